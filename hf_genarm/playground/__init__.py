"""A page on which guidance is tried out: two answers that stream side by side. Needs the extra `demo`."""
