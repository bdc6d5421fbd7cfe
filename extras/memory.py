"""The memory plan of a run: the peak of each phase, measured on steps of its own models whose tensors have no data.

Dims: B sequences, L prompt + response tokens, N response tokens in the batch, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import json
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import UserError, models
from common.args import flag
from common.data import Batch
from common.engine import mixes_bf16
from common.logprobs import language_model
from common.rewards import ScalarModel
from extras import loading, noise
from extras.fused_head import HEADS, Head, known_changes, score_positions

NF4 = 4.127 / 8  # bytes per weight with double quantisation, QLoRA arXiv:2305.14314, Sec. 3
STATES = {"rmsprop": 1, "adamw": 2}  # values an optimizer keeps for each weight


# ---- one step without data ----
class PeakMemory(TorchDispatchMode):
    """Count, inside its context, the bytes that operations allocate and that are still in use.

    Weights and finished gradients do not count. `peak` is the largest sum so far; `peak_logits` is the part of it in tensors
    whose last dimension is the vocabulary.
    """

    def __init__(self, model, vocabulary: int):
        super().__init__()
        known = [*model.parameters(), *model.buffers()]
        self.vocabulary, self.storages = vocabulary, weakref.WeakSet(t.untyped_storage() for t in known)
        self.live = self.logits = self.peak = self.peak_logits = 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.count(-p.grad.nbytes, 0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.storages:
                storage = tensor.untyped_storage()
                self.storages.add(storage)
                size = storage.nbytes()
                logits = size if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary else 0
                weakref.finalize(storage, self.count, -size, -logits).atexit = False
                self.count(size, logits)
        return out

    def count(self, size: int, logits: int) -> None:
        """Add bytes that were allocated, or freed if negative; `logits` of them are logits."""
        self.live, self.logits = self.live + size, self.logits + logits
        if self.live > self.peak:
            self.peak, self.peak_logits = self.live, self.logits


def device() -> str:
    """Return the type of device that a run would use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def without_data(args, config, layers: int, scalar=False, checkpointing=False, frozen=False, where="meta"):
    """Return the model of a configuration as a run prepares it, but with `layers` layers and random weights.

    where: device of the weights; on the meta device they have no values.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    models.text_config(config).num_hidden_layers, config.num_labels = layers, 1
    attention = "eager" if loading.attention(args, config) == "eager" else "sdpa"
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device(where):
        model = kind.from_config(config, dtype=getattr(torch, args.dtype), attn_implementation=attention)
        model = noise.without_noise(model)
        if scalar:
            model = ScalarModel(model)
        if frozen:
            return model
        trained = dataclasses.replace(args, gradient_checkpointing=checkpointing)
        if not scalar:
            return models.make_trainable(model, trained)
        model.model = models.make_trainable(model.model, trained, "SEQ_CLS")
        return model


def fill(model) -> None:
    """Move weights and buffers in place from the meta device to the run's. Inside a FakeTensorMode this takes no memory."""
    made = {}  # a tied weight must stay one weight
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                empty = torch.empty(p.shape, dtype=p.dtype, device=device())
                made[id(p)] = p, torch.nn.Parameter(empty, p.requires_grad)
            module._parameters[name] = None if p is None else made[id(p)][1]
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype, device=device())


def per_layer(measure: Callable[[int], dict[str, int]], layers: int) -> dict[str, int]:
    """Return measure(layers). For more than three layers it is extrapolated from two and three, since it is linear in them."""
    if layers <= 3:
        return measure(layers)
    two, three = measure(2), measure(3)
    return {name: three[name] + (layers - 3) * (three[name] - two[name]) for name in three}


def weights(args, config, scalar: bool = False, frozen: bool = False) -> dict[str, int]:
    """Return sizes of a loaded model's weights.

    In bytes: `all`, those that are `trained`, and the `largest` trained one. As counts: all `numbers`, and `trained_numbers`.
    """

    def measure(layers: int) -> dict[str, int]:
        model = without_data(args, config, layers, scalar, frozen=frozen)
        parameters = [p for _, p in model.named_parameters()]
        trained = [] if frozen else [p for p in parameters if p.requires_grad]
        size = sum(p.nbytes for p in parameters)
        if args.load_in_4bit:
            base = [p for name, p in model.named_parameters() if "base_layer.weight" in name]
            size += sum(round(p.numel() * NF4) - p.nbytes for p in base)
        return {
            "all": size,
            "trained": sum(p.nbytes for p in trained),
            "largest": max((p.nbytes for p in trained), default=0),
            "numbers": sum(p.numel() for p in parameters),
            "trained_numbers": sum(p.numel() for p in trained),
        }

    return per_layer(measure, models.text_config(config).num_hidden_layers)


def empty_batch(rows: int, length: int, response: int) -> Batch:
    """Return a batch of zeros, (rows, length), with `response` response tokens in each row."""
    ids = torch.zeros(rows, length, dtype=torch.long, device=device())
    return Batch(ids, ids, ids[:, :response], ids[:, :response] == 0, ids[:, 0])


@contextlib.contextmanager
def counted(args, model, vocabulary: int) -> Iterator[PeakMemory]:
    """Count the memory of what is done inside the context, without data, under the run's mixed precision."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fill(model)
        with PeakMemory(model, vocabulary) as memory:
            with torch.autocast(device(), torch.bfloat16, enabled=mixes_bf16(args)):
                yield memory


def forward_costs(args, config, rows: int, scalar: str = "", checkpointing=False, train=True) -> dict[str, int]:
    """Return the bytes, besides weights, of a forward pass over `rows` full windows; with `train` also of its backward pass.

    scalar: "" for log-probs of responses, "last" or "every" for a scalar model that is read there. The result has the `peak`
    without finished gradients, the part of it in `logits`, and with `train` what the forward pass leaves `saved`.
    """
    length, response = args.max_length, args.max_length - args.max_prompt_length
    text = models.text_config(config)

    def measure(layers: int) -> dict[str, int]:
        model = without_data(args, config, layers, bool(scalar), checkpointing, not train).train(train)
        with counted(args, model, text.vocab_size) as memory, torch.set_grad_enabled(train):
            batch = empty_batch(rows, length, response)
            if scalar:
                out = model(batch, every=scalar == "every")
            else:
                inner: Any = language_model(model)
                head = inner.get_output_embeddings()  # without values it cannot be probed
                HEADS[head] = Head(text.vocab_size, known_changes(config)[-1])
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                positions = torch.zeros(rows * response, dtype=torch.long, device=device())
                out = score_positions(model, inputs, positions, positions)[0]
            saved = memory.live
            if train:
                with torch.autocast(device(), enabled=False):
                    out.sum().backward()
        return {"peak": memory.peak, "logits": memory.peak_logits} | ({"saved": saved} if train else {})

    return per_layer(measure, models.text_config(config).num_hidden_layers)


def generation_costs(args, config) -> dict[str, int]:
    """Return the bytes, besides weights, of a batch of Generator at its largest moment.

    That is when it reads a batch of full prompts, or the last token of all answers, or prompts that join full answers.
    """
    from transformers import DynamicCache

    from extras.decoding import choose_tokens, joining

    rows, prompt = args.per_device_eval_batch_size, args.max_prompt_length
    longest = min(args.max_length, prompt + args.max_new_tokens) - 1
    moments = {  # (rows, tokens in the cache afterwards, new tokens among them)
        "prompt": (rows, prompt, prompt),
        "last": (rows, longest, 1),
        "join": (joining(rows), prompt, prompt),
    }

    def measure(layers: int) -> dict[str, int]:
        model = without_data(args, config, layers).eval()
        out: dict[str, int] = {}
        with counted(args, model, models.text_config(config).vocab_size) as memory, torch.no_grad():
            caches = [DynamicCache(config=model.config)]
            for moment, (n, length, new) in moments.items():
                if moment == "join":
                    caches.append(DynamicCache(config=model.config))
                cache = caches[-1]
                grows: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
                if length > prompt + 1:  # add what the steps in between leave in the cache
                    for layer in grows:
                        part = layer.keys[:, :, :1].expand(-1, -1, length - prompt - 1, -1)
                        layer.update(part.clone(), part.clone())
                memory.peak = 0
                ids = torch.zeros(n, new, dtype=torch.long, device=device())
                mask = torch.ones(n, length, dtype=torch.long, device=device())
                logits = model(
                    input_ids=ids, attention_mask=mask, position_ids=ids, past_key_values=cache, logits_to_keep=1
                ).logits[:, -1]
                choose_tokens(logits, torch.zeros(n, device=device()), 1.0)
                held = [layer for cache in caches for layer in cache.layers]
                states = [x for layer in held for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor)]
                kv_cache = sum(x.nbytes for x in states)
                found = {"peak": memory.peak, "logits": memory.peak_logits, "kv_cache": kv_cache}
                out |= {f"{moment} {name}": size for name, size in found.items()}
        return out

    found = per_layer(measure, models.text_config(config).num_hidden_layers)
    moment = max(moments, key=lambda m: found[f"{m} peak"])
    return {name: found[f"{moment} {name}"] for name in ("peak", "logits", "kv_cache")}


# ---- the plan ----
def launched() -> tuple[int, str]:
    """Return (processes, engine) that the launcher asked for. The engine's name is that of Engine.name."""
    env = os.environ
    engine = "plain"
    if env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if path := env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            stage = json.loads(Path(path).read_text()).get("zero_optimization", {}).get("stage")
        engine = f"zero{stage}"
    elif env.get("ACCELERATE_USE_FSDP") == "true":
        engine = "fsdp2"
    return int(env.get("WORLD_SIZE", 1)), engine


# what an engine shards: 1 optimizer state, 2 also gradients, 3 also weights
LEVELS = {"zero2": 2, "zero3": 3, "fsdp2": 3}


class Plan:
    """Bytes per device in each phase of a run, as {part: bytes} at the phase's peak, if every sequence fills its window.

    Scripts without a reward model train, generate and score. Scripts with one (and, with PPO, a value model) have a reward
    step, answers, and a policy update. The plan leaves out gold models and baselines while they are in use, vLLM, and the layer
    that an engine gathers.
    """

    def __init__(self, args):
        self.args = args
        self.world, self.engine = launched()
        self.world = args.num_processes or self.world
        self.level = LEVELS.get(self.engine, 0)
        self.bf16 = self.level > 0 and mixes_bf16(args)
        # engines compute with bf16 weights, without autocast
        self.computed = dataclasses.replace(args, dtype="bfloat16", mixed_precision="no") if self.bf16 else args
        self.config = models.load_config(args.model, args.trust_remote_code)
        self.policy = self.stored(weights(args, self.config))
        self.frozen = weights(args, self.config, frozen=True)["all"]
        self.scalars = args.scalar_models
        if self.scalars:
            name = getattr(args, "reward_model", "") or args.model
            self.scalar_config = models.load_config(name, args.trust_remote_code, "--reward-model")
            self.scalar = self.stored(weights(args, self.scalar_config, scalar=True))

    def stored(self, found: dict[str, int]) -> dict[str, int]:
        """Return weights() as the engine keeps them. Under bf16, ZeRO keeps all in bf16, and FSDP2 trained ones in float32."""
        if not self.bf16:
            return found
        if self.engine == "fsdp2":
            trained, rest = 4 * found["trained_numbers"], found["all"] - found["trained"]
        else:
            trained, rest = 2 * found["trained_numbers"], 2 * (found["numbers"] - found["trained_numbers"])
        largest = found["largest"] * trained // max(found["trained"], 1)
        return {**found, "all": trained + rest, "trained": trained, "largest": largest}

    def shard(self, size: float, level: int) -> float:
        """Return a device's part of `size` bytes. level: 1 is optimizer state, 2 gradients, 3 weights."""
        return size / self.world if self.level >= level else size

    def held(self) -> dict[str, float]:
        """Return the bytes of the weights of all trained models."""
        if not self.scalars:
            return {"weights": self.shard(self.policy["all"], 3)}
        one = self.shard(self.scalar["all"], 3)
        return {"policy": self.shard(self.policy["all"], 3), "value": (self.scalars - 1) * one, "reward": one}

    def optimizer(self, *trained: dict[str, int]) -> dict[str, float]:
        """Return the bytes of these models' optimizer state. Under ZeRO it includes a float32 copy of each trained weight."""
        values = STATES[self.args.optimizer]
        if self.engine.startswith("zero"):
            size = 4 * (values + 1) * sum(model["trained_numbers"] for model in trained)
        else:
            size = values * sum(model["trained"] for model in trained)
        return {"optimizer": self.shard(size, 1)}

    def reference(self, copies: int = 1) -> dict[str, float]:
        """Return the bytes of the reference policy, which has none of its own with LoRA unless it moves."""
        args = self.args
        moves = getattr(args, "sft_epochs", 0) or getattr(args, "ref", "initial") == "previous"
        adapter_off = args.lora_r and not (self.scalars and moves)  # models.open_reference
        return {"reference": 0 if adapter_off else copies * self.frozen}

    def step(self, rows: int, trained: int, largest: int, peak: int, logits: int) -> dict[str, float]:
        """Return the bytes of an update on `rows` rows at its larger moment: a backward pass, or the optimizer's step.

        Before the first backward pass there are no gradients.
        """
        gradients = self.shard(trained, 2)
        accumulated = rows > self.args.per_device_train_batch_size * self.world
        backward = {"gradients": gradients if accumulated else 0, "logits": logits, "activations": peak - logits}
        update = {"gradients": gradients, "update": gradients if device() == "cuda" else largest}  # torch's foreach
        ddp = {"ddp_buckets": trained} if self.world > 1 and not self.level else {}
        return max(backward, update, key=lambda parts: sum(parts.values())) | ddp

    def training(self, checkpointing: bool) -> dict[str, dict[str, float]]:
        """Return {phase: {part: bytes}} of the phases with a backward pass."""
        args, computed = self.args, self.computed
        rows, update = args.per_device_train_batch_size, args.batch_size
        own = forward_costs(computed, self.config, rows * args.sequences_per_row, checkpointing=checkpointing)
        peak, logits, policy = own["peak"], own["logits"], self.policy
        trained, largest, together = policy["trained"], policy["largest"], [policy]
        if not self.scalars:
            return {"train": self.held() | self.optimizer(policy) | self.step(update, trained, largest, peak, logits)}
        scalar = self.scalar
        reward = forward_costs(computed, self.scalar_config, 2 * rows, "last", checkpointing)["peak"]
        if self.scalars == 2:
            update = args.rollout_batch_size // args.num_mini_batches
            value = forward_costs(computed, self.scalar_config, rows * args.sequences_per_row, "every", checkpointing)
            together = [policy, scalar]
            trained, largest = trained + scalar["trained"], max(largest, scalar["largest"])
            if own["saved"] + value["peak"] > peak:  # the value's backward pass comes first
                peak, logits = own["saved"] + value["peak"], 0
        return {
            "reward step": self.held()
            | self.optimizer(scalar)
            | self.step(args.batch_size, scalar["trained"], scalar["largest"], reward, 0),
            "policy update": self.held()
            | self.reference()
            | self.optimizer(*together, scalar)
            | self.step(update, trained, largest, peak, logits),
        }

    def answering(self) -> dict[str, dict[str, float]]:
        """Return {phase: {part: bytes}} of the phases without a backward pass."""
        args = self.args
        made, scored = (
            {k: v for k, v in costs.items() if k != "peak"} | {"activations": 2 * costs["peak"] - sum(costs.values())}
            for costs in (
                generation_costs(self.computed, self.config),
                forward_costs(args, self.config, args.per_device_eval_batch_size, train=False),
            )
        )
        if args.generation == "vllm":  # the trainer makes no batches, but it scores some of vLLM's answers
            made = scored
        if self.level == 3:  # engine.all_weights gathers one model at a time
            sizes = [weights(self.computed, self.config)["all"]]
            sizes += [weights(self.computed, self.scalar_config, scalar=True)["all"]] if self.scalars else []
            made, scored = (parts | {"gathered": max(sizes)} for parts in (made, scored))
        held = self.held() | self.optimizer(self.policy, *[self.scalar for _ in range(self.scalars)])
        if self.scalars:
            moves = getattr(args, "ref", "initial") == "previous" and args.T > 1
            copies = 2 if moves else 1  # an evaluation also has the initial policy
            larger = max(made, scored, key=lambda parts: sum(parts.values()))
            phases = {"answers": held | self.reference(copies) | larger}
        else:
            phases = {"generate": held | made, "score": held | self.reference() | scored}
        if self.level == 3:  # in the stored type
            phases["save"] = held | {"gathered": self.policy["all"]}
        return phases


def print_memory_plan(args) -> None:
    """Print the memory plan: one line for each phase, and for training also the total with or without checkpointing."""
    try:
        plan, gib = Plan(args), 2**30
        other = plan.training(not args.gradient_checkpointing)
        phases = {**plan.training(args.gradient_checkpointing), **plan.answering()}
    except UserError:
        raise
    except Exception as error:  # some models' code needs values, and a plan without data has none
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        print(f"  memory per device: no estimate for this architecture ({type(error).__name__}: {reason})")
        return
    for phase, parts in phases.items():
        detail = ", ".join(f"{part} {size / gib:.3f}" for part, size in parts.items() if size)
        print(f"  memory per device, {phase}: about {sum(parts.values()) / gib:.2f} GiB ({detail})")
        if phase in other:
            word = "without" if args.gradient_checkpointing else "with"
            print(f"    {word} --gradient-checkpointing: about {sum(other[phase].values()) / gib:.2f} GiB")
    if args.generation == "vllm":
        when = "while it answers" if args.vllm_sleep_level else "all the time"
        print(f"  vLLM: {args.vllm_gpu_memory_utilization:.0%} of each GPU besides, {when}")
    if plan.world > 1:
        print(f"  per device of {plan.world}, {'data parallel' if plan.engine == 'plain' else plan.engine}")


# ---- out of memory ----
def ran_out_of_memory(error: Exception) -> bool:
    """True if an allocator raised the error, on any device."""
    words = ("can't allocate memory", "out of memory", "alloc_failed")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error).lower() for w in words)


def explain_out_of_memory(error: Exception, args, name: str) -> None:
    """UserError in one line if an allocator raised `error`: it names the flag to lower, and the plan of the phases it governs.

    name: the flag's field of args, such as "per_device_train_batch_size".
    """
    if not ran_out_of_memory(error):
        return
    found = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    phases = {}
    if hasattr(args, "batch_size"):  # evaluate.py has no plan
        with contextlib.suppress(Exception):  # the plan may itself fail, which must not hide the error
            train = name == "per_device_train_batch_size"
            phases = Plan(args).training(args.gradient_checkpointing) if train else Plan(args).answering()
    estimates = ", ".join(f"{phase} {sum(parts.values()) / 2**30:.2f} GiB" for phase, parts in phases.items())
    estimates = f"; --dry-run estimates per device: {estimates}" if estimates else ""
    wanted = f"less than {flag(name)} {getattr(args, name)}, or than --max-length {args.max_length}"
    raise UserError(f"out of memory: found {found}; expected {wanted}{estimates}") from error
