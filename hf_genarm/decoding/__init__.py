"""Guided decoding: what runs in step with `generate`."""
