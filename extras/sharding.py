"""Engines that cut a model up: DeepSpeed ZeRO-2 and ZeRO-3, and FSDP2. Each overrides what common/engine.py does.

ZeRO-3 and FSDP2 leave each process a part of the weights. The view of such a model is a twin without hooks. It has weights
only inside `common.engine.all_weights`, which gathers them once, so that processes may then do unequal numbers of forward passes.
"""

import contextlib
import copy
import logging
import os
import shutil
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from common import UserError
from common.engine import Engine

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def open_sharded(**settings) -> Engine:
    """The engine of a launch that asks for DeepSpeed or FSDP: the plain one where a single process needs no other.

    UserError for ZeRO-1, FSDP1, or DeepSpeed without ninja on a CPU.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return ZeRO(open_deepspeed(**settings))
    accelerator = open_fsdp(**settings)
    if not str(accelerator.distributed_type).endswith("FSDP"):
        return Engine(accelerator)
    if not accelerator.is_fsdp2:
        raise UserError("fsdp_version: found 1 in the accelerate config, expected 2 (configs/fsdp2.yaml)")
    return FSDP2(accelerator)


def open_deepspeed(**settings):
    """accelerate's Accelerator with DeepSpeed."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from transformers.integrations import unset_hf_deepspeed_config

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cpu = not torch.accelerator.is_available()
    if cpu and not shutil.which("ninja"):
        raise UserError("DeepSpeed on CPU: found no ninja on PATH, expected it: pip install ninja, activate the venv")
    # accelerate must not be told of the CPU: it would leave DeepSpeed out
    gloo = [InitProcessGroupKwargs(backend="gloo")] if cpu else []
    accelerator = Accelerator(kwargs_handlers=gloo, **settings)
    unset_hf_deepspeed_config()  # from_pretrained would cut up references as well, which no engine puts together
    return accelerator


def open_fsdp(**settings):
    """accelerate's Accelerator with FSDP. accelerate turns FSDP on for GPUs only; torch's runs on gloo as well."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **settings)
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # so that a machine without a GPU can test it
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator


# ---- the engines ----
class Sharded(Engine):
    """The common part of ZeRO and FSDP2."""

    cuts_weights = True  # a process holds a part of the weights
    cast: torch.dtype | None = None  # type of a twin's weights, where it is not the stored one

    def set_up(self, args, model: nn.Module) -> None:
        """Settings of the launch for this model, before accelerate prepares it."""
        raise NotImplementedError

    def prepare(self, args, *objects) -> tuple[list, dict[nn.Module, nn.Module]]:
        """One model and its optimizer at a time: each has settings of its own."""
        prepared, views = [], {}
        for model, optimizer in zip(objects[::2], objects[1::2], strict=True):
            twin = empty_copy(model) if self.cuts_weights else None
            self.set_up(args, model)
            model, optimizer = self.accelerator.prepare(model, optimizer)
            prepared += [model, optimizer]
            views[model] = bare = self.accelerator.unwrap_model(model)
            if twin is not None:
                for path, module in twin.named_modules():
                    # weak: a copy of the twin must not copy what it is filled from
                    module.__dict__["shards"] = weakref.ref(bare.get_submodule(path)), self.cast
                    module._buffers.update(bare.get_submodule(path)._buffers)  # on the device by now
                views[model] = twin
        return prepared, views

    def part(self, model: nn.Module, last: bool):
        return contextlib.nullcontext()

    @torch.no_grad()
    def load_weights(self, model: nn.Module, state: dict[str, Tensor], part: str = "") -> None:
        if not self.cuts_weights:
            super().load_weights(model, state, part)
            return
        bare = self.accelerator.unwrap_model(model)
        bare = bare.get_submodule(part) if part else bare
        for key, buffer in bare.named_buffers():
            if key in state:  # the others are made, not saved
                buffer.copy_(state[key])
        for key, parameter in bare.named_parameters(remove_duplicate=False):
            scatter(parameter, state[key])

    def save_state(self, folder: str) -> list[int]:
        """Returns which optimizers have no state yet: saving FSDP2's would give them one, and AdamW's would count a step."""
        from torch.distributed.checkpoint import CheckpointException

        fresh = [i for i, optimizer in enumerate(self.accelerator._optimizers) if not optimizer.state]
        try:
            super().save_state(folder)
        except CheckpointException as error:  # FSDP2's; it is no Exception, but a BaseException
            reason = next(iter(error.failures.values()))[0] if error.failures else error
            raise OSError(f"{reason}") from error
        self.clear_optimizer_states(fresh)
        return fresh

    def load_state(self, folder: str, fresh: list[int], **options) -> None:
        super().load_state(folder, fresh, **options)
        self.clear_optimizer_states(fresh)

    def clear_optimizer_states(self, optimizers: list[int]) -> None:
        """Empty the state of these optimizers."""
        for i in optimizers:
            self.accelerator._optimizers[i].state.clear()


class ZeRO(Sharded):
    """DeepSpeed, which owns an update from the backward pass on."""

    def __init__(self, accelerator):
        super().__init__(accelerator)
        stage = accelerator.deepspeed_plugin.zero_stage
        if stage not in (2, 3):
            raise UserError(f"zero_stage: found {stage} in the accelerate config, expected 2 or 3 (configs/zero*.yaml)")
        self.name, self.cuts_weights = f"zero{stage}", stage == 3

    def set_up(self, args, model: nn.Module) -> None:
        self.accelerator.deepspeed_plugin.deepspeed_config |= {
            "gradient_clipping": args.max_grad_norm,
            "gradient_accumulation_steps": 1,  # Run.step says where an update ends
            "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        }

    def backward(self, model: Any, loss: Tensor, last: bool) -> None:
        model.set_gradient_accumulation_boundary(last)
        model.backward(loss)

    def clip(self, model: Any, max_norm: float) -> float:
        """DeepSpeed clips and moves the weights in one call: the update is made here."""
        model.step()
        return float(model.get_global_grad_norm())

    @torch.no_grad()
    def load_weights(self, model: Any, state: dict[str, Tensor], part: str = "") -> None:
        super().load_weights(model, state, part)
        model.optimizer.refresh_fp32_params()


class FSDP2(Sharded):
    """torch's fully_shard, as accelerate applies it."""

    name = "fsdp2"

    def __init__(self, accelerator):
        super().__init__(accelerator)
        self.cast = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None

    def set_up(self, args, model: nn.Module) -> None:
        """The model's own layers are the units; gradients are summed in float32."""
        from accelerate.utils import FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import MixedPrecisionPolicy

        layers = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
        present = {type(m).__name__ for m in model.modules()}
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            transformer_cls_names_to_wrap=sorted(layers & present),
            mixed_precision_policy=MixedPrecisionPolicy(self.cast, torch.float32) if self.cast else None,
        )

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        return full_tensor_of(cast(Tensor, super().clip(model, max_norm)))

    def probe(self, model: nn.Module, loss_fn, rows: list) -> float:
        loss = super().probe(model, loss_fn, rows)
        for part in model.modules():
            # FSDP2 keeps what is outside its layers whole until a backward pass
            if callable(reshard := getattr(part, "reshard", None)):
                reshard()
        return loss


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights are on the meta device; buffers are shared, and no forward is wrapped."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, memo | {id(b): b for b in model.buffers()})
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # of models.autocast_forward, bound to the model itself
    return twin


# ---- whole weights ----
@contextlib.contextmanager
def gathered_copy(module: nn.Module, cast: bool) -> Iterator[nn.Module]:
    """common.engine.all_weights for a twin. A twin, or a part of one, that is whole already stays as it is."""
    if not any(p.is_meta for p in module.parameters()):
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
                    value = gather_parameter(shard)
                    value = value.to(dtype) if cast and dtype and value.is_floating_point() else value
                    made[shard] = nn.Parameter(value, requires_grad=False)
                part._parameters[name] = made[shard]
                empty.append((part, name, meta))
    try:
        yield module
    finally:
        for part, name, meta in empty:
            part._parameters[name] = meta


def trained(view: nn.Module) -> nn.Module:
    """The module that trains, with each process's part of the weights, if `view` is a twin; any other module itself."""
    return view.__dict__["shards"][0]() if "shards" in view.__dict__ else view


def gather_parameter(parameter: Tensor) -> Tensor:
    """The whole of a parameter, on all processes, each of which has a part."""
    with gathered_parameters([parameter]):
        return full_tensor_of(parameter).clone() if hasattr(parameter, "ds_id") else full_tensor_of(parameter)


@contextlib.contextmanager
def gathered_parameters(parameters: list[Tensor]) -> Iterator[None]:
    """Context in which ZeRO-3's parameters among these have all their numbers."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def full_tensor_of(tensor: Tensor) -> Tensor:
    """The tensor with all its numbers if FSDP2 has cut it up, or what it was made from; else itself. Without gradient."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_dtensor(x: Tensor) -> "TypeGuard[DTensor]":
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def scatter(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter that is cut up over the processes."""
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
