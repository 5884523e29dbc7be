"""Rollouts: running whole episodes of a policy in many copies of an environment."""
