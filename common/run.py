"""What every run shares: flags, processes, run directory, metrics, progress, optimizer steps, checkpoints and resume."""

import configparser
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import math
import netrc
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import torch

from common import UserError, engines, terminal
from common.data import collate, read_pairs, stop_at_end_of_turn, write_pairs

Auto = Literal["auto"]
LARGEST = 2**32 - 1  # of whole numbers: numpy takes no larger seed
RANGES = {  # expected -> whether a number is so
    "a number above 0": lambda x: x > 0,
    "0 or more": lambda x: x >= 0,
    "1 or more": lambda x: x >= 1,
    "2 or more, to choose a pair from": lambda x: x >= 2,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "a share above 0 and below 1": lambda x: 0 < x < 1,
    "a number above 0 and at most 1": lambda x: 0 < x <= 1,
    "between 0 and 1": lambda x: 0 <= x <= 1,
    "any number": lambda x: True,
}
FAMILIES = {"pythia": r"pythia-(14m|31m|70m|160m|410m|1b|1\.4b|2\.8b)(-.*)?"}  # row of SETTINGS -> the models it is for
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}  # their packages


@dataclass
class BaseArgs:
    """Flags of everything that reads a model and data. Those that default to auto are resolved from the SETTINGS table."""

    resume: ClassVar[str] = ""  # a flag of training scripts
    lora_r: ClassVar[int] = 0
    load_in_4bit: ClassVar[bool] = False
    ranges: ClassVar[dict[str, tuple[str, ...]]] = {  # key of RANGES -> flags; a subclass adds its own
        "a number above 0": (
            "eval_samples", "max_length", "max_prompt_length", "max_new_tokens", "per_device_eval_batch_size",
        ),
        "a share above 0 and below 1": ("vllm_gpu_memory_utilization",),
        "0 or more": ("seed",),
    }  # fmt: skip
    may_be_infinite: ClassVar[tuple[str, ...]] = ("max_grad_norm",)
    may_be_empty: ClassVar[tuple[str, ...]] = ("reward_model",)  # beside the flags that are empty by default

    model: str = "tiny"
    """model to start from: tiny (embedded), a local folder, a short name (zephyr-7b-sft-full, pythia-1.4b, ...) or a hub id."""
    dataset: str = "auto"
    """demonstrations: pydoc (embedded), a .json/.jsonl/.parquet file, a folder, a short name or a hub id."""
    eval_dataset: str = "auto"
    """held-out data; auto: the test split of --dataset (of --preference-dataset where there is one), or a tenth, by prompt."""
    turns: Literal["auto", "first", "last", "all"] = "auto"
    """assistant turns of a dialogue to learn: first, last, or all, a row each; auto: UltraChat first (as SPIN), else last."""
    eval_samples: int | Auto = "auto"
    """held-out rows to measure on, > 0."""
    max_length: int | Auto = "auto"
    """window, prompt + response tokens. RFT paper: 1024 (1B), 2048 (7B); AIHF paper: 512 (7B); N+ details: 565."""
    max_prompt_length: int | Auto = "auto"
    """longest prompt, tokens; rows above it are left out and counted. auto: --max-length minus --max-new-tokens."""
    max_new_tokens: int | Auto = "auto"
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
    per_device_eval_batch_size: int | Auto = "auto"
    """rows per forward pass without gradient, and per batch of generation."""
    generation: Literal["hf", "vllm"] = "hf"
    """sampler: transformers, anywhere, or a vLLM engine per process beside the model (docs/generation.md)."""
    vllm_gpu_memory_utilization: float = 0.3
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
    template: Literal["auto", "paper"] = "auto"
    """auto: the chat template of --model's tokenizer, else the RFT paper's "### Instruction"; paper: the latter for any model, as
    the paper does for zephyr too. Saved tokenizers then have no chat template, so that all that follows asks alike."""
    trust_remote_code: bool = False
    """run the Python code that a hub repository ships. Off unless you ask."""
    seed: int = 1
    """seed of data order and sampling, 0 to 4294967295."""
    output_dir: str = "auto"
    """run directory; auto: runs/<script>__<seed>__<time>. One that holds another run is refused."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """tracker to send the metrics to as well."""

    def check(self) -> None:
        """UserError, naming the flag, for values outside their range. Called after auto values are resolved."""
        check_values(self)
        if not getattr(self, "dry_run", False):
            check_tracker(self.report_to)
        installed = importlib.util.find_spec("vllm") is not None
        require(
            self.generation == "hf" or installed or getattr(self, "dry_run", False), "generation",
            "vllm, which is not installed here",
            "hf, or vLLM installed: pip install -r requirements-gpu.txt (without an NVIDIA GPU: make install-vllm)",
        )  # fmt: skip
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
class RunArgs(BaseArgs):
    """Flags of every training script."""

    sequences_per_row: ClassVar[int] = 1  # in a forward pass of the policy; a pair has two
    scalar_models: ClassVar[int] = 0  # beside the policy: 1 is a reward model, 2 a value model too
    ranges: ClassVar[dict[str, tuple[str, ...]]] = {
        "a number above 0": (
            "learning_rate", "batch_size", "per_device_train_batch_size", "max_grad_norm", "lora_alpha", "save_steps",
            "logging_steps",
        ),
        "0 or more": ("max_samples", "select_top_k", "lora_r"),
        "at least 0 and below 1": ("warmup_ratio",),
    }  # fmt: skip
    # flag -> what a run did that was made before the flag was, where that is not the default or the default is auto
    before: ClassVar[dict] = {"template": "auto", "turns": "last"}

    max_samples: int | Auto = "auto"
    """demonstrations to use, the first N in a seeded order; 0 means all. RFT paper, as SPIN: 50,000 of UltraChat200k."""
    select_top_k: int = 0
    """keep the N demonstrations that --gold-reward-model scores highest; 0 keeps all. RFT paper, Sec. 5.2: 10,000."""
    learning_rate: float | Auto = "auto"
    """peak learning rate of the policy, > 0. RFT paper: 5e-7; AIHF paper: 5e-7 (7B)."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """both without weight decay; rmsprop with the bias correction that torch's lacks. RFT paper: rmsprop; AIHF paper: silent."""
    warmup_ratio: float = 0.1
    """part of the updates in which the learning rate rises linearly; then it falls to 0. RFT's released code: 0.1."""
    max_grad_norm: float = 1.0
    """gradient norm is clipped at this value, > 0; inf: not clipped. Default of transformers' Trainer, with which RFT's released
    code trains: 1."""
    batch_size: int | Auto = "auto"
    """rows (demonstrations or pairs) per optimizer step over all devices. RFT paper: 8 or 16; AIHF: 8 (7B); IRL: 64."""
    per_device_train_batch_size: int | Auto = "auto"
    """rows per forward pass: changes memory, never the gradient; accumulation steps follow from it."""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time."""
    lora_r: int = 0
    """rank of LoRA adapters on all linear layers; 0 trains all weights. RFT paper's LoRA variant: 64."""
    lora_alpha: int = 16
    """LoRA scale numerator, > 0. RFT's released code: 16."""
    load_in_4bit: bool = False
    """QLoRA: the frozen base in 4 bits (nf4), with --lora-r, on a CUDA GPU with bitsandbytes; not where a reward is learned."""
    save_steps: int = 100
    """optimizer steps between checkpoints inside a training phase, > 0; one is also written at the end of each phase."""
    logging_steps: int = 1
    """optimizer steps between rows of metrics.jsonl, > 0."""
    resume: str = ""
    """run directory to continue; its own settings are used."""
    dry_run: bool = False
    """print the plan (steps, tokens to generate, memory) and exit."""

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


def check_values(args: BaseArgs) -> None:
    """UserError for a number outside the range that its class declares, and for one that is not finite."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and field.name not in args.may_be_infinite:
            require(math.isfinite(value), field.name, value, "a finite number")
        elif isinstance(value, int):
            require(value <= LARGEST, field.name, value, f"at most {LARGEST}")
    for cls in reversed(type(args).__mro__):
        for expected, names in vars(cls).get("ranges", {}).items():
            for name in names:
                require(RANGES[expected](getattr(args, name)), name, getattr(args, name), expected)


def check_tracker(name: str) -> None:
    """UserError unless a tracker is installed and wandb would not ask for a key: found now, not once models are loaded."""
    if name == "none":
        return
    installed = any(importlib.util.find_spec(package) for package in TRACKERS[name])
    require(
        installed, "report_to", f"{name}, which is not installed here", f"none, or {name} installed: pip install {name}"
    )
    require(
        name != "wandb" or wandb_can_start(), "report_to", "wandb, which has no key here",
        "none, or a key (wandb login, or the variable WANDB_API_KEY), or WANDB_MODE=offline",
    )  # fmt: skip


def wandb_can_start() -> bool:
    """True if wandb has a key, in the environment, a settings file or netrc, or is told to do without: offline, disabled."""
    home, variable = Path.home(), os.environ.get
    stored = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
        folder = Path(variable("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
        stored.read([folder / "settings", Path(variable("WANDB_DIR") or ".") / "wandb" / "settings"])
    settings = stored["default"] if "default" in stored else {}
    mode = variable("WANDB_MODE") or settings.get("mode", "online")
    if mode in ("offline", "dryrun", "disabled") or settings.get("api_key"):
        return True
    if variable("WANDB_API_KEY") or variable("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(variable("WANDB_BASE_URL") or settings.get("base_url", "https://api.wandb.ai")).netloc
    for path in [variable("NETRC")] if variable("NETRC") else [home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def first_model(name: str) -> str:
    """Name, in lower case, of the model that a model in a run directory was made from; of any other model its own."""
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, RecursionError
    ):  # no args.json, or not one of ours
        if Path(name).is_dir():
            return first_model(json.loads((Path(name).parent / "args.json").read_text())["args"]["model"])
    return Path(name).name.lower()


def settings_row(model: str, settings: dict[str, dict]) -> str:
    """Key of the row of `settings` for a model: the one that first_model is, or whose FAMILIES it is of; else `other`."""
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
        check_sources(args, given[0])
    return key


def check_sources(args, given: str) -> None:
    """UserError if a user's own source of one kind would be joined by the table's source of the other kind."""
    missing = "preference_dataset" if given == "dataset" else "dataset"
    if given == "dataset" or (args.needs_demonstrations() and args.preference_dataset != "none"):
        raise UserError(
            f"{flag(missing)}: found none beside {flag(given)} {getattr(args, given)}, expected a source too; one may be both"
        )


def parse_args(cls, description: str, settings: dict[str, dict]):
    """Command line -> args with every auto resolved. With --resume the run's own args come back; others are refused."""
    check_launch()
    args = command_line(cls, description)
    if args.resume:
        saved = saved_args(cls, args.resume)
        same = args.output_dir == "auto" or Path(args.output_dir).resolve() == Path(args.resume).resolve()
        require(
            same, "output_dir", args.output_dir, f"none beside --resume {args.resume}, which goes on in its own folder"
        )
        for name, given in vars(command_line(cls, description, saved)).items():
            if name not in ("resume", "dry_run", "output_dir") and given not in ("auto", getattr(saved, name)):
                raise UserError(
                    f"{flag(name)}: found {given}, but the run in {args.resume} has {getattr(saved, name)};"
                    " a resumed run keeps its settings"
                )
        args = dataclasses.replace(saved, resume=args.resume, output_dir=args.resume, dry_run=args.dry_run)
    elif any(word.partition("=")[0] == "--resume" for word in sys.argv[1:]):  # such as --resume "$RUN" of a shell
        require(False, "resume", "an empty text", "a run directory")
    for field in dataclasses.fields(cls):  # before a name is looked up: "" would be the current folder
        empty = (
            field.default != "" and field.name not in cls.may_be_empty and not str(getattr(args, field.name)).strip()
        )
        require(not empty, field.name, "an empty text", "a value")
    row = settings_row(args.model, settings)
    filled = any(getattr(args, name) == "auto" for name in settings[row])
    resolve_auto(args, settings)
    args.check()
    if os.environ.get("RANK", "0") == "0" and filled and len(settings) > 1:
        models = {"other": "any other model", "pythia": "pythia up to 2.8b"}.get(row, row)
        print(f"settings: those for {models} (--model {args.model}) where no flag is given", flush=True)
    if getattr(args, "dry_run", False) and os.environ.get("RANK", "0") != "0":
        sys.exit(0)  # rank 0 prints the plan
    return args


# ---- the command line ----
def command_line(cls, description: str, default=None):
    """The words of the command line as a `cls`, by tyro, over a default. UserError, one line, for what is not a flag or value."""
    import tyro

    printed = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, description=description, **given)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    wrong = wrong_word(cls, sys.argv[1:])
    said = re.split("[-─]{4,}", re.sub("[│╭╮╰╯]", "", printed.getvalue()))  # tyro's heading, what is wrong, help
    raise UserError(wrong or " ".join(said[:2][-1].split()))


def wrong_word(cls, words: list[str]) -> str:
    """Return one line about the first wrong word of a command line; empty if all are right."""
    types_of = get_type_hints(cls)
    known = {flag(field.name): types_of[field.name] for field in dataclasses.fields(cls)}
    known |= {f"--no-{name[2:]}": kind for name, kind in known.items() if kind is bool}
    before, rest = "", iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        name = name.replace("_", "-")
        if name not in known:
            if before and not word.startswith("-"):
                return f"{before}: found the value {word}, expected none: the flag alone says yes, --no-... says no"
            if not word.startswith("--"):
                return f"{word}: found a word without a flag, expected --flag value (see --help)"
            near = "".join(f"{n}, or " for n in difflib.get_close_matches(name, known, 1))
            return f"{word}: found no flag of this name, expected {near}one that --help shows"
        before = name if known[name] is bool else ""
        if known[name] is bool and given:
            return f"{name}: found the value {value}, expected none: the flag alone says yes, --no-... says no"
        if known[name] is not bool:
            value = value if given else next(rest, None)
            if value is None or not reads(value, known[name]):
                found = "no value" if value is None else value or "an empty text"
                return f"{name}: found {found}, expected {in_words(known[name])}"
    return ""


def kinds_of(kind) -> tuple:
    """The types of a union, else the one type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def reads(text: str, kind) -> bool:
    """True if a word of the command line is a value of a flag's type."""

    def one(kind) -> bool:
        if get_origin(kind) is Literal:
            return text in map(str, get_args(kind))
        try:
            return kind(text) is not None
        except ValueError:
            return False

    return any(map(one, kinds_of(kind)))


def holds(value, kind) -> bool:
    """True if a value from a JSON file is of a flag's type."""

    def one(kind) -> bool:
        if get_origin(kind) is Literal:
            return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
        return type(value) is kind or (kind is float and type(value) is int)

    return any(map(one, kinds_of(kind)))


def in_words(kind) -> str:
    """A flag's type as an error names it: a number or auto."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    choices = [", ".join(map(str, get_args(k))) if get_origin(k) is Literal else names[k] for k in kinds_of(kind)]
    return "one of " * (", " in choices[0]) + " or ".join(choices)


def saved_args(cls, folder: str):
    """The args that a run wrote to its args.json. UserError, one line, for what a run of this script has not written.

    A flag that is missing there is newer than the run, which goes on without it: as its default is, or as cls.before says.
    """
    path, script = Path(folder) / "args.json", Path(inspect.getfile(cls)).stem
    if not path.is_file():
        raise UserError(f"--resume: found no args.json in {folder}, expected a run directory")
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--resume: {path}: found broken JSON ({error}), expected what a run writes there") from None
    saved = stored.get("args") if isinstance(stored, dict) else None
    if not isinstance(saved, dict):
        raise UserError(
            f"--resume: {path}: found {json.dumps(stored):.60}, expected script and args, as a run writes them"
        )
    if stored.get("script", script) != script:
        raise UserError(f"--resume: found a run of {stored['script']}.py in {folder}, expected one of {script}.py")
    types_of = get_type_hints(cls)
    default = {field.name: field.default for field in dataclasses.fields(cls)}
    made_at = f"the version that made the run (commit {stored.get('commit') or 'unknown'})"
    if unknown := ", ".join(flag(str(name)) for name in saved if name not in default):
        raise UserError(f"--resume: {path}: found {unknown}, which this version does not know; expected {made_at}")
    newer = {name: cls.before.get(name, value) for name, value in default.items() if name not in saved}
    if unclear := ", ".join(flag(name) for name in newer if name not in cls.before and default[name] == "auto"):
        raise UserError(
            f"--resume: {path}: found no {unclear}, whose value depends on the model in this version; expected {made_at}"
        )
    for name, value in saved.items():
        if not holds(value, types_of[name]):
            found = f"{flag(name)} {json.dumps(value):.60}"
            raise UserError(f"--resume: {path}: found {found}, expected {in_words(types_of[name])}")
    if newer and os.environ.get("RANK", "0") == "0":
        listed = ", ".join(f"{flag(name)} {value!r}" for name, value in newer.items())
        print(f"--resume: {path} is older than {listed}: what the run has done so far", flush=True)
    return cls(**saved, **newer)


def one_line_warning(message, category, filename, lineno, line=None) -> str:
    """warnings.formatwarning for users: what is said, without our source line, once for all ranks."""
    return f"warning: {' '.join(str(message).split())}\n" if os.environ.get("RANK", "0") == "0" else ""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo")


def main(script_main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit status 2, a warning one line of rank 0.

    A signal ends it with one line and status 128 + its number (Run._on_signal). A stream that is closed, or on a full disk,
    costs what is printed and nothing else; the latter gives status 1.
    """
    terminal.catch()
    terminal.be_patient()
    shown, warnings.formatwarning = warnings.formatwarning, one_line_warning
    status: int | str | None = 0
    try:
        try:
            script_main()
        except Exception as error:
            status = report_failure(error)
        else:
            if lost := terminal.lost_output():
                print(f"error: stdout: {lost}; what was printed is lost, nothing else is", file=sys.stderr)
                status = 1
    except SystemExit as stop:
        status = stop.code
    finally:
        warnings.formatwarning = shown
    if "RANK" in os.environ and status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)  # the launcher ends the other ranks
    if status:
        sys.exit(status)


def report_failure(error: Exception) -> int:
    """Say what ended a script -> its exit status. An error that is not the user's is raised again, with what is saved in it."""
    if isinstance(error, UserError):
        print("error: " + str(error).replace("\n", " "), file=sys.stderr, flush=True)
        return 2
    if terminal.asked:  # another rank, or vLLM's process, has followed the signal and was missed
        name, rank = signal.Signals(terminal.asked).name, os.environ.get("RANK", "0")
        if rank == "0":
            terminal.tell(f"{name}: stopped ({type(error).__name__} on the way){Run.hint and f';{Run.hint}'}", 1)
        return 128 + terminal.asked
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        after = Run.hint and f"; free space, then{Run.hint}"
        print(f"error: {error}{after}", file=sys.stderr, flush=True)
        return 2
    if "RANK" not in os.environ:
        if Run.hint:
            error.add_note(f"What is saved is kept;{Run.hint}")
        raise error
    rank = os.environ["RANK"]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(word in str(error) for word in PEER_ENDED):
        time.sleep(1)  # a signal to all ranks may be on its way to this one
        reason = " ".join(str(error).split())[:120]
        print(f"rank {rank} lost another rank, whose message says why ({reason})", file=sys.stderr, flush=True)
        return 1
    traceback.print_exception(error)
    print(
        f"rank {rank} failed: {type(error).__name__}: {error}. What is saved is kept;{Run.hint}",
        file=sys.stderr,
        flush=True,
    )
    return 1


# ---- the launch ----
def check_launch() -> None:
    """UserError where the environment asks for processes that could not find each other, or an engine that is not installed."""
    numbers = {"WORLD_SIZE": 0, "RANK": 0, "LOCAL_RANK": 0}
    for name in numbers.keys() & os.environ.keys():
        if not re.fullmatch(r"-?\d+", os.environ[name]):
            found = f"{name}: found {os.environ[name]!r} in the environment"
            raise UserError(f"{found}, expected a whole number, as torchrun sets it")
        numbers[name] = int(os.environ[name])
    world = numbers["WORLD_SIZE"]
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if world > 1 and missing:
        raise UserError(
            f"WORLD_SIZE: found {world} in the environment but no {', '.join(missing)}, expected all that torchrun and"
            f" accelerate launch set: unset WORLD_SIZE, or type accelerate launch --num_processes {world} ..."
        )
    if world and numbers["RANK"] >= world:
        raise UserError(f"RANK: found {numbers['RANK']} in the environment, expected 0 to {world - 1} (WORLD_SIZE - 1)")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not importlib.util.find_spec("deepspeed"):
        raise UserError(
            "DeepSpeed, which the accelerate config asks for: found it not installed here, expected pip install -r"
            " requirements-engines.txt, or another file of configs/"
        )


def expected_processes() -> int:
    """How many processes the launcher was asked for: torchrun's WORLD_SIZE, or the words of `accelerate launch`."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    import psutil
    import yaml

    words = psutil.Process().parent().cmdline() if psutil.Process().parent() else []
    if "launch" not in words or not any("accelerate" in w for w in words):
        return 1
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name in ("--num_processes", "--num-processes"):
        if name in words:
            return int(words[words.index(name) + 1])
    for name in ("--config_file", "--config-file"):
        if name in words:
            return int(yaml.safe_load(Path(words[words.index(name) + 1]).read_text()).get("num_processes") or 1)
    return 1


def native_bf16() -> bool:
    """True where bf16 products are faster than float32 ones: CUDA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def mixes_bf16(args) -> bool:
    """Whether --mixed-precision means bf16 here."""
    return args.mixed_precision == "bf16" or (args.mixed_precision == "auto" and native_bf16())


def uses_bf16(args) -> bool:
    """Whether models compute in bf16, stored so or under mixed precision."""
    return args.dtype == "bfloat16" or mixes_bf16(args)


@contextlib.contextmanager
def progress(phase: str, total: int, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with ETA on a terminal, a line every 15 s elsewhere. Yields advance(n)."""
    from rich import progress as bars

    if show and sys.stderr.isatty():
        from rich.console import Console

        columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn()]
        columns += [bars.TimeElapsedColumn(), bars.TextColumn("ETA"), bars.TimeRemainingColumn()]
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(phase, total=total)
            yield lambda n=1: bar.advance(task, n)
        return
    done, started, spoken = 0, time.time(), time.time()

    def advance(n: int = 1) -> None:
        nonlocal done, spoken
        done += n
        if show and time.time() - spoken > 15:
            spoken = time.time()
            eta = (spoken - started) * (total - done) / max(done, 1)
            print(f"  {phase}: {done}/{total}, ETA {eta:.0f} s", file=sys.stderr, flush=True)

    yield advance


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
    """RMSprop or AdamW, torch defaults but for what is given. The learning rate is set at every step.

    parts: parameters, once for each part of the model that may have a learning rate of its own (Run.step).
    """
    groups = [{"params": [p for p in part if p.requires_grad]} for part in parts]
    kind = torch.optim.RMSprop if name == "rmsprop" else torch.optim.AdamW
    return kind(groups, lr=0.0, eps=eps, weight_decay=weight_decay)


def bias_correction(optimizer) -> float:
    """Factor of the next step's learning rate: RMSprop's correction for a mean of squares that starts at 0, which torch lacks.

    Without it the steps under an even gradient are 10, 7.1, 5.8, ... times the learning rate whenever the state is new.
    1 for other optimizers: AdamW corrects by itself. Kingma and Ba, arXiv:1412.6980, Sec. 3, with beta1 = 0.
    """
    alpha = optimizer.param_groups[0].get("alpha")
    if alpha is None:
        return 1.0
    done = next(iter(optimizer.state.values()), {}).get("step", 0)  # the same of all parameters (engines.clip)
    return math.sqrt(1 - alpha ** (float(done) + 1))


def stream_seed(*key: int) -> int:
    """Seed of the random stream that a key names: a resumed run needs no stream position."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def data_order(n: int, *key: int) -> list[int]:
    """A permutation of range(n) that is a function of the key alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(stream_seed(*key))).tolist()


def names_flag_when_out_of_memory(name: str):
    """Of a method of Run: an allocator's error becomes one line with the flag `name` to lower and the plan's estimate."""

    def decorate(method):
        @functools.wraps(method)
        def wrapped(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                from common.memory import explain_out_of_memory  # it imports this file

                explain_out_of_memory(error, self.args, name)
                raise

        return wrapped

    return decorate


def leaves_nothing_half_written(method):
    """Decorate a method of Run that writes a folder as .partial_*: a failed write becomes one line, and its part is removed."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            for partial in self.dir.glob(".partial_*"):
                shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError) and "os error" not in str(error):  # as safetensors words its own
                raise
            reason = " ".join(str(error).split())[:200]
            after = Run.hint and f"; free space, then{Run.hint}"
            raise UserError(f"the model could not be written to {self.dir} ({reason}){after}") from error

    return wrapped


class Run:
    """One run of one script: its processes, its directory, its log and its checkpoints."""

    hint: ClassVar[str] = ""  # how to continue the run of this process, once it can be
    engine = "plain"  # engines.engine_name
    views: ClassVar[dict] = {}  # prepared model -> its view

    def __init__(self, args: BaseArgs, script: str, metrics: dict[str, str]):
        from accelerate.utils import ProjectConfiguration, set_seed
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # ours speak for the phases
        self.args, self.script, self.metrics = args, script, metrics
        self.can_resume = any(field.name == "resume" for field in dataclasses.fields(args))
        expected = expected_processes()
        # decided here once: args.json says it, so that a run goes on in its precision on whatever machine resumes it
        precision = args.mixed_precision = "bf16" if mixes_bf16(args) else "no"
        log_with = None if args.report_to == "none" else args.report_to
        self.dir = Path(args.resume or args.output_dir)
        project = ProjectConfiguration(logging_dir=str(self.dir))  # the directory is settled below, by rank 0
        self.accelerator = engines.open_accelerator(
            mixed_precision=precision, log_with=log_with, project_config=project
        )
        if args.lora_r:
            self.accelerator.register_save_state_pre_hook(leave_out_loaded)
        if self.accelerator.num_processes != expected:
            raise UserError(
                f"launched for {expected} processes, but accelerate runs {self.accelerator.num_processes}: they would train"
                f" apart. Type: accelerate launch --config_file configs/cpu.yaml --num_processes {expected} {script}.py ..."
            )
        self.engine = engines.engine_name(self.accelerator)
        one = "one process, or DDP (configs/ddp.yaml): 4-bit weights are not cut up"
        require(not args.load_in_4bit or self.engine == "plain", "load_in_4bit", self.engine, one)
        known = args.dtype == "float32" or precision == "bf16" or not self.engine.startswith("zero")
        require(
            known,
            "dtype",
            f"{args.dtype} without mixed precision, under {self.engine}",
            "--mixed-precision bf16 beside it",
        )
        self.views = {}
        self.rank, self.world, self.is_main = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.accelerator.is_main_process,
        )
        if os.environ.get("OMP_NUM_THREADS") is None and self.accelerator.device.type == "cpu" and self.world > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.world))
        set_seed(args.seed)
        self.stop_requested, self.stop_signal = 0.0, 0  # when a stop was asked for, and by which signal
        self.in_updates = False  # whether weights change
        self.probe: tuple | None = None  # of the last update, for refuse_diverged
        terminal.catch(self._on_signal)
        self._make_directory()
        if log_with:
            project.logging_dir = str(self.dir)
            kept = tracker_settings(args.report_to, self.dir) if self.is_main else {}
            self.accelerator.init_trackers("cleanirl", config=flat_config(args), init_kwargs=kept)
        self.position: dict = {"outer_iteration": 0, "step": 0}  # optimizer steps that are done; the loops' own counts
        self.update: dict[str, int] = {}  # the update in progress, as its row of metrics names it
        self.saved, self.last_step = "", 0  # position of the last checkpoint; step of the last row of metrics
        self.seconds: dict[str, float] = {}

    @staticmethod
    def print_plan(args: BaseArgs, script: str, *lines: str) -> None:
        """--dry-run: print what would run, and the memory it would take."""
        from common.memory import print_memory_plan  # it imports this file

        print(f"{script} --dry-run: model {args.model}, {lines[0]}", *lines[1:], sep="\n  ")
        print_memory_plan(args)

    # ---- directory ----
    def _make_directory(self) -> None:
        """Create (or, with --resume, reopen) the run directory; rank 0 decides its name, all ranks learn it."""
        from accelerate.utils import broadcast_object_list

        problem = None
        if self.is_main:
            try:
                self._open_directory()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                name = "--resume" if self.args.resume else "--output-dir"
                problem = f"{name}: {self.dir} could not be opened: {error}; expected a folder that can be written"
        message = broadcast_object_list([problem, str(self.dir)])
        if message[0]:
            raise UserError(message[0])
        self.dir = Path(message[1])

    def _open_directory(self) -> None:
        from common.inputs import changed_inputs, digests  # it imports this file

        args = self.args
        if args.output_dir == "auto" and not args.resume:
            self.dir = new_directory(Path("runs") / f"{self.script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
        used = f"--output-dir: {self.dir} already holds files; expected a new or empty folder"
        used += f", or --resume {self.dir}" if self.can_resume else ""
        if not args.resume and self.dir.exists() and not untouched(self.dir):
            raise UserError(used)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.dir)
        if args.resume:
            changed_inputs(args, json.loads((self.dir / "args.json").read_text()))
        elif not untouched(self.dir):  # another process was faster
            raise UserError(used)
        for name in ("samples", "evals", *(("generations", "checkpoint") if self.can_resume else ())):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        if not args.resume:
            made_by = {"script": self.script, "args": dataclasses.asdict(args), "inputs": digests(args)}
            write_json(self.dir / "args.json", {**made_by, **environment()})
        if self.can_resume:
            Run.hint = f" continue with --resume {self.dir}"

    def _on_signal(self, number: int, _=None) -> None:
        """Between updates there is something to save: stop_if_asked does it. Elsewhere the last checkpoint says it all.

        A launcher that is stopped with its processes passes the signal on: one that comes again at once is the same.
        """
        if not self.in_updates or (self.stop_requested and time.time() - self.stop_requested > 10):
            self._stop(number)
        if not self.stop_requested and self.is_main and sys.stderr.isatty():
            terminal.tell(f"{signal.Signals(number).name}: stopping after this update", 2)
        self.stop_requested, self.stop_signal = self.stop_requested or time.time(), self.stop_signal or number
        terminal.asked = number

    def _stop(self, number: int) -> None:
        if self.is_main:
            terminal.tell(f"{signal.Signals(number).name}: stopped{Run.hint and f';{Run.hint}'}", 1)
        terminal.leave(number)

    def stop_if_asked(self, position: dict | None = None) -> None:
        """After a signal on any rank: write a checkpoint and exit on all ranks, with status 128 + its number."""
        asked = torch.tensor([float(self.stop_signal == n) for n in terminal.SIGNALS], device=self.accelerator.device)
        asked = self.accelerator.reduce(asked).tolist()
        if any(asked):
            self.save_checkpoint(position)
            self._stop(next(n for n, found in zip(terminal.SIGNALS, asked, strict=True) if found))

    def finished(self) -> bool:
        """True, and says so, if --resume names a run that has its final model."""
        done = bool(self.args.resume) and (self.dir / "final").is_dir()
        if done:
            self.say(f"{self.dir} is finished: its model is in {self.dir / 'final'}")
        return done

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    # ---- metrics ----
    def log(self, row: dict[str, float], **axis: int) -> None:
        """Append one row to metrics.jsonl, null for what is not a finite number; an eval/nll that is none is a UserError.

        KeyError on a name that METRICS does not describe.
        """
        if unknown := row.keys() - self.metrics.keys():
            raise KeyError(f"describe {sorted(unknown)} in METRICS")
        self.last_step = max(self.last_step, axis.get("step", 0))
        if self.is_main:
            with open(self.dir / "metrics.jsonl", "a") as f:
                f.write(json.dumps({**axis, **without_nan(row)}, allow_nan=False) + "\n")
        if self.args.report_to != "none":
            self.accelerator.log(row, step=axis.get("step"))
        if not math.isfinite(nll := row.get("eval/nll", 0.0)):
            raise UserError(
                f"found eval/nll {nll} on held-out rows, expected a finite number: the model has diverged; it is not saved"
            )

    def log_update(self, row: dict[str, float], count: int = 0, **axis: int) -> None:
        """Log the row of the update in progress, of every --logging-steps-th one.

        count: number of the update, from 1; by default its number within the phase.
        """
        if (count or self.update["count"]) % self.args.logging_steps == 0:
            self.log(row, step=self.update["step"], outer_iteration=self.update["outer_iteration"], **axis)

    def logged(self) -> list[dict]:
        """Rows of metrics.jsonl so far."""
        path = self.dir / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    @contextlib.contextmanager
    def phase(self, name: str, total: int, updates: bool = False, **axis: int) -> Iterator[Callable[[int], None]]:
        """Progress for one phase; its wall time goes to timing.jsonl, apart from the metrics, which a rerun repeats exactly.

        updates: the phase changes weights and calls stop_if_asked after each step.
        """
        started, outer = time.time(), (self.in_updates, self.seconds)  # an evaluation may stand inside a training phase
        parts = self.seconds = {}
        self.in_updates = updates
        with progress(name, total, self.is_main) as advance:
            yield advance
        self.in_updates, self.seconds = outer
        if self.is_main:
            row = {**axis, "phase": name, "items": total, "seconds": round(time.time() - started, 3)}
            row |= {part: round(value, 3) for part, value in parts.items()}
            with open(self.dir / "timing.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def updates(
        self, name: str, batches: list, outer_iteration: int = 0, first: int = 0, per_update: int = 1,
        evaluate: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """Loop over the updates of a training phase: yield (k, batch) for those that a resumed run has not done yet.

        After the loop's body the position moves to the end of the update, a checkpoint is written where one is due, the run
        stops if a signal has asked for it, and progress advances. A checkpoint is due every --save-steps optimizer steps and
        at the end of the phase.

        first: optimizer steps of the run before this phase. per_update: optimizer steps of one update.
        evaluate: is called with the number of updates done, before the first one of the run, every --eval-updates updates
        and after the last one.
        """
        save_every = max(1, self.args.save_steps // per_update)
        with self.phase(name, len(batches), updates=True, outer_iteration=outer_iteration) as advance:
            for k, batch in enumerate([*batches, None] if evaluate else batches):
                if first + k * per_update < self.position["step"]:
                    advance(1)
                    continue
                if evaluate and (k == len(batches) or (k % self.args.eval_updates == 0 and (k or not outer_iteration))):
                    self.save_checkpoint()  # an evaluation is long, and a stop in it would lose what is not saved
                    with self.timed("evaluate"):
                        evaluate(k)
                if k == len(batches):
                    break
                step = first + (k + 1) * per_update
                self.update = {"count": k + 1, "step": step, "outer_iteration": outer_iteration}
                yield k, batch
                self.position.update(outer_iteration=outer_iteration, step=step)
                if (k + 1) % save_every == 0 or k + 1 == len(batches):
                    self.save_checkpoint()
                self.stop_if_asked()
                advance(1)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Wall time of a part of the current phase, summed under its name in the phase's row of timing.jsonl."""
        started, parts = time.time(), self.seconds
        yield
        parts[part] = parts.get(part, 0.0) + time.time() - started

    # ---- models ----
    def prepare(self, *objects) -> list:
        """model, optimizer, model, optimizer, ... made ready to be trained by this launch."""
        prepared, views = engines.prepare(self.accelerator, self.args, *objects)
        self.views |= views
        return prepared

    def unwrap(self, model):
        """What to generate, score and save with in place of a prepared model (engines.py); any other model itself."""
        return self.views.get(model, model)

    def load_weights(self, model, source, part: str = "") -> None:
        """Give a prepared model, or the part of it at an attribute path, the weights of another model."""
        with engines.whole(source, cast=False):
            engines.load_weights(self.accelerator, model, source.state_dict(), part)

    # ---- sharing work ----
    @names_flag_when_out_of_memory("per_device_eval_batch_size")
    def map_rows(self, n: int, work: Callable[[list[int]], list]) -> list:
        """work(indices) -> results on each rank's share of range(n), gathered in order on all ranks."""
        from accelerate.utils import gather_object

        mine = list(range(self.rank, n, self.world))
        results = list(zip(mine, work(mine), strict=True))
        if self.world > 1:
            results = gather_object(results)
        return [r for _, r in sorted(results, key=lambda pair: pair[0])]

    def score_batches(self, sequences: list[tuple], score: Callable, advance=lambda n: None) -> list:
        """score(batch) -> a result per row, on this rank, over length-sorted batches of [(prompt ids, response ids)].

        Without gradient; results in the order of `sequences`.
        """
        order = sorted(range(len(sequences)), key=lambda i: -sum(map(len, sequences[i])))
        size, out = self.args.per_device_eval_batch_size, [None] * len(sequences)
        with torch.no_grad():
            for i in range(0, len(order), size):
                part = order[i : i + size]
                batch = collate([sequences[j] for j in part], pad_token_id=0)  # the id is never read
                for j, result in zip(part, score(batch.to(self.accelerator.device)), strict=True):
                    out[j] = result
                advance(len(part))
        return out

    def map_sequences(self, sequences: list[tuple], score: Callable, advance=lambda n: None) -> list:
        """score_batches shared over ranks, gathered in order on all of them."""
        shared = self.shared(advance)
        return self.map_rows(
            len(sequences), lambda mine: self.score_batches([sequences[i] for i in mine], score, shared)
        )

    def cached(self, path: Path, keys: list[str], work: Callable, name: str, block: int = 4096) -> list:
        """A value per key: from the Parquet file, else by work(indices, advance) in all ranks together.

        The file is written after every block, so that a run cut off loses one block.
        """
        from accelerate.utils import broadcast_object_list

        stored = {r["key"]: r["value"] for r in read_pairs(path)} if self.is_main and path.exists() else {}
        (known,) = broadcast_object_list([stored])
        missing = [i for i, key in enumerate(keys) if key not in known]
        with self.phase(name, len(missing), step=0) as advance:
            for start in range(0, len(missing), block):
                part = missing[start : start + block]
                known |= dict(zip((keys[i] for i in part), work(part, advance), strict=True))
                if self.is_main:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_pairs(path, [{"key": k, "value": v} for k, v in known.items()])
        return [known[key] for key in keys]

    def stored(self, path: Path, make: Callable[[], list[dict]], since: int | None = None) -> list[dict]:
        """Rows of a Parquet file of this run; if it is not there, made by make() in all ranks together and written by rank 0.

        since: optimizer step from which the run trains on them. UserError if it is past that step and the file is gone.
        """
        if not path.exists():
            if since is not None and self.position["step"] > since:
                raise UserError(f"--resume: found no {path}, expected the rows that the run was already training on")
            rows = make()
            if self.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_pairs(path, rows)
            self.accelerator.wait_for_everyone()
        return read_pairs(path)

    def shared(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Progress of work that all ranks share, from this rank's part of it."""
        return lambda n: advance(n * self.world)

    def batches(self, n: int, *key: int) -> list[list[int]]:
        """Global batches of one epoch over range(n), in the order of (seed, key); the last one may be smaller."""
        order = data_order(n, self.args.seed, *key)
        return [order[i : i + self.args.batch_size] for i in range(0, n, self.args.batch_size)]

    def epochs(self, n: int, epochs: int, *key: int) -> list[list[int]]:
        """Global batches of several epochs over range(n), each in an order of its own."""
        return [batch for e in range(epochs) for batch in self.batches(n, *key, e)]

    def prompt_batches(self, n: int, total: int, *key: int) -> list[list[int]]:
        """Batches of --rollout-batch-size over `total` draws from range(n): every index once before any comes again.

        Each pass over range(n) has an order of its own. The last batch may be smaller.
        """
        order = [i for e in range(math.ceil(total / n)) for i in data_order(n, self.args.seed, *key, e)][:total]
        return [order[i : i + self.args.rollout_batch_size] for i in range(0, total, self.args.rollout_batch_size)]

    @names_flag_when_out_of_memory("per_device_train_batch_size")
    def step(
        self, model, optimizer, rows: list, loss_fn: Callable, length: Callable, lr: float | tuple[float, ...],
        rate: str = "learning_rate",
    ) -> dict[str, float]:  # fmt: skip
        """One optimizer step on `rows`, the global batch; the same on any number of devices and micro-batches.

        loss_fn(rows) -> (losses (b,), {name: (sum, count)}); the objective is the mean of all losses of the global batch.
        lr is this step's learning rate, or one for each part that make_optimizer was given: a part rests at 0, its weights
        keep their bytes, weight decay or not. `rate` is the name of the flag it comes from.
        Rows are sorted by length so that a micro-batch holds similar ones. Raises UserError on a loss that is not finite.
        """
        micro = self.args.per_device_train_batch_size
        ordered = sorted(rows, key=length, reverse=True)
        mine = ordered[self.rank :: self.world]
        # as many micro-batches on every rank: one that has run out takes part in the collectives with weight 0
        most = math.ceil(math.ceil(len(rows) / self.world) / micro)
        parts = [(mine[i * micro : (i + 1) * micro] or ordered[:1], float(i * micro < len(mine))) for i in range(most)]
        weight = self.world / len(rows)  # gradients are averaged over ranks
        rates = lr if isinstance(lr, tuple) else (lr,) * len(optimizer.param_groups)
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = own * bias_correction(optimizer)
        names, totals, fresh = [], 0.0, not optimizer.state
        for i, (part, share) in enumerate(parts):
            last = i == most - 1
            with contextlib.nullcontext() if last or self.engine != "plain" else self.accelerator.no_sync(model):
                losses, stats = loss_fn(part)
                engines.backward(self.accelerator, model, losses.sum() * (weight * share), last)
            stats = {"loss": (losses.detach().sum(), losses.new_tensor(len(part))), **stats}
            names = list(stats)
            totals = totals + share * torch.stack([torch.stack([s.double(), c.double()]) for s, c in stats.values()])
        totals = self.accelerator.reduce(totals, reduction="sum")
        row = {name: (s / c).item() for name, (s, c) in zip(names, totals, strict=True) if c > 0}
        row["grad_norm"] = engines.clip(self.accelerator, model, self.args.max_grad_norm)
        row["learning_rate"] = max(rates)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise self._diverged(row, rows, rate, fresh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.probe = model, loss_fn, parts[0][0], rate
        return row

    def _diverged(self, row: dict[str, float], rows: list[dict], rate: str, fresh: bool) -> UserError:
        """Why an update's loss is not finite, as far as it can be known. fresh: its optimizer has not moved a weight yet."""
        found = f"found loss {row['loss']}, gradient norm {row['grad_norm']}, expected finite numbers"
        if bad := next(((k, v) for r in rows for k, v in r.items() if has_nan(v)), None):
            values = bad[1] if isinstance(bad[1], list) else [bad[1]]
            value = next(v for v in values if not math.isfinite(v))
            return UserError(f"{found}: a row of this update holds {bad[0]} {value}, which was computed before it")
        if fresh:
            numbers = [(f.name, getattr(self.args, f.name)) for f in dataclasses.fields(self.args)]
            large = [f"{flag(n)} {v:g}" for n, v in numbers if isinstance(v, float) and not abs(v) < 1e6]
            where = f"look at {', '.join(large)}" if large else "look at the model, its --dtype, and the data"
            return UserError(
                f"first update: {found}; it has moved no weight yet, so {flag(rate)} is not the cause: {where}"
            )
        return UserError(
            f"training diverged: {found}; nothing of this update was kept."
            f" Lower {flag(rate)}; last good checkpoint: {self.last_checkpoint() or 'none yet'}"
        )

    def refuse_diverged(self) -> None:
        """UserError, on all ranks, unless what is about to be saved is of use: all weights of the prepared models are finite
        numbers, and so is the loss of rows of the last update now that it is made. Weights of 1e30 are finite."""
        names = [name for m in self.accelerator._models if (name := engines.not_finite(m))]
        loss, rate = 0.0, "learning_rate"
        if self.probe is not None:
            *probe, rate = self.probe
            loss = engines.probe(*probe)
        bad = torch.tensor([float(bool(names)), float(not math.isfinite(loss))], device=self.accelerator.device)
        bad = self.accelerator.reduce(bad, reduction="sum").tolist()
        if any(bad):
            where = f"weights that are not finite ({names[0] if names else 'on another rank'})" if bad[0] else ""
            where = where or f"loss {loss if not math.isfinite(loss) else math.nan} after the last update"
            raise UserError(
                f"training diverged: found {where}, expected finite numbers; they were not saved."
                f" Lower {flag(rate)}; last good checkpoint: {self.last_checkpoint() or 'none yet'}"
            )
        self.probe = None

    # ---- checkpoints ----
    def last_checkpoint(self) -> Path | None:
        found = sorted(p for p in (self.dir / "checkpoint").iterdir() if not p.name.startswith("."))
        return found[-1] if found else None

    def save_checkpoint(self, position: dict | None = None) -> None:
        """Models, optimizers, RNG and position under checkpoint/<iteration>_<step>; the two newest are kept.

        With LoRA, of a frozen base only what is no longer as it was loaded: of --model itself, nothing.

        Everything is written to a temporary folder, listed with its SHA-256, synced, then renamed: a reader sees a whole
        checkpoint or none. A failed write leaves the earlier ones as they were and raises UserError.
        """
        folder, position = self.dir / "checkpoint", position or self.position
        if self.saved == str(position):
            return
        self.refuse_diverged()
        final = folder / f"{position['outer_iteration']:04d}_{position['step']:08d}"
        partial = folder / f".partial_{final.name}"
        error = None
        try:
            if self.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            fresh = engines.save_state(self.accelerator, str(partial))
        except Exception as e:  # any failure to write: disk full, quota, permissions, a library's own wrapper of these
            error = e
            if self.engine != "plain":  # the others may wait in the midst of the library's own collectives
                raise self._not_written(e) from e
        failed = self.accelerator.reduce(torch.tensor(float(error is not None), device=self.accelerator.device)).item()
        if self.is_main and not failed:
            try:
                metrics = self.dir / "metrics.jsonl"
                size = metrics.stat().st_size if metrics.exists() else 0
                made_by = {"engine": self.engine, "processes": self.world, "fresh_optimizers": fresh}
                write_json(partial / "position.json", {**position, "metrics_bytes": size, **made_by})
                seal(partial)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                sync_path(folder)
                for old in sorted(p for p in folder.iterdir() if not p.name.startswith("."))[:-2]:
                    shutil.rmtree(old)
            except OSError as e:
                error = e
        if self.is_main and (failed or error):
            shutil.rmtree(partial, ignore_errors=True)
        failed = self.accelerator.reduce(torch.tensor(float(error is not None), device=self.accelerator.device)).item()
        if failed:
            raise self._not_written(error)
        self.saved = str(position)

    def _not_written(self, error: Exception | None) -> UserError:
        return UserError(
            f"checkpoint could not be written to {self.dir / 'checkpoint'} ({error or 'on another rank'});"
            f" last good checkpoint: {self.last_checkpoint() or 'none yet'}; free space, then --resume {self.dir}"
        )

    def load_checkpoint(self) -> dict | None:
        """With --resume, load the newest checkpoint that is whole; name and skip those that are not. Returns its position.

        The run goes on from there, and metrics.jsonl is cut back to it. None if there is nothing to resume. UserError if
        checkpoints exist and none is whole, or if the newest one was made by another engine, or by ZeRO on another number of
        processes: its optimizer state is cut up for that number.
        """
        if not self.args.resume:
            return None
        self.accelerator.wait_for_everyone()
        found = sorted((p for p in (self.dir / "checkpoint").iterdir() if not p.name.startswith(".")), reverse=True)
        for path in found:
            if problem := broken_seal(path):
                self.say(f"checkpoint {path.name} is damaged ({problem}); trying the one before it")
                continue
            position = json.loads((path / "position.json").read_text())
            size = position.pop("metrics_bytes")
            made_by = position.pop("engine", "plain"), position.pop("processes", self.world)
            fresh = position.pop("fresh_optimizers", [])
            if made_by[0] != self.engine or (self.engine.startswith("zero") and made_by[1] != self.world):
                raise UserError(
                    f"--resume: found {path.name} of {made_by[0]} on {made_by[1]} process(es), but this is {self.engine} on"
                    f" {self.world}; expected the same engine, and with ZeRO the same --num_processes"
                )
            # an adapter-only checkpoint lacks weights that are loaded already; engines keep all of them
            known = {"strict": False} if self.args.lora_r and self.engine == "plain" else {}
            try:
                engines.load_state(self.accelerator, str(path), fresh, **known)
            except ValueError as error:  # optimizers with other groups of parameters
                raise UserError(
                    f"--resume: found {path.name}, which another version wrote ({error}); expected a checkpoint of this one"
                ) from error
            metrics = self.dir / "metrics.jsonl"
            if self.is_main and metrics.exists():
                if metrics.stat().st_size < size:
                    raise UserError(
                        f"--resume: found {metrics} of {metrics.stat().st_size} bytes, expected {size} at {path.name}: rows are"
                        " lost; put it back, or delete it to go on without them"
                    )
                os.truncate(metrics, size)
            self.say(f"resumed from {path}")
            self.position, self.saved, self.last_step = position, str(position), position["step"]
            return position
        if found:
            raise UserError(f"--resume: none of the {len(found)} checkpoints in {self.dir / 'checkpoint'} is whole")
        if self.is_main:
            (self.dir / "metrics.jsonl").unlink(missing_ok=True)
        return None

    def model_card(self, method: str, paper: str, note: str = "", base: str = "", measure: str = "eval/nll") -> str:
        """README.md of a saved model: front matter, how it was made, a note of its own, the last row that holds `measure`.

        base: the model it was made from, if that is not --model. Without such a row there is no table.
        """
        args = self.args
        last = next((r for r in reversed(self.logged()) if measure in r), {}) if self.is_main else {}
        measured = "".join(
            f"| {k} | {v:.4g} | {meaning} |\n"
            for k, v in last.items()
            if (meaning := self.metrics.get(k, "").replace("|", "\\|"))
        )
        table = f"| held-out measure | value | meaning |\n|---|---|---|\n{measured}" if measured else ""
        base = base or args.model
        lora = f", LoRA r = {args.lora_r} merged" if args.lora_r else ""
        data = [d for d in dict.fromkeys((args.dataset, getattr(args, "preference_dataset", "none"))) if d != "none"]
        listed, named = "\n- ".join(data), " and ".join(f"`{name}`" for name in data)
        return (
            f"---\nlibrary_name: transformers\nbase_model: {base}\ndatasets:\n- {listed}\n"
            f"tags:\n- cleanirl\n- {self.script}\n---\n\n# {base} after {method}\n\n"
            f"Trained with `{self.script}.py` of CleanIRL ({paper}) on {named}{lora}.\n\n{note}"
            f"```\n{' '.join(['python', *sys.argv])}\n```\n\nAll settings: `args.json` of the run.\n\n{table}"
        )

    @leaves_nothing_half_written
    def save_final(self, model, tokenizer, card: str, name: str = "final", part: str = "") -> Path:
        """<name>/: weights (safetensors), tokenizer and model card, loadable with from_pretrained.

        part: attribute path of the model to save inside a prepared module that holds several, such as "policy".
        """
        self.accelerator.wait_for_everyone()
        self.refuse_diverged()
        path, partial = self.dir / name, self.dir / f".partial_{name}"
        model = self.unwrap(model)  # with its mixed precision: training may go on
        model = model.get_submodule(part) if part else model
        with engines.whole(model, cast=False):
            if self.is_main:
                if self.args.lora_r:
                    from common.models import merged  # it imports this file

                    model = merged(self.args, model)
                shutil.rmtree(partial, ignore_errors=True)
                stop_at_end_of_turn(model, tokenizer)
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                (partial / "README.md").write_text(card)
                seal(partial)
                shutil.rmtree(path, ignore_errors=True)
                os.replace(partial, path)
        self.accelerator.wait_for_everyone()
        return path

    def rename(self, name: str, new: str) -> Path:
        """Give what save_final has saved another name, on all ranks together."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            shutil.rmtree(self.dir / new, ignore_errors=True)
            os.replace(self.dir / name, self.dir / new)
        self.accelerator.wait_for_everyone()
        return self.dir / new

    def end(self) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def without_nan(row: dict) -> dict:
    """The row with None, null in JSON, for numbers that are not finite: JSON has no NaN, and other readers refuse it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def has_nan(value) -> bool:
    """True if a number, or one of a list of numbers, is not finite."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(v, float) and not math.isfinite(v) for v in values)


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl, NaN where it holds null. UserError, naming the line, if one cannot be read."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append({k: math.nan if v is None else v for k, v in json.loads(line).items()})
        except (ValueError, AttributeError):
            raise UserError(
                f"{path} line {number}: found {line[:40]!r}, expected a row of metrics; remove it"
            ) from None
    return rows


def new_directory(path: Path) -> Path:
    """Make the folder of that name; with a number behind it if that is there already, as of a run of the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in (path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            name.mkdir()
            return name
    raise FileExistsError(f"{path} and 998 more of that name are there")


def untouched(folder: Path) -> bool:
    """True if a folder is empty, or holds no more than a run leaves that failed before it had anything."""
    found = {p.name: p for p in folder.iterdir()}
    made = {"args.json", ".lock", "trained_prompts.parquet", "samples", "evals", "generations", "checkpoint"}
    ours = ".lock" in found and found.keys() <= made
    return not found or (ours and not any(any(p.iterdir()) for p in found.values() if p.is_dir()))


def lock(folder: Path):
    """A file that keeps other processes out of the folder while it is open; the kernel closes it with this process.

    UserError if another process has it open.
    """
    handle = open(folder / ".lock", "a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        raise UserError(
            f"{folder} is in use by process {handle.read().strip() or 'unknown'}; expected that it has ended"
        ) from None
    except OSError:  # a network file system that has no locks: the user must take care
        return handle
    handle.truncate(0)
    print(f"{os.getpid()} on {socket.gethostname()}", file=handle, flush=True)
    return handle


def write_json(path: Path, value) -> None:
    """Atomically: temporary name, fsync, rename."""
    partial = path.with_name(f".partial_{path.name}")
    with open(partial, "w") as f:
        f.write(json.dumps(value, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def tracker_settings(tracker: str, folder: Path) -> dict[str, dict]:
    """init_kwargs of accelerate's init_trackers: a run under the folder's name, whose id stays in the folder for a resume."""
    path = folder / "tracker.json"
    if not path.exists():
        write_json(path, {"report_to": tracker, "id": secrets.token_hex(4)})
    kept = json.loads(path.read_text())["id"]
    name = folder.resolve().name
    return {
        "wandb": {"name": name, "id": kept, "resume": "allow"},
        "trackio": {"name": f"{name}-{kept}", "resume": "allow"},  # which knows a run by its name alone
    }


def fingerprint(p: torch.Tensor) -> int:
    """Sum of a tensor's bits as integers: the same on any device, another one after any training."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    return p.detach().contiguous().view(integer).sum(dtype=torch.int64).item()


def leave_out_loaded(models: list, weights: list[dict], folder: str) -> None:
    """Hook of accelerate's save_state: drop frozen weights that still are as add_lora found them, loaded from a model."""
    for model, state in zip(models, weights, strict=False):  # engines save by themselves and give no weights here
        for name, p in model.named_parameters(remove_duplicate=False):
            if not p.requires_grad and getattr(p, "loaded", None) == fingerprint(p):
                state.pop(name, None)


def sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write manifest.json: size and SHA-256 of every file below, all synced to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    for path in files:
        sync_path(path)
    manifest = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}
    write_json(folder / "manifest.json", manifest)


def broken_seal(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None: file missing, cut short, or changed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return "manifest.json missing or unreadable"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
        if digest(path) != entry["sha256"]:
            return f"{name} differs from its checksum"
    return None


def environment() -> dict:
    """Versions and commit, for args.json."""
    from importlib.metadata import version

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {
        "versions": {"python": sys.version.split()[0], **{n: version(n) for n in names}},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": sys.argv,
    }


def flat_config(args) -> dict:
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in dataclasses.asdict(args).items()}
