"""Workflows: graphs of tool and model calls inside a budget and a deadline."""
