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


class Alone(LogitsProcessor):
    """
    log π_base + Σ α (log π_r - log π_ref), each model on its own prompt and the answer: without a cache, without
    padding, in float64. `prompts` has an entry for each model, `None` where it reads the base's prompt.
    """

    def __init__(self, models, alphas, inputs, prompts, reference=None, reference_prompts=None):
        self.models, self.alphas, self.inputs, self.prompts = models, alphas, inputs, prompts
        self.reference, self.reference_prompts = reference, reference_prompts

    def log_probs(self, model, prompts, row, index, n_rows):
        prompts = self.inputs if prompts is None else prompts
        request = index // (n_rows // len(prompts["input_ids"]))
        kept = prompts["attention_mask"][request].bool()
        answer = row[self.inputs["input_ids"].shape[1] :]
        return next_token_log_probs(model, torch.cat([prompts["input_ids"][request][kept], answer]))

    def rewards(self, row, index, n_rows):
        rewards = [
            self.log_probs(model, prompts, row, index, n_rows)
            for model, prompts in zip(self.models, self.prompts, strict=True)
        ]
        if self.reference is None:
            return rewards
        reference = self.log_probs(self.reference, self.reference_prompts, row, index, n_rows)
        return [reward - reference for reward in rewards]

    def __call__(self, input_ids, scores):
        rows = []
        for index, row in enumerate(input_ids):
            guided, alphas = scores[index].double().log_softmax(-1), self.alphas
            if isinstance(alphas, torch.Tensor):
                alphas = alphas[index // (len(input_ids) // len(alphas))].tolist()
            for reward, alpha in zip(self.rewards(row, index, len(input_ids)), alphas, strict=True):
                guided = guided + alpha * reward
            rows.append(guided.log_softmax(-1))
        return torch.stack(rows).to(scores.dtype)


def naive(model, pairs, scored):
    """Text by text, without padding, over whole logits."""
    rows = []
    for ids, mask, wanted in zip(pairs.input_ids, pairs.attention_mask, scored, strict=True):
        ids = ids[mask == 1][None]
        log_probs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, -ids.shape[1] : -1]
        row = torch.zeros(len(mask))
        row[1 : ids.shape[1]] = log_probs.gather(1, ids[0, 1:, None])[:, 0]
        rows.append(torch.where(wanted, row, 0.0))
    return torch.stack(rows)
