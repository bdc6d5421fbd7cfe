"""How much faster rows that share a prompt are than separate rows, over lengths, with the bound that counted operations set.

Two things are measured: a training step of irft.py on pairs (forward and backward pass), and the scores of --candidates answers
to one prompt without gradient. Shared and separate rows take turns in one process. The table has medians. Models are random.

    python benchmark/shared_prompt.py --output runs/shared_prompt
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import irft  # noqa: E402
import tiny  # noqa: E402
from common.args import main  # noqa: E402
from common.data import collate  # noqa: E402
from common.engine import mixes_bf16  # noqa: E402
from common.logprobs import response_logprobs  # noqa: E402
from extras import figures, noise, shared_prompts  # noqa: E402

SHAPES = {"tiny": "the embedded model's shape, 1,024 words", "17m": "Llama, 17 million weights, 49,152 words"}
LLAMA_17M = dict(
    vocab_size=49152, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


@dataclass
class Args:
    shapes: tuple[str, ...] = tuple(SHAPES)
    """shapes of models: tiny, 17m."""
    prompts: tuple[int, ...] = (16, 64, 128, 256, 512)
    """tokens of a prompt."""
    responses: tuple[int, ...] = (16, 64, 256)
    """tokens of an answer."""
    pairs: int = 8
    """pairs in a training step."""
    candidates: int = 16
    """answers to one prompt that are scored without gradient."""
    repeats: int = 5
    """measurements of each kind."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """as in the scripts."""
    output: str = "runs/shared_prompt"
    """folder for shared_prompt.md, shared_prompt.json and shared_prompt.png."""


def make_model(shape: str):
    """A random model of that shape, in float32, which shares prompts. ValueError if it does not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    longer = {"dtype": "float32", "max_position_embeddings": 4096}
    config = (
        AutoConfig.from_pretrained(tiny.MODEL, **longer)
        if shape == "tiny"
        else AutoConfig.for_model("llama", **LLAMA_17M)
    )
    model = noise.without_noise(AutoModelForCausalLM.from_config(config))
    shared_prompts.settle(model, irft.Args(), shape)
    if model.shared_prompts is None:
        raise ValueError(f"{shape}: found a model that does not share prompts, expected one that does")
    return model


def operations(model, prompt: int, answers: list[int], copies: int) -> int:
    """Operations of a forward pass over answers to one prompt, with `copies` copies of the prompt.

    Two for each number of a matrix and token: the head's for answer tokens, the others' for all. Four times the width for each
    pair of tokens of which one sees the other, in each layer. A backward pass takes twice as many, whatever the rows are.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    outside = head * (1 if config.tie_word_embeddings else 2)
    layers = sum(p.numel() for p in model.parameters() if p.dim() > 1) - outside
    tokens = copies * prompt + sum(answers)
    seen = copies * prompt * (prompt + 1) // 2 + sum(a * prompt + a * (a + 1) // 2 for a in answers)
    attention = 4 * config.hidden_size * config.num_hidden_layers * seen
    return 2 * layers * tokens + attention + 2 * head * sum(answers)


def alternate(model, work: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of work() with separate and with shared rows, in turns, after one round that does not count."""
    limits, seconds = model.shared_prompts, ([], [])
    for turn in range(repeats + 1):
        for kind, found in zip((None, limits), seconds, strict=True):
            model.shared_prompts = kind
            started = time.perf_counter()
            work()
            if turn:
                found.append(time.perf_counter() - started)
    return seconds


def measure(model, args: Args, kind: str, prompt: int, response: int) -> dict:
    """A row of the table. kind: training or scoring."""
    draw = torch.Generator().manual_seed(prompt * 10_007 + response)

    def tokens(n: int) -> list[int]:
        return torch.randint(5, model.config.vocab_size, (n,), generator=draw).tolist()

    if kind == "training":
        refs = {"ref_chosen": -9.0, "ref_rejected": -9.0}
        pairs = [
            {"prompt_ids": tokens(prompt), "chosen_ids": tokens(response), "rejected_ids": tokens(response), **refs}
            for _ in range(args.pairs)
        ]
        answers = 2
    else:
        x, answers = tokens(prompt), args.candidates
        sequences = [(x, tokens(response)) for _ in range(answers)]

    def work() -> None:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=mixes_bf16(args)),
            torch.set_grad_enabled(kind == "training"),
        ):
            if kind == "scoring":
                response_logprobs(model, collate(sequences, 0))
                return
            losses, _ = irft.pair_loss(model, pairs, irft.Args(), "cpu")
        losses.mean().backward()
        model.zero_grad(set_to_none=True)

    separate, shared = alternate(model, work, args.repeats)
    ratios = [a / b for a, b in zip(separate, shared, strict=True)]
    lengths = [response] * answers
    return {
        "kind": kind, "prompt": prompt, "response": response, "answers": answers,
        "separate_ms": 1e3 * statistics.median(separate), "shared_ms": 1e3 * statistics.median(shared),
        "speed_up": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        "bound": operations(model, prompt, lengths, answers) / operations(model, prompt, lengths, 1),
        "tokens": answers * (prompt + response) / (prompt + answers * response),
    }  # fmt: skip


def markdown(shape: str, rows: list[dict]) -> str:
    text = f"{SHAPES[shape]}\n\n| | prompt | answer | separate, ms | shared, ms | speed-up | bound | fewer tokens |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for r in rows:
        what = "training, pairs" if r["kind"] == "training" else f"scoring, {r['answers']} answers"
        text += f"| {what} | {r['prompt']} | {r['response']} | {r['separate_ms']:.1f} | {r['shared_ms']:.1f} |"
        text += f" {r['speed_up']:.2f} [{r['least']:.2f}, {r['most']:.2f}] | {r['bound']:.2f} | {r['tokens']:.2f} |\n"
    return text


def figure(found: dict[str, list[dict]], path: Path) -> None:
    """A panel for each shape and kind: the speed-up over the prompt's length, a colour for each length of answer."""
    kinds = ("training", "scoring")
    fig, axes = figures.subplots(len(found), 2, (9.5, 3.4 * len(found)))
    for line, (shape, rows) in zip(axes, found.items(), strict=True):
        for ax, kind in zip(line, kinds, strict=True):
            own = [r for r in rows if r["kind"] == kind]
            for response, color in figures.colored(sorted({r["response"] for r in own})):
                points = [r for r in own if r["response"] == response]
                x, y = [r["prompt"] for r in points], [r["speed_up"] for r in points]
                ends = [r["least"] for r in points], [r["most"] for r in points]
                figures.draw(ax, x, y, *ends, color=color, label=f"answers of {response} tokens")
                ax.plot(x, [r["bound"] for r in points], color=color, lw=1.2, ls="--")
            figures.level(ax, 1.0)
            ax.set(xscale="log", xlabel="tokens of the prompt", ylabel="separate / shared time")
            ax.set_xticks(x, [str(n) for n in x], minor=False)
            ax.minorticks_off()
            what = "training on pairs" if kind == "training" else f"scoring {own[0]['answers']} answers"
            ax.set_title(f"{shape}: {what} (dashed: bound)", loc="left")
            ax.legend(frameon=False, loc="best")
    figures.caption(fig, "bands: least and most of the repeats")
    figures.save(fig, path)


def shared_prompt(args: Args) -> None:
    found, out = {}, Path(args.output)
    for shape in args.shapes:
        model = make_model(shape)
        found[shape] = [
            measure(model, args, kind, prompt, response)
            for kind in ("training", "scoring")
            for response in args.responses
            for prompt in args.prompts
        ]
    out.mkdir(parents=True, exist_ok=True)
    precision = "bf16 autocast" if mixes_bf16(args) else "float32"
    text = f"{torch.get_num_threads()} thread(s), {precision}, {args.pairs} pairs, medians of {args.repeats}\n\n"
    text += "\n".join(markdown(shape, rows) for shape, rows in found.items())
    (out / "shared_prompt.md").write_text(text)
    (out / "shared_prompt.json").write_text(json.dumps(found, indent=2) + "\n")
    figure(found, out / "shared_prompt.png")
    print(text)
    print(f"table: {out / 'shared_prompt.md'}   figure: {out / 'shared_prompt.png'}")


if __name__ == "__main__":
    main(lambda: shared_prompt(tyro.cli(Args, description=__doc__)))
