"""Rewards of strings: reward models whose tokens are other ones than those of the base."""
