"""Rollout engines hold their own copy of the weights, sample from it, and never see a loss."""
