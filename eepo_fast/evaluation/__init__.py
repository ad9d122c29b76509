"""Measures greedy accuracy and unbiased pass@k."""
