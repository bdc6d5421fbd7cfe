"""What a run costs, known before it begins: tokens and floating-point operations of every phase, and hours at a given rate.

A forward pass takes 2 operations per weight and token, a backward pass 4 (2 for frozen weights), as matrix products have
them. The head is counted for response tokens alone, lookups in an embedding not at all. Attention's two products take 4
operations per layer, column of its width, and pair of a token with one that it sees. --gradient-checkpointing adds another
forward pass of all but the head. Padding, optimizer steps and communication are left out. All experts of a mixture count.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


# ---- tokens ----
@dataclass(frozen=True)
class Sequences:
    """Sums over a set of sequences. Each is an array (2,): what is expected, and what it is at most."""

    count: np.ndarray
    tokens: np.ndarray  # of prompts and responses
    responses: np.ndarray  # of responses
    squares: np.ndarray  # squared lengths, for attention

    def __add__(self, other: "Sequences") -> "Sequences":
        return Sequences(*(a + b for a, b in zip(self.fields(), other.fields(), strict=True)))

    def __mul__(self, times: float) -> "Sequences":
        return Sequences(*(field * times for field in self.fields()))

    def fields(self) -> list[np.ndarray]:
        return [self.count, self.tokens, self.responses, self.squares]


def sequences(lengths: Iterable[tuple]) -> Sequences:
    """Sequences of these (prompt tokens, response tokens). Each is a number, or an array (2,): expected, and at most."""
    prompts, responses = zip(*lengths, strict=True) if (lengths := list(lengths)) else ((), ())
    both = np.array(responses, float).reshape(len(lengths), -1 if lengths else 2) + np.zeros(2)  # (n, 2)
    whole = both + np.array(prompts, float)[:, None]
    return Sequences(*(x.sum(0) for x in (np.ones_like(both), whole, both, whole**2)))


def written(rows: list[dict], *names: str) -> Sequences:
    """The responses that rows of data have under these names, each after its prompt."""
    return sequences((len(row["prompt_ids"]), len(row[name])) for row in rows for name in names)


@dataclass
class Pass:
    """Sequences that go through a model together."""

    kind: str  # generate, score or train
    model: str  # policy or scalar
    sequences: Sequences
    at_once: int  # rows that are shared out over the devices before these wait for each other


class Work:
    """The passes of every phase of a run.

    How long answers will be is not known. They are expected to be as long as the responses of `rows`, and are at most
    --max-new-tokens long. Gold models, judges, experts, and checks of the first answers are left out.
    """

    def __init__(self, args, rows: list[dict]):
        self.args, self.rows = args, rows
        self.name = "response_ids" if "response_ids" in rows[0] else "chosen_ids"
        longest = args.max_new_tokens
        self.answer = np.array([np.mean([min(len(row[self.name]), longest) for row in rows]), longest])
        self.phases: dict[str, list[Pass]] = {}

    def answered(self, rows: list[dict]) -> Sequences:
        """An answer after the prompt of every row."""
        return sequences((len(row["prompt_ids"]), self.answer) for row in rows)

    def pairs(self, rows: list[dict]) -> Sequences:
        """The demonstration of every row and an answer to its prompt."""
        return written(rows, "response_ids") + self.answered(rows)

    def add(self, phase: str, kind: str, these: Sequences, at_once: int, *, model: str = "policy") -> None:
        if these.count.any():
            self.phases.setdefault(phase, []).append(Pass(kind, model, these, at_once))

    def evaluations(self, times: int, rewards: int = 0) -> None:
        """So many evaluations (evals.evaluate) on --eval-samples rows as long as those of the data, and what precedes them.

        rewards: measurements of a reward model. With one, an evaluation also scores its samples.
        """
        share = self.args.eval_samples / len(self.rows)
        said, samples = written(self.rows, self.name) * share, self.answered(self.rows) * share
        n = math.ceil(self.args.eval_samples)
        self.add("evaluations", "generate", samples * (times + 1), n)
        kl = 2 * times * (getattr(self.args, "eval_temperature", 1.0) == 1.0)  # policy and reference on the samples
        self.add("evaluations", "score", (said * 2 + samples) * (times + 1) + samples * kl, n)
        if rewards:
            self.add("evaluations", "score", (said * 2 + samples) * rewards + samples * times, n, model="scalar")

    def total(self, kind: str, model: str = "", phase: str = "") -> Sequences:
        """All passes of a kind, of a model or a phase if one is named."""
        out = sequences([])
        for name, passes in self.phases.items():
            for p in passes:
                if p.kind == kind and model in ("", p.model) and phase in ("", name):
                    out += p.sequences
        return out


def with_reward(args, demonstrations: list[dict], preferences: list[dict], updates: int) -> Work:
    """Work of a script that learns a reward model, and a policy by PPO or from the candidates of each prompt.

    updates: policy updates in one outer iteration.
    """
    prompts = preferences if getattr(args, "prompts", "demonstrations") == "preferences" else demonstrations
    work, T, size = Work(args, demonstrations or preferences), args.T, args.rollout_batch_size
    said = written(demonstrations, "response_ids") * args.sft_epochs
    if getattr(args, "sft_tokens", "response") == "all":
        said = dataclasses.replace(said, responses=said.tokens)
    work.add("SFT", "train", said, args.batch_size)
    compared, pairs = written(preferences, "chosen_ids", "rejected_ids") * T, sequences([])
    if getattr(args, "demo_weight", 1.0):
        work.add("answers", "generate", work.answered(demonstrations) * T, len(demonstrations))
        passes = T * (T + 1) / 2 if getattr(args, "pairs", "current") == "accumulated" else T
        pairs = work.pairs(demonstrations) * passes
    work.add("reward step", "train", (pairs + compared) * args.num_train_epochs, args.batch_size, model="scalar")
    if hasattr(args, "reward_normalisation"):
        said = written(demonstrations, "response_ids") * T
        work.add("reward step", "score", said, len(demonstrations), model="scalar")
    if args.scalar_models == 2:
        answers = work.answered(prompts) * (T * updates * size / len(prompts))
        work.add("PPO", "generate", answers, size)
        work.add("PPO", "score", answers * 2, size, model="scalar")  # reward, value
        work.add("PPO", "score", answers, size)  # reference
        for model in ("policy", "scalar"):
            work.add("PPO", "train", answers * args.num_ppo_epochs, size // args.num_mini_batches, model=model)
    else:
        asked = work.answered(prompts) * (T * (args.total_prompts or len(prompts)) / len(prompts))
        work.add("policy step", "generate", asked * args.num_generations, size * args.num_generations)
        work.add("policy step", "score", asked * args.num_generations, size * args.num_generations, model="scalar")
        if args.sequences_per_row == 2:
            work.add("policy step", "score", asked * 2, size)  # reference
        trained = asked * (args.sequences_per_row * args.num_policy_epochs)
        work.add("policy step", "train", trained, args.batch_size)
    work.evaluations(T * math.ceil(updates / args.eval_updates) + 1, rewards=T)
    return work


# ---- operations ----
@dataclass(frozen=True)
class Sizes:
    """Numbers of a model's weights that multiply every token, and of its head's; summed widths of attention's layers."""

    trained: float
    frozen: float
    head: float
    head_trained: int  # 1, or 0 where it is frozen
    attention: float


def model_sizes(model, config, layers: int) -> Sizes:
    """Sizes of a causal model or a classifier of so many layers, with or without adapters. config: of its text model."""
    import torch

    from common.logprobs import language_model

    head = getattr(language_model(model), "get_output_embeddings", lambda: None)()
    head = None if head is None else head.weight
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    body = [p for p in model.parameters() if p.ndim > 1 and p is not head and id(p) not in lookups]
    heads = getattr(config, "num_attention_heads", None) or 0  # a state-space model has none
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    return Sizes(
        trained=sum(p.numel() for p in body if p.requires_grad),
        frozen=sum(p.numel() for p in body if not p.requires_grad),
        head=0 if head is None else head.numel(),
        head_trained=int(head is not None and head.requires_grad),
        attention=width * layers,
    )


def operations(sizes: Sizes, these: Sequences, train: bool, checkpointing: bool = False) -> np.ndarray:
    """Floating-point operations (2,) of a forward pass, and with `train` of its backward pass too."""
    attention = 2 * sizes.attention * these.squares  # each token sees half of the sequence on average
    body = 2 * (sizes.trained + sizes.frozen) * these.tokens + attention
    forward = body + 2 * sizes.head * these.responses
    if not train:
        return forward
    backward = (4 * sizes.trained + 2 * sizes.frozen) * these.tokens + 2 * attention
    backward = backward + (4 if sizes.head_trained else 2) * sizes.head * these.responses
    return forward + backward + (body if checkpointing else 0)


def sizes_of(args, scalar: bool) -> Sizes:
    """model_sizes of the policy, or of the reward and value model, from their configuration."""
    from common import models
    from extras.memory import per_layer, without_data

    name = (getattr(args, "reward_model", "") if scalar else "") or args.model
    config = models.load_config(name, args.trust_remote_code, "--reward-model" if scalar else "--model")
    text = models.text_config(config)

    def measure(layers: int) -> dict:
        model = without_data(args, config, layers, scalar)
        return vars(model_sizes(model.model if scalar else model, text, layers))

    return Sizes(**per_layer(measure, text.num_hidden_layers))


# ---- hours ----
class NoEnd:
    """A tokenizer of no use but to say that no token ends an answer."""

    eos_token_id = None


def measured(args, work: Work) -> tuple[float, float]:
    """(tokens trained, tokens generated) per second by the policy on this device, from steps on random weights.

    A few seconds: batches grow until a step takes a second or the batch is that of the run, and a model deeper than four
    layers is timed with one and with four, since time is linear in their number. Weights are not read.
    """
    import torch

    from common import models
    from common.data import collate
    from common.engine import mixes_bf16
    from common.generation import Generator
    from common.logprobs import response_logprobs
    from extras.memory import device, without_data

    config = models.load_config(args.model, args.trust_remote_code)
    trained = work.total("train", "policy")
    length, answer = (int(x[0] / trained.count[0]) for x in (trained.tokens, trained.responses))
    prompt, new = [1] * (length - answer), max(round(float(work.answer[0])), 1)

    def train(model, rows: int) -> None:
        batch = collate([(prompt, [1] * answer)] * rows, pad_token_id=0).to(device())
        with torch.autocast(device(), torch.bfloat16, enabled=mixes_bf16(args)):
            scores = response_logprobs(model.train(), batch)
        scores.logprobs.sum().backward()
        model.zero_grad(set_to_none=True)

    def generate(model, rows: int, tokens: int) -> None:
        generator = Generator(model, NoEnd(), rows, tokens)
        generator.eos_ids = set()
        with torch.autocast(device(), torch.bfloat16, enabled=mixes_bf16(args)):
            generator.sample([prompt] * rows, list(range(rows)), 0)

    def seconds(act: Callable, *given) -> float:
        act(*given)
        if device() == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        act(*given)
        if device() == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    depth = models.text_config(config).num_hidden_layers
    layers = [depth] if depth <= 4 else [4, 1]
    made = [without_data(args, config, n, checkpointing=args.gradient_checkpointing, where=device()) for n in layers]

    def whole(act: Callable, *given) -> float:
        """Seconds of the whole model."""
        first, *rest = (seconds(act, model, *given) for model in made)
        return first + sum((depth - 4) * (first - one) / 3 for one in rest)

    def batch_of(act: Callable, most: int, *given) -> int:
        rows = 1
        while rows < most and seconds(act, made[0], rows, *given) < 1:
            rows = min(2 * rows, most)
        return rows

    rows = batch_of(train, args.per_device_train_batch_size * args.sequences_per_row)
    found = rows * length / whole(train, rows)
    if args.generation == "vllm":
        return found, 0.0
    rows = batch_of(generate, args.per_device_eval_batch_size, 2)
    two, ten = (whole(generate, rows, n) for n in (2, 10))
    step = max(ten - two, 1e-9) / 8
    return found, rows * new / (two + (new - 2) * step)


def hours(passed: Pass, done: np.ndarray, rates: tuple[float, float], devices: int) -> np.ndarray:
    """Hours (2,) of a pass of `done` operations at (operations per second, tokens generated per second) of a device.

    Devices wait for the one with the most rows: an update of 16 rows takes as long on 64 devices as on 16.
    """
    amount, rate = (passed.sequences.responses, rates[1]) if passed.kind == "generate" else (done, rates[0])
    busiest = math.ceil(passed.at_once / devices) / passed.at_once
    return amount * busiest / rate / 3600


# ---- what --dry-run prints ----
def short(value: float, digits: int = 3) -> str:
    """A number in three digits, with the letter of its thousands."""
    power = 0 if value < 1 else min(int(math.log10(value) / 3 + 1e-9), 7)
    return f"{value / 1000**power:.{digits}g}" + ("", " k", " M", " G", " T", " P", " E", " Z")[power]


def both(value: np.ndarray, unit: str = "") -> str:
    """What is expected, and what it is at most if that is more."""
    expected, most = value
    return short(expected) + unit + (f" (at most {short(most)}{unit})" if most > expected * 1.0005 else "")


def spent(value: np.ndarray) -> str:
    """both() of hours, in minutes or seconds where those are few."""
    unit, size = next((u for u in (("h", 1), ("min", 60)) if value[0] * u[1] >= 1), ("s", 3600))
    return both(value * size, f" {unit}")


def work_lines(args, work: Work) -> list[str]:
    """Lines of the plan: tokens, operations and hours of every phase, all devices together, and of the whole run."""
    from extras.memory import launched

    devices = args.num_processes or launched()[0]
    sizes = {"policy": sizes_of(args, False)} | ({"scalar": sizes_of(args, True)} if args.scalar_models else {})
    checkpointing = args.gradient_checkpointing
    expected = f"answers of {work.answer[0]:.3g} tokens are expected, as the responses of the data; {args.max_new_tokens} at most"
    lines = [f"{expected}. All outer iterations, on all devices together:"]

    def done(p: Pass) -> np.ndarray:
        return operations(sizes[p.model], p.sequences, p.kind == "train", checkpointing)

    trained = [p for passes in work.phases.values() for p in passes if (p.kind, p.model) == ("train", "policy")]
    per_token = sum(done(p)[0] for p in trained) / sum(p.sequences.tokens[0] for p in trained)
    rates = args.tokens_per_second, args.generation_tokens_per_second
    if rates[0] == "measure":
        found = measured(args, work)
        rates = found[0], rates[1] or found[1]
    rates = rates[0] * per_token, rates[1]
    totals, whole = np.zeros(2), np.zeros(2)
    for name, passes in work.phases.items():
        took, own = sum(map(done, passes), np.zeros(2)), [p for p in passes if rates[p.kind == "generate"]]
        parts = [
            f"{kind}s {both(total.responses if kind == 'generate' else total.tokens)} tokens"
            for kind in ("generate", "score", "train")
            if (total := work.total(kind, phase=name)).count.any()
        ]
        time_taken = sum((hours(p, done(p), rates, devices) for p in own), np.zeros(2))
        lines.append(f"{name}: {', '.join(parts)}; {both(took, 'FLOP')}" + (f"; {spent(time_taken)}" if own else ""))
        totals, whole = totals + took, whole + time_taken
    left = " without generation (--generation-tokens-per-second)" * (not rates[1])
    lines.append(f"in all {both(totals, 'FLOP')}, {short(per_token)}FLOP to train the policy on a token")
    if rates[0]:
        lines[-1] += f"; {spent(whole)} on {devices} device(s){left}"
        generated = f", {short(rates[1])} generated" if rates[1] else ""
        lines.append(f"at {short(rates[0] / per_token)} tokens a second trained on a device{generated}")
    return lines


def print_plan(args, script: str, work: Work, *lines: str) -> None:
    """--dry-run: print what would run, what it computes, and the memory and time that it would take."""
    from common import UserError
    from extras.memory import print_memory_plan

    print(f"{script} --dry-run: model {args.model}, {lines[0]}", *lines[1:], sep="\n  ")
    try:
        print(*(f"  {line}" for line in work_lines(args, work)), sep="\n")
    except UserError:
        raise
    except Exception as error:  # as in print_memory_plan
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        print(f"  work: no estimate for this architecture ({type(error).__name__}: {reason})")
    print_memory_plan(args)
