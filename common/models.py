"""Models: names, loading, the embedded `tiny`, LoRA, and the reference policy."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import tiny
from common import UserError, engines
from common.data import check_template
from common.run import fingerprint, uses_bf16

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
    "beaver-7b-v3.0-reward": "PKU-Alignment/beaver-7b-v3.0-reward",
}


def resolve_model(name: str) -> str:
    """A local folder wins; then `tiny`; then the short names; else the name is taken as a hub id."""
    if tiny.is_tiny(name):
        return str(tiny.MODEL)
    return name if Path(name).is_dir() else MODELS.get(name, name)


def load_tokenizer(args, name: str = "", flag: str = "--model"):
    """Tokenizer of that name, --model unless given, which --template paper takes the chat template from. UserError in one line if
    it cannot be had, has no EOS token, or does not fit model and window."""
    name = name or args.model
    config = text_config(load_config(name, args.trust_remote_code, flag))
    tokenizer = read_tokenizer(name, args.trust_remote_code, flag)
    if getattr(args, "template", "auto") == "paper" and name == args.model:
        tokenizer.chat_template = None  # render_prompt then takes the paper's, also of the tokenizer that is saved
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name}: found a tokenizer without an EOS token, expected one: responses could not end")
    vocabulary = getattr(config, "vocab_size", None) or len(tokenizer)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{flag} {name}: found a tokenizer of {len(tokenizer)} tokens but {vocabulary} embeddings in the model;"
            " expected a tokenizer made for this model"
        )
    window = getattr(config, "max_position_embeddings", None)
    if isinstance(window, int) and 0 < window < args.max_length:
        raise UserError(
            f"--max-length: found {args.max_length}, expected at most {window}, the window of {flag} {name}"
        )
    return tokenizer


def check_window(args, name: str = "", flag: str = "--model") -> None:
    """UserError where a prompt with its answer would be longer than the window of that model, --model unless given.

    Absolute positions do not exist beyond it. Rotary ones do, but the model was never trained on them.
    """
    name = name or args.model
    window = getattr(text_config(load_config(name, args.trust_remote_code, flag)), "max_position_embeddings", None)
    length = args.max_prompt_length + args.max_new_tokens
    if isinstance(window, int) and 0 < window < length:
        raise UserError(
            f"--max-new-tokens: found {args.max_new_tokens}, {length} tokens with --max-prompt-length {args.max_prompt_length};"
            f" expected at most {window} in all, the window of {flag} {name}"
        )


def load_config(name: str, trust_remote_code: bool = False, flag: str = "--model"):
    from transformers import AutoConfig

    with one_line_error(name, flag):
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)


def text_config(config):
    """The part of a configuration that describes the language model; of most models the configuration itself."""
    return config.get_text_config(decoder=True)


def read_tokenizer(name: str, trust_remote_code: bool, flag: str):
    """The tokenizer of that name as it is. UserError if it, or its chat template, cannot be read."""
    from transformers import AutoTokenizer

    with one_line_error(name, flag, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
        ids = tokenizer("a word, and 2 more", add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise UserError(
            f"{flag} {name}: found a tokenizer that knows no word, expected its vocabulary beside the model (tokenizer.json, or"
            " tokenizer.model): save_pretrained of the tokenizer writes it"
        )
    check_template(tokenizer, f"{flag} {name}")
    return tokenizer


def attention(args, config) -> str:
    """--attn-implementation. auto: flash attention 3 (on Hopper) or 2 where the model has it, it is installed, and CUDA
    computes in bf16; else sdpa where the model has it; else eager."""
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


def load_model(args, name: str = "", flag: str = "--model", only_check: bool = False):
    """Causal language model of that name, --model unless given, without noise.

    UserError if it cannot be read, if a weight is missing, or if it is not a causal model. only_check: all of that from what
    its files say, without the weights themselves.
    """
    from transformers import AutoModelForCausalLM

    name = name or args.model
    config = load_config(name, args.trust_remote_code, flag)
    refuse_other_kinds(config, f"{flag} {name}")
    implementation = attention(args, config)
    with one_line_error(name, flag), quiet_load():
        model, info = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            dtype=getattr(torch, args.dtype),
            attn_implementation=implementation,
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **({"device_map": "meta"} if only_check else four_bits(args) if name == args.model else {}),
        )
    refuse_mismatched(info, f"{flag} {name}")
    refuse_missing(info, f"{flag} {name}", "a causal language model, with as many layers as its config.json says")
    if any(getattr(module, "is_decoder", True) is False for module in model.modules()):
        raise UserError(
            f"{flag} {name}: found {type(model).__name__} with is_decoder false in its config.json, which sees the tokens"
            " after the one it predicts; expected a causal model"
        )
    refuse_not_finite(model, name, flag)
    make_generation_config_valid(model, f"{flag} {name}")
    freeze_other_modalities(model)
    return without_noise(model)


def refuse_other_kinds(config, owner: str) -> None:
    """UserError where config.json says that the model was made for another task: its language-model head would be random."""
    for name in config.architectures or ():
        if name.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")):
            raise UserError(f"{owner}: found {name}, expected a causal language model")


def refuse_missing(info: dict, owner: str, expected: str, may_miss: frozenset[str] = frozenset()) -> None:
    """UserError if a checkpoint lacks weights, which transformers would fill with random numbers."""
    missing = sorted(k for k in info["missing_keys"] if not k.endswith(".rotary_emb.inv_freq") and k not in may_miss)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{owner}: found no weights for {', '.join(missing[:3])}{more}, expected {expected}")


def refuse_mismatched(info: dict, owner: str) -> None:
    """UserError if weights of a checkpoint have other sizes than its config.json says."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{owner}: found weights {name} of size {tuple(found)}, expected {tuple(expected)}, which its config.json says"
        )


def make_generation_config_valid(model, owner: str) -> None:
    """Drop from the model's generation config what transformers refuses to save, such as a temperature beside greedy search.

    What generate() does stays the same: fields that contradict each other are fields that it does not use.
    """
    given = model.generation_config
    try:
        given.validate(strict=True)
        return
    except (TypeError, ValueError):
        kept, dropped = type(given)(), []
    names = [n for n in given.to_diff_dict() if n != "transformers_version"]
    for name in sorted(names, key=lambda n: n not in ("do_sample", "num_beams")):  # the two that others depend on
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
    """{name: module} of the outermost parts of a model that text never passes through, such as a vision tower."""
    if text_config(model.config) is model.config:
        return {}
    text = {id(m) for part in (model.get_decoder(), model.get_output_embeddings()) for m in part.modules()}
    found = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and not any(id(m) in text for m in module.modules()):
            found[name] = module
    return found


def freeze_other_modalities(model) -> None:
    """Parts that no text passes through have no gradient, and stay as they are."""
    for module in other_modalities(model).values():
        module.requires_grad_(False)


@contextlib.contextmanager
def quiet_load():
    """Without transformers' report of weights that are missing, which are made or refused here, and without its bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def refuse_not_finite(model, name: str, flag: str) -> None:
    """UserError if a weight of a loaded model is not a finite number, as of a run that diverged."""
    if broken := engines.not_finite(model):
        raise UserError(f"{flag} {name}: found weights that are not finite ({broken}), expected numbers")


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


def without_noise(model):
    """The same model, and in training mode the same function as in evaluation mode, for as long as it lives.

    Every rate of dropout is 0: nn.Dropout's, and those that a module keeps for its own use. Other noise (a router's jitter or
    sampled experts) has no common name, so no module of the model enters training mode, except those that recompute
    activations: they ask for it.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    kind = type(model)
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    model.__class__ = type(kind.__name__, (kind,), {**names, "train": train_quietly})
    return model


def train_quietly(model, mode: bool = True):
    """Module.train of a model without noise: only modules that recompute activations enter training mode."""
    torch.nn.Module.train(model, mode)
    for module in model.modules():
        if module is not model and not getattr(module, "gradient_checkpointing", False):
            module.training = False
    return model


# ---- what cannot be loaded, in one line ----
@contextlib.contextmanager
def one_line_error(name: str, flag: str = "--model", part: str = "") -> Iterator[None]:
    """Turn whatever transformers raises for a model that it cannot load into one line: the flag, what was found, the cause.

    part: what is being read, where it is not the whole model.
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
    """One line for an error of loading the model, or the part of it, that `flag` names."""
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
    """True for a name that can only be a local path: a hub id is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def wrong_folder(folder: Path) -> str:
    """Why a folder cannot be a model, with what was probably meant; empty if it looks like one."""
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


HUB_SECONDS = 10  # to get any answer from the hub; its client would try again and again, for every file


def offline_if_unreachable(name: str) -> None:
    """Before a model is asked of the hub: if the hub does not answer, use what is in its cache, without trying every file."""
    if not Path(resolve_model(name)).exists() and not is_path(name):
        probe_hub()


@functools.cache
def probe_hub() -> None:
    """Ask the hub for any answer once per process; without one, turn its client's offline mode on."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # no name, no route, no answer, no certificate: all the same to who wants a model
        print(f"{constants.ENDPOINT} does not answer: only what is in its cache can be used", file=sys.stderr)
        constants.HF_HUB_OFFLINE = True


def autocast_forward(run, model):
    """The model, its forward under the run's mixed precision: for what is called by itself, not as accelerate prepared it."""
    if run.accelerator.mixed_precision == "bf16":
        # a weak reference: a bound method kept in the model itself would keep it in memory when it is no longer used
        forward, this = type(model).forward, weakref.ref(model)
        wrapped = functools.wraps(forward)(lambda *args, **kwargs: forward(this(), *args, **kwargs))
        model.forward = torch.autocast(run.accelerator.device.type, torch.bfloat16)(wrapped)
    return model


def for_inference(run, model):
    """A model that is not trained: on the run's device, under its mixed precision, in evaluation mode."""
    return autocast_forward(run, model.to(run.accelerator.device).eval())


def prepare_policy(args, name: str = ""):
    """The model to train, --model unless named: loaded, with LoRA and gradient checkpointing where asked."""
    return make_trainable(load_model(args, name), args)


def make_trainable(model, args, task_type: str = "CAUSAL_LM"):
    """The same model with LoRA adapters and gradient checkpointing where asked."""
    if args.lora_r:
        model = add_lora(model, args, task_type)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def weights_digest(run, model) -> str:
    """SHA-256 of the names, types and values of a prepared model's weights and buffers; rank 0's, on every rank."""
    from accelerate.utils import broadcast_object_list

    digest = hashlib.sha256()
    with engines.whole(run.unwrap(model), cast=False) as whole:
        for name, tensor in sorted(whole.state_dict().items()) if run.is_main else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return broadcast_object_list([digest.hexdigest()])[0]


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
    found = []
    for name, module in model.named_modules():
        own = isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward
        if own and model_code(type(module)) and not is_linear_map(module):
            found.append(name)
        found += [f"{name}.{part}".lstrip(".") for part in read_directly(type(module)) if hasattr(module, part)]
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


@contextlib.contextmanager
def reference_policy(run, policy, is_initial: bool) -> Iterator[torch.nn.Module]:
    """The initial model, without gradient, for as long as the context lasts.

    The policy itself while it has not moved (`is_initial`); with LoRA the policy with its adapter off; else a second copy,
    loaded from disk and freed again, so that training never shares memory with it.
    """
    policy = run.unwrap(policy)
    if is_initial:
        yield policy
    else:
        with open_reference(run, policy, run.args.model)() as reference:
            yield reference


def open_reference(run, policy, source: str) -> Callable[[], contextlib.AbstractContextManager]:
    """A function that gives contexts in which the reference policy from `source` can be called; it is loaded once.

    With LoRA the reference of --model is the policy with its adapter off, and nothing is loaded.
    """
    if run.args.lora_r and source == run.args.model:

        @contextlib.contextmanager
        def adapter_off():
            with policy.disable_adapter():
                yield policy

        return adapter_off
    model = for_inference(run, load_model(run.args, source))
    return lambda: contextlib.nullcontext(model)
