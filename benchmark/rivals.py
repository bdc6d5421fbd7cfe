"""Speed in training beside what a user would take instead: a table of ratios for docs/performance.md. See rivals.sh.

For every case both sides train the same random model on the same rows, with the same updates, precision, learning rate and
optimizer (AdamW). Each side is a process of its own, and they take turns: A B C A B C. A ratio is the median over the turns,
with the lowest and the highest in brackets. Before any turn the first losses are compared: there is no ratio for different work.

TRL runs twice: at its best (no gradient checkpointing, rows sorted by length as our side sorts them) and as it comes.
PPO is compared with plain_ppo.py, since TRL has no PPOTrainer any more. Sampling is compared with vLLM here, and with `generate`
of transformers by sampling.py.
"""

import dataclasses
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.turns import Child, Clock, Turns  # noqa: E402
from common import UserError  # noqa: E402
from common.args import main, require
from common.engine import native_bf16

EOS, PAD, FIRST_WORD = 0, 1, 2
BETA, RATE = 0.1, 1e-5  # of AdamW: one update moves the first loss far, and not to 0


@dataclass
class Shape:
    label: str
    architecture: str
    size: dict
    batch: int  # rows of an update
    micro: int  # rows of a forward pass
    updates: int  # of a turn


SHAPES = {
    "tiny": Shape(
        "the embedded model, 1,024 words", "gpt_neox",
        dict(vocab_size=1024, hidden_size=192, num_hidden_layers=3, num_attention_heads=6, intermediate_size=768),
        32, 16, 2,
    ),
    "17m": Shape(
        "17M Llama, 49,152 words", "llama",
        dict(
            vocab_size=49152, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
            intermediate_size=688, tie_word_embeddings=True,
        ),
        8, 4, 1,
    ),
    "135m": Shape(
        "SmolLM2-135M", "llama",
        dict(
            vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, tie_word_embeddings=True,
        ),
        2, 2, 1,
    ),
}  # fmt: skip
LENGTHS = {  # name -> words in the table, range of tokens of a prompt, range of tokens of an answer
    "answers": ("16 to 48, 64 to 192", (16, 48), (64, 192)),
    "prompts": ("96 to 224, 8 to 48", (96, 224), (8, 48)),
}
WHATS = {  # what is measured -> words in the table, unit of a rate
    "dpo": ("DPO (IRFT)", "pairs/s"),
    "sft": ("SFT", "tokens/s"),
    "reward": ("reward", "pairs/s"),
    "ppo": ("PPO, whole update", "answers/s"),
    "ppo_learn": ("PPO, its learning alone", "answers/s"),
    "sample": ("sampling", "tokens/s"),
    "sample_uneven": ("sampling, uneven lengths", "tokens/s"),
}
SIDES = {"best": "TRL", "default": "TRL as it comes", "plain": "plain PPO", "vllm": "vLLM"}
TRAINED, GENERATED = ("dpo", "sft", "reward"), 32  # tokens of an answer that PPO samples
SAMPLED, MEAN = 128, 32  # tokens of an answer at most, and on average where lengths are uneven
DEFAULT = [  # (what, shape, lengths, LoRA's rank) that are measured: a choice, since all of them would take hours
    ("dpo", "tiny", "answers", 0), ("dpo", "tiny", "prompts", 0), ("dpo", "17m", "answers", 0), ("dpo", "17m", "prompts", 0),
    ("dpo", "17m", "answers", 8), ("dpo", "135m", "answers", 0), ("dpo", "135m", "prompts", 8),
    ("sft", "tiny", "answers", 0), ("sft", "17m", "answers", 0), ("sft", "17m", "prompts", 0), ("sft", "135m", "answers", 0),
    ("reward", "tiny", "answers", 0), ("reward", "17m", "prompts", 0), ("reward", "135m", "prompts", 8),
    ("ppo", "tiny", "prompts", 0), ("ppo", "17m", "prompts", 0),
    ("sample", "17m", "answers", 0), ("sample_uneven", "17m", "answers", 0), ("sample", "135m", "answers", 0),
]  # fmt: skip


@dataclass
class Args:
    what: tuple[str, ...] = (*TRAINED, "ppo", "sample", "sample_uneven")
    """what to compare: dpo, sft, reward, ppo, sample, sample_uneven."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """models to compare on: tiny, 17m, 135m."""
    repeats: int = 3
    """turns of each side, > 0."""
    rivals_python: str = ""
    """Python of the environment with TRL; rivals.sh gives it. Empty: leave out what needs it."""
    vllm_python: str = ""
    """Python of the environment that `make install-vllm` makes. Empty: leave out what needs it."""
    clock: Literal["wall", "cpu"] = "wall"
    """what seconds are: of the clock, or of all processors (ratios on a machine that has other work to do)."""
    lines: str = "runs/rivals.jsonl"
    """file to which every measurement is added, as a JSON line."""
    case: str = ""
    """file of a case: measure `side` of it in this process, in turns."""
    side: str = "ours"
    """ours or plain."""


@dataclass
class Case:
    what: str
    shape: str
    lengths: str
    lora_r: int
    precision: str
    batch: int
    micro: int
    updates: int  # optimizer steps of a turn (PPO: whole updates)
    first: int  # optimizer steps before the first turn
    learning_rate: float
    rows: list[dict]
    folder: str = ""
    model: str = ""
    reward: str = ""
    beta: float = BETA
    new_tokens: int = SAMPLED  # of an answer that is sampled, at most
    ends: list[int] = field(default_factory=list)  # words that end a sampled answer


# ---- the data and the models of a case ----
def make_case(what: str, shape: str, lengths: str, lora_r: int, repeats: int) -> Case:
    """A case with random rows, sorted by length within each update as Run.step sorts them. Responses end with EOS."""
    s = SHAPES[shape]
    stream, vocabulary = random.Random(0), s.size["vocab_size"]
    batch, updates = (32, 1) if what.startswith("sample") else (s.batch, 1 if what == "ppo" else s.updates)
    first = 2 if what in TRAINED and not lora_r and shape != "135m" else 1
    _, prompts, answers = LENGTHS[lengths]

    def ids(low: int, high: int) -> list[int]:
        return [stream.randrange(FIRST_WORD, vocabulary) for _ in range(stream.randint(low, high))]

    rows = []
    for k in range(first + repeats * updates):
        if (
            k == 1 < first
        ):  # the first rows again: an update that one side has not made, or otherwise, shows in their loss
            rows += rows[:batch]
            continue
        part = [
            {"prompt_ids": ids(*prompts), "chosen_ids": [*ids(*answers), EOS], "rejected_ids": [*ids(*answers), EOS]}
            for _ in range(batch)
        ]
        rows += sorted(part, key=lambda r: longest(r, what), reverse=True)
    precision = "bf16" if native_bf16() and not what.startswith("sample") else "no"
    case = Case(what, shape, lengths, lora_r, precision, batch, s.micro, updates, first, RATE, rows)
    if what == "sample_uneven":  # each word ends an answer with this probability, about
        case.ends = list(range(FIRST_WORD, vocabulary, MEAN))
    return case


def longest(row: dict, what: str) -> int:
    answer = len(row["chosen_ids"])
    return len(row["prompt_ids"]) + (answer if what == "sft" else max(answer, len(row["rejected_ids"])))


def make_models(shape: str, folder: Path) -> None:
    """Save a random policy, a random reward model and the tokenizer of words w2, w3, ... of a shape.

    The weights are larger than usual, so that tokens differ in probability and losses of different rows in value.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    s = SHAPES[shape]
    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(FIRST_WORD, s.size["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = dict(
        max_position_embeddings=512, eos_token_id=EOS, bos_token_id=EOS, pad_token_id=PAD, initializer_range=0.06
    )
    config = AutoConfig.for_model(s.architecture, **s.size, **own)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    reward = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(s.architecture, **s.size, **own, num_labels=1)
    )
    torch.nn.init.normal_(reward.score.weight, std=s.size["hidden_size"] ** -0.5)
    for name, model in (("model", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
            folder / name
        )


# ---- our side, by the scripts' own functions ----
class NoEnd:
    """A tokenizer of no use but to say which token ends an answer."""

    eos_token_id, chat_template = EOS, None


def our_run(case: Case, script, **flags):
    """A Run of a script with the settings of a case."""
    from common.args import resolve_auto
    from common.run import Run

    _, prompts, answers = LENGTHS[case.lengths]
    args = script.Args(
        model=case.model, output_dir=f"{case.folder}/ours", optimizer="adamw", lora_r=case.lora_r, mixed_precision=case.precision,
        batch_size=case.batch, per_device_train_batch_size=case.micro, per_device_eval_batch_size=case.micro,
        max_length=512, max_prompt_length=prompts[1], max_new_tokens=answers[1] + 1, beta=case.beta, **flags,
    )  # fmt: skip
    resolve_auto(args, script.SETTINGS)
    return Run(args, "rivals", script.METRICS)


def our_update(case: Case) -> Callable[[int], dict[str, float]]:
    """The function that makes the k-th update of DPO, SFT or the reward -> its row of metrics."""
    import irft
    import rft
    import sft
    from common import evals, models, rewards
    from common.data import pair_length, row_length
    from common.streams import make_optimizer

    script = {"dpo": irft, "sft": sft, "reward": rft}[case.what]
    run = our_run(case, script, **(dict(reward_model="") if case.what == "reward" else {}))
    args, device = run.args, run.accelerator.device
    made = (
        rewards.prepare_scalar(args, case.reward, "--reward-model")
        if case.what == "reward"
        else models.prepare_policy(args)
    )
    model, optimizer = run.prepare(made, make_optimizer("adamw", made.parameters()))
    rows = case.rows
    if case.what == "sft":
        rows = [{"prompt_ids": r["prompt_ids"], "response_ids": r["chosen_ids"]} for r in rows]
    if case.what == "dpo":
        for kind in ("chosen", "rejected"):
            sequences = [(r["prompt_ids"], r[f"{kind}_ids"]) for r in rows]
            for row, (logp, _) in zip(rows, evals.sequence_logprobs(run, run.unwrap(model), sequences), strict=True):
                row[f"ref_{kind}"] = logp
    model.train()

    def update(k: int) -> dict[str, float]:
        batch = rows[k * case.batch : (k + 1) * case.batch]
        scale = len(batch) / sum(len(r["response_ids"]) for r in batch) if case.what == "sft" else 1.0

        def loss(part: list[dict]):
            if case.what == "dpo":
                return irft.pair_loss(model, part, args, device)
            if case.what == "sft":
                return sft.demonstration_loss(model, part, device, scale)
            return rft.reward_batch_loss(model, part, args, device)

        return run.step(
            model, optimizer, batch, loss, row_length if case.what == "sft" else pair_length, case.learning_rate
        )

    return update


def our_ppo(case: Case):
    """(first losses on stored answers, the function that makes the k-th PPO update -> Seconds of its learning)."""
    import rft
    from common import models, rewards
    from common.generation import Generator
    from common.rewards import ActorCritic
    from common.streams import make_optimizer

    run = our_run(case, rft, reward_model="", rollout_batch_size=case.batch, sft_epochs=0)
    run.args.max_new_tokens = GENERATED
    policy = models.autocast_forward(run, models.prepare_policy(run.args))
    value, reward = (
        models.autocast_forward(run, rewards.prepare_scalar(run.args, case.reward, "--reward-model")) for _ in range(2)
    )
    actor_critic, optimizer = run.prepare(
        ActorCritic(policy, value), make_optimizer("adamw", policy.parameters(), value.parameters())
    )
    raw = run.unwrap(actor_critic)
    reference = models.open_reference(run, raw.policy, case.model)
    generator = Generator(raw.policy, NoEnd(), case.micro, GENERATED)
    actor_critic.train()
    part = stored_answers(case)
    with torch.no_grad():
        _, stats = rft.ppo_batch_loss(actor_critic, part, run.args, run.accelerator.device, 1.0)
    names = ("loss/policy_avg", "loss/value_avg", "policy/entropy_avg")
    first = [(stats[name][0] / stats[name][1]).item() for name in names]

    def update(k: int) -> dict[str, float]:
        rows = [{"prompt_ids": r["prompt_ids"]} for r in case.rows[k * case.batch : (k + 1) * case.batch]]
        rollouts = rft.collect(run, raw, reward, generator, reference, rows, k)
        rft.add_advantages(rollouts, run.args)
        started = Clock()
        rft.ppo_update(run, actor_critic, optimizer, rollouts, case.learning_rate, k)
        return started.seconds()

    return first, update


def stored_answers(case: Case) -> list[dict]:
    """Answers of uneven length with made-up log-probs, values, advantages and returns: both sides must get the same loss."""
    stream, rows = random.Random(1), []
    for r in case.rows[: case.micro]:
        ids = r["chosen_ids"][-stream.randint(GENERATED // 2, GENERATED) :]

        def numbers(mean: float, spread: float, n: int = len(ids)) -> list[float]:
            return [stream.gauss(mean, spread) for _ in range(n)]

        logprobs = numbers(-math.log(SHAPES[case.shape].size["vocab_size"]), 0.1)
        rows.append(
            dict(
                prompt_ids=r["prompt_ids"], response_ids=ids, logprobs=logprobs, values=numbers(0, 1),
                advantages=numbers(0, 1), returns=numbers(0, 1),
            )
        )  # fmt: skip
    return rows


# ---- the other side of PPO ----
def plain_ppo(case: Case):
    """As our_ppo, by plain_ppo.py."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from benchmark import plain_ppo as plain
    from common.data import pad_right

    policy, reference = (AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32) for _ in range(2))
    value, reward = (
        plain.Scalar(AutoModelForSequenceClassification.from_pretrained(case.reward, num_labels=1, dtype=torch.float32))
        for _ in range(2)
    )
    optimizer = torch.optim.AdamW([*policy.parameters(), *value.parameters()], lr=case.learning_rate, weight_decay=0.0)
    settings = plain.Settings(PAD, EOS, GENERATED, case.micro, case.learning_rate, beta=case.beta)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16")
    part = stored_answers(case)
    prompts = plain.left_padded([r["prompt_ids"] for r in part], PAD)
    answers = pad_right([r["response_ids"] for r in part], PAD)
    batch = {"ids": torch.cat([prompts, answers], 1), "start": torch.tensor(prompts.shape[1]), "mask": answers != PAD}
    batch |= {
        k: pad_right([r[k] for r in part], 0.0, torch.float32) for k in ("logprobs", "values", "advantages", "returns")
    }
    with torch.no_grad(), autocast:
        first = [x.item() for x in plain.losses(policy, value, batch, settings)]

    def update(k: int) -> dict[str, float]:
        queries = [r["prompt_ids"] for r in case.rows[k * case.batch : (k + 1) * case.batch]]
        with autocast:
            rollouts = plain.rollout(policy, reference, value, reward, queries, settings)
            started = Clock()
            plain.learn(policy, value, optimizer, rollouts, settings)
        return started.seconds()

    return first, update


def our_sampling(case: Case):
    """The function that answers the prompts of the k-th turn -> tokens of the answers."""
    from transformers import AutoModelForCausalLM

    from common.generation import Generator

    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    size = case.batch * case.updates
    generator = Generator(model, NoEnd(), min(size, 32), case.new_tokens)
    generator.eos_ids = set(case.ends)

    def answer(k: int) -> int:
        prompts = [r["prompt_ids"] for r in case.rows[k * size : (k + 1) * size]]
        return sum(map(len, generator.sample(prompts, list(range(len(prompts))), k).response_ids))

    return answer


def measure(case: Case, side: str) -> None:
    """Report the first losses, then the seconds of every turn, of `updates` updates each."""
    turns = Turns()
    if case.what.startswith("sample"):
        answer, turn = our_sampling(case), 1
        turns.report(losses=[], tokens=answer(0))
        while turns.wait():
            started = Clock()
            tokens = answer(turn)
            turns.report(seconds=started.seconds(), tokens=tokens)
            turn += 1
        return
    if case.what == "ppo":
        first, update = (our_ppo if side == "ours" else plain_ppo)(case)
        update(0)
        turns.report(losses=first)
    else:
        update = our_update(case)
        rows = [update(k) for k in range(case.first)]
        logps = {kind: rows[0][f"logps/{kind}"] for kind in ("chosen", "rejected") if f"logps/{kind}" in rows[0]}
        turns.report(losses=[r["loss"] for r in rows], **logps)
    done = case.first
    while turns.wait():
        started = Clock()
        found = [update(k) for k in range(done, done + case.updates)]
        learning = (
            {"learning": {clock: sum(f[clock] for f in found) for clock in found[0]}} if case.what == "ppo" else {}
        )
        turns.report(seconds=started.seconds(), **learning)
        done += case.updates


# ---- the comparison ----
# Both sides round as bf16 does, in other orders: ours reads a shared prompt once. Log-probs are sums over a hundred tokens,
# so one token more or less would change them by a hundredth. AdamW's first step turns the sign of a small gradient into a
# whole step. Sampled answers have other random numbers.
TOLERANCE = {"losses": 1e-2, "chosen": 1e-3, "rejected": 1e-3, "tokens": 0.5}


def check_same_work(case: Case, firsts: dict[str, dict]) -> None:
    """UserError unless the first losses of all sides are those of the same work, to bf16's rounding.

    DPO's first loss is log 2 wherever policy and reference coincide; which rows it is of, the log-probs say. After an update
    the losses say that both sides made it. TRL as it comes has the rows in another order, so that its DPO alone is compared.
    """
    ours = firsts["ours"]
    for side, theirs in firsts.items():
        expected = dict(ours)
        if side == "default":
            theirs, expected = {"losses": theirs["losses"][:1]}, {"losses": [math.log(2)]}
            if case.what != "dpo":
                continue
        for name, values in expected.items():
            pairs = zip(values, theirs[name], strict=True) if name == "losses" else [(values, theirs[name])]
            for k, (x, y) in enumerate(pairs):
                if name == "losses" and case.what == "dpo" and k == 0:
                    x = math.log(2)
                if not math.isclose(x, y, rel_tol=TOLERANCE[name]):
                    where = f"{case.what}, {case.shape}, {case.lengths}, LoRA {case.lora_r}: {name} {k}"
                    raise UserError(
                        f"{where}: found {y:.6g} ({side}), expected {x:.6g} as on our side: not the same work"
                    )


def units(case: Case, turn: int) -> int:
    """What one turn gets done: pairs, answers, or tokens of prompts and responses (SFT)."""
    begin = (case.first + turn * case.updates) * case.batch
    rows = case.rows[begin : begin + case.updates * case.batch]
    return sum(len(r["prompt_ids"]) + len(r["chosen_ids"]) for r in rows) if case.what == "sft" else len(rows)


def rates(done: int, seconds: dict[str, float]) -> dict[str, float]:
    return {clock: done / s for clock, s in seconds.items()}


def compare(case: Case, repeats: int, pythons: dict[str, str]) -> list[dict]:
    """Measure all sides of a case in turns -> a line for every turn of every side."""
    path = Path(case.folder) / "case.json"
    path.write_text(json.dumps(dataclasses.asdict(case)))
    ours = [sys.executable, __file__, "--case", str(path), "--side"]
    words = {"ours": [*ours, "ours"]}
    if case.what == "ppo":
        words["plain"] = [*ours, "plain"]
    elif case.what.startswith("sample"):
        words["vllm"] = [pythons["vllm"], str(Path(__file__).parent / "rivals_vllm.py"), str(path)]
    else:
        trl = str(Path(__file__).parent / "rivals_trl.py")
        words |= {side: [pythons["trl"], trl, str(path), side] for side in ("best", "default")}
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": f"{case.folder}/datasets",
        "TOKENIZERS_PARALLELISM": "false",
    }
    children: dict[str, Child] = {}
    try:
        for side, command in words.items():
            children[side] = Child(command, Path(case.folder) / f"{side}.log", env)
        firsts = {side: child.row() for side, child in children.items()}
        check_same_work(case, firsts)
        lines = []
        for turn in range(repeats):
            for side, child in children.items():
                found = child.turn()
                done = found.get("tokens") or units(case, turn)
                about = dict(
                    what=case.what, shape=case.shape, lengths=case.lengths, lora_r=case.lora_r, side=side, turn=turn
                )
                lines.append(about | rates(done, found["seconds"]))
                if "learning" in found:
                    lines.append(about | {"what": "ppo_learn"} | rates(done, found["learning"]))
        return lines
    except RuntimeError as error:
        raise UserError(f"{case.what}, {case.shape}: {error}") from None
    finally:
        for child in children.values():
            child.end()


# ---- the table ----
def ratios(lines: list[dict], side: str, clock: str) -> list[float]:
    """Our rate over that of another side, of each turn."""
    rate = {(line["side"], line["turn"]): line[clock] for line in lines}
    return [own / rate[side, turn] for (name, turn), own in rate.items() if name == "ours"]


def table(lines: list[dict], clock: str = "wall") -> str:
    """The Markdown table of all measurements: a row for every case and rival."""
    out = ["| | model | prompt, answer (tokens) | trained | ours | rival | | ours / rival |", "|---" * 8 + "|"]
    cases: dict[tuple, list[dict]] = {}
    for line in lines:
        cases.setdefault((line["what"], line["shape"], line["lengths"], line["lora_r"]), []).append(line)
    for (what, shape, lengths, lora_r), own in cases.items():
        label, unit = WHATS[what]
        trained = f"LoRA, r = {lora_r}" if lora_r else "all weights"
        medians = {s: statistics.median(x[clock] for x in own if x["side"] == s) for s in {x["side"] for x in own}}
        for side, name in SIDES.items():
            if side not in medians:
                continue
            found = ratios(own, side, clock)
            ratio = f"**{statistics.median(found):.2f}** [{min(found):.2f}, {max(found):.2f}]"
            rates = f"{number(medians['ours'])} {unit} | {name} | {number(medians[side])} {unit}"
            sizes = LENGTHS[lengths][0]
            out.append(f"| {label} | {SHAPES[shape].label} | {sizes} | {trained} | {rates} | {ratio} |")
    return "\n".join(out)


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def machine(rivals_python: str, repeats: int) -> str:
    """The machine and the versions of both environments, in a line of Markdown."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = next(
        (line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), platform.processor()
    )
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in cpu]
    import transformers

    code = "import torch, transformers, trl; print(f'TRL {trl.__version__}, torch {torch.__version__}, transformers"
    code += " {transformers.__version__}')"
    theirs = "none"
    if rivals_python:
        theirs = subprocess.run([rivals_python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    precision = "bf16 autocast" if native_bf16() else "float32"
    known = ", ".join(flags) or "no known flags"
    return (
        f"{name or 'unknown CPU'}, {os.cpu_count()} cores ({torch.get_num_threads()} threads), {known};"
        f" {precision}. Ours: torch {torch.__version__}, transformers {transformers.__version__}. Theirs: {theirs}."
        f" Medians of {repeats} turns."
    )


def show(args: Args) -> None:
    require(args.repeats > 0, "repeats", args.repeats, "a number > 0")
    for name, given, known in (("what", args.what, [*WHATS]), ("shapes", args.shapes, [*SHAPES])):
        require(set(given) <= set(known), name, ", ".join(given), f"some of {', '.join(known)}")
    pythons = {"trl": args.rivals_python, "vllm": args.vllm_python, "plain": sys.executable}
    needs = {what: "trl" for what in TRAINED} | {"ppo": "plain", "sample": "vllm", "sample_uneven": "vllm"}
    chosen = [c for c in DEFAULT if c[0] in args.what and c[1] in args.shapes and pythons[needs[c[0]]]]
    lines: list[dict] = []
    Path(args.lines).parent.mkdir(parents=True, exist_ok=True)
    print(machine(args.rivals_python, args.repeats) + "\n", flush=True)
    with tempfile.TemporaryDirectory() as parent:
        for i, one in enumerate(chosen):
            started, models = time.time(), Path(parent) / one[1]
            if not models.is_dir():
                make_models(one[1], models)
            case = make_case(*one, args.repeats)
            case.model, case.reward = str(models / "model"), str(models / "reward")
            case.folder = str(Path(parent) / str(i))
            Path(case.folder).mkdir()
            found = compare(case, args.repeats, pythons)
            with open(args.lines, "a") as f:
                f.writelines(json.dumps(line) + "\n" for line in found)
            lines += found
            print(
                f"{i + 1} of {len(chosen)}: {' '.join(map(str, one))}, {time.time() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    print(table(lines, args.clock))


def run(args: Args) -> None:
    if args.case:
        measure(Case(**json.loads(Path(args.case).read_text())), args.side)
    else:
        show(args)


if __name__ == "__main__":
    main(lambda: run(tyro.cli(Args, description=__doc__)))
