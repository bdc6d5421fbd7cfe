"""irl_dpo_ultrachat.py as a user meets it: what a run leaves, an expert's answers, bad input, processes, resume."""

import json
import signal
import sys

import pytest
import torch
from helpers import (
    OnDemand,
    assert_phases_as_planned,
    assert_same_metrics,
    chosen,
    command,
    drive,
    make_classifier,
    make_data,
    make_model,
    make_tokenizer,
    metrics,
    run,
    slow_unless,
    weights,
)

import irl_dpo_ultrachat as irl
from common.store import read_pairs
from common.streams import learning_rate_at
from extras.metrics import JUDGE_METRICS
from extras.sources import load_rows

SCRIPT = "irl_dpo_ultrachat.py"
SMALL = "--sft-epochs 1 --sft-learning-rate 1e-3 --reward-learning-rate 1e-3 --eval-updates 1 --rollout-batch-size 4".split()
SMALL += "--num-generations 3 --total-prompts 8".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("irl")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 20)
    make_data(folder / "prefs.jsonl", 40, preference=True)
    make_classifier(folder / "gold", make_model(folder / "other", "mistral", make_tokenizer(310)))
    return folder


def argv(place, out, *flags: str) -> list[str]:
    return command(SCRIPT, place / "model", place / "data.jsonl", out, *SMALL, *flags)[1:]


# ---- what a run leaves ----
@pytest.fixture(scope="module")
def finished(place):
    """Runs with every measurement: an expert of another tokenizer, people's pairs, gold reward, selection, baseline; two iterations."""
    flags = ["--T", "2", "--gold-reward-model", str(place / "gold"), "--select-top-k", "12", "--eval-dataset", "auto"]
    flags += ["--expert-model", str(place / "other"), "--eval-preference-dataset", str(place / "prefs.jsonl")]
    flags += ["--baseline", str(place / "other"), "--report-to", "tensorboard", "--pairs", "accumulated"]
    out = place / "finished"
    statuses, printed = drive([{"argv": argv(place, out, *flags)}], CLEANIRL_CACHE=str(place / "cache"))
    assert statuses == [0], printed
    return out, printed


def test_a_run_leaves_what_it_promises(finished, place):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    out, printed = finished
    assert_phases_as_planned(out, 12)
    rows = metrics(out)
    assert set().union(*rows) - {"step", "outer_iteration", "episodes", "updates"} == set(irl.METRICS) - set(
        JUDGE_METRICS
    )
    steps = irl.Steps(sft=3, K=[3, 6], updates=2, per_update=1)
    assert "12 demonstrations, 3 SFT steps, T = 2, K = 3" in printed and "dpo on 8 prompts x 3 candidates" in printed
    assert sum("sft/loss" in r for r in rows) == 3 and sum("reward/loss" in r for r in rows) == 3 + 6
    updates = [r for r in rows if "objective/scores" in r]
    first = [steps.before_policy(t) for t in range(2)]
    assert [r["step"] for r in updates] == [f + u for f in first for u in (1, 2)]
    assert [r["episodes"] for r in updates] == [12, 24, 36, 48]
    measured = [(r["outer_iteration"], r["updates"], r["episodes"]) for r in rows if "eval/nll" in r]
    assert measured == [(t, u, 12 * u) for t, u in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 4))]
    for name in ("final", "sft"):
        assert AutoModelForCausalLM.from_pretrained(out / name).config.model_type == "gpt_neox"
    reward = AutoModelForSequenceClassification.from_pretrained(out / "reward")
    centres = [r["eval/reward/center"] for r in rows if "eval/reward/center" in r]
    assert reward.config.num_labels == 1 and reward.config.reward_center == pytest.approx(centres[1])
    assert "after IRL" in (out / "final" / "README.md").read_text()
    assert "2503.13538" in (out / "reward" / "README.md").read_text()
    timing = {r["phase"]: r for r in map(json.loads, (out / "timing.jsonl").read_text().splitlines())}
    assert {"sample", "score", "reference", "update", "evaluate"} <= timing["iteration 0: online DPO"].keys()
    assert list(out.rglob("events.out.tfevents*"))


def test_demonstrations_average_zero_on_held_out_data(finished):
    """The reward of iteration 0 before its centre was taken off is what evals/reward_0000.parquet holds."""
    out = finished[0]
    centre = next(r["eval/reward/center"] for r in metrics(out) if "eval/reward/center" in r)
    rows = read_pairs(out / "evals" / "reward_0000.parquet")
    assert sum(r["chosen"] for r in rows) / len(rows) == pytest.approx(centre, abs=1e-5) and abs(centre) > 1e-4


def test_candidates_hold_n_answers_a_prompt_with_their_scores(finished):
    out = finished[0]
    files = sorted((out / "candidates").iterdir())
    assert [f.name[:15] for f in files] == [f"iter_{t}_{first:07d}_" for t in (0, 1) for first in (0, 4)]
    by_update = {f.name[:14]: read_pairs(f) for f in files}
    assert all(len(c) == 4 and len(r[k]) == 3 for c in by_update.values() for r in c for k in r)
    means = [r["objective/scores"] for r in metrics(out) if "objective/scores" in r]
    for found, mean in zip(by_update.values(), means, strict=True):  # less 1 for each answer without EOS
        scores = [s - (not e) for c in found for s, e in zip(c["scores"], c["finished"], strict=True)]
        assert sum(scores) / len(scores) == pytest.approx(mean, abs=1e-9)


def test_demonstrations_are_the_experts_answers(finished, place):
    """Training and held-out rows alike; in the student's tokens, with EOS only where the expert ended; kept in the cache."""
    from transformers import AutoTokenizer

    out, tokenizer = finished[0], AutoTokenizer.from_pretrained(place / "model")
    own = {r["row"]: r["response"] for r in load_rows(str(place / "data.jsonl"), "all")}
    pairs = read_pairs(out / "generations" / "iter_0.parquet")
    answers = [r["value"] for f in (place / "cache").glob("expert-*.parquet") for r in read_pairs(f)]
    by_text = {a["text"]: a["finished"] for a in answers}
    assert len(answers) == len(own)  # of both splits, once each
    for p in pairs:
        assert p["chosen"] in by_text and p["chosen"] != own[p["row"]]
        ids = tokenizer(p["chosen"], add_special_tokens=False)["input_ids"]
        assert p["chosen_ids"] == (ids + [tokenizer.eos_token_id] * by_text[p["chosen"]])[: 96 - len(p["prompt_ids"])]
    shown = (out / "samples" / "0000.md").read_text()
    held = [r for r in load_rows(str(place / "data.jsonl"), "test")]
    assert sum(f"Demonstration: {r['response']}\n" in shown for r in held) == 0


def test_every_reward_is_measured_on_peoples_pairs(finished, place):
    out = finished[0]
    kept = [r for r in metrics(out) if "eval/reward/accuracy_preferences" in r]
    assert [r["outer_iteration"] for r in kept] == [0, 1]
    rows = read_pairs(out / "evals" / "preferences_0001.parquet")
    assert {r["row"] for r in rows} <= {r["row"] for r in load_rows(str(place / "prefs.jsonl"), "all", "preferences")}
    assert len(rows) == 4  # --eval-samples
    won = [(r["chosen"] > r["rejected"]) + 0.5 * (r["chosen"] == r["rejected"]) for r in rows]
    assert kept[1]["eval/reward/accuracy_preferences"] == pytest.approx(sum(won) / len(won))


def test_learning_rates_follow_the_scheduler_anew_in_each_iteration(finished):
    rows = metrics(finished[0])
    for name, steps in (("sft/loss", [3]), ("reward/loss", [3, 6]), ("objective/scores", [2, 2])):
        expected = [learning_rate_at(k, n, 1e-3, 0.0, "cosine") for n in steps for k in range(n)]
        assert [r["learning_rate"] for r in rows if name in r] == pytest.approx(expected, rel=1e-12), name


def test_first_updates_see_the_reference_and_the_policy_that_answered(finished):
    first = next(r for r in metrics(finished[0]) if "objective/scores" in r)
    assert first["policy/loss"] == pytest.approx(0.693147, abs=1e-4) and first["sampling/logp_difference"] < 1e-5
    assert first["objective/scores_best"] > first["objective/scores"]


VARIANTS = {
    "best_of_n": "--T 2 --policy-objective best_of_n --temperature 0.7 --num-policy-epochs 2",
    "max_max": "--T 2 --pair-choice max_max --ref initial --reward-init previous --negatives greedy",
    "linear": "--T 1 --pair-choice random --reward-loss linear --optimizer rmsprop --lr-scheduler-type linear",
    "all_prompts": "--T 1 --total-prompts 0 --rollout-batch-size 1000 --batch-size 32 --sft-epochs 0",
    "more_prompts": "--T 1 --total-prompts 25 --rollout-batch-size 10 --batch-size 16 --pair-choice max_random",
    "lora": "--T 2 --lora-r 4 --gradient-checkpointing",
    "autocast": "--T 1 --mixed-precision bf16 --dtype bfloat16",
}


@pytest.fixture(scope="module")
def variants(place):
    """{name: folder of that run}, each made when a test asks for it."""

    def make(name: str):
        out = place / f"variant_{name}"
        statuses, printed = drive([{"argv": argv(place, out, *VARIANTS[name].split())}])
        assert statuses == [0], printed
        return out

    return OnDemand(make)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "best_of_n", VARIANTS))
def test_every_variant_trains_and_starts_at_its_reference(variants, place, name):
    from safetensors.torch import load_file

    out, words = variants[name], VARIANTS[name]
    rows = [r for r in metrics(out) if "objective/scores" in r]
    starts = [next(r for r in rows if r["outer_iteration"] == t) for t in sorted({r["outer_iteration"] for r in rows})]
    assert len(starts) == int(words.split()[1])
    rounding = 0.2 if "bf16" in words else 1e-3
    for r in starts if "--ref initial" not in words else starts[:1]:
        if name != "best_of_n":
            assert r["policy/loss"] == pytest.approx(0.6931, abs=rounding)
            assert r["rewards/margins"] == pytest.approx(0, abs=rounding)
    before = load_file(place / "model" / "model.safetensors")
    after, reward = (load_file(out / folder / "model.safetensors") for folder in ("final", "reward"))
    for found in (after, reward):
        assert max((found[k].float() - before[k]).abs().max() for k in found if k in before) > 1e-4


def test_best_of_n_logs_no_margins_and_every_prompt_counts(variants):
    rows = [r for r in metrics(variants["best_of_n"]) if "objective/scores" in r]
    assert (
        not [k for r in rows for k in r if k.startswith("rewards/")] and {"logps/chosen", "entropy"} <= rows[0].keys()
    )
    timing = [json.loads(line) for line in (variants["best_of_n"] / "timing.jsonl").read_text().splitlines()]
    (phase, _) = [r for r in timing if r["phase"].endswith("best of N")]
    assert "reference" not in phase


@pytest.mark.slow
def test_prompts_of_the_policy_step_run_out_evenly(variants):
    """25 prompts, 10 at a time: three updates, the last one of 5; 0 means every demonstration's."""
    n = len(load_rows(str(variants["lora"].parent / "data.jsonl"), "all"))
    for name, expected in (("more_prompts", [30, 60, 75]), ("all_prompts", [3 * n])):
        assert [r["episodes"] for r in metrics(variants[name]) if "objective/scores" in r] == expected
    files = sorted(f.name[:14] for f in (variants["more_prompts"] / "candidates").iterdir())
    assert files == ["iter_0_0000000", "iter_0_0000010", "iter_0_0000020"]


@pytest.mark.slow
def test_lora_models_are_saved_merged(variants, place):
    from safetensors.torch import load_file

    before, after = load_file(place / "model" / "model.safetensors"), weights(variants["lora"])
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


# ---- bad input and dry runs ----
def bad_inputs(place):
    def flags(*extra):
        return argv(place, place / "never_made", *extra)

    make_model(place / "window", window=48)
    data = str(place / "data.jsonl")
    return {
        "one candidate": (flags("--num-generations", "1"), "--num-generations: found 1, expected 2 or more, to choose a pair from"),
        "zero beta": (flags("--beta", "0"), "--beta: found 0.0, expected a number above 0"),
        "greedy temperature": (flags("--greedy-temperature", "0"), "--greedy-temperature: found 0.0, expected a number above 0"),
        "no rollout": (flags("--rollout-batch-size", "0"), "--rollout-batch-size: found 0, expected a number above 0"),
        "negative prompts": (flags("--total-prompts", "-1"), "--total-prompts: found -1, expected 0 or more"),
        "no policy epoch": (flags("--num-policy-epochs", "0"), "--num-policy-epochs: found 0, expected 1 or more"),
        "no iteration": (flags("--T", "0"), "--T: found 0, expected 1 or more"),
        "no such run": (flags("--candidates-from", str(place / "nowhere")), f"--candidates-from: found {place / 'nowhere'}, expected the directory of a run of this script"),
        "no run": (flags("--candidates-from", str(place / "model")), "expected the directory of a run of this script, with a folder candidates/"),
        "no expert": (flags("--expert-model", "no-such-model"), "--expert-model no-such-model: found no local folder ./no-such-model"),
        "expert's window": (flags("--expert-model", str(place / "window")), f"the window of --expert-model {place / 'window'}"),
        "people's pairs": (flags("--eval-preference-dataset", data), f"--eval-preference-dataset {data} row 0: found columns prompt, completion, expected a preference"),
        "no pairs": (flags("--eval-preference-dataset", "no.jsonl"), "--eval-preference-dataset: found no file no.jsonl"),
        "selection without gold": (flags("--select-top-k", "3"), "--select-top-k: found 3, expected --gold-reward-model beside it"),
        "diverged": (flags("--reward-learning-rate", "1e30", "--reward-loss", "linear"), "training diverged: found loss"),
    }  # fmt: skip


BAD = [
    "one candidate", "zero beta", "greedy temperature", "no rollout", "negative prompts", "no policy epoch", "no iteration",
    "no such run", "no run", "no expert", "expert's window", "people's pairs", "no pairs",
    "selection without gold", "diverged",
]  # fmt: skip
DRY = {
    "dpo": "--T 2",
    "best_of_n": "--T 2 --policy-objective best_of_n",
    "accumulated": "--T 3 --pairs accumulated --pair-choice max_max",
}


@pytest.fixture(scope="module")
def outcomes(place):
    """{name of a bad input or a dry run: (exit status, what was printed, what was expected)}."""
    cases = bad_inputs(place)
    assert list(cases) == BAD
    cases |= {f"dry {n}": (argv(place, place / "dry", *words.split(), "--dry-run"), "") for n, words in DRY.items()}
    scenarios = [
        {"argv": [str(place / f"never_{i}") if w.endswith("never_made") else w for w in words], "mark": name}
        for i, (name, (words, _)) in enumerate(cases.items())
    ]
    statuses, printed = drive(scenarios)
    parts = printed.split("=== ")[1:]
    return dict(zip(cases, zip(statuses, parts, (e for _, e in cases.values()), strict=True), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_clear_line(outcomes, place, name):
    status, printed, expected = outcomes[name]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and expected in errors[0], printed
    assert "Traceback" not in printed
    if name != "diverged":  # seen before there is a folder
        assert not (place / f"never_{BAD.index(name)}").exists()


@pytest.mark.parametrize("name", DRY)
def test_dry_run_counts_what_a_run_would_do(outcomes, place, name):
    status, plan, _ = outcomes[f"dry {name}"]
    n = len(load_rows(str(place / "data.jsonl"), "all"))
    assert status == 0 and not (place / "dry").exists() and n == 20
    assert "5 SFT steps of 4 demonstrations" in plan and "memory per device, policy update" in plan
    K = "5 to 15" if name == "accumulated" else "5"
    assert f"{n} answers of up to 8 tokens ({n * 8} at most), K = {K} reward steps" in plan
    assert "24 candidates of 8 prompts (192 tokens at most), each scored once" in plan
    kind = {
        "dpo": "DPO on pairs (max_min)",
        "best_of_n": "fine-tuning on the best",
        "accumulated": "DPO on pairs (max_max)",
    }
    assert f"2 policy updates of 1 optimizer steps: {kind[name]}" in plan
    assert f"in all {5 + 3 * 2 + 30 if name == 'accumulated' else 5 + 2 * 7} optimizer steps" in plan


# ---- processes ----
@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(place):
    """Uneven shares of every batch, at last one prompt for two; candidates and choices are those of one process."""
    from safetensors.torch import load_file

    flags = "--T 2 --learning-rate 1e-4 --reward-learning-rate 1e-4 --batch-size 5 --rollout-batch-size 5 --total-prompts 11".split()
    one, two = place / "one", place / "two"
    assert drive([{"argv": argv(place, one, *flags)}])[0] == [0]
    run([sys.executable, *argv(place, two, *flags)], ranks=2)
    start = load_file(place / "model" / "model.safetensors")
    for name in ("final", "reward"):
        a, b = (load_file(out / name / "model.safetensors") for out in (one, two))
        assert max((a[k] - start[k]).abs().max() for k in a if k in start) > 2e-4
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert_same_metrics(one, two)
    found = []
    for out in (one, two):
        files = sorted((out / "candidates").iterdir(), key=lambda f: f.name[:14])
        found.append([c["response_ids"] for f in files for c in read_pairs(f)])
    assert found[0] == found[1] and len(found[0]) == 22
    again = place / "again"  # two processes agree on what is there, and read it
    run([sys.executable, *argv(place, again, *flags), "--candidates-from", str(two)], ranks=2)
    assert not (again / "candidates").exists()


# ---- resume ----
POINTS = [  # (function, n-th call): one or more in every phase
    ("common.run.Run.step", 3),  # SFT
    ("common.evals.prepare_held_out", 1),
    ("common.run.Run.save_final", 1),  # after 5 SFT steps, sft/ not yet kept
    ("common.run.write_pairs", 2),  # answers sampled, not yet on disk
    ("common.run.Run.step", 8),  # reward step: 6 to 10
    ("common.evals.evaluate_reward", 1),
    ("extras.preference_data.evaluate_preferences", 1),
    ("common.run.write_pairs", 3),  # candidates scored, not yet on disk
    ("irl_dpo_ultrachat.choose_pairs", 2),  # candidates on disk, no step taken
    ("common.run.Run.step", 12),  # inside a policy update
    ("common.evals.evaluate", 2),  # between updates
    ("common.run.Run.step", 20),  # iteration 1: the reward learns from the pairs of both
    ("irl_dpo_ultrachat.score_candidates", 5),  # iteration 1: the reference is another policy now
    ("common.run.Run.save_final", 4),  # final/, after sft/, policy_1/ and reward/
]
QUICK = [("common.run.Run.step", 12)]
FLAGS = "--T 2 --total-prompts 12 --num-policy-epochs 2 --eval-updates 2 --ref previous --pairs accumulated".split()


@pytest.fixture(scope="module")
def runs(place, request):
    """{name: folder} of an undisturbed run, and of runs that were killed at each point and resumed."""
    flags = [*FLAGS, "--eval-preference-dataset", str(place / "prefs.jsonl")]
    scenarios, statuses = [{"argv": argv(place, place / "whole", *flags)}], [0]
    for i in chosen(request, "i"):
        (at, n), out = POINTS[i], place / f"killed_{i}"
        scenarios.append({"argv": argv(place, out, *flags), "at": at, "n": n})
        scenarios.append({"argv": [SCRIPT, "--resume", str(out)]})
        statuses += [-signal.SIGKILL, 0]
    assert drive(scenarios)[0] == statuses
    return place


def assert_same_run(expected, found) -> None:
    from safetensors.torch import load_file

    for name in ("sft", "policy_1", "reward", "final"):
        a, b = (load_file(out / name / "model.safetensors") for out in (expected, found))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert (expected / "metrics.jsonl").read_bytes() == (found / "metrics.jsonl").read_bytes()
    for folder in ("samples", "evals", "generations", "candidates"):
        kept = [sorted(p.name for p in (out / folder).iterdir() if p.name[0] != ".") for out in (expected, found)]
        assert kept[0] == kept[1] and kept[0]
        for name in kept[0]:
            assert (expected / folder / name).read_bytes() == (found / folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "i", slow_unless(lambda i: POINTS[i] in QUICK, range(len(POINTS))), ids=lambda i: "-".join(map(str, POINTS[i]))
)
def test_killed_and_resumed_equals_left_alone(runs, i):
    assert_same_run(runs / "whole", runs / f"killed_{i}")


def test_training_moved_the_weights(runs):
    """Guards the tests above against comparing runs that did nothing."""
    from safetensors.torch import load_file

    path = [load_file(runs / "whole" / name / "model.safetensors") for name in ("sft", "policy_1", "final")]
    path.insert(0, load_file(runs / "model" / "model.safetensors"))
    for a, b in zip(path, path[1:], strict=False):
        assert max((a[k] - b[k]).abs().max() for k in a) > 1e-4


@pytest.mark.slow
def test_sigterm_while_candidates_are_made_keeps_them(runs, place):
    """Between two blocks of one update: the first block's candidates stay on disk and are not made again."""
    out = place / "stopped"
    words = argv(place, out, *FLAGS, "--eval-preference-dataset", str(place / "prefs.jsonl"), "--save-steps", "1000")
    scenarios = [{"argv": words, "at": "irl_dpo_ultrachat.score_candidates", "n": 3, "signal": signal.SIGTERM}]
    scenarios.append({"argv": [SCRIPT, "--resume", str(out)]})
    statuses, printed = drive(scenarios)
    assert statuses == [143, 0] and "SIGTERM: stopped; continue with --resume" in printed
    assert "iteration 0: candidates of 4 prompts taken from" in printed
    assert_same_run(runs / "whole", out)
