"""LoRA and 4-bit base models."""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import re
from typing import Any

import torch

from common import UserError
from common.models import load_model
from extras.loading import other_modalities


def fingerprint(p: torch.Tensor) -> int:
    """Return the sum of a tensor's bits as integers. It is the same on any device, and changes with any training."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    return int(p.detach().contiguous().view(integer).sum(dtype=torch.int64).item())


def leave_out_loaded(models: list, weights: list[dict], folder: str) -> None:
    """Drop frozen weights that have not changed since add_lora from a checkpoint. This is a hook of accelerate's save_state."""
    for model, state in zip(models, weights, strict=False):  # engines save in their own way and give no weights here
        for name, p in model.named_parameters(remove_duplicate=False):
            if not p.requires_grad and getattr(p, "loaded", None) == fingerprint(p):
                state.pop(name, None)


def four_bits() -> dict:
    """Return the options of from_pretrained for --load-in-4bit. UserError on a machine where it cannot run."""
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if not (installed and torch.cuda.is_available()):
        found = "no CUDA GPU" if installed else "no bitsandbytes"
        raise UserError(f"--load-in-4bit: found {found}, expected bitsandbytes on a machine with a CUDA GPU")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


# ---- LoRA and the reference policy ----
def add_lora(model, args, task_type: str = "CAUSAL_LM"):
    """Add LoRA without dropout to all linear layers except those of not_adapted. A scalar head (SEQ_CLS) is trained in full.

    The reference policy is then the model with its adapter switched off. Checkpoints leave out frozen weights that have not
    changed since.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type=task_type,
        exclude_modules=not_adapted(model),
    )  # fmt: skip
    model = get_peft_model(model, config)
    for p in model.parameters():
        if not p.requires_grad and not p.is_meta:
            p.loaded = fingerprint(p)
    return model


def not_adapted(model) -> list[str]:
    """Return the names of linear layers that get no adapter.

    The model uses these in another way than by calling a linear map, so that the adapted and the merged model would differ, or
    fail. They are layers with a forward of their own (a router that returns its choice of experts), layers whose weight is read
    directly (in state-space mixers and some routers), and layers that text never passes through.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        kind: Any = type(module)
        own = isinstance(module, torch.nn.Linear) and kind.forward is not torch.nn.Linear.forward
        if own and model_code(kind) and not is_linear_map(module):
            found.append(name)
        found += [f"{name}.{part}".lstrip(".") for part in read_directly(kind) if hasattr(module, part)]
    for outer, module in other_modalities(model).items():
        found += [f"{outer}.{name}" if name else outer for name, _ in module.named_modules()]
    return found


def model_code(kind: type) -> bool:
    """Return True if a class belongs to one architecture, in transformers or in a hub repository."""
    return kind.__module__.startswith(("transformers.models.", "transformers_modules."))


@functools.cache
def read_directly(kind: type) -> list[str]:
    """Return the attributes whose `.weight` the code of a module reads, for more than its type or device."""
    source = ""
    for base in kind.__mro__:
        with contextlib.suppress(OSError, TypeError):  # the source is not available
            source += inspect.getsource(base) if model_code(base) else ""
    return sorted(set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device))", source)))


@torch.no_grad()
def is_linear_map(module: torch.nn.Linear) -> bool:
    """Return True if a layer with a forward of its own still computes a linear map, and returns nothing else."""
    x = module.weight.new_ones(1, 1, module.in_features)
    try:
        y = module(x)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    expected = torch.nn.functional.linear(x, module.weight, module.bias)
    if not isinstance(y, torch.Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or torch.allclose(y, expected, rtol=1e-2, atol=1e-4)


def merged(args, model):
    """Return a copy of a model in main memory with its LoRA adapters merged into the base.

    A 4-bit base is loaded again in --dtype, because the sum would lose most of the adapter when rounded to 4 bits.
    """
    if not args.load_in_4bit:
        held = {id(p): torch.nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, held).to("cpu").merge_and_unload()
    whole = add_lora(load_model(dataclasses.replace(args, load_in_4bit=False)), args)
    adapters = {name: p for name, p in model.state_dict().items() if "lora_" in name}
    whole.load_state_dict(adapters, strict=False)
    return whole.merge_and_unload()
