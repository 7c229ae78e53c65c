"""What guided decoding should return, recomputed from scratch: no cache, one row at a time, no padding, float64."""

import torch
from transformers import LogitsProcessor


def next_token_log_probs(model, row: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the token after one unpadded row, `(vocab_size,)`."""
    with torch.no_grad():
        logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, -1]
    return logits.cpu().double().log_softmax(dim=-1)


def guided(base_log_probs: torch.Tensor, rewards: list[torch.Tensor], alphas: list[float]) -> torch.Tensor:
    """Eq. 7, written out: the product of the distributions, divided by its sum."""
    product = base_log_probs.double().exp()
    for reward, alpha in zip(rewards, alphas, strict=True):
        product = product * reward.exp() ** alpha
    return (product / product.sum(dim=-1, keepdim=True)).log()


class Recompute(LogitsProcessor):
    """
    The processor that ours must equal: every reward from scratch, on the unpadded tokens of each row. `alphas` has a
    value for each model; as a tensor, it has a row of them for each request. Rows whose strengths are 0 are left alone.
    """

    def __init__(self, models: list, alphas: list[float] | torch.Tensor, prompt_mask: torch.Tensor | None = None):
        self.models, self.alphas, self.prompt_mask = models, alphas, prompt_mask

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = []
        for index, row in enumerate(input_ids):
            if self.prompt_mask is not None:
                mask = self.prompt_mask[index // (len(input_ids) // len(self.prompt_mask))].bool()
                row = torch.cat([row[: len(mask)][mask], row[len(mask) :]])
            rewards = [next_token_log_probs(model, row) for model in self.models]
            alphas = self.alphas
            if isinstance(alphas, torch.Tensor):
                alphas = alphas[index // (len(input_ids) // len(alphas))].tolist()
            base = scores[index].double()
            rows.append(guided(base.log_softmax(dim=-1), rewards, alphas) if any(alphas) else base)
        return torch.stack(rows).to(scores.dtype)
