"""What every family of causal LMs can be, as the page says: a sample by default, all of them in the slow suite."""

import pytest
from families import AS_DECODER, FAMILIES, PAGE, outcomes, read
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# One of each kind of network that has been wrong, or was said to be fused and was not.
SAMPLE = ["bert", "bert with `is_decoder=True`", "gpt_neox", "hrm_text", "llama", "llama4_text", "mamba", "opt"]
SAMPLE += ["qwen2_moe", "xlm", "xlnet"]

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


def test_the_page_has_every_family():
    """And families that older versions of transformers don't have yet."""
    assert read().keys() >= {*FAMILIES}
    assert len(FAMILIES) > 150
    not_built = PAGE.read_text(encoding="utf-8").split("Not built tiny:")[1].split("\n\n")[0]
    scanned = {family.removesuffix(AS_DECODER) for family in FAMILIES}
    assert {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f"`{name}`" in not_built} | scanned == {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    }


@pytest.mark.parametrize(
    "family", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_as_the_page_says(family):
    assert outcomes(family) == read()[family]
