"""A contrast compares readings of one kind, also where `generate` reads a text otherwise than training does."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_genarm import GenARMLogitsProcessor

SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROBERTA = {"is_decoder": True, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "initializer_range": 0.4}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("roberta", ROBERTA), ("xlm-roberta", ROBERTA), ("camembert", ROBERTA), ("llama", {})],
)
def test_a_model_contrasted_with_itself_changes_nothing(model_type, config):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **config)).eval()
    inputs = {"input_ids": torch.randint(5, 48, (1, 9)), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    if model_type != "llama":  # `generate` reads the text otherwise
        with torch.no_grad():
            alone = base(input_ids=inputs["input_ids"]).logits[0, -1].log_softmax(-1)
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        generated = base.generate(**inputs, **options).logits[0][0].log_softmax(-1)
        assert (alone - generated).abs().max() > 0.05
    processor = GenARMLogitsProcessor(copy.deepcopy(base), 3.0, base_model=base, reference="base")
    options = {"max_new_tokens": 6, "output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    output = base.generate(**inputs, logits_processor=[processor], **options)
    for guided, unguided in zip(output.scores, output.logits, strict=True):
        torch.testing.assert_close(guided.log_softmax(-1), unguided.log_softmax(-1), atol=1e-4, rtol=0)
