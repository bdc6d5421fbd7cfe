"""Loading models: their names, their attention, and one clear line for each model that cannot be loaded."""

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import tiny
from common import UserError
from common.engine import mixes_bf16, not_finite
from common.models import text_config

MODELS = {  # short name -> hub id; a local folder of the same name wins
    "zephyr-7b-sft-full": "alignment-handbook/zephyr-7b-sft-full",
    "mistral-7b-sft-beta": "HuggingFaceH4/mistral-7b-sft-beta",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-1b-deduped": "EleutherAI/pythia-1b-deduped",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "beaver-7b-v3.0-reward": "PKU-Alignment/beaver-7b-v3.0-reward",
}


def resolve_model(name: str) -> str:
    """Return the path or hub id of a model's name. A local folder comes first, then `tiny`, then MODELS, then a hub id."""
    if tiny.is_tiny(name):
        return str(tiny.MODEL)
    return name if Path(name).is_dir() else MODELS.get(name, name)


def refuse_other_kinds(config, owner: str) -> None:
    """UserError if config.json names a class for another task, because the language-model head would be random."""
    for name in config.architectures or ():
        if name.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")):
            raise UserError(f"{owner}: found {name}, expected a causal language model")


def from_pretrained(kind, args, name: str, flag: str, **options) -> tuple[Any, dict]:
    """Call kind.from_pretrained -> (model, loading info), in --dtype. UserError in one line if it fails.

    Weights that are missing or have other sizes are not refused here: they are listed in the info.
    """
    with one_line_error(name, flag), quiet_load():
        return kind.from_pretrained(
            resolve_model(name),
            dtype=getattr(torch, args.dtype),
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the caller refuses them, with their names
            **options,
        )


def attention(args, config) -> str:
    """Return the attention that --attn-implementation names.

    auto: flash attention 3 (on Hopper) or 2 if the model has it, its package is installed, and CUDA computes in bf16. Otherwise
    sdpa if the model has it, else eager.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if args.attn_implementation != "auto":
        return args.attn_implementation
    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    plain = "sdpa" if getattr(known, "_supports_sdpa", True) else "eager"
    if not (torch.cuda.is_available() and uses_bf16(args) and getattr(known, "_supports_flash_attn", False)):
        return plain
    if is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == 9:
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else plain


def refuse_unfit(model, info: dict, name: str, flag: str) -> None:
    """UserError if a causal model was loaded that cannot be trained. `info` is what from_pretrained returned with it."""
    refuse_mismatched(info, f"{flag} {name}")
    refuse_missing(info, f"{flag} {name}", "a causal language model, with as many layers as its config.json says")
    if any(getattr(module, "is_decoder", True) is False for module in model.modules()):
        raise UserError(
            f"{flag} {name}: found {type(model).__name__} with is_decoder false in its config.json, which sees the tokens"
            " after the one it predicts; expected a causal model"
        )
    refuse_not_finite(model, name, flag)
    make_generation_config_valid(model, f"{flag} {name}")


def refuse_unfit_scalar(info: dict, owner: str, may_lack_head: bool) -> None:
    """UserError if a classifier was loaded that is no scalar model: several labels, or weights that are missing."""
    if any(name.startswith(("score.", "classifier.")) for name, *_ in info["mismatched_keys"]):
        raise UserError(f"{owner}: found a classifier of several labels, expected one label")
    refuse_mismatched(info, owner)
    expected = "a causal model, or a classifier on one" if may_lack_head else "a model with a scalar head"
    refuse_missing(info, owner, expected, frozenset({"score.weight"} if may_lack_head else ()))


def refuse_missing(info: dict, owner: str, expected: str, may_miss: frozenset[str] = frozenset()) -> None:
    """UserError if a checkpoint lacks weights, which transformers would fill with random numbers."""
    missing = sorted(k for k in info["missing_keys"] if not k.endswith(".rotary_emb.inv_freq") and k not in may_miss)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{owner}: found no weights for {', '.join(missing[:3])}{more}, expected {expected}")


def refuse_mismatched(info: dict, owner: str) -> None:
    """UserError if weights of a checkpoint do not have the sizes that its config.json gives."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{owner}: found weights {name} of size {tuple(found)}, expected {tuple(expected)}, which its config.json says"
        )


def make_generation_config_valid(model, owner: str) -> None:
    """Drop the fields of a generation config that transformers refuses to save, such as a temperature beside greedy search.

    generate() does the same as before, because it does not use fields that contradict each other.
    """
    given = model.generation_config
    try:
        given.validate(strict=True)
        return
    except (TypeError, ValueError):
        kept, dropped = type(given)(), []
    names = [n for n in given.to_diff_dict() if n != "transformers_version"]
    for name in sorted(names, key=lambda n: n not in ("do_sample", "num_beams")):  # other fields depend on these two
        before = getattr(kept, name, None)
        setattr(kept, name, getattr(given, name))
        try:
            kept.validate(strict=True)
        except (TypeError, ValueError):
            setattr(kept, name, before)
            dropped.append(f"{name} {getattr(given, name)}")
    model.generation_config = kept
    warnings.warn(
        f"{owner}: found a generation_config.json that contradicts itself, left out {', '.join(dropped)}", stacklevel=2
    )


def other_modalities(model) -> dict[str, torch.nn.Module]:
    """Return {name: module} of the outermost parts of a model that text never passes through, such as a vision tower."""
    if text_config(model.config) is model.config:
        return {}
    text = {id(m) for part in (model.get_decoder(), model.get_output_embeddings()) for m in part.modules()}
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and not any(id(m) in text for m in module.modules()):
            found[name] = module
    return found


def freeze_other_modalities(model) -> None:
    """Switch off the gradient of the parts that text never passes through. They keep their weights."""
    for module in other_modalities(model).values():
        module.requires_grad_(False)


@contextlib.contextmanager
def quiet_load():
    """Hide transformers' progress bars, and its report of missing weights, which are made or refused here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def refuse_not_finite(model, name: str, flag: str) -> None:
    """UserError if a loaded model has a weight that is not a finite number, as after a run that diverged."""
    if broken := not_finite(model):
        raise UserError(f"{flag} {name}: found weights that are not finite ({broken}), expected numbers")


# ---- one line for each error ----
@contextlib.contextmanager
def one_line_error(name: str, flag: str = "--model", part: str = "") -> Iterator[None]:
    """Turn any error of loading a model into a UserError in one line, with the flag, what was found, and the cause.

    part: the part that is being read, if that is not the whole model.
    """
    offline_if_unreachable(name)
    folder = Path(resolve_model(name))
    if folder.is_dir() and (problem := wrong_folder(folder)):
        raise UserError(f"{flag} {name}: the folder could not be read: {problem}")
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(explain_load(name, flag, part, error)) from error


def explain_load(name: str, flag: str, part: str, error: Exception) -> str:
    """Return one line for an error of loading the model that `flag` names, or a part of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason, text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200], str(error).lower()
    if isinstance(error, ImportError) and "flash" in text:
        return (
            f"--attn-implementation: found flash attention, which cannot be used here for {flag} {name}: {reason}; expected"
            " auto, sdpa or eager, or its package installed"
        )
    if any(words in text for words in ("attention implementation", "attn_implementation", "flash attention")):
        return f"--attn-implementation: found one that {flag} {name} cannot use, expected auto, sdpa or eager: {reason}"
    if tiny.is_tiny(name) or Path(name).is_dir():
        where = "the embedded model" if tiny.is_tiny(name) else "the folder"
        if part:
            return f"{flag} {name}: found no {part} that can be read in {where}: {reason}; expected what save_pretrained writes"
        return f"{flag} {name}: {where} could not be read ({type(error).__name__}): {reason}"
    if is_path(name):
        return f"{flag} {name}: found no local folder of that name, expected one, a short name or a hub id"
    target = resolve_model(name)
    return (
        f"{flag} {name}: found no local folder ./{name} and the hub ({target}) could not provide it; expected a folder made by"
        f" save_pretrained, or a reachable hub. {reason}"
    )


def is_path(name: str) -> bool:
    """Return True for a name that can only be a local path. A hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def wrong_folder(folder: Path) -> str:
    """Return why a folder cannot be a model, with a guess at what was meant. Empty if it looks like a model."""
    if (folder / "config.json").is_file():
        return ""
    expected = "expected a folder made by save_pretrained, with a config.json"
    if (folder / "adapter_config.json").is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
            expected = (
                f"expected the whole model: merge the adapter into its base ({base}) with peft's merge_and_unload first"
            )
        return f"found a LoRA adapter without its base model, {expected}"
    inside = [name for name in ("final", "sft", "reward") if (folder / name / "config.json").is_file()]
    if inside:
        return f"found a run directory, expected a model: did you mean {' or '.join(str(folder / n) for n in inside)}?"
    if (folder / "args.json").is_file():
        return f"found a run directory without a final model, {expected}"
    if not any(folder.iterdir()):
        return f"found an empty folder, {expected}"
    return f"found no config.json in the folder, {expected}"


HUB_SECONDS = 10  # time for the hub to answer; its client would try again and again, for every file


def offline_if_unreachable(name: str) -> None:
    """Before a model is read from the hub, find out if the hub answers. If not, only its cache is used from then on."""
    if not Path(resolve_model(name)).exists() and not is_path(name):
        probe_hub()


@functools.cache
def probe_hub() -> None:
    """Ask the hub for any answer, once per process. If none comes, switch its client to offline mode."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # no name, no route, no answer, no certificate: the model cannot be had in any case
        print(f"{constants.ENDPOINT} does not answer: only what is in its cache can be used", file=sys.stderr)
        constants.HF_HUB_OFFLINE = True


def uses_bf16(args) -> bool:
    """True if models compute in bf16: stored so, or under mixed precision."""
    return args.dtype == "bfloat16" or mixes_bf16(args)
