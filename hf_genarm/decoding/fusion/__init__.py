"""The joint pass: base and reward adapters in one forward pass."""
