"""Figures and pages about finished runs."""
