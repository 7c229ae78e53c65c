"""Base and reward adapters in one forward pass."""
