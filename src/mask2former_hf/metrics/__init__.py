"""Metrics with small state that merges across processes."""
