"""common/logprobs.py::score_tokens on a CPU, a few rows of logits at a time, so that they stay in its cache.

Torch's own operations each pass over all N x V logits in main memory, and its argmax over bf16 is slow. Here every pass but the
first and the last is over a block in the cache, and the backward pass makes the probabilities again instead of keeping them.

Dims: N response tokens, V vocabulary.
"""

import torch
from torch import Tensor

from common.logprobs import score_tokens, temper

BLOCK = 2**18  # logits at a time: 1 MiB in float32


def score(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return score_tokens of the same arguments -> (3, N), equal to rounding.

    It is score_tokens itself on other devices, and where all logits are one block.
    """
    if logits.device.type != "cpu" or logits.numel() <= BLOCK:
        return score_tokens(logits, targets, temperature)
    return Blocks.apply(logits, targets, temperature)


class Blocks(torch.autograd.Function):
    """logits (N, V) -> log-prob, entropy and correctness (3, N), of which the first carries gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        found = logits.new_empty(3, len(logits), dtype=wide)
        normalisers = logits.new_empty(len(logits), 1, dtype=wide)  # log of the sum of exp
        for rows in blocks(logits):
            ids, z = targets[rows, None], temper(logits[rows], temperature)
            best = z.argmax(-1, keepdim=True)
            top = z.gather(-1, best)
            chosen, z = z.gather(-1, ids) - top, z - top
            p = z.exp()
            total = p.sum(-1, keepdim=True)
            log = total.log()
            normalisers[rows] = top + log
            found[0, rows] = (chosen - log)[:, 0]
            found[1, rows] = log[:, 0] - p.mul_(z).sum(-1) / total[:, 0]
            found[2, rows] = (best == ids)[:, 0].to(wide)
        ctx.save_for_backward(logits, targets, normalisers)
        ctx.temperature = temperature
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        logits, targets, normalisers = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in blocks(logits):
            p = temper(logits[rows], ctx.temperature).sub(normalisers[rows]).exp_()
            scale = gradient[0, rows, None] / ctx.temperature
            found[rows] = p.mul_(-scale).scatter_add_(-1, targets[rows, None], scale)
        return found, None, None


def blocks(logits: Tensor) -> list[slice]:
    """Slices of the rows of logits (N, V), BLOCK logits each, or a row where it is longer."""
    size = max(1, BLOCK // logits.shape[1])
    return [slice(i, i + size) for i in range(0, len(logits), size)]
