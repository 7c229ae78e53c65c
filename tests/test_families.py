"""What every family of causal LMs can be, as the page says: a sample by default, all of them in the slow suite."""

import pytest
from families import FAMILIES, outcomes, read

# One of each kind of network that has been wrong, or was said to be fused and was not.
SAMPLE = ["bert", "bert with `is_decoder=True`", "gpt_neox", "hrm_text", "llama", "llama4_text", "mamba", "opt"]
SAMPLE += ["phi4_multimodal", "qwen2_moe", "xlm", "xlnet"]

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


def test_the_page_has_every_family():
    assert sorted(read()) == FAMILIES


@pytest.mark.parametrize(
    "family", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_as_the_page_says(family):
    assert outcomes(family) == read()[family]
