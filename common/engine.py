"""Train a model in one process, or a copy of it in each process (DDP). extras/sharding.py has the engines that cut weights up.

Training goes through the module that `prepare` returns. Generation, scoring and saving go through its view: the module
itself where every process has all weights, else a copy that has weights only inside `whole`.
"""

import contextlib
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def open_engine(**settings) -> "Engine":
    """The engine that the launch asks for, around an Accelerator with these settings; on gloo where there is no GPU."""
    if "true" in (os.environ.get("ACCELERATE_USE_DEEPSPEED"), os.environ.get("ACCELERATE_USE_FSDP")):
        from extras.sharding import open_sharded

        return open_sharded(**settings)
    from accelerate import Accelerator

    return Engine(Accelerator(cpu=not torch.accelerator.is_available(), **settings))


class Engine:
    """One process or DDP. An engine in extras/sharding.py overrides what it does otherwise.

    We keep backward and clip of our own because accelerate hides where an update of DeepSpeed ends, and does not return
    the norm of the gradients in the same way for all engines.
    """

    name = "plain"

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def prepare(self, args, *objects) -> tuple[list, dict[nn.Module, nn.Module]]:
        """model, optimizer, model, optimizer, ... as accelerate prepares them, and {prepared model: its view}."""
        prepared = self.accelerator.prepare(*objects)
        return prepared, {m: self.accelerator.unwrap_model(m) for m in prepared if isinstance(m, nn.Module)}

    def part(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Context of a micro-batch: processes exchange gradients in the `last` one of an update alone."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """Add a micro-batch to the gradients; `last` of an update."""
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, max_norm: float) -> Tensor | float:
        """Clip the gradients at max_norm. Returns their norm over all processes, before that."""
        for p in model.parameters():  # the loss may leave a part out: checkpoints hold the state of all
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def probe(self, model: nn.Module, loss_fn: Callable, rows: list) -> float:
        """Mean of loss_fn's losses of the rows under a prepared model, without gradient. All processes call it together."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            losses, _ = loss_fn(rows)
        model.train(was_training)
        return losses.double().mean().item()

    def load_weights(self, model: nn.Module, state: dict[str, Tensor], part: str = "") -> None:
        """Copy a whole state dict into a prepared model, or into the part of it at that attribute path."""
        view = self.accelerator.unwrap_model(model)
        (view.get_submodule(part) if part else view).load_state_dict(state)

    def save_state(self, folder: str) -> list[int]:
        """Write models, optimizers and random states. Returns the optimizers to be left without state at a resume."""
        self.accelerator.save_state(folder, safe_serialization=True)
        return []

    def load_state(self, folder: str, fresh: list[int], **options) -> None:
        """Read what save_state wrote. fresh: what it returned. options: of accelerate's load_state."""
        self.accelerator.load_state(folder, **options)


# ---- mixed precision ----
def native_bf16() -> bool:
    """True where bf16 products are faster than float32 ones: CUDA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def mixes_bf16(args) -> bool:
    """True if --mixed-precision means bf16 here."""
    return args.mixed_precision == "bf16" or (args.mixed_precision == "auto" and native_bf16())


# ---- models under any engine ----
def all_weights(module: nn.Module, cast: bool = True) -> AbstractContextManager[nn.Module]:
    """Context of a view with all its weights, which are gathered on all processes where an engine has cut them up.

    All processes enter it together. cast: in the type that training computes in, else as stored.
    """
    if "shards" not in module.__dict__:
        return contextlib.nullcontext(module)
    from extras.sharding import gathered_copy

    return gathered_copy(module, cast)


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Context in evaluation mode, with all weights; then back to the mode before. All processes enter it together."""
    was_training = model.training
    model.eval()
    try:
        with all_weights(model):
            yield
    finally:
        model.train(was_training)


def zero_of(module: nn.Module) -> Tensor | float:
    """A 0 that depends on all weights: DDP wants every weight in the loss. Weights that an engine cuts up need none."""
    return sum(
        0.0 * p.sum()
        for p in module.parameters()
        if p.requires_grad and not (hasattr(p, "ds_id") or hasattr(p, "to_local"))
    )


@torch.no_grad()
def not_finite(model: nn.Module) -> str:
    """Name of a parameter that is not finite in this process's part of it; empty if there is none."""
    found = {}
    for name, p in model.named_parameters():
        part = p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() if hasattr(p, "to_local") else p
        if part.is_floating_point() and part.numel() and not part.is_meta:
            found[name] = torch.linalg.vector_norm(part, torch.inf).float()  # no copy of the weights, unlike isfinite
    sizes = torch.stack(list(found.values())).tolist() if found else []
    return next((name for name, size in zip(found, sizes, strict=True) if not math.isfinite(size)), "")
