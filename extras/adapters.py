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
    """Sum of a tensor's bits as integers: the same on any device, another one after any training."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    return int(p.detach().contiguous().view(integer).sum(dtype=torch.int64).item())


def leave_out_loaded(models: list, weights: list[dict], folder: str) -> None:
    """Hook of accelerate's save_state: drop frozen weights that still are as add_lora found them, loaded from a model."""
    for model, state in zip(models, weights, strict=False):  # engines save by themselves and give no weights here
        for name, p in model.named_parameters(remove_duplicate=False):
            if not p.requires_grad and getattr(p, "loaded", None) == fingerprint(p):
                state.pop(name, None)


def four_bits(args) -> dict:
    """What from_pretrained needs for --load-in-4bit; nothing without it. UserError where it cannot run."""
    if not args.load_in_4bit:
        return {}
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
    """LoRA on all linear layers but those of not_adapted, dropout 0. A scalar head (task_type SEQ_CLS) is trained whole.

    The reference policy is then the model with its adapter switched off. A checkpoint leaves out frozen weights that still
    are as they are now.
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
    """Names of linear layers that an adapter cannot stand in for: the rest of the model uses them in another way than calling
    a linear map, so that its output would differ from that of the merged model, or fail.

    Those with a forward of their own (a router that returns its choice of experts), those whose weight is read directly (in
    state-space mixers and some routers), and those that text never passes through.
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
    """True if a class belongs to one architecture, in transformers or in a hub repository."""
    return kind.__module__.startswith(("transformers.models.", "transformers_modules."))


@functools.cache
def read_directly(kind: type) -> list[str]:
    """Attributes whose `.weight` the code of a module reads, for more than its type or device."""
    source = ""
    for base in kind.__mro__:
        with contextlib.suppress(OSError, TypeError):  # no source at hand
            source += inspect.getsource(base) if model_code(base) else ""
    return sorted(set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device))", source)))


@torch.no_grad()
def is_linear_map(module: torch.nn.Linear) -> bool:
    """True if a linear layer with a forward of its own still is one: it takes a vector and returns the product alone."""
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
    """A copy of a model, in main memory, with its LoRA adapters merged into the base.

    A 4-bit base is loaded again in --dtype: rounded to 4 bits, the sum would lose most of the adapter.
    """
    if not args.load_in_4bit:
        held = {id(p): torch.nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, held).to("cpu").merge_and_unload()
    whole = add_lora(load_model(dataclasses.replace(args, load_in_4bit=False)), args)
    adapters = {name: p for name, p in model.state_dict().items() if "lora_" in name}
    whole.load_state_dict(adapters, strict=False)
    return whole.merge_and_unload()
