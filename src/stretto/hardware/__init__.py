"""Machines: devices, links and clusters, the catalog, the probe, and the cost of work on them."""
