"""Log-probabilities of responses, and masked reductions. The next-token shift happens here and nowhere else.

Dims: B sequences, L prompt + response tokens, T response tokens, V vocabulary, N response tokens in the batch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import Batch


def plain_logprobs(model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log pi(y_t | x, y_<t) = log_softmax(z_t / temperature)[y_t] of each response token -> (B, T) nats, with gradient.

    z_t are the logits at the token before y_t. This is the specification of `response_logprobs`, and the tests compare the two.
    Response ids outside the mask must be ids of the vocabulary. Zero outside the mask.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # (B, L, V)
    t = torch.arange(batch.response_ids.shape[1], device=logits.device)
    before = (batch.response_start[:, None] - 1 + t).clamp(max=logits.shape[1] - 1)  # (B, T) what predicts token t
    z = logits.gather(1, before[..., None].expand(-1, -1, logits.shape[-1]))  # (B, T, V)
    logp = temper(z, temperature).log_softmax(-1).gather(-1, batch.response_ids[..., None])[..., 0]  # (B, T)
    return torch.where(batch.response_mask, logp, 0.0)


class ResponseScores(NamedTuple):
    """Scores of the response tokens of a batch, from one forward pass. All are zero outside the response mask."""

    logprobs: Tensor  # (B, T) log pi(y_t | x, y_<t), nats, carries gradient
    entropy: Tensor  # (B, T) of the next-token distribution, nats, no gradient
    correct: Tensor  # (B, T) 1.0 where y_t was the most likely token, no gradient


def response_logprobs(model, batch: Batch, temperature: float = 1.0) -> ResponseScores:
    """`plain_logprobs`, entropy and accuracy of each response token, without the logits of all positions.

    Gradient flows through `logprobs`. UserError on a model without a language-model head.
    """
    # The plain version holds B x L x V logits, which can take more memory than the rest of the step. This one makes only the
    # logits that predict response tokens, in chunks. Its values and gradients equal the plain version's (tests/test_logprobs.py).
    from extras.fused_head import score_positions
    from extras.packing import model_inputs

    mask = batch.response_mask
    inputs, before, _ = model_inputs(language_model(model), batch)
    scores = score_positions(model, inputs, before[mask], batch.response_ids[mask], temperature)  # (3, N)

    def scatter(values: Tensor) -> Tensor:  # (N,) -> (B, T)
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    return ResponseScores(scatter(scores[0]), *map(scatter, scores[1:].detach()))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) over True positions of mask (B, T) -> (B,). Values at the other positions, even NaN, have no effect."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over all True positions of mask, both (B, T) -> (). NaN if there is none."""
    return masked_sum(x, mask).sum() / mask.sum()


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by the sampling temperature, in float32 or float64. The sampler and the scorer both call this."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def score_tokens(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob, entropy and correctness of each token -> (3, N). Only the first row carries gradient.

    logits: (N, V), the i-th predicts targets[i]. targets: (N,).
    """
    logp = temper(logits, temperature).log_softmax(-1)
    chosen = -F.nll_loss(logp, targets, reduction="none")
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
        correct = logits.argmax(-1) == targets
    return torch.stack([chosen, entropy, correct.to(logp.dtype)])


def language_model(model) -> torch.nn.Module:
    """The transformers model inside the wrappers of accelerate, its engines, and peft."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
