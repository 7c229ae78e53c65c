"""How much memory the keys and values of reward models get, and when a server is refused for it."""

import pytest
from tiny import tiny_llama

from hf_genarm.vllm import memory
from hf_genarm.vllm.memory import bytes_per_token, n_tokens_that_fit
from hf_genarm.vllm.paged_lm import PagedLM
from hf_genarm.vllm.server_config import ServerConfig

TOTAL, FREE = 1_000_000, 600_000


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(memory, "_memory", lambda device: (TOTAL, FREE))


def tokens(length=100, most=8, **config):
    """Each token takes 1,000 bytes: two hundred of them are a fifth of the memory."""
    return n_tokens_that_fit(ServerConfig(reward_models="a", **config), 1000, length, most, "cpu")


@pytest.mark.parametrize(
    ("config", "options", "n"),
    [
        ({}, {}, 200),  # a fifth of the memory
        ({}, {"most": None}, 200),
        ({}, {"most": 1}, 100),  # no more than can be used
        ({"reward_memory": 0.5}, {}, 500),
        ({"reward_memory": 300_500}, {}, 300),
        ({"reward_memory": 3e5}, {"most": 1}, 300),
        ({"slots": 1}, {}, 100),  # fewer than texts at once
        ({"slots": 5}, {"most": 1}, 500),
    ],
)
def test_budgets(config, options, n):
    assert tokens(**options, **config) == n


@pytest.mark.parametrize(
    ("config", "length", "message"),
    [
        (
            {"reward_memory": 99_000},
            100,
            "`reward_memory` .* is 99000, but .* one text of 100 tokens take 100,000 bytes",
        ),
        ({"reward_memory": 0.05}, 100, r"is 0\.05, 50,000 bytes, but .* with `--max-model-len 50` or less"),
        ({}, 201, "left out, so 200,000 bytes, but .* one text of 201 tokens take 201,000 bytes"),
        (
            {"slots": 7},
            100,
            "`slots` .* is 7: 700,000 bytes .* but 600,000 bytes are free. Set `reward_memory` to less",
        ),
        ({"reward_memory": 0.7}, 100, "`reward_memory` .*: 700,000 bytes .* but 600,000 bytes are free"),
    ],
)
def test_what_does_not_fit_is_refused_with_bytes_and_the_setting(config, length, message):
    with pytest.raises(ValueError, match=message):
        tokens(length, **config)


@pytest.mark.parametrize("value", [0, -1, True, "8GB", float("nan"), float("inf")])
def test_budgets_that_are_none(value):
    with pytest.raises(ValueError, match=r"`reward_memory` .* must be a number of bytes, or a share of the memory"):
        ServerConfig(reward_models="a", reward_memory=value)
    with pytest.raises(ValueError, match=r"`slots` .* must be left out where `reward_memory` is given"):
        ServerConfig(reward_models="a", reward_memory=1e9, slots=1)


@pytest.mark.parametrize("options", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}, {"head_dim": 32}])
def test_the_bytes_of_a_token_are_known_from_the_configuration(options):
    network = tiny_llama(**options)
    assert bytes_per_token([network.config], 4) == PagedLM(network, 32).bytes_per_token
    assert bytes_per_token([network.config, None], 4) is None
