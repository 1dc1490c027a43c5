"""Measurements beside named peers and the machine's limits, all in one run. Nothing here is a test."""
