"""Examples and benchmarks, which are run from the root of a clone: `python -m examples.quickstart`."""
