"""Tables of docs/scaling.md: what IRFT and the IRL paper's online DPO with 7 billion weights take on many GPUs, by the plan.

The model is of Mistral's shape and has no weights, the data are rows of one length, and nothing is trained: these are the
numbers of --dry-run. Rates are a share of what NVIDIA's data sheet says of an H100 SXM. Two minutes on a CPU.

    python benchmark/scaling.py
    python benchmark/scaling.py --share 0.3 --prompt 500 --response 200
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import UserError  # noqa: E402
from common.args import main, resolve_auto  # noqa: E402
from extras import cost, memory  # noqa: E402

MISTRAL = dict(
    vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336, max_position_embeddings=4096,
)  # fmt: skip
DEVICES = (8, 64, 512)
ENGINES = {  # what accelerate's launcher sets for the configs of these names
    "ddp": {},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true"},
}
SCRIPTS = ("irft", "irl_dpo_ultrachat")


@dataclass
class Args:
    prompt: int = 200
    """tokens of every prompt."""
    response: int = 250
    """tokens of every demonstration, and so of an expected answer."""
    peak: float = 989e12
    """operations per second of a GPU in bf16, without sparsity: H100 SXM."""
    bandwidth: float = 3.35e12
    """bytes per second of its memory."""
    share: float = 0.4
    """part of both that a run is taken to reach."""
    rows: int = 64
    """answers that a GPU samples at a time: each step reads all weights once, in bf16."""


def settings(script: str, model: str, args: Args):
    """(module of the script, its Args for a 7B model on 50,000 demonstrations)."""
    module = __import__(script)
    given = dict(model=model, mixed_precision="bf16", gradient_checkpointing=True, generation="vllm", dry_run=True)
    found = module.Args(**given)
    resolve_auto(found, module.SETTINGS)
    found.check()
    if args.response > found.max_new_tokens or args.prompt > found.max_prompt_length:
        raise UserError(
            f"--prompt, --response: found {args.prompt}, {args.response}, expected lengths that {script}.py keeps"
        )
    return module, found


def work_of(module, found, args: Args) -> cost.Work:
    rows = [{"prompt_ids": [0] * args.prompt, "response_ids": [0] * args.response}] * found.max_samples
    if module.__name__ == "irft":
        return module.plan_work(module.make_plan(len(rows), found), rows, found)
    return cost.with_reward(found, rows, [], module.count_steps(len(rows), found).updates)


def hours_table(found, work: cost.Work, args: Args) -> None:
    """Tokens, operations and hours of every phase."""
    sizes = {"policy": cost.sizes_of(found, False)}
    sizes |= {"scalar": cost.sizes_of(found, True)} if found.scalar_models else {}
    policy = sizes["policy"]
    generated = args.share * args.bandwidth * args.rows / (2 * (policy.trained + policy.frozen + policy.head))
    rates = args.share * args.peak, generated
    print("| phase | generated | scored | trained | FLOP | " + " | ".join(f"h on {n}" for n in DEVICES) + " |")
    print("|---" * (5 + len(DEVICES)) + "|")
    whole = [0.0] * len(DEVICES)
    for name, passes in work.phases.items():
        done = [cost.operations(sizes[p.model], p.sequences, p.kind == "train", True) for p in passes]
        took = [sum(cost.hours(p, d, rates, n)[0] for p, d in zip(passes, done, strict=True)) for n in DEVICES]
        whole = [a + b for a, b in zip(whole, took, strict=True)]
        kinds = [work.total(kind, phase=name) for kind in ("generate", "score", "train")]
        tokens = [kinds[0].responses[0], kinds[1].tokens[0], kinds[2].tokens[0]]
        cells = [cost.short(x) if x else "-" for x in (*tokens, sum(done)[0])]
        print(f"| {' | '.join([name, *cells, *(f'{x:.2f}' for x in took)])} |")
    print(f"| all | | | | | {' | '.join(f'{x:.2f}' for x in whole)} |")
    print(f"\n{cost.short(generated)} tokens a second generated on a GPU, {cost.short(rates[0])}FLOP/s trained.\n")


def memory_table(found) -> None:
    """GiB of each phase on a device."""
    plans: dict[str, dict[str, float]] = {}
    for engine, variables in ENGINES.items():
        for name in {name for e in ENGINES.values() for name in e}:
            os.environ.pop(name, None)
        os.environ.update(variables)
        for n in DEVICES:
            found.num_processes = n
            plan = memory.Plan(found)
            phases = plan.training(True) | plan.answering()
            plans[f"{engine}, {n}"] = {name: sum(parts.values()) / 2**30 for name, parts in phases.items()}
    names = list(dict.fromkeys(name for phases in plans.values() for name in phases))
    print(f"| engine, devices | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    for label, phases in plans.items():
        print(f"| {label} | {' | '.join(f'{phases[n]:.0f}' if n in phases else '-' for n in names)} |")
    print()


def show(args: Args) -> None:
    """Print the tables of both scripts."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model("mistral", **MISTRAL).save_pretrained(folder)
        for script in SCRIPTS:
            module, found = settings(script, folder, args)
            print(f"## {script}.py\n")
            hours_table(found, work_of(module, found, args), args)
            memory_table(found)


if __name__ == "__main__":
    main(lambda: show(tyro.cli(Args, description=__doc__)))
