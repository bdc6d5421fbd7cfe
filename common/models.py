"""Models: names, loading, the embedded `tiny`, LoRA, the reference policy, and what a run costs in memory."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from common import UserError
from common.data import cache_folder, encode, load_rows, pydoc_key
from common.run import data_order, learning_rate_at, progress

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


def load_tokenizer(args):
    """Tokenizer of --model. UserError in one line if it cannot be had, has no EOS token, or does not fit model and window."""
    from transformers import AutoTokenizer

    name = args.model
    with one_line_error(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=args.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model {name}: found a tokenizer without an EOS token, expected one: responses could not end"
        )
    config = load_config(name, args.trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--model {name}: found a tokenizer of {len(tokenizer)} tokens but {config.vocab_size} embeddings in the model;"
            " expected a tokenizer made for this model"
        )
    window = getattr(config, "max_position_embeddings", None)
    if window and args.max_length > window:
        raise UserError(
            f"--max-length: found {args.max_length}, expected at most {window}, the window of --model {name}"
        )
    return tokenizer


def load_config(name: str, trust_remote_code: bool = False):
    from transformers import AutoConfig

    with one_line_error(name):
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)


def load_model(args):
    """Causal language model of --model with dropout off."""
    from transformers import AutoModelForCausalLM

    with one_line_error(args.model):
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(args.model),
            dtype=getattr(torch, args.dtype),
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model


@contextlib.contextmanager
def one_line_error(name: str) -> Iterator[None]:
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
            f"--model {name}: found no local folder ./{name} and {where}; expected a folder made by save_pretrained, or a"
            f" reachable hub. {reason}"
            if not Path(name).is_dir()
            else f"--model {name}: {where}: {reason}"
        ) from error


def prepare_policy(args):
    """The model to train: loaded, with LoRA and gradient checkpointing where asked."""
    model = load_model(args)
    if args.lora_r:
        model = add_lora(model, args)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# ---- LoRA and the reference policy ----
def add_lora(model, args):
    """LoRA on all linear layers, dropout 0. The reference policy is then the model with its adapter switched off."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@contextlib.contextmanager
def reference_policy(run, policy, is_initial: bool) -> Iterator[torch.nn.Module]:
    """The initial model, without gradient, for as long as the context lasts.

    The policy itself while it has not moved (`is_initial`); with LoRA the policy with its adapter off; else a second copy,
    loaded from disk and freed again, so that training never shares memory with it.
    """
    args = run.args
    policy = run.accelerator.unwrap_model(policy)
    if is_initial:
        yield policy
    elif args.lora_r:
        with policy.disable_adapter():
            yield policy
    else:
        model = load_model(args).to(run.accelerator.device).eval()
        if run.accelerator.mixed_precision == "bf16":
            model.forward = torch.autocast(run.accelerator.device.type, torch.bfloat16)(model.forward)
        yield model


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


# ---- what it costs ----
def memory_plan(config, args, sequences_per_row: int) -> dict[str, dict[str, float]]:
    """Estimated GiB per device: {phase: {part: GiB}} for training, generation and scoring with data parallelism.

    Counted exactly: weights, gradients, optimizer state, logits, KV cache. Activations: about 34 hidden-sized values per
    token and layer (2 with gradient checkpointing), an estimate.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    gib = 2**30
    count = sum(p.numel() for p in model.parameters())
    linear = [
        m
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "head" not in n and "embed_out" not in n
    ]
    trained = sum(args.lora_r * (m.in_features + m.out_features) for m in linear) if args.lora_r else count
    width = 2 if args.dtype == "bfloat16" else 4
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    weights = count * width
    sequences = sequences_per_row * args.per_device_train_batch_size
    tokens = sequences * args.max_length
    activations = tokens * layers * hidden * (2 if args.gradient_checkpointing else 34) * 2
    states = {"rmsprop": 1, "adamw": 2}[args.optimizer]
    answers = sequences * min(args.max_length, args.max_length - args.max_prompt_length + args.max_new_tokens)
    cache = args.per_device_eval_batch_size * args.max_length * layers * heads * head_dim * 2 * width
    plan = {
        "train": {
            "weights": weights,
            "gradients": trained * width,
            "optimizer": trained * width * states,
            "logits": answers * config.vocab_size * 4 * 3,
            "activations": activations,
        },
        "generate": {"weights": weights, "optimizer": trained * width * states, "kv_cache": cache},
        "score": {
            "weights": weights,
            "reference": 0 if args.lora_r else weights,
            "optimizer": trained * width * states,
            "logits": args.per_device_eval_batch_size
            * 2
            * (args.max_length - args.max_prompt_length)
            * config.vocab_size
            * 4,
        },
    }
    return {phase: {part: value / gib for part, value in parts.items()} for phase, parts in plan.items()}


def print_memory_plan(args, sequences_per_row: int) -> None:
    config = load_config(args.model, args.trust_remote_code)
    for phase, parts in memory_plan(config, args, sequences_per_row).items():
        detail = ", ".join(f"{part} {gib:.3f}" for part, gib in parts.items() if gib)
        print(f"  memory per device, {phase}: about {sum(parts.values()):.2f} GiB ({detail})")
