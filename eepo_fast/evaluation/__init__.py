"""Evaluation: greedy accuracy and unbiased pass@k."""
