"""What guided decoding should return, recomputed from scratch: no cache, no padding, float64."""

import torch
from transformers import LogitsProcessor


def next_token_log_probs(model, row: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the token after one unpadded row, `(vocab_size,)`."""
    return log_probs_after(model, [row])[0]


def log_probs_after(model, rows: list[torch.Tensor]) -> torch.Tensor:
    """The same after several rows, `(n_rows, vocab_size)`; those of one length, such as beams, are read at once."""
    result: dict[int, torch.Tensor] = {}
    for length in {len(row) for row in rows}:
        indices = [index for index, row in enumerate(rows) if len(row) == length]
        input_ids = torch.stack([rows[index] for index in indices]).to(model.device)
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits[:, -1]
        result |= zip(indices, logits.cpu().double().log_softmax(dim=-1), strict=True)
    return torch.stack([result[index] for index in range(len(rows))])


def unpadded(input_ids: torch.Tensor, prompt_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows of a batch without the padding of their prompts; rows of one prompt follow each other."""
    if prompt_mask is None:
        return list(input_ids)
    masks = prompt_mask.bool().repeat_interleave(len(input_ids) // len(prompt_mask), dim=0)
    length = masks.shape[1]
    return [torch.cat([row[:length][mask], row[length:]]) for row, mask in zip(input_ids, masks, strict=True)]


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
        texts, rows = unpadded(input_ids, self.prompt_mask), []
        of_models = [log_probs_after(model, texts) for model in self.models]
        for index in range(len(texts)):
            rewards = [of_model[index] for of_model in of_models]
            alphas = self.alphas
            if isinstance(alphas, torch.Tensor):
                alphas = alphas[index // (len(input_ids) // len(alphas))].tolist()
            base = scores[index].double()
            rows.append(guided(base.log_softmax(dim=-1), rewards, alphas) if any(alphas) else base)
        return torch.stack(rows).to(scores.dtype)
