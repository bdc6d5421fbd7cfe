"""Models: names, loading, the embedded `tiny`, LoRA, and the reference policy."""

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from common import UserError
from common.args import uses_bf16
from extras import sharding


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

    from extras.loading import one_line_error, resolve_model

    with one_line_error(name, flag):
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)


def text_config(config):
    """The part of a configuration that describes the language model; of most models the configuration itself."""
    return config.get_text_config(decoder=True)


def read_tokenizer(name: str, trust_remote_code: bool, flag: str):
    """The tokenizer of that name as it is. UserError if it, or its chat template, cannot be read."""
    from transformers import AutoTokenizer

    from extras.loading import one_line_error, resolve_model
    from extras.templates import check_template

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

    from extras.adapters import four_bits
    from extras.loading import (
        freeze_other_modalities,
        make_generation_config_valid,
        one_line_error,
        quiet_load,
        refuse_mismatched,
        refuse_missing,
        refuse_not_finite,
        refuse_other_kinds,
        resolve_model,
    )

    name = name or args.model
    config = load_config(name, args.trust_remote_code, flag)
    refuse_other_kinds(config, f"{flag} {name}")
    implementation = attention(args, config)
    with one_line_error(name, flag), quiet_load():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            dtype=getattr(torch, args.dtype),
            attn_implementation=implementation,
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **({"device_map": "meta"} if only_check else four_bits(args) if name == args.model else {}),
        )
    model, info = loaded
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
    from extras.adapters import add_lora

    if args.lora_r:
        model = add_lora(model, args, task_type)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def weights_digest(run, model) -> str:
    """SHA-256 of the names, types and values of a prepared model's weights and buffers; rank 0's, on every rank."""
    from accelerate.utils import broadcast_object_list

    digest = hashlib.sha256()
    with sharding.whole(run.unwrap(model), cast=False) as whole:
        for name, tensor in sorted(whole.state_dict().items()) if run.is_main else ():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return broadcast_object_list([digest.hexdigest()])[0]


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
