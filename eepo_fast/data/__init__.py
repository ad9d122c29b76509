"""Loads problems from files, the hub or a task of our own, makes prompts of them, and teaches the demo's base model."""
