"""What a model trains under: one process or DDP ("plain"), DeepSpeed ZeRO-2 and ZeRO-3, FSDP2; what differs is here.

Training goes through the module that `prepare` returns. Everything without a gradient (generation, scoring, saving) goes
through its view: the module itself where each process has all weights; else (ZeRO-3, FSDP2) a twin without hooks whose
weights exist inside `whole` alone, gathered once, so that processes may then do unequal numbers of forward passes.
"""

import contextlib
import copy
import logging
import math
import os
import shutil
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from common import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SHARDED = ("zero3", "fsdp2")  # engines of which a process holds a part of the weights


def open_accelerator(**settings):
    """accelerate's Accelerator for this launch, on gloo where there is no accelerator device."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
    from transformers.integrations import unset_hf_deepspeed_config

    cpu = not torch.accelerator.is_available()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if cpu and not shutil.which("ninja"):
            raise UserError(
                "DeepSpeed on CPU: found no ninja on PATH, expected it: pip install ninja, activate the venv"
            )
        # accelerate must not be told of the CPU: it would leave DeepSpeed out
        gloo = [InitProcessGroupKwargs(backend="gloo")] if cpu else []
        accelerator = Accelerator(kwargs_handlers=gloo, **settings)
        unset_hf_deepspeed_config()  # from_pretrained would cut up references as well, which no engine puts together
        return accelerator
    accelerator = Accelerator(cpu=cpu, **settings)
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate turns FSDP on for GPUs only; torch's runs on gloo as well, and so can be tested anywhere
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator


def engine_name(accelerator) -> str:
    """plain, zero2, zero3 or fsdp2. UserError for what is none of them."""
    if accelerator.deepspeed_plugin is not None:
        stage = accelerator.deepspeed_plugin.zero_stage
        if stage not in (2, 3):
            raise UserError(f"zero_stage: found {stage} in the accelerate config, expected 2 or 3 (configs/zero*.yaml)")
        return f"zero{stage}"
    if str(accelerator.distributed_type).endswith("FSDP"):
        if not accelerator.is_fsdp2:
            raise UserError("fsdp_version: found 1 in the accelerate config, expected 2 (configs/fsdp2.yaml)")
        return "fsdp2"
    return "plain"


# ---- preparing ----
def prepare(accelerator, args, *objects) -> tuple[list, dict[nn.Module, nn.Module]]:
    """model, optimizer, model, optimizer, ... as accelerate prepares them, and {prepared model: its view}."""
    name = engine_name(accelerator)
    if name == "plain":
        prepared = accelerator.prepare(*objects)
        return prepared, {m: accelerator.unwrap_model(m) for m in prepared if isinstance(m, nn.Module)}
    prepared, views = [], {}
    for model, optimizer in zip(objects[::2], objects[1::2], strict=True):
        twin = weightless_twin(model) if name in SHARDED else None
        if name == "fsdp2":
            accelerator.state.fsdp_plugin = fsdp2_plugin(accelerator, model)
        else:
            accelerator.deepspeed_plugin.deepspeed_config |= {
                "gradient_clipping": args.max_grad_norm,
                "gradient_accumulation_steps": 1,  # Run.step says where an update ends
                "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
            }
        model, optimizer = accelerator.prepare(model, optimizer)
        prepared += [model, optimizer]
        views[model] = bare = accelerator.unwrap_model(model)
        if twin is not None:
            cast = torch.bfloat16 if name == "fsdp2" and accelerator.mixed_precision == "bf16" else None
            for path, module in twin.named_modules():
                # weak: a copy of the twin must not copy what it is filled from
                module.__dict__["shards"] = weakref.ref(bare.get_submodule(path)), cast
                module._buffers.update(bare.get_submodule(path)._buffers)  # on the device by now
            views[model] = twin
    return prepared, views


def fsdp2_plugin(accelerator, model: nn.Module):
    """Settings of the launch for this model: its own layers are the units; gradients are summed in float32."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    layers = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    present = {type(m).__name__ for m in model.modules()}
    bf16 = accelerator.mixed_precision == "bf16"
    return FullyShardedDataParallelPlugin(
        transformer_cls_names_to_wrap=sorted(layers & present),
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None,
    )


def weightless_twin(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights are on the meta device; buffers are shared, and no forward is wrapped."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, memo | {id(b): b for b in model.buffers()})
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # of models.autocast_forward, bound to the model itself
    return twin


# ---- whole weights ----
@contextlib.contextmanager
def whole(module: nn.Module, cast: bool = True) -> Iterator[nn.Module]:
    """The view with all its weights, for as long as the context lasts: of a twin they are gathered now, on all processes.

    All processes enter it together. cast: in the type that training computes in, else as stored.
    """
    if "shards" not in module.__dict__ or not any(p.is_meta for p in module.parameters()):
        yield module
        return
    empty, made = [], {}
    for part in module.modules():
        source, dtype = part.__dict__["shards"]
        shards = source()
        part._buffers.update(shards._buffers)
        for name, meta in part._parameters.items():
            if meta is not None and meta.is_meta:
                shard = shards._parameters[name]
                if shard not in made:  # tied weights once
                    value = gather(shard)
                    value = value.to(dtype) if cast and dtype and value.is_floating_point() else value
                    made[shard] = nn.Parameter(value, requires_grad=False)
                part._parameters[name] = made[shard]
                empty.append((part, name, meta))
    try:
        yield module
    finally:
        for part, name, meta in empty:
            part._parameters[name] = meta


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with all weights, and back to what it was. All processes enter it together."""
    was_training = model.training
    model.eval()
    try:
        with whole(model):
            yield
    finally:
        model.train(was_training)


def trained(view: nn.Module) -> nn.Module:
    """The module that trains, of which a twin is the view, with each process's part of the weights; any other module itself."""
    return view.__dict__["shards"][0]() if "shards" in view.__dict__ else view


def gather(parameter: Tensor) -> Tensor:
    """All of a parameter of which each process has a part, on all of them."""
    with gathered([parameter]):
        return full(parameter).clone() if hasattr(parameter, "ds_id") else full(parameter)


@contextlib.contextmanager
def gathered(parameters: list[Tensor]) -> Iterator[None]:
    """ZeRO-3's parameters among these have all their numbers, for as long as the context lasts."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def full(tensor: Tensor) -> Tensor:
    """A tensor of FSDP2's, or made from such ones, with all its numbers; any other itself. Without gradient."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_dtensor(x: Tensor) -> "TypeGuard[DTensor]":
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


@torch.no_grad()
def load_weights(accelerator, model: Any, state: dict[str, Tensor], part: str = "") -> None:
    """Copy a whole state dict into a prepared model, or into the part of it at that attribute path."""
    bare = accelerator.unwrap_model(model)
    bare = bare.get_submodule(part) if part else bare
    name = engine_name(accelerator)
    if name not in SHARDED:
        bare.load_state_dict(state)
    else:
        for key, buffer in bare.named_buffers():
            if key in state:  # the others are made, not saved
                buffer.copy_(state[key])
        for key, parameter in bare.named_parameters(remove_duplicate=False):
            scatter(parameter, state[key])
    if name.startswith("zero"):
        model.optimizer.refresh_fp32_params()


def scatter(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter of which each process has a part."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        return
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def zero_of(module: nn.Module) -> Tensor | float:
    """A 0 that depends on all weights, as DDP wants it of a part that an update leaves out; sharded weights need none."""
    return sum(
        0.0 * p.sum() for p in module.parameters() if p.requires_grad and not (hasattr(p, "ds_id") or is_dtensor(p))
    )


# ---- an update ----
def backward(accelerator, model: Any, loss: Tensor, last: bool) -> None:
    """Add a micro-batch to the gradients; `last` of an update."""
    if engine_name(accelerator).startswith("zero"):
        model.set_gradient_accumulation_boundary(last)
        model.backward(loss)
    else:
        accelerator.backward(loss)


def clip(accelerator, model: Any, max_norm: float) -> float:
    """Norm of the gradients of all processes, before they are clipped at max_norm. Under ZeRO the update is made here too."""
    if engine_name(accelerator).startswith("zero"):
        model.step()
        return float(model.get_global_grad_norm())
    # of a part that the loss leaves out: 0, as under DDP; checkpoints hold the state of all
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if is_dtensor(norm) else norm)


def ran_out_of_memory(error: Exception) -> bool:
    """True if an allocator raised the error, on any device."""
    words = ("can't allocate memory", "out of memory", "alloc_failed")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error).lower() for w in words)


@torch.no_grad()
def not_finite(model: nn.Module) -> str:
    """Name of a parameter of which this process's part is not finite, or nothing."""
    found = {}
    for name, p in model.named_parameters():
        part = p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() if is_dtensor(p) else p
        if part.is_floating_point() and part.numel() and not part.is_meta:
            found[name] = torch.linalg.vector_norm(part, torch.inf).float()  # no copy of the weights, unlike isfinite
    sizes = torch.stack(list(found.values())).tolist() if found else []
    return next((name for name, size in zip(found, sizes, strict=True) if not math.isfinite(size)), "")


def probe(model: nn.Module, loss_fn, rows: list) -> float:
    """Mean of loss_fn's losses of the rows under a prepared model, without gradient. All processes call it together."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        losses, _ = loss_fn(rows)
    model.train(was_training)
    for part in model.modules():
        if callable(
            reshard := getattr(part, "reshard", None)
        ):  # FSDP2 keeps what is outside its layers whole until a backward pass
            reshard()
    return losses.double().mean().item()


# ---- checkpoints ----
def save_state(accelerator, folder: str) -> list[int]:
    """accelerate's save_state. Returns which optimizers had no state yet: saving FSDP2's would give them one, AdamW's a step."""
    from torch.distributed.checkpoint import CheckpointException

    fresh = [i for i, optimizer in enumerate(accelerator._optimizers) if not optimizer.state]
    try:
        accelerator.save_state(folder, safe_serialization=True)
    except CheckpointException as error:  # FSDP2's; no Exception, but a BaseException
        reason = next(iter(error.failures.values()))[0] if error.failures else error
        raise OSError(f"{reason}") from error
    forget(accelerator, fresh)
    return fresh


def load_state(accelerator, folder: str, fresh: list[int], **options) -> None:
    """accelerate's load_state, with its options; `fresh` optimizers are left without state."""
    accelerator.load_state(folder, **options)
    forget(accelerator, fresh)


def forget(accelerator, optimizers: list[int]) -> None:
    for i in optimizers:
        accelerator._optimizers[i].state.clear()
