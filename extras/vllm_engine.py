"""Sampler `vllm`: one engine per process, on the device that trains. The trainer's weights replace the engine's in place.

Written for vLLM 0.32. docs/generation.md lists the details, with reasons and tests.
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from common import UserError
from common.args import require
from common.data import collate
from common.engine import evaluating
from common.generation import Rollout, stop_tokens
from common.logprobs import language_model, response_logprobs
from extras import screen, sharding
from extras.adapters import fingerprint
from extras.agreement import CHECKED, LIMITS
from extras.loading import uses_bf16

VLLM_METRICS = {  # name -> meaning, unit, range; logged after every phase of generation
    "sampling/vllm_logp_difference": "mean |log pi (trainer) - log pi (vLLM)| per token of answers just sampled; rounding",
}
SHARD_BYTES = 2**30  # size of the files that carry weights to an engine in another process
ENVIRONMENT = {  # set unless the user has set them
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # send no usage statistics
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes nearly all memory, but the trainer needs some
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default it also binds the trainer's threads to cores
}
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
)  # how its variables begin


class VllmGenerator:
    """Sample from `model` with this process's engine, which gets the model's weights whenever it holds others.

    It is a common.generation.Sampler: all processes call `sample` equally often.
    """

    def __init__(self, run, model, tokenizer):
        self.run, self.model, self.eos_ids = run, model, stop_tokens(model, tokenizer)
        run.metrics = {**run.metrics, **VLLM_METRICS}

    def sample(
        self,
        prompts: list[list[int]],
        row_ids: list[int],
        seed: int,
        temperature: float = 1.0,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Rollout:
        """Sample one response to each prompt, as Sampler.sample says. UserError if the answers are not the model's.

        Neighbours that share a prompt and have row ids r, r + 1, ... are sent as one request for several answers. The answers
        are the same as from separate requests.
        """
        require(
            temperature == 0 or temperature >= 0.01, "temperature", temperature, "0.01 or more, the least vLLM takes"
        )
        engine = current_engine(self.run, self.model)
        with engine.awake(self.model):
            answers = engine.generate(
                prompts, row_ids, seed, temperature, self.run.args.max_new_tokens, self.eos_ids, advance
            )
        ids, logprobs = [y for y, _ in answers], [logp for _, logp in answers]
        rollout = Rollout(prompts, ids, [y[-1] in self.eos_ids for y in ids], logprobs)
        self.check(rollout, temperature or 1.0, engine.dtype)
        return rollout

    def check(self, rollout: Rollout, temperature: float, dtype: str) -> None:
        """Score the answers to the longest prompts with the model that is trained. UserError if vLLM's log-probs differ.

        The forward pass of a sharded model is collective. A process without answers takes part with a row of weight 0.
        """
        longest = sorted(range(len(rollout.prompt_ids)), key=lambda i: -len(rollout.prompt_ids[i]))[: CHECKED[0]]
        sequences = [(rollout.prompt_ids[i], rollout.response_ids[i][: CHECKED[1]]) for i in longest]
        batch = collate(sequences or [([0], [0])], pad_token_id=0).to(self.run.accelerator.device)
        with torch.no_grad(), evaluating(self.model):
            ours = response_logprobs(self.model, batch, temperature).logprobs.tolist()
        theirs = [rollout.logprobs[i][: CHECKED[1]] for i in longest]
        gaps = [abs(a - b) for x, y in zip(ours, theirs, strict=False) for a, b in zip(x, y, strict=False)]
        total, count = self.run.accelerator.reduce(
            torch.tensor([sum(gaps), len(gaps)], device=self.run.accelerator.device), reduction="sum"
        ).tolist()
        if not count:
            return
        found = total / count
        limit = LIMITS["vllm"][dtype] / temperature  # rounding errors of logits are divided by it too
        self.run.log({"sampling/vllm_logp_difference": found}, step=self.run.last_step)
        if not found <= limit:
            raise UserError(
                f"--generation vllm: found log-probs {found:.4f} nats per token from the trainer's on the answers just sampled,"
                f" expected at most {limit:g} ({dtype}): the policy that is trained is not the one that answered"
            )


# ---- the engine ----
ENGINES: list["Engine"] = []  # engines of this process: the first one started, and at most one in a child process


def current_engine(run, model) -> "Engine":
    """Return the engine for the configuration of `model`, and start it on first use. Models with one configuration share it.

    vLLM keeps state per process. Therefore a second engine gets a process of its own. So does an engine for a model that vLLM
    runs by patching transformers' class (GPT-NeoX).
    """
    config = engine_config(model)
    for engine in ENGINES:
        if engine.config == config:
            return engine
    if len(ENGINES) > 1:
        ENGINES.pop().close()
    ENGINES.append(
        Engine(run, language_model(model).config, config, inside=not ENGINES and native(config["architectures"][0]))
    )
    return ENGINES[-1]


def engine_config(model) -> dict:
    """Return config.json as the engine needs it: without adapter and quantisation, since it gets merged, full weights."""
    model = language_model(model)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    return {**config, "architectures": [type(model).__name__.removeprefix("FSDP")]}


def native(architecture: str) -> bool:
    """Return True if vLLM has its own code for the architecture. It runs the others by patching transformers' modules."""
    from vllm import ModelRegistry

    entry = ModelRegistry.models.get(architecture)
    return entry is not None and not getattr(entry, "class_name", "").startswith("Transformers")


class Engine:
    """A vLLM engine on this process's device, inside the process or in a child process. It starts without weights."""

    def __init__(self, run, model_config, config: dict, inside: bool):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM, envs
        from vllm.platforms import current_platform

        args = run.args
        self.run, self.config, self.inside = run, config, inside
        self.dtype = "bfloat16" if uses_bf16(args) else "float32"
        self.level = args.vllm_sleep_level if current_platform.is_sleep_mode_available() else 0
        self.asleep = False
        self.holds: int | None = None  # the checksum of its weights
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        length = args.max_prompt_length + args.max_new_tokens
        check_fits(model_config, length, current_platform.is_cpu())
        Path(self.folder.name, "config.json").write_text(json.dumps(config))
        run.print(f"vllm: starting an engine ({self.dtype}, {'in the trainer' if inside else 'a process of its own'})")
        envs.disable_envs_cache()
        # vLLM seeds the global random numbers, which are put back afterwards
        own = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
        try:
            with environment(inside, run.accelerator.local_process_index), torch.random.fork_rng(own):
                self.llm = LLM(
                    model=self.folder.name,
                    load_format="dummy",  # weights come from the trainer
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # else it takes top-k and the like from the model's file
                    dtype=self.dtype,
                    max_model_len=length,
                    # a prompt that is read in two parts draws twice from its stream; vLLM undoes this on GPUs only
                    enable_chunked_prefill=False if current_platform.is_cpu() else None,
                    logprobs_mode="processed_logprobs",  # those of the distribution it samples from
                    gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                    enable_sleep_mode=self.level > 0,
                    enforce_eager=current_platform.is_cpu(),
                    distributed_executor_backend="external_launcher" if inside and run.world > 1 else None,
                    worker_extension_cls="" if inside else "extras.vllm_engine.WeightFiles",
                    trust_remote_code=args.trust_remote_code,
                    seed=0,
                )
        except Exception as error:
            raise self.failed("no engine started", error) from error
        if not inside:
            self.llm.collective_rpc("end_with", args=(os.getpid(), self.folder.name))

    @contextlib.contextmanager
    def awake(self, model) -> Iterator[None]:
        """Give the engine the model's weights inside the context. Afterwards its memory is free for the trainer.

        Weights are sent again only if their checksum has changed on some rank since they were sent last.
        """
        if self.asleep:
            torch.cuda.empty_cache()
            self.wake_up("weights")
        with self.run.timed("vllm_sync"):
            source = sharding.trained(model)
            found = checksum(source)
            stale = torch.tensor(float(found != self.holds), device=self.run.accelerator.device)
            if (
                self.run.accelerator.reduce(stale, reduction="sum").item() > 0
            ):  # sending may be collective: all ranks or none
                self.load(full_weights(source))
                self.holds = found
        if self.asleep:
            self.wake_up("kv_cache")
        yield
        if self.level:
            self.llm.sleep(level=self.level)
            self.asleep = True
            self.holds = None if self.level == 2 else self.holds

    def wake_up(self, part: str) -> None:
        """Take memory for `part` again: weights, or kv_cache. UserError if it is no longer free."""
        try:
            self.llm.wake_up(tags=[part])
        except Exception as error:  # something else took the memory
            raise self.failed("no memory to wake up in", error) from error

    def failed(self, found: str, error: Exception) -> UserError:
        """Return one line for an error of vLLM."""
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        return UserError(
            f"--generation vllm: found {found}: {reason}. With too little memory change --vllm-gpu-memory-utilization"
            f" {self.run.args.vllm_gpu_memory_utilization}; what vLLM printed stands above"
        )

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights, and clear the prefix cache. weights: (name as in transformers' checkpoints, full tensor) pairs."""
        if self.inside:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        else:
            write_shards(weights, Path(self.folder.name), getattr(torch, self.dtype))
            self.llm.collective_rpc("load_shards", args=(self.folder.name,))
        if not self.llm.reset_prefix_cache():  # it holds keys and values of the old weights
            raise RuntimeError("vLLM did not reset its prefix cache")

    def generate(
        self,
        prompts: list[list[int]],
        row_ids: list[int],
        seed: int,
        temperature: float,
        max_tokens: int,
        eos_ids: set[int],
        advance: Callable[[int], None],
    ) -> list[tuple[list[int], list[float]]]:
        """Return (response ids, their log-probs in nats) for every prompt, in order."""
        from vllm import SamplingParams

        base = seed * 1_000_003 % 2**62
        requests = group(prompts, row_ids) if temperature else [(i, 1) for i in range(len(prompts))]
        asked = [
            SamplingParams(
                n=n, seed=base + row_ids[i], temperature=temperature, max_tokens=max_tokens, logprobs=0,
                stop_token_ids=sorted(eos_ids), ignore_eos=True, detokenize=False,
            )
            for i, n in requests
        ]  # fmt: skip
        self.llm.enqueue([{"prompt_token_ids": prompts[i]} for i, _ in requests], asked, use_tqdm=False)
        done = []
        while self.llm.llm_engine.has_unfinished_requests():
            try:
                outputs = self.llm.llm_engine.step()
            except Exception as error:
                raise self.failed("no answers", error) from error
            for output in outputs:
                if output.finished:
                    done.append(output)
                    screen.saw_ranks(sum(len(c.token_ids) for c in output.outputs))
                    advance(len(output.outputs))
        answers = [c for output in sorted(done, key=lambda o: int(o.request_id)) for c in output.outputs]
        return [
            (list(c.token_ids), [each[token].logprob for token, each in zip(c.token_ids, c.logprobs, strict=True)])
            for c in answers
        ]

    def close(self) -> None:
        """End an engine that lives in a process of its own."""
        self.llm.llm_engine.engine_core.shutdown()
        self.folder.cleanup()


def check_fits(config, length: int, on_cpu: bool) -> None:
    """UserError for a model that vLLM cannot run, since its own messages are less clear. length: tokens of prompt and answer."""
    config = config.get_text_config(decoder=True)
    window = getattr(config, "max_position_embeddings", None) or length
    expected = (
        f"--max-prompt-length plus --max-new-tokens of at most {window}, the model's window, with --generation vllm"
    )
    require(length <= window, "max_new_tokens", f"{length} tokens in all", expected)
    if on_cpu:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size, known = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            CPUAttentionBackend.get_supported_head_sizes(),
        )
        expected = f"one of {', '.join(map(str, known))}, which vLLM has on CPU, or --generation hf"
        require(size in known, "generation", f"vllm for a model with heads of {size} dimensions", expected)


@contextlib.contextmanager
def environment(inside: bool, device: int) -> Iterator[None]:
    """Set the variables that vLLM reads while it starts.

    inside: the engine runs in this process. Otherwise its process must not see the launcher's variables, and sees one device.
    """
    wanted: dict[str, str | None] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if inside else "1"}
    if not inside:
        wanted |= dict.fromkeys(n for n in os.environ if n.startswith(LAUNCHER))
        wanted["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # a fork would share the trainer's threads and GPU
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            wanted["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
    before = {name: os.environ.get(name) for name in wanted}
    set_environment(wanted)
    try:
        yield
    finally:
        set_environment(before)


def set_environment(values: dict[str, str | None]) -> None:
    """Set environment variables. None removes a variable."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def group(prompts: list[list[int]], row_ids: list[int]) -> list[tuple[int, int]]:
    """Group neighbours that share a prompt and whose row ids follow each other -> [(index of the first, how many)]."""
    found: list[tuple[int, int]] = []
    for i in range(len(prompts)):
        if found and prompts[i] == prompts[i - 1] and row_ids[i] == row_ids[i - 1] + 1:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((i, 1))
    return found


# ---- sending weights ----
def full_weights(model) -> Iterator[tuple[str, Tensor]]:
    """Yield (name as in transformers' checkpoints, full tensor) of every parameter, on this rank, one at a time.

    A head that is tied to the embeddings is sent too: on a CPU vLLM packs it by itself, and would keep the old one. With LoRA
    the tensor is base plus adapter, as merge_and_unload computes it; the model itself does not change. Under ZeRO-3 and FSDP2
    each tensor is gathered when its turn comes. That is collective: all ranks iterate.
    """
    base = language_model(model)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        layer_name, in_lora, leaf = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if in_lora and leaf == "weight":
            layer = base.get_submodule(layer_name)
            with sharding.gathered_parameters(list(layer.parameters())):
                tensor = merged_weight(layer)
        else:
            tensor = sharding.gather_parameter(parameter)
        yield (f"{layer_name}.{leaf}" if in_lora else name), tensor


def merged_weight(layer) -> Tensor:
    """Return the weight of a LoRA layer with its adapters added. A quantised base is dequantised first."""
    from peft.utils.integrations import dequantize_module_weight

    with torch.no_grad():
        weight = sharding.full_tensor_of(dequantize_module_weight(layer.base_layer))
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            weight = weight + sharding.full_tensor_of(layer.get_delta_weight(adapter)).to(weight.dtype)
    return weight


def checksum(model) -> int:
    """Return a sum over the bits of this rank's part of all parameters. It changes with any training or loading.

    The version counters of tensors would miss writes through `.data`, which is how DeepSpeed updates.
    """
    total = 0
    for i, parameter in enumerate(model.parameters()):
        part = getattr(parameter, "ds_tensor", parameter)
        part = part.to_local() if hasattr(part, "to_local") else part
        total = (total + (2 * i + 1) * fingerprint(part)) % 2**63
    return total


def write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Write safetensors files of about SHARD_BYTES each, in the order of the weights."""
    from safetensors.torch import save_file

    shard, size, number = {}, 0, 0
    for name, tensor in weights:
        shard[name] = tensor.to("cpu", dtype, copy=True).contiguous()  # safetensors refuses tensors that share memory
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
    if shard:
        save_file(shard, folder / f"{number:05d}.safetensors")


class WeightFiles:
    """Methods that are added to vLLM's worker in a child process."""

    reload_weights: Callable  # the worker's

    def end_with(self, trainer: int, folder: str) -> None:
        """Kill engine and worker and remove the folder when the trainer has ended, also when it was killed.

        vLLM's own processes do not notice that.
        """
        parent = os.getppid()  # the engine, or the trainer where the engine is its own worker

        def watch() -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                while psutil.Process(trainer).status() != psutil.STATUS_ZOMBIE:
                    time.sleep(1)
            shutil.rmtree(folder, ignore_errors=True)
            for process in {parent, os.getpid()} - {trainer}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()

    def load_shards(self, folder: str) -> None:
        """Load the files of write_shards, and remove each after it was read."""
        from safetensors.torch import load_file

        def weights():
            for path in sorted(Path(folder).glob("*.safetensors")):
                yield from load_file(path).items()
                path.unlink()

        self.reload_weights(weights_iterator=weights())
