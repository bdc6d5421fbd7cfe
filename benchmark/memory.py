"""Peak memory: the plan of --dry-run against what its phases really take, and RFT paper's Table 2.

Each case runs in a process of its own. `peak` is the largest sum of bytes that torch's allocator had handed out, from its
own record of every allocation; `resident` that of the resident set above its size before the model was made. The models
are random.

    python benchmark/memory.py                     # Table 2: Alg. 2 trains in the memory of SFT
    python benchmark/memory.py --plan 100m         # plan and measurement of every phase, of a model of that shape
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

CASES = {
    "sft": "SFT, 2B sequences",
    "irft": "IRFT, B pairs, stored reference log-probs",
    "irft_ref": "IRFT, B pairs, reference model in memory",
}
PHASES = {"irft": ("train", "generate", "score"), "rft": ("reward step", "policy update", "answers")}
NEOX_100M = dict(  # 98 million, pythia-160m's vocabulary and head size
    vocab_size=50304, hidden_size=512, num_hidden_layers=15, num_attention_heads=8, intermediate_size=2048,
    max_position_embeddings=512,
)  # fmt: skip
SIZES = {  # of the batches that are measured
    "tiny": dict(
        max_length=256, max_new_tokens=64, max_prompt_length=192, batch_size=8, per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
    ),
    "100m": dict(
        max_length=128, max_new_tokens=32, max_prompt_length=96, batch_size=4, per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
    ),
}  # fmt: skip


@dataclass
class Args:
    case: str = ""
    """one of sft, irft, irft_ref: measure it in this process; empty: all of them, a table."""
    hidden: int = 512
    """width of the model."""
    layers: int = 8
    """its depth."""
    pairs: int = 4
    """B."""
    length: int = 256
    """tokens per sequence, half of them response."""
    steps: int = 3
    """updates."""
    plan: Literal["", "tiny", "100m"] = ""
    """compare --dry-run's plan with measurements of a model of this shape."""


# ---- measuring ----
def measured_peak(work: Callable[[], object]) -> int:
    """Largest sum of bytes that torch's CPU allocator handed out and did not get back while work() ran."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def sequences(rows: int, args) -> list[tuple[list[int], list[int]]]:
    """Full windows, but for the last row, which is a token shorter: with padding, as real batches are."""
    prompt, response = args.max_prompt_length, args.max_length - args.max_prompt_length
    return [([1] * prompt, [2] * (response - (i == rows - 1))) for i in range(rows)]


def measure_phase(phase: str, args) -> int:
    """Bytes at the peak of a phase of irft.py or rft.py, by their own functions: what is held before it, and what it adds."""
    import torch

    import irft
    import rft
    from common import models, rewards
    from common.data import collate
    from common.generation import make_generator
    from common.logprobs import response_logprobs
    from common.streams import make_optimizer

    def update(model, optimizer, loss, rows) -> None:
        for start in range(0, len(rows), args.per_device_train_batch_size):
            loss(model, rows[start : start + args.per_device_train_batch_size], args, "cpu")[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def prepared(model, loss, row):
        """The model and an optimizer that has its state."""
        optimizer = make_optimizer(args.optimizer, model.train().parameters())
        update(model, optimizer, loss, [row])
        return model, optimizer

    def held(*parts) -> int:
        tensors = []
        for part in parts:
            if isinstance(part, torch.nn.Module):
                tensors += [*part.parameters(), *part.buffers()]
            else:
                tensors += [x for state in part.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        return sum(t.nbytes for t in tensors)

    def ppo_loss(model, rows, args, device):
        return rft.ppo_batch_loss(model, rows, args, device, 1.0)

    def answer(policy) -> None:
        generator = make_generator(SimpleNamespace(args=args), policy, models.load_tokenizer(args))
        generator.eos_ids = set()  # all of them of full length
        generator.check = None  # scoring is a phase of its own
        asked = sequences(args.per_device_eval_batch_size, args)
        prompts = [[i, *x[1:]] for i, (x, _) in enumerate(asked)]  # equal ones are read once
        generator.sample(prompts, list(range(len(prompts))), 0)

    def score(policy) -> None:
        with torch.no_grad():
            response_logprobs(policy, collate(sequences(args.per_device_eval_batch_size, args), 0))

    def row(x: list[int], y: list[int]) -> dict:
        zeros = dict.fromkeys(("logprobs", "values", "advantages", "returns"), [0.0] * len(y))
        pair = {"chosen_ids": y, "rejected_ids": y[:-1], "ref_chosen": -9.0, "ref_rejected": -9.0}
        return {"prompt_ids": x, "response_ids": y, **zeros, **pair}

    size = args.rollout_batch_size // args.num_mini_batches if phase == "policy update" else args.batch_size
    rows, short = [row(x, y) for x, y in sequences(size, args)], row([1], [2, 2])
    if phase in PHASES["irft"]:
        policy, optimizer = prepared(models.prepare_policy(args), irft.pair_loss, short)
        if phase == "train":
            return held(policy, optimizer) + measured_peak(lambda: update(policy, optimizer, irft.pair_loss, rows))
        if phase == "generate":
            return held(policy, optimizer) + measured_peak(lambda: answer(policy))
        reference = models.load_model(args).eval()
        return held(policy, optimizer, reference) + measured_peak(lambda: score(reference))
    value, reward = (rewards.prepare_scalar(args, args.model, "--reward-model") for _ in range(2))
    reward, reward_optimizer = prepared(reward, rft.reward_batch_loss, short)
    if phase == "reward step":
        actor_critic = rft.ActorCritic(models.prepare_policy(args), value)
        work = measured_peak(lambda: update(reward, reward_optimizer, rft.reward_batch_loss, rows))
        return held(actor_critic, reward, reward_optimizer) + work
    actor_critic, optimizer = prepared(rft.ActorCritic(models.prepare_policy(args), value), ppo_loss, short)
    before = held(actor_critic, optimizer, reward, reward_optimizer)
    if phase == "policy update":
        return before + reference_bytes(args) + measured_peak(lambda: update(actor_critic, optimizer, ppo_loss, rows))
    reference = models.load_model(args).eval()
    return before + reference_bytes(args) + measured_peak(lambda: (answer(actor_critic.policy), score(reference)))


def reference_bytes(args) -> int:
    """Weights of rft.py's reference policy. With LoRA there are none: it is the policy with its adapter switched off."""
    from common import models

    return 0 if args.lora_r else sum(p.nbytes for p in models.load_model(args).parameters())


def phase_args(script: str, folder: Path, **settings):
    """Args of irft.py or rft.py for the model in `folder`, named by its shape, float32."""
    import irft
    import rft

    shared = SIZES.get(folder.name, SIZES["tiny"]) | dict(model=str(folder), mixed_precision="no")
    shared |= dict(share_prompts=False)  # the plan is of separate rows
    ppo = dict(rollout_batch_size=2 * shared["batch_size"], num_mini_batches=2)
    own = dict(reward_model="", sft_epochs=0, **ppo) if script == "rft" else {}
    return {"irft": irft, "rft": rft}[script].Args(**shared | own | settings)


def planned(args) -> dict[str, float]:
    """{phase: bytes} of the plan."""
    from extras.memory import Plan

    plan = Plan(args)
    phases = plan.training(args.gradient_checkpointing) | plan.answering()
    return {phase: sum(parts.values()) for phase, parts in phases.items()}


def make_model(folder: Path, shape: str) -> None:
    """A random GPT-NeoX of that shape with a tokenizer of 258 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    import tiny

    words = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    config = (
        GPTNeoXConfig.from_pretrained(tiny.MODEL, dtype="float32") if shape == "tiny" else GPTNeoXConfig(**NEOX_100M)
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_plan(shape: str) -> None:
    """Every phase of irft.py and rft.py, plan and measurement, the latter in processes of their own."""
    variants = {"": {}, ", checkpointing": {"gradient_checkpointing": True}, ", LoRA": {"lora_r": 8}}
    sizes = ", ".join(f"{name} {value}" for name, value in SIZES[shape].items())
    print(f"{shape}: {sizes}, float32")
    print("| phase | plan, MiB | peak, MiB | plan / peak | resident, MiB |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/{shape}"
        make_model(Path(folder), shape)
        for script, phases in PHASES.items():
            for words, settings in variants.items():
                plan = planned(phase_args(script, Path(folder), **settings))
                for phase in phases:
                    if settings and "train" not in phase and phase != "policy update":
                        continue
                    given = [sys.executable, __file__, "--case", json.dumps([script, phase, folder, settings])]
                    done = subprocess.run(given, capture_output=True, text=True, check=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                    mib = [x / 2**20 for x in (plan[phase], found["peak"], found["resident"])]
                    ratio = mib[0] / mib[1]
                    print(
                        f"| {script}, {phase}{words} | {mib[0]:.0f} | {mib[1]:.0f} | {ratio:.2f} | {mib[2]:.0f} |",
                        flush=True,
                    )


# ---- RFT paper, Table 2 ----
def measure(args: Args) -> dict[str, float]:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    import irft
    import sft
    from common.data import collate
    from common.logprobs import masked_sum, response_logprobs
    from extras import shared_prompts

    def make():
        size = dict(vocab_size=4096, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=8)
        return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=4 * args.hidden, max_position_embeddings=512, **size))

    torch.manual_seed(0)
    half = args.length // 2
    ids = torch.randint(0, 4096, (2 * args.pairs, args.length)).tolist()
    pairs = [
        {
            "prompt_ids": a[:half],
            "chosen_ids": a[half:],
            "rejected_ids": b[half:],
            "ref_chosen": -900.0,
            "ref_rejected": -900.0,
        }
        for a, b in zip(ids[::2], ids[1::2], strict=True)
    ]
    rows = [
        {"prompt_ids": p["prompt_ids"], "response_ids": p[k]} for p in pairs for k in ("chosen_ids", "rejected_ids")
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = make()
    if args.case != "sft":  # whose rows have prompts of their own
        shared_prompts.settle(model, irft.Args(), args.case)
    reference = make() if args.case == "irft_ref" else None
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-6)
    for _ in range(args.steps):
        if reference is not None:
            with torch.no_grad():
                for kind in ("chosen", "rejected"):
                    batch = collate([(p["prompt_ids"], p[f"{kind}_ids"]) for p in pairs], 0)
                    scores = masked_sum(response_logprobs(reference, batch).logprobs, batch.response_mask)
                    for pair, value in zip(pairs, scores.tolist(), strict=True):
                        pair[f"ref_{kind}"] = value
        if args.case == "sft":
            losses, _ = sft.demonstration_loss(model, rows, "cpu")
        else:
            losses, _ = irft.pair_loss(model, pairs, irft.Args(), "cpu")
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (peak - before) / 1024, "parameters": sum(p.numel() for p in model.parameters())}


def main(args: Args) -> None:
    if args.case.startswith("["):
        script, phase, folder, settings = json.loads(args.case)
        given, before = phase_args(script, Path(folder), **settings), resident()
        print(json.dumps({"peak": measure_phase(phase, given), "resident": resident() - before}))
        return
    if args.case:
        print(json.dumps(measure(args)))
        return
    if args.plan:
        print_plan(args.plan)
        return
    found = {}
    for case in CASES:
        words = [sys.executable, __file__, "--case", case, "--hidden", str(args.hidden), "--layers", str(args.layers)]
        words += ["--pairs", str(args.pairs), "--length", str(args.length), "--steps", str(args.steps)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{found['sft']['parameters'] / 1e6:.0f}M parameters, {2 * args.pairs} sequences of {args.length} tokens, float32"
    )
    print("| training step | peak, MiB | over SFT |\n|---|---|---|")
    for case, label in CASES.items():
        print(f"| {label} | {found[case]['mib']:.0f} | {found[case]['mib'] / found['sft']['mib']:.2f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
