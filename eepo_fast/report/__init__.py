"""Draws figures and pages about finished runs."""
