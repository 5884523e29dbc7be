"""Whole episodes of any policy in many copies of any environment."""
