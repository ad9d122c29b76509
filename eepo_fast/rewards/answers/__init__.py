"""Compares mathematical answers, and knows nothing else."""
