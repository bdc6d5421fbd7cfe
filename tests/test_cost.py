"""What --dry-run says of tokens, operations and hours, against runs, torch's own count, and sums by hand."""

import dataclasses
import importlib
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import jsonl, make_model
from torch.utils.flop_counter import FlopCounterMode

import irft
from common import UserError, generation, models
from common.args import resolve_auto
from common.data import collate
from common.logprobs import response_logprobs
from common.rewards import ScalarModel, prepare_scalar
from common.run import Run
from extras import command_line, cost, words
from extras.sources import held_out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    make_model(folder / "model")
    for name, form in (("posts", "POST: {}\n\nTL;DR:"), ("data", "{}")):
        prompts = [form.format(f"Say {'so ' * (i % 5)}{i}.") for i in range(40)]
        prompts = [p for p in prompts if not held_out(p)][:8]
        rows = [{"prompt": p, "response": "yes " * (1 + i % 4) + f"{i}"} for i, p in enumerate(prompts)]
        jsonl(folder / f"{name}.jsonl", rows)
    prefs = [{"prompt": p, "chosen": f"good {i}", "rejected": f"bad bad {i}"} for i, p in enumerate(prompts)]
    jsonl(folder / "prefs.jsonl", prefs)
    return folder


# ---- tokens: the plan of a run, and the run ----
LEARNED = dict(sft_epochs=2, sft_learning_rate=1e-4, reward_learning_rate=1e-4, rollout_batch_size=4, eval_updates=2)
PPO = dict(LEARNED, total_episodes=16, num_ppo_epochs=2, num_mini_batches=2, value_warmup_ratio=0.0)
CANDIDATES = dict(LEARNED, total_prompts=0, num_generations=3, num_policy_epochs=2)
CASES = {
    "sft": ("sft", dict(num_train_epochs=3)),
    "irft": ("irft", dict(T=2, num_train_epochs=2)),
    "irft, replay": ("irft", dict(T=5, num_chunks=3, replay="previous", num_train_epochs=1)),
    "aihf_direct": ("aihf_direct", dict(T=2, num_train_epochs=2)),
    "aihf_direct, direct": ("aihf_direct", dict(T=1, objective="direct", ref="previous")),
    "rft": ("rft", dict(PPO, T=2, reward_model="")),
    "aihf_ppo": ("aihf_ppo", dict(PPO, T=1, reward_model="")),
    "aihf": ("aihf", dict(CANDIDATES, T=2, reward_model="", num_train_epochs=2)),
    "aihf, RLHF": ("aihf", dict(CANDIDATES, T=1, reward_model="", demo_weight=0.0, sft_epochs=0)),
    "irl_ppo_tldr": ("irl_ppo_tldr", dict(PPO, T=2, pairs="accumulated", prompts="demonstrations", eval_temperature=0.7)),
    "irl_dpo_ultrachat": ("irl_dpo_ultrachat", dict(CANDIDATES, T=2, pairs="accumulated", policy_objective="dpo")),
}  # fmt: skip


def settings(place, name: str, **given):
    script, own = CASES[name]
    module = importlib.import_module(script)
    data = str(place / ("posts.jsonl" if script == "irl_ppo_tldr" else "data.jsonl"))
    shared = dict(
        model=str(place / "model"), dataset=data, eval_dataset=data, eval_samples=8, max_samples=0, max_length=96,
        max_prompt_length=80, max_new_tokens=6, learning_rate=1e-4, batch_size=4, per_device_train_batch_size=4,
        per_device_eval_batch_size=16, mixed_precision="no", save_steps=1000,
    )  # fmt: skip
    shared |= {"preference_dataset": str(place / "prefs.jsonl")} if script.startswith("aihf") else {}
    args = module.Args(**{**shared, **own, **given})
    resolve_auto(args, module.SETTINGS)
    args.check()
    return module, args


def planned(place, name: str, monkeypatch, **given) -> tuple:
    """(args, Work) of a case's plan."""
    module, args = settings(place, name, dry_run=True, **given)
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(cost, "print_plan", lambda args, script, work, *lines: kept.append(work))
        module.train(args)
    return args, kept[0]


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_of_the_plan_are_those_of_the_run(place, tmp_path, monkeypatch, name):
    """No answer ends before --max-new-tokens here, so that the run takes what the plan says it takes at most."""
    _, work = planned(place, name, monkeypatch)
    found = Counter()
    step, score, sample = Run.step, Run.score_batches, generation.Generator.sample

    def counting_step(self, model, optimizer, rows, *rest, **more):
        names = ("response_ids", "chosen_ids", "rejected_ids")
        tokens = sum(len(r["prompt_ids"]) + len(r[n]) for r in rows for n in names if r.get(n) is not None)
        scalar = isinstance(self.unwrap(model), ScalarModel)
        found["train scalar" if scalar else "train policy"] += tokens
        found["train scalar"] += tokens * ("advantages" in rows[0])  # the value model, beside the policy
        return step(self, model, optimizer, rows, *rest, **more)

    def counting_score(self, sequences, *rest):
        found["score"] += sum(map(len, (part for sequence in sequences for part in sequence)))
        return score(self, sequences, *rest)

    def counting_sample(self, *given):
        rollout = sample(self, *given)
        found["generate"] += sum(map(len, rollout.response_ids))
        return rollout

    monkeypatch.setattr(generation, "stop_tokens", lambda model, tokenizer: set())
    monkeypatch.setattr(Run, "step", counting_step)
    monkeypatch.setattr(Run, "score_batches", counting_score)
    monkeypatch.setattr(generation.Generator, "sample", counting_sample)
    module, args = settings(place, name, output_dir=str(tmp_path / "run"))
    module.train(args)
    expected = {f"train {m}": work.total("train", m).tokens[1] for m in ("policy", "scalar")}
    expected |= {"score": work.total("score").tokens[1], "generate": work.total("generate").responses[1]}
    if name == "aihf, RLHF":  # the held-out rows are not as long as the preferences, which the plan takes them for
        assert found.pop("score") == pytest.approx(expected.pop("score"), rel=0.05)
    assert {k: v for k, v in found.items() if v} == pytest.approx({k: v for k, v in expected.items() if v})
    if name in ("sft", "irft", "irft, replay", "aihf_direct", "aihf_direct, direct"):
        from common.store import read_metrics

        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert max(row.get("num_tokens", 0) for row in rows) == pytest.approx(expected["train policy"])


def test_expected_answers_are_as_long_as_the_data_and_no_longer_than_an_answer_can_be(place):
    _, args = settings(place, "irft", max_new_tokens=5)
    rows = [{"prompt_ids": [1] * p, "response_ids": [2] * r} for p, r in ((3, 2), (4, 9), (5, 5))]
    work = cost.Work(args, rows)
    assert work.answer.tolist() == [(2 + 5 + 5) / 3, 5]
    pairs = work.pairs(rows[:2])
    assert pairs.count.tolist() == [4, 4] and pairs.responses.tolist() == [2 + 9 + 8, 2 + 9 + 10]
    assert pairs.tokens.tolist() == [2 * 7 + 19, 2 * 7 + 21]
    assert pairs.squares.tolist() == [5**2 + 13**2 + 7**2 + 8**2, 5**2 + 13**2 + 8**2 + 9**2]
    assert [x.tolist() for x in (pairs * 3).fields()] == [(3 * x).tolist() for x in pairs.fields()]


# ---- operations: torch's own count ----
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": True}, {"lora_r": 2}], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_operations_are_those_that_torch_counts(place, train, given, tied):
    """But for what torch counts, both halves of the attention, and for what it does not do: with adapters the gradient of the
    first layer's input, and with checkpointing the last product of each layer again."""
    folder = make_model(place / f"counted_{tied}", "mistral", tie_word_embeddings=tied)
    _, args = settings(place, "irft", model=str(folder), attn_implementation="eager", **given)
    model = models.prepare_policy(args).train()
    lengths = [(9, 7)] * 3
    batch = collate([([i] * p, [2] * r) for i, (p, r) in enumerate(lengths)], pad_token_id=0)  # no prompt is shared
    response_logprobs(model, batch)  # the first call also probes the head
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        scores = response_logprobs(model, batch)
        if train:
            scores.logprobs.sum().backward()
    config, these = model.config, cost.sequences(lengths)
    sizes = cost.model_sizes(model, config, config.num_hidden_layers)
    assert cost.sizes_of(args, False) == sizes
    passes = 1 + train * (2 + args.gradient_checkpointing)
    other_half = 2 * config.hidden_size * config.num_hidden_layers * 3 * 16**2 * passes
    found = cost.operations(sizes, these, train, args.gradient_checkpointing)
    assert found[0] == found[1]
    first = 2 * 3 * 16 * (32 + 2 * 16) * 32 if args.lora_r and train else 0  # of q, k and v
    last = 2 * 3 * 16 * 32 * 64 * 2 if args.gradient_checkpointing and train else 0
    assert counter.get_total_flops() == pytest.approx(found[0] + other_half - first - last, rel=0.005)


def test_operations_of_a_scalar_model(place):
    _, args = settings(place, "rft", attn_implementation="eager")
    model = prepare_scalar(args, args.model, "--model").train()
    batch = collate([([i] * 9, [2] * 7) for i in range(3)], pad_token_id=0)  # no prompt is shared
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    found = cost.operations(cost.sizes_of(args, True), cost.sequences([(9, 7)] * 3), True)
    other_half = 2 * 32 * 2 * 3 * 16**2 * 3
    assert counter.get_total_flops() == pytest.approx(found[0] + other_half, rel=0.005)


# ---- hours ----
def test_hours_of_a_pass_are_those_of_the_busiest_device():
    these = cost.sequences([(10, 30)] * 100)
    train, generate = cost.Pass("train", "policy", these, 16), cost.Pass("generate", "policy", these, 100)
    for devices, waits in ((1, 1), (8, 1 / 8), (16, 1 / 16), (64, 1 / 16), (12, 2 / 16)):
        assert cost.hours(train, np.array([7200.0, 9000.0]), (1.0, 0.0), devices)[0] == pytest.approx(2 * waits)
    assert cost.hours(generate, np.zeros(2), (1.0, 0.5), 10).tolist() == pytest.approx([3000 / 10 / 0.5 / 3600] * 2)


def printed(place, monkeypatch, capsys, name: str = "irft", **given) -> str:
    args, work = planned(place, name, monkeypatch, **given)
    print(*cost.work_lines(args, work), sep="\n")
    return capsys.readouterr().out.splitlines()[-12:]


def test_training_at_a_given_rate_takes_its_tokens_over_the_rate(place, monkeypatch, capsys):
    args, work = planned(place, "irft", monkeypatch)
    tokens = work.total("train").tokens[0]
    lines = printed(place, monkeypatch, capsys, tokens_per_second=tokens / 7200)
    (training,) = [line for line in lines if line.startswith("training: ")]
    assert "; 2 h" in training and "generation-tokens-per-second" in lines[-2]
    assert [line for line in lines if line.startswith("answers: ")][0].endswith("FLOP")  # no rate, no hours
    generated = work.total("generate", phase="answers").responses[0]
    rates = dict(tokens_per_second=tokens / 7200, generation_tokens_per_second=generated / 3600)
    lines = printed(place, monkeypatch, capsys, **rates, num_processes=4)  # batches of 4: none waits
    assert "; 30 min" in [line for line in lines if line.startswith("training: ")][0]
    assert "; 15 min" in [line for line in lines if line.startswith("answers: ")][0]
    assert "on 4 device(s)" in lines[-2] and "without generation" not in lines[-2]


def test_a_measured_rate_is_that_of_steps_made_here(place, monkeypatch, capsys):
    args, work = planned(place, "irft", monkeypatch)
    trained, generated = cost.measured(args, work)
    assert 1 < trained < 1e9 and 1 < generated < 1e9
    monkeypatch.setattr(cost, "measured", lambda args, work: (trained, generated))
    lines = printed(place, monkeypatch, capsys, tokens_per_second="measure")
    assert lines[-1].startswith(f"at {cost.short(trained)} tokens a second trained on a device, ")


def test_deep_models_are_timed_with_one_and_four_layers(place, monkeypatch):
    """A clock that a forward pass of a layer moves by 3 s, and the rest of a pass by 5: 35 s for 10 layers."""
    folder = make_model(place / "deep", num_hidden_layers=10)
    args, work = planned(place, "irft", monkeypatch, model=str(folder))
    clock, layers = [0.0], []

    def forward(model, batch, *rest):
        layers.append(model.config.num_hidden_layers)
        clock[0] += 5 + 3 * layers[-1]
        return Scores(next(model.parameters()).sum()[None])

    Scores = dataclasses.make_dataclass("Scores", ["logprobs"])
    monkeypatch.setattr("common.logprobs.response_logprobs", forward)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    trained, _ = cost.measured(dataclasses.replace(args, generation="vllm"), work)
    total = work.total("train")
    assert trained == pytest.approx(int(total.tokens[0] / total.count[0]) / 35) and set(layers) == {1, 4}


@pytest.mark.parametrize("flag", words.PLANNED)
def test_flags_of_the_plan_need_a_plan(monkeypatch, flag):
    word = f"--{flag.replace('_', '-')}"
    monkeypatch.setattr("sys.argv", ["irft.py", word, "3"])
    with pytest.raises(UserError, match=f"^{word}: found 3.*, expected --dry-run beside it"):
        command_line.given_args(irft.Args, "")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (1.5e6, "1.5 M"), (8.61e12, "8.61 T"), (3e21, "3 Z")]
)
def test_numbers_are_short(value, text):
    assert cost.short(value) == text
