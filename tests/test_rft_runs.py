"""rft.py as a user meets it: what a run leaves behind, its variants, bad input, two processes, and the sums of Fig. 2."""

import json
import sys

import pytest
import torch
from helpers import (
    OnDemand,
    assert_data_can_be_given_back,
    assert_phases_as_planned,
    assert_same_metrics,
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

import rft
from common.store import read_pairs
from extras.metrics import JUDGE_METRICS

SMALL = [
    "--sft-epochs", "1", "--num-train-epochs", "2", "--total-episodes", "8", "--rollout-batch-size", "4", "--eval-updates", "1",
    "--reward-learning-rate", "1e-3", "--num-ppo-epochs", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rft")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 20)
    make_classifier(folder / "gold", make_model(folder / "other", "mistral", make_tokenizer(310)))
    return folder


def argv(place, out, *flags, model="model") -> list[str]:
    return command("rft.py", place / model, place / "data.jsonl", out, *SMALL, *flags)[1:]


@pytest.fixture(scope="module")
def finished(place):
    """One run with every measurement: gold reward of another tokenizer, selection, a baseline, two iterations."""
    out = place / "run"
    flags = ["--T", "2", "--gold-reward-model", str(place / "gold"), "--select-top-k", "12"]
    flags += ["--baseline", str(place / "other")]
    run([sys.executable, *argv(place, out, *flags, "--report-to", "tensorboard")], CLEANIRL_CACHE=str(place / "cache"))
    return out


def test_a_run_leaves_what_it_promises(finished, place):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    assert_data_can_be_given_back(finished, make_tokenizer().eos_token_id)
    assert_phases_as_planned(finished, 12)
    rows = metrics(finished)
    names = set().union(*rows) - {"step", "outer_iteration", "episodes", "updates"}
    assert names == set(rft.METRICS) - set(JUDGE_METRICS)
    steps = rft.Steps(sft=3, K=6, updates=2, per_update=2)
    assert sum("sft/loss" in r for r in rows) == steps.sft and sum("reward/loss" in r for r in rows) == 2 * steps.K
    assert [r["step"] for r in rows if "objective/kl" in r] == [11, 13, 21, 23]
    assert [(r["outer_iteration"], r["updates"]) for r in rows if "eval/nll" in r] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 3),
        (1, 4),
    ]
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    assert AutoModelForCausalLM.from_pretrained(finished / "final").config.model_type == "gpt_neox"
    AutoModelForCausalLM.from_pretrained(finished / "sft")
    reward = AutoModelForSequenceClassification.from_pretrained(finished / "reward")
    assert reward.config.num_labels == 1 and reward.config.pad_token_id != tokenizer.eos_token_id
    card = (finished / "reward" / "README.md").read_text()
    assert "reward_center" in card and "eval/reward/accuracy" in card and "eval/nll" not in card
    assert (
        "eval/nll" in (finished / "final" / "README.md").read_text()
        and "|---|" not in (finished / "sft" / "README.md").read_text()
    )
    pairs = read_pairs(finished / "generations" / "iter_1.parquet")
    assert len(pairs) == 12 and {"prompt", "chosen", "rejected", "row"} <= pairs[0].keys()
    timing = {r["phase"]: r for r in map(json.loads, (finished / "timing.jsonl").read_text().splitlines())}
    assert {"sample", "score", "reference", "value", "update", "evaluate"} <= timing["iteration 0: PPO"].keys()
    assert list(finished.rglob("events.out.tfevents*"))


def test_first_update_sees_the_reference_and_the_policy_that_answered(finished):
    """The policy starts at the reference: KL 0; the first of the two steps of an update has ratio 1, so their mean is near it."""
    first = next(r for r in metrics(finished) if "objective/kl" in r)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["sampling/logp_difference"] < 1e-5
    for r in metrics(finished):
        if "objective/kl" in r:
            assert r["objective/rlhf_reward"] == pytest.approx(r["objective/scores"] - 0.1 * r["objective/kl"])


def test_demonstrations_average_zero_on_held_out_data(finished, place):
    """As docs/rft.md says to score: plain transformers on the texts of the held-out rows, minus reward_center."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from common.data import render_prompt, respond, tokenise_prompts
    from extras.sources import load_rows

    folder = finished / "reward"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = {
        r["row"]: (render_prompt(tokenizer, r["prompt"]), r["response"])
        for r in load_rows(str(place / "data.jsonl"), "all")
    }
    stored = read_pairs(finished / "evals" / "reward_0001.parquet")  # with the centre of the iteration before
    scores = []
    for prompt, response in (texts[r["row"]] for r in stored):
        ids = tokenise_prompts(tokenizer, [prompt])[0]
        ids += respond(tokenizer, [prompt], [response], [True])[0]
        scores.append(model(input_ids=torch.tensor([ids])).logits[0, 0].item() - model.config.reward_center)
    first, center = (r["eval/reward/center"] for r in metrics(finished) if "eval/reward/center" in r)
    assert model.config.reward_center == pytest.approx(center)
    assert scores == pytest.approx([r["chosen"] - (center - first) for r in stored], abs=1e-5)
    assert sum(scores) == pytest.approx(0, abs=1e-4) and abs(first) > 1e-3  # there was something to subtract


def test_gold_scores_and_win_rates_agree_with_the_rows(finished):
    rows = read_pairs(finished / "evals" / "0004.parquet")
    reference = read_pairs(finished / "evals" / "reference.parquet")
    last = [r for r in metrics(finished) if "eval/nll" in r][-1]
    score = [r["gold/score"] for r in rows]
    assert last["eval/gold/score"] == pytest.approx(sum(score) / len(score))
    for name in ("base", "baseline", "demonstrations"):
        wins = [(a > b[f"gold_{name}"]) + 0.5 * (a == b[f"gold_{name}"]) for a, b in zip(score, reference, strict=True)]
        assert last[f"eval/gold/win_rate_{name}"] == pytest.approx(sum(wins) / len(wins))
    start = next(r for r in metrics(finished) if "eval/nll" in r)
    assert start["eval/gold/win_rate_base"] == 0.5  # the reference against its own samples


def test_selection_keeps_the_best_and_can_be_read_as_data(finished, place):
    from extras.sources import load_rows

    kept = read_pairs(finished / "generations" / "selected.parquet")
    assert len(kept) == 12
    pairs = read_pairs(finished / "generations" / "iter_0.parquet")
    assert {p["row"] for p in pairs} == {k["row"] for k in kept}
    rows = load_rows(str(finished / "generations" / "selected.parquet"), "all")
    assert [r["response"] for r in rows] == [k["completion"] for k in kept]


VARIANTS = {
    "linear": ["--reward-loss", "linear", "--optimizer", "adamw", "--temperature", "0.7"],
    "no_sft": ["--sft-epochs", "0", "--T", "2", "--init", "initial", "--reward-init", "base"],
    "any_reward": ["--reward-model", "REWARD", "--T", "2", "--ref", "previous", "--reward-init", "previous"],
    "irl": ["--T", "2", "--reward-init", "sft", "--ref", "previous", "--num-mini-batches", "2"],
    "lora": ["--lora-r", "4", "--gradient-checkpointing", "--T", "2", "--sft-epochs", "0"],
    "lora_sft": ["--lora-r", "4", "--T", "2", "--init", "initial", "--ref", "previous", "--reward-init", "sft"],
    "bf16": ["--mixed-precision", "bf16", "--dtype", "bfloat16"],
    "autocast": ["--mixed-precision", "bf16"],
}


@pytest.fixture(scope="module")
def variants(place):
    """{name: folder of that run}, each made when a test asks for it."""
    make_classifier(place / "classifier", place / "model")

    def make(name: str):
        out = place / f"variant_{name}"
        flags = [str(place / "classifier") if f == "REWARD" else f for f in VARIANTS[name]]
        statuses, printed = drive([{"argv": argv(place, out, *flags)}])
        assert statuses == [0], printed
        return out

    return OnDemand(make)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "linear", VARIANTS))
def test_every_variant_trains_and_starts_at_its_reference(variants, name):
    out = variants[name]
    rows = [r for r in metrics(out) if "objective/kl" in r]
    starts = [next(r for r in rows if r["outer_iteration"] == t) for t in {r["outer_iteration"] for r in rows}]
    flags = dict(zip(VARIANTS[name], VARIANTS[name][1:], strict=False))
    coincide = flags.get("--init", "previous") == flags.get("--ref", "initial")  # in later iterations too
    for r in starts if coincide else starts[:1]:
        assert r["objective/kl"] == pytest.approx(0, abs=0.2 if name in ("bf16", "autocast") else 1e-3), name
    assert rows[-1]["policy/approxkl_avg"] > 0
    assert (out / "final" / "model.safetensors").is_file() and (out / "reward" / "model.safetensors").is_file()


@pytest.mark.slow
def test_lora_models_are_saved_merged(variants, place):
    from safetensors.torch import load_file

    before, after = load_file(place / "model" / "model.safetensors"), weights(variants["lora"])
    assert before.keys() == after.keys()
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert changed and all("dense" in k or "query_key_value" in k for k in changed)
    assert "score.weight" in load_file(variants["lora"] / "reward" / "model.safetensors")


def test_a_reward_that_starts_from_a_classifier_keeps_its_head(place):
    """One reward step at learning rate near 0 leaves the head that was there; a causal model gets a new one from the seed."""
    from safetensors.torch import load_file

    out = place / "kept_head"
    flags = ["--reward-model", str(place / "gold_same"), "--reward-learning-rate", "1e-12", "--total-episodes", "4"]
    make_classifier(place / "gold_same", place / "model")
    assert drive([{"argv": argv(place, out, *flags)}])[0] == [0]
    head = load_file(place / "gold_same" / "model.safetensors")["score.weight"]
    found = load_file(out / "reward" / "model.safetensors")["score.weight"]
    torch.testing.assert_close(found, head, rtol=0, atol=1e-6)


# ---- bad input ----
def bad_inputs(place):
    make_classifier(place / "two_labels", place / "model", labels=2)
    make_model(place / "foreign", tokenizer=make_tokenizer(290))

    def flags(*extra):
        return argv(place, place / "never_made", *extra)

    return {
        "negative beta": (flags("--beta", "-1"), "--beta: found -1.0, expected a number above 0"),
        "gamma": (flags("--gamma", "1.5"), "--gamma: found 1.5, expected a number above 0 and at most 1"),
        "lambda": (flags("--lam", "-0.1"), "--lam: found -0.1, expected between 0 and 1"),
        "minibatches": (flags("--num-mini-batches", "3"), "--num-mini-batches: found 3, expected a divisor of --rollout-batch-size 4"),
        "episodes": (flags("--total-episodes", "0"), "--total-episodes: found 0, expected a number above 0"),
        "selection without gold": (flags("--select-top-k", "3"), "--select-top-k: found 3, expected --gold-reward-model beside it"),
        "too many to select": (flags("--select-top-k", "99", "--gold-reward-model", str(place / "gold")), "--select-top-k: found 99, expected at most"),
        "baseline without gold": (flags("--baseline", "x"), "--baseline: found x, expected --gold-reward-model beside it"),
        "unknown reward": (flags("--reward-model", "no-such"), "--reward-model no-such: found no local folder ./no-such"),
        "reward of another tokenizer": (flags("--reward-model", str(place / "foreign")), "expected the same one, since both read the same token ids"),
        "reward of two labels": (flags("--reward-model", str(place / "two_labels")), "found a classifier of several labels, expected one label"),
        "reward twice": (flags("--reward-init", "sft", "--reward-model", str(place / "gold")), "--reward-init: found sft, expected --reward-model '' beside it"),
        "gold without head": (flags("--gold-reward-model", str(place / "other")), "found no weights for score.weight, expected a model with a scalar head"),
        "diverged": (flags("--reward-learning-rate", "1e30", "--reward-loss", "linear"), "Lower --reward-learning-rate"),
    }  # fmt: skip


BAD = [
    "negative beta", "gamma", "lambda", "minibatches", "episodes", "selection without gold", "too many to select", "baseline without gold",
    "unknown reward", "reward of another tokenizer", "reward of two labels", "reward twice", "gold without head", "diverged",
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(place):
    cases = bad_inputs(place)
    assert list(cases) == BAD
    scenarios = []
    for i, (name, (words, _)) in enumerate(cases.items()):
        scenarios.append(
            {"argv": [str(place / f"never_{i}") if w.endswith("never_made") else w for w in words], "mark": name}
        )
    statuses, printed = drive(scenarios)
    parts = printed.split("=== ")[1:]
    return {
        name: (status, part, expected)
        for (name, (_, expected)), status, part in zip(cases.items(), statuses, parts, strict=True)
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_clear_line(outcomes, name):
    status, printed, expected = outcomes[name]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and expected in errors[0], printed
    assert "Traceback" not in printed


def test_dry_run_counts_what_a_run_would_do(place):
    out = place / "dry"
    done = run([sys.executable, *argv(place, out, "--T", "2", "--dry-run")])
    assert not out.exists()
    assert "5 SFT steps" in done.stdout and "K = 10 reward steps" in done.stdout
    assert (
        "2 PPO updates of 2 optimizer steps on 4 answers" in done.stdout and "in all 33 optimizer steps" in done.stdout
    )
    assert "memory per device, policy update" in done.stdout


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(place):
    """Uneven shares of every batch; rollouts, rewards, whitening and updates are those of one process."""
    from safetensors.torch import load_file

    flags = "--T 2 --batch-size 5 --rollout-batch-size 5 --total-episodes 10 --learning-rate 1e-4".split()
    flags += ["--reward-learning-rate", "1e-4", "--optimizer", "adamw"]
    one, two = place / "one", place / "two"
    assert drive([{"argv": argv(place, one, *flags)}])[0] == [0]
    run([sys.executable, *argv(place, two, *flags)], ranks=2)
    for name in ("final", "reward"):
        a, b = (load_file(out / name / "model.safetensors") for out in (one, two))
        start = load_file(place / "model" / "model.safetensors")
        assert max((a[k] - start[k]).abs().max() for k in a if k in start) > 5e-4
        # no difference of two scores depends on the last bias: its gradient is rounding, which AdamW makes a step of
        told = [k for k in a if (name, k) != ("reward", "gpt_neox.final_layer_norm.bias")]
        assert max((a[k] - b[k]).abs().max() for k in told) < 2e-6
    assert_same_metrics(one, two)
    ids = [[p["rejected_ids"] for p in read_pairs(out / "generations" / "iter_1.parquet")] for out in (one, two)]
    assert ids[0] == ids[1]
