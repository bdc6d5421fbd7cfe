"""Models: tokenizer, policy and reference policy, loaded and made ready to train."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator

import torch


def load_tokenizer(args, name: str = "", flag: str = "--model"):
    """Return the tokenizer of the model `name`, by default --model. With --template paper, --model's loses its chat template.

    UserError in one line if it cannot be read, has no EOS token, or does not fit the model and its window.
    """
    from extras.tokenizers import refuse_unfit

    name = name or args.model
    config = text_config(load_config(name, args.trust_remote_code, flag))
    tokenizer = read_tokenizer(name, args.trust_remote_code, flag)
    if getattr(args, "template", "auto") == "paper" and name == args.model:
        tokenizer.chat_template = (
            None  # then render_prompt uses the paper's template, also after this tokenizer was saved
        )
    refuse_unfit(tokenizer, config, args.max_length, f"{flag} {name}")
    return tokenizer


def read_tokenizer(name: str, trust_remote_code: bool, flag: str):
    """Return the tokenizer of the model `name`, unchanged. UserError if it or its chat template cannot be read."""
    from transformers import AutoTokenizer

    from extras.loading import one_line_error, resolve_model
    from extras.tokenizers import refuse_unreadable

    with one_line_error(name, flag, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
        ids = tokenizer("a word, and 2 more", add_special_tokens=False)["input_ids"]
    refuse_unreadable(tokenizer, ids, f"{flag} {name}")
    return tokenizer


def check_window(args, name: str = "", flag: str = "--model") -> None:
    """UserError if a prompt with its answer can be longer than the window of the model `name`, by default --model."""
    from extras.tokenizers import refuse_window

    name = name or args.model
    refuse_window(args, text_config(load_config(name, args.trust_remote_code, flag)), f"{flag} {name}")


def load_config(name: str, trust_remote_code: bool = False, flag: str = "--model"):
    """Return the configuration of the model `name`. UserError, which names `flag`, if it cannot be read."""
    from transformers import AutoConfig

    from extras.loading import one_line_error, resolve_model

    with one_line_error(name, flag):
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)


def text_config(config):
    """Return the part of a configuration that describes the language model. For most models it is the configuration itself."""
    return config.get_text_config(decoder=True)


def load_model(args, name: str = "", flag: str = "--model", only_check: bool = False):
    """Return the causal language model `name`, by default --model, without dropout or other noise.

    UserError if it cannot be read, lacks a weight, or is not causal. only_check: do all of this without reading the weights.
    """
    from transformers import AutoModelForCausalLM

    from extras import loading, noise, shared_prompts

    name = name or args.model
    config = load_config(name, args.trust_remote_code, flag)
    loading.refuse_other_kinds(config, f"{flag} {name}")
    options = {"device_map": "meta"} if only_check else {}
    if args.load_in_4bit and name == args.model and not only_check:
        from extras.adapters import four_bits

        options = four_bits()
    attention = loading.attention(args, config)
    model, info = loading.from_pretrained(
        AutoModelForCausalLM, args, name, flag, attn_implementation=attention, **options
    )
    loading.refuse_unfit(model, info, name, flag)
    loading.freeze_other_modalities(model)
    model = noise.without_noise(model)
    return model if only_check else shared_prompts.settle(model, args, f"{flag} {name}")


def autocast_forward(run, model):
    """Return the same model, with its forward under the run's mixed precision. For models that accelerate does not prepare."""
    if run.accelerator.mixed_precision == "bf16":
        # A weak reference: if the model kept a bound method of itself, its memory would not be freed after its last use.
        forward, this = type(model).forward, weakref.ref(model)
        wrapped = functools.wraps(forward)(lambda *args, **kwargs: forward(this(), *args, **kwargs))
        model.forward = torch.autocast(run.accelerator.device.type, torch.bfloat16)(wrapped)
    return model


def for_inference(run, model):
    """Return a model that is not trained on the run's device, in evaluation mode, under the run's mixed precision."""
    return autocast_forward(run, model.to(run.accelerator.device).eval())


def prepare_policy(args, name: str = ""):
    """Load the model to train, by default --model, and apply --lora-r and --gradient-checkpointing."""
    return make_trainable(load_model(args, name), args)


def make_trainable(model, args, task_type: str = "CAUSAL_LM"):
    """Return the same model, with LoRA adapters if --lora-r is set, and with --gradient-checkpointing."""
    if args.lora_r:
        from extras.adapters import add_lora

        model = add_lora(model, args, task_type)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextlib.contextmanager
def reference_policy(run, policy, is_initial: bool) -> Iterator[torch.nn.Module]:
    """Give the initial model inside the context.

    It is the policy itself if that has not been trained yet (`is_initial`). With LoRA it is the policy with its adapter off.
    Otherwise a second copy is loaded from disk, and freed again, so that it takes no memory during training.
    """
    policy = run.unwrap(policy)
    if is_initial:
        yield policy
    else:
        with open_reference(run, policy, run.args.model)() as reference:
            yield reference


def open_reference(run, policy, source: str) -> Callable[[], contextlib.AbstractContextManager]:
    """Load the reference policy from `source` once, and return a function that makes contexts which give it.

    With LoRA the reference from --model is the policy with its adapter off, and nothing is loaded.
    """
    if run.args.lora_r and source == run.args.model:

        @contextlib.contextmanager
        def adapter_off():
            with policy.disable_adapter():
                yield policy

        return adapter_off
    model = for_inference(run, load_model(run.args, source))
    return lambda: contextlib.nullcontext(model)
