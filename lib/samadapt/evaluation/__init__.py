"""Measuring: metrics, simulated annotators, comparisons."""
