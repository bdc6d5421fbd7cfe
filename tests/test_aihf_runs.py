"""aihf.py and aihf_ppo.py as a user meets them: both data arguments, what a run leaves, bad input, processes, resume."""

import json
import signal
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    OnDemand,
    assert_data_can_be_given_back,
    assert_phases_as_planned,
    assert_same_metrics,
    chosen,
    command,
    drive,
    jsonl,
    make_classifier,
    make_data,
    make_model,
    make_tokenizer,
    metrics,
    run,
    slow_unless,
    weights,
)

import aihf
import aihf_ppo
from common import UserError, demos
from common.store import read_pairs
from common.streams import learning_rate_at
from extras import preference_data
from extras.metrics import JUDGE_METRICS
from extras.sources import load_rows

SCRIPTS = {"aihf.py": aihf, "aihf_ppo.py": aihf_ppo}
SHARED = "--sft-epochs 1 --sft-learning-rate 1e-4 --reward-learning-rate 1e-3 --eval-updates 1 --rollout-batch-size 4".split()
SMALL = {
    "aihf.py": [*SHARED, "--num-generations", "3", "--total-prompts", "8"],
    "aihf_ppo.py": [*SHARED, "--total-episodes", "8", "--num-ppo-epochs", "2"],
}
SMALL["rft.py"] = SMALL["aihf_ppo.py"]
BOTH = list(SCRIPTS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aihf")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 20)
    make_data(folder / "prefs.jsonl", 40, preference=True)
    make_classifier(folder / "gold", make_model(folder / "other", "mistral", make_tokenizer(310)))
    make_classifier(folder / "classifier", folder / "model")
    return folder


def argv(script: str, place, out, *flags: str) -> list[str]:
    data = ["--preference-dataset", str(place / "prefs.jsonl"), "--max-preferences", "20"] if script in SCRIPTS else []
    return command(script, place / "model", place / "data.jsonl", out, *SMALL[script], *data, *flags)[1:]


# ---- preferences as data ----
def load(place, tokenizer=None, **given) -> tuple[list[dict], list[dict]]:
    """(demonstrations, preferences) as the scripts load them; the messages of the latter are warnings."""
    sizes = dict(max_samples=0, max_preferences=0, seed=1, max_length=96, max_prompt_length=64, select_top_k=0)
    sizes |= dict(turns="auto", columns="", max_new_tokens=32, cut_demonstrations=False, eval_dataset="auto")
    names = dict(dataset=str(place / "data.jsonl"), preference_dataset=str(place / "prefs.jsonl"))
    args, tokenizer = SimpleNamespace(**{**sizes, **names, **given}), tokenizer or make_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        demonstrations = demos.load_demonstrations(args, tokenizer)
    return demonstrations, preference_data.load_preferences(args, tokenizer, demonstrations)


def pairs(n: int, chosen="yes {i}", rejected="no") -> list[dict]:
    return [{"prompt": f"ask {i}", "chosen": chosen.format(i=i), "rejected": rejected.format(i=i)} for i in range(n)]


@pytest.mark.filterwarnings("ignore")
def test_preferences_are_encoded_and_chosen_by_the_seed(place):
    tokenizer = make_tokenizer()
    _, rows = load(place)
    source = {r["row"]: r for r in load_rows(str(place / "prefs.jsonl"), "train", "preferences")}
    assert [r["row"] for r in rows] == sorted(source) and len(rows) > 30
    for r in rows:
        assert r.keys() == {"row", "prompt", "prompt_ids", "prompt_text", "chosen_ids", "rejected_ids", "rejected_text"}
        for kind in ("chosen", "rejected"):
            assert tokenizer.decode(r[f"{kind}_ids"], skip_special_tokens=True) == source[r["row"]][kind]
            assert r[f"{kind}_ids"][-1] == tokenizer.eos_token_id
    few = [[r["row"] for r in load(place, max_preferences=10, seed=s)[1]] for s in (1, 1, 2)]
    assert few[0] == few[1] != few[2] and all(len(f) == 10 and f == sorted(f) for f in few)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("written", ["{0}/prefs.jsonl", "{0}/../{1}/prefs.jsonl", "prefs.jsonl", "./prefs.jsonl"])
def test_no_row_of_one_source_serves_twice(place, monkeypatch, written):
    """However the source is written: as a demonstration, or as a preference."""
    monkeypatch.chdir(place)
    written = written.format(place, place.name)
    demonstrations, preferences = load(place, dataset=written, max_samples=10)
    shown, asked = ({r["row"] for r in rows} for rows in (demonstrations, preferences))
    assert len(shown) == 10 and not shown & asked
    assert shown | asked == {r["row"] for r in load_rows(str(place / "prefs.jsonl"), "train")}
    with pytest.raises(UserError, match="--preference-dataset: found none of .*left over by the .* demonstrations"):
        load(place, dataset=written)


def test_a_hub_id_is_its_short_name():
    from extras.sources import source_id

    assert source_id("Anthropic/hh-rlhf") == source_id("hh-rlhf") != source_id("pydoc")


@pytest.mark.parametrize("script", BOTH)
def test_rlhf_of_a_finished_model_needs_no_demonstrations(place, script):
    """w1 = 0, no SFT, the preferences' prompts: --dataset is not read. Each of the other uses asks for it again."""
    words = argv(script, place, place / "never", "--dataset", "auto", "--demo-weight", "0", "--sft-epochs", "0")
    statuses, printed = drive([{"argv": [*words, "--dry-run"], "mark": "dry"}])
    assert statuses == [0] and "0 SFT steps" in printed and "policy update" in printed, printed
    for given in ({"demo_weight": 0.5}, {"sft_epochs": 1}, {"prompts": "demonstrations"}, {"select_top_k": 2}):
        unused = {"demo_weight": 0, "sft_epochs": 0}
        assert not SCRIPTS[script].Args(**unused).needs_demonstrations()
        assert SCRIPTS[script].Args(**{**unused, **given}).needs_demonstrations()


def test_held_out_prompts_that_are_trained_on_are_counted(place):
    """However the prompt is written; a source that writes it otherwise is split alike."""
    rows = load_rows(str(place / "data.jsonl"), "train")
    as_messages = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in rows
    ]
    name = jsonl(place / "messages.jsonl", as_messages)
    assert len(load_rows(name, "train")) == len(rows)
    args = SimpleNamespace(
        model=str(place / "model"), trust_remote_code=False, dataset=name, eval_dataset=name, eval_samples=99, max_samples=0, seed=1, max_length=96, max_prompt_length=64, select_top_k=0,
        gold_reward_model="", baseline="", judge_model="", turns="auto", columns="", max_new_tokens=32, cut_demonstrations=False,
    )  # fmt: skip
    tokenizer, everything = make_tokenizer(), len(load_rows(name, "all"))
    demonstrations = demos.load_demonstrations(args, tokenizer)
    with pytest.warns(UserWarning, match=f"found 5 of {everything} held-out prompts among those trained on"):
        assert len(demos.load_held_out(args, tokenizer, demonstrations[3:8])) == everything
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demos.load_held_out(args, tokenizer, [])


def test_prompts_of_both_sources_are_counted(place):
    shown = {r["prompt"] for r in load_rows(str(place / "data.jsonl"), "train")}
    asked = [r["prompt"] for r in load_rows(str(place / "prefs.jsonl"), "train", "preferences")]
    shared = sum(p in shown for p in asked)
    assert 0 < shared < len(asked)
    with pytest.warns(UserWarning, match=f"--preference-dataset: found {shared} of {len(asked)} prompts among the dem"):
        assert len(load(place)[1]) == len(asked)


def test_equal_responses_are_dropped_and_counted(place, tmp_path):
    rows = pairs(40)
    for i in range(0, 40, 4):
        rows[i]["rejected"] = rows[i]["chosen"]
    name = jsonl(tmp_path / "p.jsonl", rows)
    kept = [r["row"] for r in load_rows(name, "train", "preferences")]
    same = [i for i in kept if i % 4 == 0]
    expected = f"--preference-dataset: found {len(same)} of {len(kept)} pairs with chosen equal to rejected \\(row {same[0]}\\): left out"
    with pytest.warns(UserWarning, match=expected):
        assert [r["row"] for r in load(place, preference_dataset=name)[1]] == [i for i in kept if i % 4]
    name = jsonl(tmp_path / "cut.jsonl", pairs(40, chosen="a " * 200 + "b", rejected="a " * 200 + "c"))
    with pytest.raises(UserError, match="pairs with chosen equal to rejected .*expected responses that differ"):
        load(place, preference_dataset=name)  # the same tokens once cut at --max-length


# ---- what a run leaves ----
@pytest.fixture(scope="module")
def finished(place):
    """A run of each script with every measurement: gold reward of another tokenizer, selection, baseline, two iterations."""
    flags = ["--T", "2", "--gold-reward-model", str(place / "gold"), "--select-top-k", "12", "--eval-dataset", "auto"]
    flags += ["--baseline", str(place / "other"), "--report-to", "tensorboard"]
    outs = {script: place / f"run_{script}" for script in BOTH}
    scenarios = [{"argv": argv(script, place, out, *flags), "mark": script} for script, out in outs.items()]
    statuses, printed = drive(scenarios, CLEANIRL_CACHE=str(place / "cache"))
    assert statuses == [0, 0], printed
    return outs, dict(zip(BOTH, printed.split("=== ")[1:], strict=True))


@pytest.mark.parametrize("script", BOTH)
def test_a_run_leaves_what_it_promises(finished, place, script):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    assert_data_can_be_given_back(finished[0][script], make_tokenizer().eos_token_id)
    out, printed = finished[0][script], finished[1][script]
    assert_phases_as_planned(out, 12, 20)
    rows, module = metrics(out), SCRIPTS[script]
    names = set().union(*rows) - {"step", "outer_iteration", "episodes", "updates"}
    assert names == set(module.METRICS) - set(JUDGE_METRICS)
    per_update = {"aihf.py": 1, "aihf_ppo.py": 2}[script]
    steps = module.Steps(sft=3, K=5, updates=2, per_update=per_update)
    assert "12 demonstrations, 20 preferences, 3 SFT steps, T = 2, K = 5" in printed
    assert sum("sft/loss" in r for r in rows) == steps.sft and sum("reward/loss" in r for r in rows) == 2 * steps.K
    updates = [r for r in rows if "objective/scores" in r]
    first = [steps.before(t) + steps.K for t in range(2)]
    assert [r["step"] for r in updates] == [f + u * per_update for f in first for u in (1, 2)]
    answers = {"aihf.py": 12, "aihf_ppo.py": 4}[script]
    assert [r["episodes"] for r in updates] == [answers * u for u in (1, 2, 3, 4)]
    measured = [(r["outer_iteration"], r["updates"], r["episodes"]) for r in rows if "eval/nll" in r]
    assert measured == [(t, u, answers * u) for t, u in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 4))]
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    for name in ("final", "sft"):
        assert AutoModelForCausalLM.from_pretrained(out / name).config.model_type == "gpt_neox"
    reward = AutoModelForSequenceClassification.from_pretrained(out / "reward")
    assert reward.config.num_labels == 1 and reward.config.pad_token_id != tokenizer.eos_token_id
    card = (out / "final" / "README.md").read_text()
    assert "after AIHF" in card and "2406.06874" in card
    assert (
        f"on `{place / 'data.jsonl'}` and `{place / 'prefs.jsonl'}`" in card and "\ndatasets:" not in card
    )  # not of the hub
    card = (out / "reward" / "README.md").read_text()
    assert "reward_center" in card and "eval/reward/accuracy" in card and "AIHF, reward model" in card
    found = read_pairs(out / "generations" / "iter_1.parquet")
    assert len(found) == 12 and {"prompt", "chosen", "rejected", "row"} <= found[0].keys()
    assert {p["row"] for p in found} == {r["row"] for r in read_pairs(out / "generations" / "selected.parquet")}
    timing = {r["phase"]: r for r in map(json.loads, (out / "timing.jsonl").read_text().splitlines())}
    phase = {"aihf.py": "iteration 0: online DPO", "aihf_ppo.py": "iteration 0: PPO"}[script]
    assert {"sample", "score", "reference", "update", "evaluate"} <= timing[phase].keys()
    assert list(out.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("script", BOTH)
def test_held_out_preferences_judge_and_centre_the_reward(finished, place, script):
    """Of the preferences' own held-out tenth: chosen against rejected; chosen responses average 0 once centred."""
    out = finished[0][script]
    rows = read_pairs(out / "evals" / "reward_0001.parquet")
    assert {r["row"] for r in rows} <= {r["row"] for r in load_rows(str(place / "prefs.jsonl"), "test", "preferences")}
    centres = [r["eval/reward/center"] for r in metrics(out) if "eval/reward/center" in r]
    assert sum(r["chosen"] for r in rows) / len(rows) == pytest.approx(centres[1] - centres[0], abs=1e-5)
    assert json.loads((out / "reward" / "config.json").read_text())["reward_center"] == pytest.approx(centres[1])
    wins = [(r["chosen"] > r["rejected"]) + 0.5 * (r["chosen"] == r["rejected"]) for r in rows]
    last = [r["eval/reward/accuracy"] for r in metrics(out) if "eval/reward/accuracy" in r][-1]
    assert last == pytest.approx(sum(wins) / len(wins))


@pytest.mark.parametrize("script", BOTH)
def test_the_loss_of_the_reward_step_is_that_of_both_sources(finished, script):
    """Means over an epoch: reward/loss = w1 demonstrations/loss + preferences/loss, where each step's parts have their size."""
    rows = [r for r in metrics(finished[0][script]) if "reward/loss" in r][:5]
    sizes = [[(k + 1) * n // 5 - k * n // 5 for k in range(5)] for n in (12, 20)]
    parts = [
        sum(r[f"{name}/loss"] * s for r, s in zip(rows, size, strict=True)) / sum(size)
        for name, size in zip(("demonstrations", "preferences"), sizes, strict=True)
    ]
    assert sum(r["reward/loss"] for r in rows) / 5 == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize("script", BOTH)
def test_learning_rates_follow_the_scheduler_anew_in_each_iteration(finished, script):
    rows, kind = metrics(finished[0][script]), {"aihf.py": "cosine", "aihf_ppo.py": "linear"}[script]
    for name, peak, steps, times in (
        ("sft/loss", 1e-4, 3, 1),
        ("reward/loss", 1e-3, 5, 2),
        ("objective/scores", 1e-3, 2, 2),
    ):
        expected = [learning_rate_at(k, steps, peak, 0.1, kind) for k in range(steps)] * times
        assert [r["learning_rate"] for r in rows if name in r] == pytest.approx(expected, rel=1e-12), name


def test_first_updates_see_the_reference_and_the_policy_that_answered(finished):
    online, ppo = (next(r for r in metrics(finished[0][s]) if "objective/scores" in r) for s in BOTH)
    assert online["policy/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert ppo["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert max(online["sampling/logp_difference"], ppo["sampling/logp_difference"]) < 1e-5
    assert online["objective/scores_best"] > online["objective/scores"]


VARIANTS = {
    "linear": ("aihf.py", "--T 1 --reward-loss linear --optimizer adamw --temperature 0.7 --lr-scheduler-type linear"),
    "rlhf": ("aihf.py", "--T 1 --demo-weight 0"),
    "prompts": ("aihf.py", "--T 2 --prompts demonstrations --total-prompts 25 --rollout-batch-size 10 --num-policy-epochs 2"),
    "all_prompts": ("aihf.py", "--T 1 --total-prompts 0 --rollout-batch-size 1000 --batch-size 32"),
    "previous": ("aihf.py", "--T 2 --ref previous --init initial --reward-init sft"),
    "any_reward": ("aihf.py", "--T 2 --ref previous --reward-model CLASSIFIER --reward-init base --sft-epochs 0"),
    "lora_sft": ("aihf.py", "--T 2 --lora-r 4 --gradient-checkpointing --init initial --ref previous --reward-init sft"),
    "autocast": ("aihf.py", "--T 1 --mixed-precision bf16 --gradient-checkpointing"),
    "ppo_rlhf": ("aihf_ppo.py", "--T 1 --demo-weight 0 --reward-loss linear --mixed-precision bf16 --dtype bfloat16"),
    "ppo_prompts": ("aihf_ppo.py", "--T 2 --prompts demonstrations --total-episodes 25 --rollout-batch-size 10 --init initial"),
    "ppo_previous": ("aihf_ppo.py", "--T 2 --ref previous --init initial --reward-init sft --num-mini-batches 2"),
    "ppo_lora": ("aihf_ppo.py", "--T 1 --lora-r 4 --reward-model CLASSIFIER"),
}  # fmt: skip


@pytest.fixture(scope="module")
def variants(place):
    """{name: folder of that run}, each made when a test asks for it."""

    def make(name: str):
        (script, words), out = VARIANTS[name], place / f"variant_{name}"
        words = words.replace("CLASSIFIER", str(place / "classifier")).split()
        statuses, printed = drive([{"argv": argv(script, place, out, *words)}])
        assert statuses == [0], printed
        return out

    return OnDemand(make)


@pytest.mark.parametrize("name", slow_unless(lambda name: name in ("rlhf", "ppo_rlhf"), VARIANTS))
def test_every_variant_trains_and_starts_at_its_reference(variants, place, name):
    from safetensors.torch import load_file

    out, (script, words) = variants[name], VARIANTS[name]
    rows = [r for r in metrics(out) if "objective/scores" in r]
    starts = [next(r for r in rows if r["outer_iteration"] == t) for t in sorted({r["outer_iteration"] for r in rows})]
    flags = dict(zip(words.split(), words.split()[1:], strict=False))
    assert len(starts) == int(flags["--T"])
    coincide = flags.get("--init", "previous") == flags.get("--ref", "initial")  # in later iterations too
    rounding = 0.2 if "bf16" in words else 1e-3
    for r in starts if coincide else starts[:1]:
        if script == "aihf_ppo.py":
            assert r["objective/kl"] == pytest.approx(0, abs=rounding)
        elif "--num-policy-epochs" not in flags:
            assert r["policy/loss"] == pytest.approx(0.6931, abs=rounding)
            assert r["rewards/margins"] == pytest.approx(0, abs=rounding)
    before = load_file(place / "model" / "model.safetensors")
    after, reward = (load_file(out / folder / "model.safetensors") for folder in ("final", "reward"))
    for found in (after, reward):
        assert max((found[k].float() - before[k]).abs().max() for k in found if k in before) > 1e-4


def test_rlhf_samples_no_answers_to_demonstrations(variants):
    for name in ("rlhf", "ppo_rlhf"):
        assert not list((variants[name] / "generations").iterdir())
        assert not [k for r in metrics(variants[name]) for k in r if k.startswith("demonstrations/")]
        assert "after RLHF" in (variants[name] / "final" / "README.md").read_text()


@pytest.mark.slow
def test_prompts_of_the_policy_step_run_out_evenly(variants):
    """25 prompts, 10 at a time: three updates, the last one of 5; PPO's updates all have their size."""
    online, ppo = (
        [r["episodes"] for r in metrics(variants[n]) if "objective/scores" in r] for n in ("prompts", "ppo_prompts")
    )
    assert online == [3 * k for k in (10, 20, 25, 35, 45, 50)] and ppo == [10 * k for k in range(1, 7)]
    whole = [r["episodes"] for r in metrics(variants["all_prompts"]) if "objective/scores" in r]
    assert whole == [3 * 20]  # those of the 20 preferences


@pytest.mark.slow
def test_lora_models_are_saved_merged(variants, place):
    from safetensors.torch import load_file

    before = load_file(place / "model" / "model.safetensors")
    for name in ("lora_sft", "ppo_lora"):
        after = weights(variants[name])
        assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
        assert "score.weight" in load_file(variants[name] / "reward" / "model.safetensors")


# ---- bad input ----
def bad_inputs(place):
    make_classifier(place / "two_labels", place / "model", labels=2)
    make_model(place / "foreign", tokenizer=make_tokenizer(290))
    same = jsonl(place / "same.jsonl", pairs(30, rejected="yes {i}"))

    def flags(*extra, script="aihf.py"):
        return argv(script, place, place / "never_made", *extra)

    def ppo(*extra):
        return flags(*extra, script="aihf_ppo.py")

    data, prefs = str(place / "data.jsonl"), str(place / "prefs.jsonl")
    return {
        "negative weight": (flags("--demo-weight", "-0.5"), "--demo-weight: found -0.5, expected 0 or more"),
        "weight not a number": (flags("--demo-weight", "nan"), "--demo-weight: found nan, expected"),
        "preferences alone": (flags("--dataset", "auto"), f"--dataset: found none beside --preference-dataset {prefs}, expected a source too"),
        "demonstrations alone": (flags("--preference-dataset", "auto"), f"--preference-dataset: found none beside --dataset {data}, expected a source"),
        "one answer": (flags("--num-generations", "1"), "--num-generations: found 1, expected 2 or more, to choose a pair from"),
        "negative preferences": (flags("--max-preferences", "-1"), "--max-preferences: found -1, expected 0 or more"),
        "negative prompts": (flags("--total-prompts", "-1"), "--total-prompts: found -1, expected 0 or more"),
        "no rollout": (flags("--rollout-batch-size", "0"), "--rollout-batch-size: found 0, expected a number above 0"),
        "no policy epoch": (flags("--num-policy-epochs", "0"), "--num-policy-epochs: found 0, expected 1 or more"),
        "zero beta": (flags("--beta", "0"), "--beta: found 0.0, expected a number above 0"),
        "no preferences": (flags("--preference-dataset", data), f"--preference-dataset {data} row 0: found columns prompt, completion, expected a preference"),
        "no preference file": (flags("--preference-dataset", "no.jsonl"), "--preference-dataset: found no file no.jsonl"),
        "unknown preferences": (flags("--preference-dataset", "no-such-set"), "--preference-dataset: found no local path no-such-set"),
        "all equal": (flags("--preference-dataset", same), "pairs with chosen equal to rejected"),
        "nothing left": (flags("--dataset", prefs), f"--preference-dataset: found none of {prefs}, expected rows left over by the"),
        "prompts too long": (flags("--preference-dataset", jsonl(place / "long.jsonl", [{**p, "prompt": "word " * 99 + str(i)} for i, p in enumerate(pairs(30))])), "--preference-dataset: found"),
        "reward of another tokenizer": (flags("--reward-model", str(place / "foreign")), "expected the same one, since both read the same token ids"),
        "reward of two labels": (flags("--reward-model", str(place / "two_labels")), "found a classifier of several labels, expected one label"),
        "reward twice": (flags("--reward-init", "sft", "--reward-model", str(place / "classifier")), "--reward-init: found sft, expected --reward-model '' beside it, not "),
        "selection without gold": (flags("--select-top-k", "3"), "--select-top-k: found 3, expected --gold-reward-model beside it"),
        "gold without head": (flags("--gold-reward-model", str(place / "other"), "--sft-epochs", "0"), "found no weights for score.weight, expected a model with a scalar head"),
        "diverged": (flags("--reward-learning-rate", "1e30", "--reward-loss", "linear"), "training diverged: found loss"),
        "ppo: negative weight": (ppo("--demo-weight", "-1"), "--demo-weight: found -1.0, expected 0 or more"),
        "ppo: weight not a number": (ppo("--demo-weight", "nan"), "--demo-weight: found nan, expected"),
        "ppo: negative preferences": (ppo("--max-preferences", "-3"), "--max-preferences: found -3, expected 0 or more"),
        "ppo: warm-up": (ppo("--value-warmup-ratio", "1"), "--value-warmup-ratio: found 1.0, expected at least 0 and below 1"),
        "ppo: minibatches": (ppo("--num-mini-batches", "3"), "--num-mini-batches: found 3, expected a divisor of --rollout-batch-size 4"),
        "ppo: no preferences": (ppo("--preference-dataset", data), "found columns prompt, completion, expected a preference"),
        "ppo: reward of another tokenizer": (ppo("--reward-model", str(place / "foreign")), "expected the same one, since both read the same token ids"),
    }  # fmt: skip


BAD = [
    "negative weight", "weight not a number", "preferences alone", "demonstrations alone", "one answer", "negative preferences", "negative prompts", "no rollout", "no policy epoch", "zero beta", "no preferences",
    "no preference file", "unknown preferences", "all equal", "nothing left", "prompts too long", "reward of another tokenizer",
    "reward of two labels", "reward twice", "selection without gold", "gold without head", "diverged", "ppo: negative weight",
    "ppo: weight not a number", "ppo: negative preferences", "ppo: warm-up", "ppo: minibatches", "ppo: no preferences", "ppo: reward of another tokenizer",
]  # fmt: skip


DRY = [(script, weight) for script in BOTH for weight in ("0.5", "0")]


@pytest.fixture(scope="module")
def outcomes(place):
    """{name of a bad input, or (script, weight) of a dry run: (exit status, what was printed, what was expected)}."""
    cases = bad_inputs(place)
    assert list(cases) == BAD
    for script, weight in DRY:
        words = argv(script, place, place / "dry", "--T", "2", "--demo-weight", weight, "--dry-run")
        cases[script, weight] = (words, "")
    scenarios = [
        {"argv": [str(place / f"never_{i}") if w.endswith("never_made") else w for w in words], "mark": str(name)}
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
    if name not in ("reward of two labels", "gold without head", "diverged"):  # seen before there is a folder
        assert not (place / f"never_{BAD.index(name)}").exists()


@pytest.mark.parametrize("script, weight", DRY)
def test_dry_run_counts_what_a_run_would_do(outcomes, place, script, weight):
    status, plan, _ = outcomes[script, weight]
    answers = len(load_rows(str(place / "data.jsonl"), "all")) if float(weight) else 0
    assert status == 0 and not (place / "dry").exists()
    assert f"w1 = {weight}, T = 2" in plan and str(place / "prefs.jsonl") in plan
    assert "5 SFT steps of 4 demonstrations" in plan and "memory per device, policy update" in plan
    assert f"{answers} answers of up to 8 tokens ({answers * 8} at most), K = 5 reward steps" in plan
    if script == "aihf.py":
        assert "2 policy updates of 1 optimizer steps, each after\n  up to 12 answers (96 tokens" in plan
        assert "in all 19 optimizer steps" in plan and "value" not in plan
    else:
        assert "2 PPO updates of 2 optimizer steps on 4 answers" in plan and "in all 23 optimizer steps" in plan


# ---- processes ----
@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(place):
    """Uneven shares of every batch, at last one prompt for two; answers, choices and updates are those of one process.

    aihf_ppo.py shares what is shared out here with aihf.py and rft.py (test_rft_runs.py).
    """
    from safetensors.torch import load_file

    flags = "--T 2 --learning-rate 1e-4 --reward-learning-rate 1e-4 --optimizer adamw".split()
    flags += "--batch-size 5 --rollout-batch-size 5 --total-prompts 11 --sft-learning-rate 2e-5".split()
    one, two = place / "one", place / "two"
    assert drive([{"argv": argv("aihf.py", place, one, *flags)}])[0] == [0]
    run([sys.executable, *argv("aihf.py", place, two, *flags)], ranks=2)
    start = load_file(place / "model" / "model.safetensors")
    for name in ("final", "reward"):
        a, b = (load_file(out / name / "model.safetensors") for out in (one, two))
        assert max((a[k] - start[k]).abs().max() for k in a if k in start) > 2e-4
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert_same_metrics(one, two)
    ids = [[p["rejected_ids"] for p in read_pairs(out / "generations" / "iter_1.parquet")] for out in (one, two)]
    assert ids[0] == ids[1]


# ---- resume ----
POINTS = [  # (script, function, n-th call): one or more in every phase
    ("aihf.py", "common.run.Run.step", 3),  # SFT
    ("aihf.py", "common.evals.prepare_held_out", 1),
    ("aihf.py", "common.run.Run.save_final", 1),  # after 5 SFT steps, sft/ not yet kept
    ("aihf.py", "common.run.write_pairs", 2),  # answers sampled, not yet on disk
    ("aihf.py", "common.run.Run.step", 8),  # reward step: 6 to 10
    ("aihf.py", "common.evals.evaluate_reward", 1),
    ("aihf.py", "common.run.Run.step", 12),  # inside an update of online DPO
    ("aihf.py", "common.evals.evaluate", 2),  # between updates
    ("aihf.py", "aihf.collect", 5),  # iteration 1: the reference is another policy now
    ("aihf_ppo.py", "common.run.Run.step", 9),  # reward step
    ("aihf_ppo.py", "aihf_ppo.collect", 1),
    ("aihf_ppo.py", "common.run.Run.step", 14),  # inside a PPO update
    ("aihf_ppo.py", "common.run.Run.save_final", 3),  # reward/
]
QUICK = [("aihf.py", "common.run.Run.step", 12), ("aihf_ppo.py", "common.run.Run.step", 14)]
FLAGS = {
    "aihf.py": "--T 2 --total-prompts 12 --num-policy-epochs 2 --eval-updates 2 --ref previous".split(),
    "aihf_ppo.py": "--T 2 --total-episodes 12 --eval-updates 2 --ref previous".split(),
}
FLAGS["rft.py"] = FLAGS["aihf_ppo.py"]


@pytest.fixture(scope="module")
def runs(place, request):
    """{name: folder} of undisturbed runs, and of runs that were killed at each point and resumed."""
    scenarios, statuses = [], []
    for script in BOTH:
        scenarios.append({"argv": argv(script, place, place / f"whole_{script}", *FLAGS[script])})
        statuses.append(0)
    for i in chosen(request, "i"):
        (script, at, n), out = POINTS[i], place / f"killed_{i}"
        scenarios.append({"argv": argv(script, place, out, *FLAGS[script]), "at": at, "n": n})
        scenarios.append({"argv": [script, "--resume", str(out)]})
        statuses += [-signal.SIGKILL, 0]
    assert drive(scenarios)[0] == statuses
    return place


def assert_same_run(expected, found) -> None:
    from safetensors.torch import load_file

    for name in ("sft", "policy_1", "reward", "final"):
        a, b = (load_file(out / name / "model.safetensors") for out in (expected, found))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert (expected / "metrics.jsonl").read_bytes() == (found / "metrics.jsonl").read_bytes()
    for folder in ("samples", "evals", "generations"):
        assert sorted(p.name for p in (expected / folder).iterdir()) == sorted(
            p.name for p in (found / folder).iterdir()
        )
        for path in (expected / folder).iterdir():
            assert path.read_bytes() == (found / folder / path.name).read_bytes(), path


@pytest.mark.parametrize(
    "i", slow_unless(lambda i: POINTS[i] in QUICK, range(len(POINTS))), ids=lambda i: "-".join(map(str, POINTS[i]))
)
def test_killed_and_resumed_equals_left_alone(runs, i):
    assert_same_run(runs / f"whole_{POINTS[i][0]}", runs / f"killed_{i}")


def test_training_moved_the_weights(runs):
    """Guards the tests above against comparing runs that did nothing."""
    from safetensors.torch import load_file

    for script in BOTH:
        path = [
            load_file(runs / f"whole_{script}" / name / "model.safetensors") for name in ("sft", "policy_1", "final")
        ]
        path.insert(0, load_file(runs / "model" / "model.safetensors"))
        for a, b in zip(path, path[1:], strict=False):
            assert max((a[k] - b[k]).abs().max() for k in a) > 1e-4


@pytest.mark.slow
def test_sigterm_after_an_evaluation_does_not_log_it_twice(runs, place):
    """While the third answers are sampled; no checkpoint was due but for the evaluation before them."""
    outs = {script: place / f"stopped_{script}" for script in ("aihf.py", "rft.py")}
    scenarios = [{"argv": argv("rft.py", place, place / "whole_rft.py", *FLAGS["rft.py"])}]
    for script, out in outs.items():
        words = argv(script, place, out, *FLAGS[script], "--save-steps", "1000")
        scenarios.append({"argv": words, "at": f"{script[:-3]}.collect", "n": 3, "signal": signal.SIGTERM})
        scenarios.append({"argv": [script, "--resume", str(out)]})
    statuses, printed = drive(scenarios)
    assert statuses == [0] + [143, 0] * 2 and printed.count("SIGTERM: stopped; continue with --resume") == 2
    for script, out in outs.items():
        assert_same_run(place / f"whole_{script}", out)
