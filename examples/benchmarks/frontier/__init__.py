"""Reward against divergence from the base, for GenARM and other methods; README.md describes the files."""
