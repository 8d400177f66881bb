"""Operators of a model that several ranks compute together, each equal to one that a single rank computes alone."""
