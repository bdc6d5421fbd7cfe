"""Flags that scripts share, their ranges, what auto means, and the entry of every script."""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from common import UserError
from common.ranges import BELOW_1, NOT_NEGATIVE, POSITIVE, SHARE, Range
from extras import flags, terminal

if TYPE_CHECKING:
    Auto = Any  # no flag is read before its auto is resolved
else:
    Auto = Literal["auto"]
LARGEST = 2**32 - 1  # largest whole number of a flag: numpy takes no larger seed
# row of SETTINGS -> the models it is for
FAMILIES = {"pythia": r"pythia-(14m|31m|70m|160m|410m|1b|1\.4b|2\.8b)(-.*)?", "smollm2": r"smollm2-135m(-.*)?"}


@dataclass
class BaseArgs(flags.StartFlags):
    """Flags of everything that reads a model and data. Those that default to auto are resolved from the SETTINGS table."""

    # flags of training scripts alone; without an annotation they are no fields
    resume = ""
    lora_r = 0
    load_in_4bit = False
    may_be_infinite: ClassVar[tuple[str, ...]] = ("max_grad_norm",)
    may_be_empty: ClassVar[tuple[str, ...]] = ("reward_model",)  # beside the flags that are empty by default

    model: str = "tiny"
    """model to start from: tiny (embedded), a local folder, a short name (zephyr-7b-sft-full, pythia-1.4b, ...) or a hub id."""
    dataset: str = "auto"
    """demonstrations: pydoc (embedded), a .json/.jsonl/.parquet file, a folder, a short name or hub id; several: a:0.7 b:0.3."""
    columns: str = ""
    """names for the columns of your data: prompt=instruction completion=output; empty: by the names that are known."""
    eval_dataset: str = "auto"
    """held-out data; auto: the test split of --dataset (of --preference-dataset where there is one), or a tenth, by prompt."""
    turns: Literal["auto", "first", "last", "all"] = "auto"
    """assistant turns of a dialogue to learn: first, last, or all, a row each; auto: UltraChat first (as SPIN), else last."""
    eval_samples: Annotated[int | Auto, POSITIVE] = "auto"
    """held-out rows to measure on, > 0."""
    max_length: Annotated[int | Auto, POSITIVE] = "auto"
    """window, prompt + response tokens. RFT paper: 1024 (1B), 2048 (7B); AIHF paper: 512 (7B); N+ details: 565."""
    max_prompt_length: Annotated[int | Auto, POSITIVE] = "auto"
    """longest prompt, tokens; rows above it are left out and counted. auto: --max-length minus --max-new-tokens."""
    max_new_tokens: Annotated[int | Auto, POSITIVE] = "auto"
    """longest sampled response, tokens; one cut here has no EOS. SPIN's code: 256; N+ details: 53; papers silent."""
    cut_demonstrations: bool = False
    """cut demonstrations at --max-new-tokens too, without EOS, so that length and end do not tell them from answers."""
    gold_reward_model: str = ""
    """reward model taken as the truth: a folder, short name or hub id; empty: none. RFT paper: beaver-7b-v3.0-reward."""
    baseline: str = ""
    """policy whose samples on the held-out prompts the gold reward compares with (folder, short name or hub id); empty: none."""
    judge_model: str = ""
    """LLM judge of the samples against the demonstrations, by its name at the endpoint; empty: none. Key: OPENAI_API_KEY."""
    judge_base_url: str = ""
    """OpenAI-compatible endpoint of --judge-model, such as http://localhost:8000/v1; empty: OpenAI's own."""
    judge_task: Literal["answer", "summary"] = "answer"
    """what the judge compares: answers to a request, or summaries of a post."""
    per_device_eval_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """rows per forward pass without gradient, and per batch of generation."""
    generation: Literal["hf", "vllm"] = "hf"
    """sampler: transformers, anywhere, or a vLLM engine per process beside the model (docs/generation.md)."""
    vllm_gpu_memory_utilization: Annotated[float, SHARE] = 0.3
    """share of a GPU for vLLM's weights and KV cache, in (0, 1). On CPU the variable VLLM_CPU_KVCACHE_SPACE says it, in GiB."""
    vllm_sleep_level: Literal[0, 1, 2] = 2
    """what vLLM does with its GPU memory between answers: 0 keeps it, 1 moves the weights to RAM, 2 gives all up. Not on CPU."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 where the device multiplies it natively, else no. RFT and AIHF papers: bf16."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the stored weights."""
    attn_implementation: str = "auto"
    """attention of transformers: sdpa, eager, flash_attention_2, ...; auto: flash attention where installed, on CUDA in bf16;
    else sdpa, or eager where a model has none. With flash attention batches have no padding."""
    share_prompts: bool = True
    """score answers to one prompt in one row where the model can: the same numbers, with less work (docs/shared_prompts.md)."""
    template: Literal["auto", "paper"] = "auto"
    """auto: the chat template of --model's tokenizer, else the RFT paper's "### Instruction"; paper: the latter for any model, as
    the paper does for zephyr too. Saved tokenizers then have it as their chat template, so that all that follows asks alike."""
    trust_remote_code: bool = False
    """run the Python code that a hub repository ships. Off unless you ask."""
    seed: Annotated[int, NOT_NEGATIVE] = 1
    """seed of data order and sampling, 0 to 4294967295."""
    output_dir: str = "auto"
    """run directory; auto: runs/<script>__<seed>__<time>. One that holds another run is refused."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """tracker to send the metrics to as well."""

    def check(self) -> None:
        """Raise UserError, naming the flag, for values outside their range. Called after auto values are resolved."""
        check_values(self)
        if not getattr(self, "dry_run", False):
            from extras.launch import check_installed

            check_installed(self)
        require(
            self.max_prompt_length < self.max_length, "max_prompt_length", self.max_prompt_length,
            f"less than --max-length {self.max_length}",
        )  # fmt: skip
        require(
            self.max_prompt_length + self.max_new_tokens <= self.max_length, "max_length", self.max_length,
            f"room for a query and an answer: {self.max_prompt_length} + {self.max_new_tokens}"
            " (--max-prompt-length + --max-new-tokens)",
        )  # fmt: skip
        require(
            not self.baseline or bool(self.gold_reward_model), "baseline", self.baseline,
            "--gold-reward-model beside it, which says whose samples are better",
        )  # fmt: skip
        url = self.judge_base_url
        require(not url or url.startswith(("http://", "https://")), "judge_base_url", url, "http://... or https://...")
        require(not url or bool(self.judge_model), "judge_base_url", url, "--judge-model beside it, the model to ask")


@dataclass
class RunArgs(flags.TrainingFlags, BaseArgs):
    """Flags of every training script."""

    sequences_per_row: ClassVar[int] = 1  # in a forward pass of the policy; a pair has two
    scalar_models: ClassVar[int] = 0  # beside the policy: 1 is a reward model, 2 a value model too
    # flag -> how a run behaved before the flag existed, if that is not its default or its default is auto
    before: ClassVar[dict] = {"template": "auto", "turns": "last", "share_prompts": False}

    max_samples: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """demonstrations to use, the first N in a seeded order; 0 means all. RFT paper, as SPIN: 50,000 of UltraChat200k."""
    select_top_k: Annotated[int, NOT_NEGATIVE] = 0
    """keep the N demonstrations that --gold-reward-model scores highest; 0 keeps all. RFT paper, Sec. 5.2: 10,000."""
    learning_rate: Annotated[float | Auto, POSITIVE] = "auto"
    """peak learning rate of the policy, > 0. RFT paper: 5e-7; AIHF paper: 5e-7 (7B)."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """both without weight decay; rmsprop with the bias correction that torch's lacks. RFT paper: rmsprop; AIHF paper: silent."""
    warmup_ratio: Annotated[float, BELOW_1] = 0.1
    """part of the updates in which the learning rate rises linearly; then it falls to 0. RFT's released code: 0.1."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """gradient norm is clipped at this value, > 0; inf: not clipped. Default of transformers' Trainer, with which RFT's released
    code trains: 1."""
    batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """rows (demonstrations or pairs) per optimizer step over all devices. RFT paper: 8 or 16; AIHF: 8 (7B); IRL: 64."""
    per_device_train_batch_size: Annotated[int | Auto, POSITIVE] = "auto"
    """rows per forward pass: changes memory, never the gradient; accumulation steps follow from it."""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time."""
    lora_r: Annotated[int, NOT_NEGATIVE] = 0
    """rank of LoRA adapters on all linear layers; 0 trains all weights. RFT paper's LoRA variant: 64."""
    lora_alpha: Annotated[int, POSITIVE] = 16
    """LoRA scale numerator, > 0. RFT's released code: 16."""
    load_in_4bit: bool = False
    """QLoRA: the frozen base in 4 bits (nf4), with --lora-r, on a CUDA GPU with bitsandbytes; not where a reward is learned."""
    save_steps: Annotated[int, POSITIVE] = 100
    """optimizer steps between checkpoints inside a training phase, > 0; one is also written at the end of each phase."""
    logging_steps: Annotated[int, POSITIVE] = 1
    """optimizer steps between rows of metrics.jsonl, > 0."""
    push_to_hub: str = ""
    """at the end, put the models and pairs on the Hugging Face hub as ID, ID-reward and ID-pairs, private; empty: do not."""
    resume: str = ""
    """run directory to continue; its own settings are used."""
    dry_run: bool = False
    """print the plan (steps, tokens, operations, memory, and hours at a given rate) and exit."""
    tokens_per_second: Annotated[float | Literal["measure"], NOT_NEGATIVE] = 0.0
    """for hours in the plan: tokens that a device trains on in a second, >= 0; 0: no hours; measure: of steps made here."""
    generation_tokens_per_second: Annotated[float, NOT_NEGATIVE] = 0.0
    """the same of generation: tokens that a device samples in a second, >= 0; 0: as measured, else no hours of generation."""
    num_processes: Annotated[int, NOT_NEGATIVE] = 0
    """devices of the plan, >= 0; 0: as many as are launched."""

    def check(self) -> None:
        super().check()
        require(
            not self.load_in_4bit or (self.lora_r > 0 and not self.scalar_models), "load_in_4bit", True,
            "--lora-r above 0 beside it, in a script without a reward model: 4-bit weights are neither trained nor replaced",
        )  # fmt: skip
        require(
            not self.select_top_k or bool(self.gold_reward_model), "select_top_k", self.select_top_k,
            "--gold-reward-model beside it, which scores the demonstrations",
        )  # fmt: skip


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def require(ok: bool, name: str, found, expected: str) -> None:
    """UserError `--flag: found X, expected Y` unless ok."""
    if not ok:
        raise UserError(f"{flag(name)}: found {found}, expected {expected}")


def ranges_of(cls) -> dict[str, Range]:
    """{name of a flag: the range in its type}."""
    hints = get_type_hints(cls, include_extras=True)
    found = {
        name: [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)] for name, hint in hints.items()
    }
    return {name: ranges[0] for name, ranges in found.items() if ranges}


def check_values(args: BaseArgs) -> None:
    """Raise UserError for a number outside the range of its flag, and for one that is not finite."""
    ranges = ranges_of(type(args))
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and field.name not in args.may_be_infinite:
            require(math.isfinite(value), field.name, value, "a finite number")
        elif isinstance(value, int):
            require(value <= LARGEST, field.name, value, f"at most {LARGEST}")
        if field.name in ranges and value != "measure":
            expected, holds = ranges[field.name]
            require(holds(value), field.name, value, expected)


def first_model(name: str) -> str:
    """Name, in lower case, of the model that a run began with, if it made this one; else the model's own name."""
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, RecursionError
    ):  # no args.json, or not one of ours
        if Path(name).is_dir():
            return first_model(json.loads((Path(name).parent / "args.json").read_text())["args"]["model"])
    return Path(name).name.lower()


def settings_row(model: str, settings: dict[str, dict]) -> str:
    """Key of the row of `settings` for a model: the row named as first_model, or whose FAMILIES match it; else `other`."""
    name = first_model(model)
    return next((k for k in settings if re.fullmatch(FAMILIES.get(k, re.escape(k)), name)), "other")


def resolve_auto(args: BaseArgs, settings: dict[str, dict]) -> str:
    """Fill the flags that are still auto from the row of `settings` for the model. Returns the key of the row."""
    key = settings_row(args.model, settings)
    given = [f for f in ("dataset", "preference_dataset") if getattr(args, f, "auto") != "auto"]
    for field, value in settings[key].items():
        if getattr(args, field) == "auto":
            setattr(args, field, value)
    if args.max_prompt_length == "auto":
        args.max_prompt_length = max(args.max_length - args.max_new_tokens, 1)
    if len(given) == 1 and hasattr(args, "preference_dataset"):
        from extras.command_line import check_sources

        check_sources(args, given[0])
    return key


def parse_args(cls, description: str, settings: dict[str, dict]):
    """Command line -> args with every auto resolved. With --resume the run's own args come back; others are refused."""
    from extras.command_line import given_args
    from extras.launch import check_launch

    check_launch()
    args = given_args(cls, description)
    row = settings_row(args.model, settings)
    filled = any(getattr(args, name) == "auto" for name in settings[row])
    resolve_auto(args, settings)
    args.check()
    if os.environ.get("RANK", "0") == "0" and filled and len(settings) > 1:
        models = {"other": "any other model", "pythia": "pythia up to 2.8b", "smollm2": "smollm2-135m"}.get(row, row)
        print(f"settings: those for {models} (--model {args.model}) where no flag is given", flush=True)
    if getattr(args, "dry_run", False) and os.environ.get("RANK", "0") != "0":
        sys.exit(0)  # rank 0 prints the plan
    return args


def main(script_main: Callable[[], None]) -> None:
    """Run a script's main: its errors and signals end in one line and an exit status (extras/terminal.py)."""
    terminal.run(script_main)
