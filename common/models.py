"""Models: names, loading, the embedded `tiny`, LoRA, and the reference policy."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common import UserError, engines
from common.data import cache_folder, encode, load_rows, pydoc_key
from common.run import data_order, fingerprint, learning_rate_at, progress, uses_bf16

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

TINY = {  # Pythia's architecture, small enough for a laptop; trained on the pydoc training rows on first use
    "vocab_size": 1024,
    "hidden_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 576,
    "max_position_embeddings": 512,
}
TINY_TRAINING = {"epochs": 1, "batch_size": 16, "learning_rate": 5e-3, "max_length": 224, "seed": 0}


def resolve_model(name: str) -> str:
    """A local folder wins; then `tiny`; then the short names; else the name is taken as a hub id."""
    if Path(name).is_dir():
        return name
    return str(tiny_path()) if name == "tiny" else MODELS.get(name, name)


def load_tokenizer(args, name: str = "", flag: str = "--model"):
    """Tokenizer of that name, --model unless given, which --template paper takes the chat template from. UserError in one line if
    it cannot be had, has no EOS token, or does not fit model and window."""
    from transformers import AutoTokenizer

    name = name or args.model
    with one_line_error(name, flag):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=args.trust_remote_code)
    if args.template == "paper" and name == args.model:
        tokenizer.chat_template = None  # render_prompt then takes the paper's, also of the tokenizer that is saved
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {name}: found a tokenizer without an EOS token, expected one: responses could not end")
    config = load_config(name, args.trust_remote_code, flag)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{flag} {name}: found a tokenizer of {len(tokenizer)} tokens but {config.vocab_size} embeddings in the model;"
            " expected a tokenizer made for this model"
        )
    window = getattr(config, "max_position_embeddings", None)
    if window and args.max_length > window:
        raise UserError(
            f"--max-length: found {args.max_length}, expected at most {window}, the window of {flag} {name}"
        )
    return tokenizer


def load_config(name: str, trust_remote_code: bool = False, flag: str = "--model"):
    from transformers import AutoConfig

    with one_line_error(name, flag):
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)


def attention(args, config) -> str:
    """--attn-implementation; auto: flash attention 3 (on Hopper) or 2 where the model has it, it is installed, and CUDA computes
    in bf16; else sdpa."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if args.attn_implementation != "auto":
        return args.attn_implementation
    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not (torch.cuda.is_available() and uses_bf16(args) and getattr(known, "_supports_flash_attn", False)):
        return "sdpa"
    if is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == 9:
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def load_model(args, name: str = "", flag: str = "--model"):
    """Causal language model of that name, --model unless given, with dropout off."""
    from transformers import AutoModelForCausalLM

    name = name or args.model
    implementation = attention(args, load_config(name, args.trust_remote_code, flag))
    with one_line_error(name, flag):
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            dtype=getattr(torch, args.dtype),
            attn_implementation=implementation,
            trust_remote_code=args.trust_remote_code,
            **(four_bits(args) if name == args.model else {}),
        )
    model.config.use_cache = False
    return without_dropout(model)


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


def without_dropout(model):
    """The same model with every rate of dropout 0: nn.Dropout's, and those that a module keeps for its own use."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    return model


@contextlib.contextmanager
def one_line_error(name: str, flag: str = "--model") -> Iterator[None]:
    """Turn what transformers raises for a model that is not there into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        target = resolve_model(name) if name != "tiny" else name
        where = (
            f"the hub ({target}) could not provide it" if not Path(name).is_dir() else "the folder could not be read"
        )
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            f"{flag} {name}: found no local folder ./{name} and {where}; expected a folder made by save_pretrained, or a"
            f" reachable hub. {reason}"
            if not Path(name).is_dir()
            else f"{flag} {name}: {where}: {reason}"
        ) from error


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
    """LoRA on all linear layers, dropout 0. A scalar head (task_type SEQ_CLS) is trained whole.

    The reference policy is then the model with its adapter switched off. A checkpoint leaves out frozen weights that still
    are as they are now.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type=task_type)
    model = get_peft_model(model, config)
    for p in model.parameters():
        if not p.requires_grad and not p.is_meta:
            p.loaded = fingerprint(p)
    return model


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


# ---- the embedded model ----
def tiny_path() -> Path:
    """Folder of the embedded model; made on first use by the first process that asks, others wait for it."""
    key = json.dumps([TINY, TINY_TRAINING, pydoc_key(), torch.__version__])
    path = cache_folder() / f"tiny-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if path.is_dir():
        return path
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            partial = path.with_name(f".partial_{path.name}")
            shutil.rmtree(partial, ignore_errors=True)
            train_tiny(partial)
            os.replace(partial, path)
    return path


def train_tiny(path: Path) -> None:
    """Byte-level BPE and a GPT-NeoX language model over the pydoc training rows, prompt and response alike."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    setting = TINY_TRAINING
    rows = load_rows("pydoc", "train")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"], special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator((f"{r['prompt']}\n{r['response']}" for r in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1])
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(setting["seed"])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad))
    torch.random.set_rng_state(generator_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = encode(rows, tokenizer, setting["max_length"], setting["max_length"] - 32)
    texts = [torch.tensor(r["prompt_ids"] + r["response_ids"]) for r in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1, fused=True)
    size = setting["batch_size"]
    total = setting["epochs"] * (len(texts) // size)
    print(f"training the embedded model tiny once ({total} steps on {len(texts)} docstrings)", file=sys.stderr)
    with progress("tiny", total) as advance:
        for epoch in range(setting["epochs"]):
            order = data_order(len(texts), setting["seed"], epoch)
            blocks = [
                order[i : i + 16 * size] for i in range(0, len(order), 16 * size)
            ]  # similar lengths share a batch
            by_length = [sorted(block, key=lambda i: len(texts[i])) for block in blocks]
            batches = [b[i : i + size] for b in by_length for i in range(0, len(b) - size + 1, size)]
            for step, j in enumerate(data_order(len(batches), setting["seed"], epoch, 1)):
                ids = torch.nn.utils.rnn.pad_sequence(
                    [texts[i] for i in batches[j]], batch_first=True, padding_value=-100
                )
                logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                done = epoch * len(batches) + step
                optimizer.param_groups[0]["lr"] = learning_rate_at(
                    min(done, total - 1), total, setting["learning_rate"], 0.05
                )
                optimizer.step()
                optimizer.zero_grad()
                advance(1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
