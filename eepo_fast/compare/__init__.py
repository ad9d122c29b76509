"""Compares methods over seeds: one plan, paired differences, margins that were declared before the runs."""
