"""
The mathematics on a language small enough to be written out: every text of 3 tokens over 4, as one table.

The base and the reward models are tables of next-token logits, one for each prefix.
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.functional import preference_loss

N_TOKENS, LENGTH = 4, 3
PROMPT = [0]
TEXTS = list(product(range(N_TOKENS), repeat=LENGTH))


class TableLM(PreTrainedModel):
    """A causal LM without a network: the logits after each prefix are looked up."""

    _is_stateful = True  # there is no cache

    def __init__(self, tables):
        super().__init__(PreTrainedConfig(name_or_path="table", vocab_size=N_TOKENS))
        self.tables = torch.nn.ParameterList(tables)  # by length of the prefix: (N_TOKENS ** length, N_TOKENS)
        self.generation_config = GenerationConfig(pad_token_id=None, eos_token_id=None, bos_token_id=None)

    @classmethod
    def random(cls, seed, scale=1.5):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(N_TOKENS**length, N_TOKENS) for length in range(LENGTH)]
        return cls([scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]).eval()

    def can_generate(self):
        return True

    def next_logits(self, text):
        index = 0
        for token in text:
            index = index * N_TOKENS + token
        table = self.tables[min(len(text), LENGTH - 1)]  # longer texts are read too, whatever follows them
        return table[index % len(table)]

    def forward(self, input_ids, use_cache=False):
        prefixes = [[row[1:at] for at in range(1, len(row) + 1)] for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack([torch.stack([*map(self.next_logits, x)]) for x in prefixes]).float())

    def log_probs(self):
        """Of all texts, (len(TEXTS),)."""
        total = []
        for text in TEXTS:
            parts = [self.next_logits(text[:at]).log_softmax(-1)[text[at]] for at in range(LENGTH)]
            total.append(torch.stack(parts).sum())
        return torch.stack(total)


def guided_log_probs_of_texts(base, processor):
    """The distribution of texts that are sampled token by token through the processor."""
    total = []
    for text in TEXTS:
        log_prob = 0.0
        for at in range(LENGTH):
            ids = torch.tensor([[*PROMPT, *text[:at]]])
            scores = base.next_logits(text[:at])[None].float()
            log_prob = log_prob + processor(ids, scores).log_softmax(-1)[0, text[at]].double()
        total.append(log_prob)
    return torch.stack(total).detach()


@pytest.mark.parametrize("alpha", [0.5, 1.0, -0.7])
def test_the_distribution_of_texts_is_the_product_over_tokens(alpha):
    """Eq. 7 over whole texts: π(y) = π_base(y) π_r(y)^α / Π Z_t."""
    base, arm = TableLM.random(0), TableLM.random(1)
    processor = GenARMLogitsProcessor(arm, alpha, pad_token_id=99)
    law = guided_log_probs_of_texts(base, processor)
    assert law.exp().sum().item() == pytest.approx(1.0, abs=1e-5)

    log_z = []
    for text in TEXTS:
        parts = []
        for at in range(LENGTH):
            product_of_both = base.next_logits(text[:at]).log_softmax(-1)
            parts.append((product_of_both + alpha * arm.next_logits(text[:at]).log_softmax(-1)).logsumexp(-1))
        log_z.append(torch.stack(parts).sum())
    optimum = base.log_probs() + alpha * arm.log_probs()
    expected = (optimum - torch.stack(log_z)).detach()
    torch.testing.assert_close(law, expected, atol=1e-5, rtol=0)
    # It is not the sequence-level optimum: the weight between the two differs from text to text.
    assert (law - optimum.log_softmax(0).detach()).abs().max() > 0.05


def test_weighting_texts_by_their_normalisers_gives_the_sequence_level_optimum():
    """Π Z_t is what importance sampling from the token-level distribution needs."""
    base, arm = TableLM.random(0), TableLM.random(1)
    processor = GenARMLogitsProcessor(arm, 1.0, pad_token_id=99)
    processor.keeps_statistics = True
    law = guided_log_probs_of_texts(base, processor)
    columns = processor.statistics(torch.tensor([[*PROMPT, *text] for text in TEXTS]))
    log_z = torch.zeros(len(TEXTS), dtype=torch.float64)
    for text, value in zip(columns["sequence"], columns["log_z"], strict=True):
        log_z[text] += value
    optimum = (base.log_probs() + arm.log_probs()).log_softmax(0).detach()
    torch.testing.assert_close((law + log_z).log_softmax(0), optimum, atol=1e-5, rtol=0)


def test_population_preferences_are_recovered_up_to_a_constant():
    """
    The paper's theorem: an autoregressive reward model that minimises Eq. 5 over all pairs, labelled by a Bradley-Terry
    model of any reward r*, has β_r log π_r(y|x) = r*(x, y) - c(x), although its tokens are normalised.
    """
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(len(TEXTS), generator=generator, dtype=torch.float64)
    prefers = torch.sigmoid(reward[:, None] - reward[None])
    arm, beta = TableLM.random(2, scale=0.1), 0.5
    optimiser = torch.optim.LBFGS(arm.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        margin = beta * (arm.log_probs()[:, None] - arm.log_probs()[None])
        loss = (prefers * preference_loss(margin)).mean()
        loss.backward()
        return loss

    before = (beta * arm.log_probs() - reward).detach().std()
    for _ in range(5):
        optimiser.step(closure)
    difference = (beta * arm.log_probs() - reward).detach()
    assert before > 0.5
    assert difference.std() < 1e-3
    # The constant is the one that makes it a distribution over texts.
    assert difference.mean().item() == pytest.approx(-beta * (reward / beta).logsumexp(0).item(), abs=1e-3)


def test_the_recovered_reward_decodes_to_the_regularised_optimum():
    """With log π_r = (r - c)/β_r, α = β_r/β is the optimum of E[r] - β KL(π‖π_base), up to the weight Π Z_t."""
    base, arm = TableLM.random(0), TableLM.random(1)
    beta_r, beta = 0.5, 0.8
    reward = beta_r * arm.log_probs().detach()
    optimum = (base.log_probs().detach() + reward / beta).log_softmax(0)

    def objective(log_probs):
        probabilities = log_probs.exp()
        return (probabilities * reward).sum() - beta * (probabilities * (log_probs - base.log_probs().detach())).sum()

    law = guided_log_probs_of_texts(base, GenARMLogitsProcessor(arm, beta_r / beta, pad_token_id=99))
    others = [guided_log_probs_of_texts(base, GenARMLogitsProcessor(arm, x, pad_token_id=99)) for x in (0.0, 3.0)]
    assert objective(optimum) > objective(law) > max(objective(x) for x in others)
