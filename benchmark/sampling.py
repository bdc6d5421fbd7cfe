"""Sampling beside `generate` of transformers: tokens per second of the same model on the same prompts, measured in turn.

The embedded model as it is, and random models of two more shapes. Answers are `even` (each has all of --max-new-tokens),
`uneven` (a set of words ends an answer, so that lengths are geometric with a fourth of that as their mean), or `candidates`
(uneven, 16 of each prompt). Only tokens up to the end of an answer count. Medians of --repeats.

    python benchmark/sampling.py --shape llama-17m
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.args import main  # noqa: E402
from common.generation import make_generator  # noqa: E402
from extras.cost import NoEnd  # noqa: E402

SHAPES = {
    "llama-17m": dict(
        vocab_size=49152, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=768,
    ),
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536,
    ),
}  # fmt: skip
LENGTHS = ("even", "uneven", "candidates")


@dataclass
class Args:
    shape: Literal["all", "tiny", "llama-17m", "smollm2-135m"] = "all"
    lengths: Literal["all", "even", "uneven", "candidates"] = "all"
    prompts: int = 64
    batch: int = 16
    """answers at a time."""
    prompt_length: int = 96
    """of the longest prompt; the shortest is a quarter of it."""
    max_new_tokens: int = 128
    repeats: int = 3
    threads: int = 2
    device: Literal["cpu", "cuda"] = "cpu"


def make_model(shape: str, device: str):
    """The model of the repository, or one with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    import tiny

    if shape == "tiny":
        model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True))
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def make_prompts(args: Args, words: int, same: int) -> list[list[int]]:
    """Random prompts, each `same` times, of lengths that are spread evenly."""
    draw = torch.Generator().manual_seed(0)
    count = max(1, args.prompts // same)
    shortest = args.prompt_length // 4
    lengths = [shortest + (args.prompt_length - shortest) * (i * 7919 % count) // count for i in range(count)]
    prompts = [torch.randint(2, words, (n,), generator=draw).tolist() for n in lengths]
    return [prompt for prompt in prompts for _ in range(same)]


def by_generate(model, prompts: list[list[int]], args: Args, ends: list[int], seed: int) -> int:
    """Answer the prompts with model.generate in batches sorted by length -> tokens of the answers."""
    torch.manual_seed(seed)
    order, tokens = sorted(prompts, key=len, reverse=True), 0
    stop = torch.tensor(ends, device=args.device)
    for start in range(0, len(order), args.batch):
        part = order[start : start + args.batch]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in part], device=args.device)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in part], device=args.device)
        found = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=args.max_new_tokens,
            eos_token_id=ends or None, pad_token_id=0,
        )[:, width:]  # fmt: skip
        ended = torch.isin(found, stop).long()
        tokens += int((ended.cumsum(-1) == ended).sum())  # the first end counts, what follows it does not
    return tokens


def measure(args: Args, shape: str, lengths: str) -> list[tuple[float, float]]:
    """(our tokens per second, those of generate) of each repeat."""
    model = make_model(shape, args.device)
    words = model.config.vocab_size
    prompts = make_prompts(args, words, 16 if lengths == "candidates" else 1)
    ends = [] if lengths == "even" else list(range(2, words, max(1, args.max_new_tokens // 4)))
    settings = dict(generation="hf", per_device_eval_batch_size=args.batch, max_new_tokens=args.max_new_tokens)
    sampler: Any = make_generator(SimpleNamespace(args=SimpleNamespace(**settings)), model, NoEnd())
    sampler.eos_ids, sampler.check = set(ends), None

    def ours(seed: int) -> int:
        return sum(map(len, sampler.sample(prompts, list(range(len(prompts))), seed).response_ids))

    def rate(answer: Callable[[int], int], seed: int) -> float:
        started = time.perf_counter()
        tokens = answer(seed)
        return tokens / (time.perf_counter() - started)

    pairs = []
    for seed in range(args.repeats + 1):  # the first one warms up
        pairs.append((rate(ours, seed), rate(lambda s: by_generate(model, prompts, args, ends, s), seed)))
    return pairs[1:]


def table(args: Args) -> None:
    torch.set_num_threads(args.threads)
    print(
        f"{args.prompts} prompts of at most {args.prompt_length} tokens, {args.batch} at a time, at most {args.max_new_tokens}"
        f" new tokens, {args.device}, float32, torch {torch.__version__}, {args.threads} threads\n"
    )
    print(
        "| shape | lengths | ours, tokens/s | generate, tokens/s | ratio | lowest | highest |\n|---|---|---|---|---|---|---|"
    )
    for shape in ("tiny", *SHAPES) if args.shape == "all" else (args.shape,):
        for lengths in LENGTHS if args.lengths == "all" else (args.lengths,):
            found = measure(args, shape, lengths)
            ratios = [a / b for a, b in found]
            ours, theirs = (statistics.median(column) for column in zip(*found, strict=True))
            print(
                f"| {shape} | {lengths} | {ours:,.0f} | {theirs:,.0f} | {statistics.median(ratios):.2f} | {min(ratios):.2f}"
                f" | {max(ratios):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(lambda: table(tyro.cli(Args, description=__doc__)))
