"""Speed and memory of SFT, IRFT, rewards, PPO and generation on a CUDA card, with random weights: see gpu.sh.

Models of the shape of pythia-1.4b (all weights trained, bf16 autocast over float32, as the scripts run by default) and of
Mistral 7B (LoRA, bf16 weights); the former under DeepSpeed ZeRO-3 too, and both with vLLM's generation, where these are
installed. IRFT is also trained with gradient checkpointing, and with padded batches where flash attention is installed,
which does without padding. Losses, updates and generators are the scripts' own. Each case runs in processes of its own.

A model's arithmetic is what extras/cost.py counts; recomputation is not counted. The card's rate is that of a large bf16
product, measured in the same process.
"""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

CONFIGS = Path(__file__).parent.parent / "configs"
sys.path.insert(0, str(Path(__file__).parent.parent))
from common import UserError  # noqa: E402
from common.args import main  # noqa: E402
from extras import cost  # noqa: E402


@dataclass
class Shape:
    architecture: str
    size: dict
    sequences: int  # in a forward pass of training
    length: int  # prompt + response
    response: int
    prompts: int  # answered at a time
    steps: int


SHAPES = {
    "pythia-1.4b": Shape(
        "gpt_neox",
        dict(vocab_size=50304, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192),
        16, 1024, 256, 64, 8,
    ),
    "mistral-7b": Shape(
        "mistral",
        dict(
            vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=14336,
        ),
        4, 1024, 256, 32, 8,
    ),
    "tiny": Shape(
        "gpt_neox",
        dict(vocab_size=1024, hidden_size=144, num_hidden_layers=3, num_attention_heads=4, intermediate_size=576),
        4, 32, 8, 4, 1,
    ),
}  # fmt: skip


@dataclass
class Case:
    shape: str
    step: str
    lora_r: int
    config: str = ""  # of configs/
    generation: str = "hf"
    checkpointing: bool = False
    attention: str = "auto"
    folder: str = ""  # for what a run writes


STEPS = {
    "sft": "SFT",
    "irft": "IRFT training",
    "reward": "reward step",
    "ppo": "PPO learning",  # policy and value model, one pass over stored answers
    "generate": "generation",
}


@dataclass
class Args:
    device: Literal["cuda", "cpu"] = "cuda"
    """what to measure; cpu shows that this script works."""
    shape: Literal["all", "pythia-1.4b", "mistral-7b", "tiny"] = "all"
    """all: pythia-1.4b whole, mistral-7b with LoRA, and pythia-1.4b under ZeRO-3."""
    case: str = ""
    """one Case as JSON: measure it in this process."""


# ---- one case ----
def operations(model, shape: Shape, train: bool) -> float:
    """Floating-point operations of a forward (and backward) pass per sequence, or of generating one answer."""
    sizes = cost.model_sizes(model, model.config, shape.size["num_hidden_layers"])
    sequence = cost.sequences([(shape.length - shape.response, shape.response)])
    return float(cost.operations(sizes, sequence, train)[0])


def scalar_operations(model, shape: Shape) -> float:
    """The same of a model with a scalar head, which is trained and costs next to nothing."""
    weights = {p: p.requires_grad for p in model.parameters() if p.ndim > 1}
    weights.pop(model.get_input_embeddings().weight)
    layers, width = shape.size["num_hidden_layers"], shape.size["hidden_size"]
    attention = 6 * layers * width * shape.length**2
    return sum((6 if trained else 4) * p.numel() for p, trained in weights.items()) * shape.length + attention


def product_rate(device: str) -> float:
    """Operations per second of a bf16 matrix product."""
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for repeats in (3, 20):  # the first ones warm up
        synchronise(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronise(device)
    return repeats * 2 * n**3 / (time.perf_counter() - started)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> int:
    """Bytes: on CUDA what the allocator held at most, on CPU the largest resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_model(auto, settings, shape: Shape, **options):
    """A random model of a shape, of transformers' class `auto`, with the run's type of weights and attention."""
    from transformers import AutoConfig

    from extras import loading, noise

    config = AutoConfig.for_model(shape.architecture, **shape.size, max_position_embeddings=2048, **options)
    made = auto.from_config(
        config, dtype=getattr(torch, settings.dtype), attn_implementation=loading.attention(settings, config)
    )
    return noise.without_noise(made)


def measure(device: str, case: Case) -> dict[str, float]:
    """tokens per second over all devices, peak bytes of one, and the fraction of a bf16 product's rate."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    import irft
    import rft
    import sft
    from common import models
    from common.args import resolve_auto
    from common.generation import make_generator
    from common.rewards import ActorCritic, ScalarModel
    from common.run import Run
    from common.streams import make_optimizer

    shape, rows = SHAPES[case.shape], SHAPES[case.shape].sequences
    script = rft if case.step in ("reward", "ppo") else irft
    per_device = rows if case.step in ("sft", "ppo") else rows // 2  # a pair has two sequences
    settings = script.Args(
        model=case.shape, output_dir=case.folder, lora_r=case.lora_r, mixed_precision="bf16", generation=case.generation,
        dtype="bfloat16" if case.lora_r else "float32", max_prompt_length=shape.length - shape.response,
        max_length=shape.length, max_new_tokens=shape.response, per_device_eval_batch_size=shape.prompts,
        per_device_train_batch_size=per_device, gradient_checkpointing=case.checkpointing, attn_implementation=case.attention,
    )  # fmt: skip
    resolve_auto(settings, script.SETTINGS)
    run = Run(settings, "gpu", {**irft.METRICS, **sft.METRICS})
    torch.manual_seed(0)
    with torch.device("cpu") if case.config else run.accelerator.device:  # engines cut up what is in main memory
        policy = random_model(AutoModelForCausalLM, settings, shape) if case.step != "reward" else None
        scalar = None
        if case.step in ("reward", "ppo"):
            scalar = ScalarModel(random_model(AutoModelForSequenceClassification, settings, shape, num_labels=1))
    work = 0.0
    if policy is not None:
        policy = models.make_trainable(policy, settings)
        work += operations(policy.get_base_model() if case.lora_r else policy, shape, case.step != "generate")
    if scalar is not None:
        scalar.model = models.make_trainable(scalar.model, settings, "SEQ_CLS")
        work += scalar_operations(scalar.inner, shape)
    rate = product_rate(device)
    if case.step == "ppo":
        model: torch.nn.Module = ActorCritic(*(models.autocast_forward(run, m) for m in (policy, scalar)))
    else:
        model = policy if policy is not None else models.autocast_forward(run, scalar)
    model, optimizer = run.prepare(model, make_optimizer("rmsprop", model.parameters()))
    prompt, answer = [5] * (shape.length - shape.response), [7] * shape.response
    zeros = dict.fromkeys(("logprobs", "values", "advantages", "returns"), [0.0] * shape.response)
    pair = dict(prompt_ids=prompt, chosen_ids=answer, rejected_ids=answer, ref_chosen=-9.0, ref_rejected=-9.0)
    row = {**pair, "response_ids": answer, **zeros}
    if case.step == "generate":
        generator = make_generator(run, run.unwrap(model), cost.NoEnd())
        generator.eos_ids = set()

    def loss(part: list[dict]):
        if case.step == "sft":
            return sft.demonstration_loss(model, part, run.accelerator.device)
        if case.step == "reward":
            return rft.reward_batch_loss(model, part, settings, run.accelerator.device)
        if case.step == "ppo":
            return rft.ppo_batch_loss(model, part, settings, run.accelerator.device, 1.0 / shape.response)
        return irft.pair_loss(model, part, settings, run.accelerator.device)

    def once() -> None:
        if case.step == "generate":
            generator.sample([prompt] * shape.prompts, list(range(shape.prompts)), 0)
        else:
            model.train()
            run.step(model, optimizer, [row] * per_device * run.world, loss, lambda _: 0, 1e-6)

    once()  # optimizer state, kernels, vLLM's start
    synchronise(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(shape.steps):
        once()
    synchronise(device)
    seconds = time.perf_counter() - started
    sequences = shape.steps * (shape.prompts if case.step == "generate" else shape.sequences)
    tokens = sequences * (shape.response if case.step == "generate" else shape.length)
    found = {
        "tokens": run.world * tokens / seconds,
        "bytes": peak(device),
        "fraction": work * sequences / seconds / rate,
        "rate": rate,
    }
    run.end()  # together: a process that leaves early takes its connections from one that still waits for the last sum
    return found


# ---- the table ----
def cause(stderr: str) -> str:
    """The line of a failed process that says why; "" if it printed nothing.

    It is a script's own `error: ...`; or the signal that torchrun reports as the first failure; or the end of the last
    traceback of the rank whose traceback came first, since the other ranks fail because that one is gone. The traceback and
    the report between lines of ===== with which torchrun ends say none of this.
    """
    ends, open_in = [], set()  # (rank, "" before torch knows it; last line of a traceback); ranks amid a traceback
    for line in stderr.splitlines():
        rank, text = re.match(r"(?:\[rank(\d+)\]: ?)?(.*)", line).groups("")
        if text.startswith("error: "):
            return text
        if text.startswith("Traceback (most recent call last)"):
            open_in.add(rank)
        elif rank in open_in and text and not text[0].isspace():
            open_in.remove(rank)
            ends.append((rank, text))
    if killed := re.search(r"^Root Cause.*?^  traceback : (Signal [^\n]*)", stderr, re.DOTALL | re.MULTILINE):
        return killed[1]
    ends = [(rank, text) for rank, text in ends if "ChildFailedError" not in text]
    said = [line.strip() for line in stderr.splitlines() if line.strip(" =-*")]
    return ([""] + said + [text for rank, text in ends if rank == ends[0][0]])[-1]


def child(args: Args, case: Case) -> dict[str, float]:
    """measure() in processes of its own, under accelerate's launcher with the case's config. UserError if it failed."""
    words = [sys.executable]
    if case.config:
        start = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(CONFIGS / case.config)]
        words = [*start, "--num_processes", str(torch.cuda.device_count() if args.device == "cuda" else 2)]
    env = os.environ | ({} if args.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    with tempfile.TemporaryDirectory() as folder:
        case.folder = f"{folder}/run"
        words += [__file__, "--device", args.device, "--case", json.dumps(dataclasses.asdict(case))]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        found = f"exit status {done.returncode}: {cause(done.stderr)[:200] or 'no output'}"
        raise UserError(f"{case.step}: found {found}, expected a measurement")
    return json.loads(found[-1])


def table(args: Args) -> None:
    """All cases of --shape, as a Markdown table; a case that fails, of memory say, is a row that says so."""
    from transformers.utils import is_flash_attn_2_available

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: found no CUDA card, expected one (--device cpu --shape tiny shows that the script works)"
        )
    named = (
        [("pythia-1.4b", 0), ("mistral-7b", 64)] if args.shape == "all" else [(args.shape, 64 * ("7b" in args.shape))]
    )
    cases = [Case(shape, step, lora_r) for shape, lora_r in named for step in STEPS]
    cases += [Case(shape, "irft", lora_r, checkpointing=True) for shape, lora_r in named]
    if args.device == "cuda" and is_flash_attn_2_available():
        cases += [Case(shape, "irft", lora_r, attention="sdpa") for shape, lora_r in named]
    if args.device == "cuda" and importlib.util.find_spec("vllm"):
        cases += [Case(shape, "generate", lora_r, generation="vllm") for shape, lora_r in named]
    if importlib.util.find_spec("deepspeed"):
        cases += [Case(named[0][0], step, 0, config="zero3.yaml") for step in STEPS]
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU: a check of the script, not a measurement"
    print(f"{card}, torch {torch.__version__}\n")
    print("| model | step | sequences x tokens (response) | tokens/s | peak, GiB | of a bf16 product's rate |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        s = SHAPES[case.shape]
        size = f"{s.prompts if case.step == 'generate' else s.sequences} x {s.length} ({s.response})"
        how = [f"LoRA r = {case.lora_r}"] * (case.lora_r > 0) + ["ZeRO-3"] * bool(case.config)
        step = [STEPS[case.step]] + ["vLLM"] * (case.generation == "vllm") + ["checkpointing"] * case.checkpointing
        step += ["sdpa, padded"] * (case.attention == "sdpa")
        label = f"{', '.join([case.shape, *how])} | {', '.join(step)} | {size}"
        try:
            found = child(args, case)
        except UserError as error:
            print(f"| {label} | {error} | | |", flush=True)
            continue
        share = f"{found['fraction']:.0%} of {found['rate'] / 1e12:.1f} T/s"
        size = f"{found['bytes'] / 2**30:.1f}{' without vLLM' * (case.generation == 'vllm')}"
        print(f"| {label} | {found['tokens']:,.0f} | {size} | {share} |", flush=True)


def run(args: Args) -> None:
    if not args.case:
        table(args)
        return
    found = measure(args.device, Case(**json.loads(args.case)))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(lambda: run(tyro.cli(Args, description=__doc__)))
