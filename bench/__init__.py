"""Measurements: baselines and what runs on a lent GPU."""
