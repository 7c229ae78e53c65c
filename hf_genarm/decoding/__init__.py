"""Steering: what runs in lockstep with `generate`."""
