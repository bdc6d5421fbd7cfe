"""Log-probabilities of responses, and masked reductions. The next-token shift happens here and nowhere else.

Dims: B sequences, L prompt + response tokens, T response tokens, V vocabulary, N response tokens in the batch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import Batch


class ResponseScores(NamedTuple):
    """What one forward pass says about the responses. Zero outside the response mask."""

    logprobs: Tensor  # (B, T) log pi(y_t | x, y_<t), nats, carries gradient
    entropy: Tensor  # (B, T) of the next-token distribution, nats, no gradient
    correct: Tensor  # (B, T) 1.0 where y_t was the most likely token, no gradient


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) over True positions of mask (B, T) -> (B,). Whatever stands elsewhere, NaN too, has no effect."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over all True positions of mask, both (B, T) -> (). NaN if there is none."""
    return masked_sum(x, mask).sum() / mask.sum()


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32 (float64 stays) divided by the sampling temperature: what sampling and scoring share."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def score_tokens(logits: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float = 1.0):
    """Log-prob, entropy and correctness of each response token -> ResponseScores.

    logits:        (B, T, V), `logits[:, t]` predicts `response_ids[:, t]`; only masked-in positions are read.
    response_ids:  (B, T).
    response_mask: (B, T) bool.
    """
    kept = temper(logits[response_mask], temperature)  # (N, V)
    targets = response_ids[response_mask]  # (N,)
    chosen = -F.cross_entropy(kept, targets, reduction="none")  # (N,)
    with torch.no_grad():
        log_z = kept.logsumexp(-1, keepdim=True)
        entropy = -(torch.exp(kept - log_z) * (kept - log_z)).sum(-1)  # (N,)
        correct = (kept.argmax(-1) == targets).to(kept.dtype)

    def scatter(values: Tensor) -> Tensor:  # (N,) -> (B, T)
        return torch.zeros(response_mask.shape, dtype=kept.dtype, device=kept.device).masked_scatter(
            response_mask, values
        )

    return ResponseScores(scatter(chosen), scatter(entropy), scatter(correct))


def response_logprobs(model, batch: Batch, temperature: float = 1.0) -> ResponseScores:
    """Score the responses of a batch under a causal language model. Gradient flows through `logprobs`.

    The language-model head runs only on the columns that predict a response token of some row.
    """
    width = batch.response_mask.shape[1]
    first = int(batch.response_start.min()) - 1  # the column that predicts the earliest response token
    columns = torch.arange(first, batch.input_ids.shape[1] - 1, device=batch.input_ids.device)
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=columns
    ).logits  # (B, L - 1 - first, V)
    offsets = torch.arange(width, device=batch.input_ids.device)
    index = (batch.response_start[:, None] - 1 - first + offsets).clamp(max=logits.shape[1] - 1)  # (B, T)
    rows = torch.arange(len(index), device=index.device)[:, None]
    return score_tokens(logits[rows, index], batch.response_ids, batch.response_mask, temperature)
