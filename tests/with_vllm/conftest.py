"""These tests run where vLLM is installed (`bash .ci/vllm`)."""

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_collection_modifyitems(items):
    if find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM is not installed; `bash .ci/vllm` runs this in an environment that has it")
        for item in items:
            if "with_vllm" in item.path.parts:
                item.add_marker(skip)
