"""Seeds, data order, learning-rate schedule and optimizer: functions of the settings alone."""

import hashlib
import math

import torch


def learning_rate_at(step: int, total: int, peak: float, warmup_ratio: float, kind: str = "linear") -> float:
    """Linear warm-up to `peak` over the first warmup_ratio of `total` updates, then to 0, linearly or as a cosine.

    `step` counts from 0.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    left = (total - step) / max(total - warmup, 1)
    return peak * (left if kind == "linear" else (1 - math.cos(math.pi * left)) / 2)


def make_optimizer(name: str, *parts, eps: float = 1e-8, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """RMSprop or AdamW with the settings given here, else torch's defaults. Run.step sets the learning rate at every step.

    parts: parameters, once for each part of the model that may have a learning rate of its own (Run.step).
    """
    groups = [{"params": [p for p in part if p.requires_grad]} for part in parts]
    how: dict = dict(lr=0.0, eps=eps, weight_decay=weight_decay)
    return torch.optim.RMSprop(groups, **how) if name == "rmsprop" else torch.optim.AdamW(groups, **how, fused=True)


def bias_correction(optimizer) -> float:
    """Factor of the next step's learning rate: RMSprop's correction for a mean of squares that starts at 0, which torch lacks.

    Without it the steps under an even gradient are 10, 7.1, 5.8, ... times the learning rate whenever the state is new.
    1 for other optimizers: AdamW corrects by itself. Kingma and Ba, arXiv:1412.6980, Sec. 3, with beta1 = 0.
    """
    alpha = optimizer.param_groups[0].get("alpha")
    if alpha is None:
        return 1.0
    first: dict = next(iter(optimizer.state.values()), {})
    done = first.get("step", 0)  # the same for all parameters (Engine.clip)
    return math.sqrt(1 - alpha ** (float(done) + 1))


def stream_seed(*key: int) -> int:
    """Seed of the random stream that a key names.

    Streams are our own, a stream for each key and each row: an answer must depend neither on its batch, nor on the number of
    processes, and a resumed run needs no position in a stream.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def data_order(n: int, *key: int) -> list[int]:
    """A permutation of range(n) that is a function of the key alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(stream_seed(*key))).tolist()
