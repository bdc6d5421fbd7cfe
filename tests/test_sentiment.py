"""The AIHF paper's sentiment task: PPO on a known reward, classes of answers, what the tables measure, and small runs."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, command, jsonl, make_model, make_tokenizer, run

from common import models
from common.data import collate
from common.store import read_pairs, write_pairs

sys.path.append(str(ROOT / "benchmark"))
import film
import sentiment_data
import sentiment_gold
import sentiment_grid
import sentiment_rl
import sentiment_table as table

WORDS = "return the number of items in list open file and read it".split()
SMALL = "--max-length 64 --max-new-tokens 8 --per-device-eval-batch-size 16 --mixed-precision no".split()


# ---- classes, preferences, demonstrations ----
def test_answers_are_cut_into_thirds():
    between = sentiment_data.cuts(np.arange(10.0))
    assert between == (3.0, 6.0)
    found = [sentiment_data.class_of(score, between) for score in range(10)]
    assert found == ["low"] * 4 + ["medium"] * 3 + ["high"] * 3  # a score at a cut is in the lower class


def answers(prompts: list[str], scores: list[list[float]]) -> list[dict]:
    return [
        {"row": row, "prompt": prompt, "text": f"{row}.{k}", "finished": bool(k % 2), "score": score}
        for row, (prompt, own) in enumerate(zip(prompts, scores, strict=True))
        for k, score in enumerate(own)
    ]


def test_preferences_are_medium_over_low_and_share_no_prompt_with_demonstrations():
    stream = np.random.default_rng(0)
    prompts = [f"prompt {i % 30}" for i in range(40)]  # ten prompts stand in two rows
    drawn = answers(prompts, stream.uniform(0, 9, (40, 4)).tolist())
    classes = sentiment_data.by_class(drawn, (3.0, 6.0))
    preferences, demonstrations = sentiment_data.share_out(classes, 12, seed=1)
    assert len(preferences) == 12 and len(demonstrations) >= 5
    text = {a["text"]: a for a in drawn}
    for p in preferences:
        chosen, rejected = text[p["chosen"]], text[p["rejected"]]
        assert 3 < p["gold_chosen"] == chosen["score"] <= 6 and p["gold_rejected"] == rejected["score"] <= 3
        assert p["prompt"] == chosen["prompt"] == rejected["prompt"] and chosen["row"] == rejected["row"]
        assert (p["chosen_finished"], p["rejected_finished"]) == (chosen["finished"], rejected["finished"])
    for d in demonstrations:
        assert text[d["completion"]]["score"] == d["gold"] > 6 and text[d["completion"]]["prompt"] == d["prompt"]
    assert not {p["prompt"] for p in preferences} & {d["prompt"] for d in demonstrations}
    assert len({p["chosen"] for p in preferences}) == 12
    assert sentiment_data.share_out(classes, 12, seed=2)[0] != preferences


def test_a_prompt_without_both_classes_makes_no_pair():
    classes = sentiment_data.by_class(answers(["a", "b", "c"], [[1, 2, 8], [4, 5], [1, 5]]), (3.0, 6.0))
    assert list(sentiment_data.pairs_of(classes, "medium", "low", 0)) == [2]
    assert list(sentiment_data.pairs_of(classes, "high", "low", 0)) == [0]
    assert list(sentiment_data.demonstrations_of(classes, 0)) == [0]


def test_prompts_are_split_by_their_text_in_the_papers_shares():
    parts = [sentiment_data.part_of(f"prompt {i}") for i in range(3000)]
    shares = {name: parts.count(name) / 3000 for name in sentiment_data.PARTS}
    assert shares == pytest.approx({"ppo": 0.3, "data": 0.4, "methods": 0.3}, abs=0.036)  # four standard errors
    assert parts == [sentiment_data.part_of(f"prompt {i}") for i in range(3000)]


# ---- the known reward in the place of a reward model ----
def test_the_score_is_that_of_the_answers_text_alone():
    tokenizer = make_tokenizer()
    said = ["open the file", " read it", "it"]
    ids = [tokenizer(text)["input_ids"] for text in said]
    ids[0].append(tokenizer.eos_token_id)
    seen = []

    def score(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([float(len(text)) for text in texts])

    batch = collate([(tokenizer("number of")["input_ids"], own) for own in ids], pad_token_id=0)
    found = sentiment_gold.GoldScore(tokenizer, score)(batch)
    assert seen == ["open the file", "read it", "it"]  # no prompt, no end, no padding
    assert found.dtype == torch.float32 and found.tolist() == [13.0, 7.0, 2.0]


# ---- what the tables measure ----
def test_rank_correlation_by_hand():
    def spearman(a, b) -> float:
        return table.rank_correlation_rows(np.array(a, float), np.array(b, float)).mean()

    assert spearman([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # ranks 0.5 0.5 2 3
    assert table.ranks(np.array([5.0, 3.0, 5.0])).tolist() == [1.5, 0.0, 1.5]


def test_the_rows_of_a_rank_correlation_spread_as_the_correlation_does():
    stream = np.random.default_rng(0)
    a = stream.normal(size=400)
    b = a + stream.normal(size=400)
    own = table.rank_correlation_rows(a, b)
    drawn = []
    for _ in range(400):
        pick = stream.integers(0, 400, 400)
        drawn.append(np.corrcoef(table.ranks(a[pick]), table.ranks(b[pick]))[0, 1])
    assert own.std() / 20 == pytest.approx(np.std(drawn), rel=0.2)


def test_distance_of_two_shapes_by_hand():
    a = np.array([0.0, 0.0, 0.0, 1.0])
    assert table.distance(a, 4 + 2 * a) == 0  # place and width do not count
    assert table.distance(a, -a) == pytest.approx(0.5)  # -0.58 (3), 1.73 against -1.73, 0.58 (3): 3/4 less 1/4


def point(kl: float, gold: list[float]) -> table.Point:
    return table.Point(0, {"kl_k1": np.array([kl, kl]), "gold": np.array(gold)}, ["a", "b"])


def test_gold_at_equal_kl_is_on_the_line_between_two_evaluations():
    points = [point(0, [0, 1]), point(1, [2, 1]), point(0.5, [9, 9]), point(3, [4, 5])]
    assert table.at_kl(points, 0.25).tolist() == [0.5, 1.0]
    assert table.at_kl(points, 1.0).tolist() == [2.0, 1.0]
    assert table.at_kl(points, 1.75) == pytest.approx([6.5, 7.0])
    assert table.at_kl(points, 3.5) is None
    assert table.at_kl([point(0.4, [1, 1]), point(2, [2, 2])], 0.3) is None  # a start that is beyond it


def test_length_and_end_alone_are_judged_by_the_other_half():
    stream = np.random.default_rng(0)
    worse = np.stack([stream.integers(5, 20, 400), np.ones(400)], 1).astype(float)
    longer = worse + [3, 0]
    assert table.shape_accuracy(longer, worse).mean() == 1
    assert table.shape_accuracy(worse, worse).tolist() == [0.5] * 400
    ended = worse * [1, 0] + [0, 1]
    assert table.shape_accuracy(ended, worse * [1, 0]).mean() == 1
    noise = table.shape_accuracy(np.stack([stream.integers(5, 20, 400), np.ones(400)], 1), worse)
    assert noise.mean() == pytest.approx(0.5, abs=0.1)  # four standard errors


def test_logistic_weights_are_where_the_gradient_is_zero():
    x = np.random.default_rng(0).normal(0.3, 1, (200, 2))
    w = table.logistic(x, ridge=0.01)
    assert x.T @ (1 / (1 + np.exp(x @ w))) / 200 == pytest.approx(0.01 * w, abs=1e-9)


@pytest.mark.parametrize(
    ("script", "args", "expected"),
    [
        ("aihf", {"num_policy_epochs": 2, "rollout_batch_size": 40, "batch_size": 32}, 20),
        ("aihf_ppo", {"num_ppo_epochs": 4, "num_mini_batches": 2}, 40),
        ("sft", {}, 77),
    ],
)
def test_policy_updates_leave_out_the_steps_of_the_reward(tmp_path, script, args, expected):
    (tmp_path / "args.json").write_text(json.dumps({"script": script, "args": args}))
    assert table.policy_updates(tmp_path, number=5, step=77) == expected


def test_the_best_rate_is_the_lowest_of_equal_ones():
    assert sentiment_grid.best({"1e-3": 0.5, "1e-4": 0.5, "3e-4": 0.4}) == "1e-4"
    assert sentiment_grid.best({"1e-3": 0.6, "1e-4": 0.5}) == "1e-3"


# ---- prompts and base of the policy step ----
def test_the_policy_step_has_prompts_and_a_base_of_its_own(tmp_path, monkeypatch):
    seen = []

    @dataclass
    class Args:
        beta: float = 0.1

    class AIHF:
        def __init__(self, run, tokenizer, *data):
            self.run, self.raw, self.prompts = run, SimpleNamespace(policy="the policy"), data[1]

        def measure(self, t, updates, reference=None):
            seen.append((t, updates, reference))

    script = SimpleNamespace(Args=Args, AIHF=AIHF)
    args = sentiment_rl.with_own_prompts(script)()
    args.max_length, args.max_prompt_length = 64, 50
    monkeypatch.setattr(models, "open_reference", lambda run, policy, name: (policy, name))
    data = [{"prompt": "open the file", "completion": "x"}, {"prompt": "read it", "completion": "y"}]
    for args.policy_prompts, args.base in (("", ""), (jsonl(tmp_path / "prompts.jsonl", data), "the base")):
        learner = script.AIHF(SimpleNamespace(args=args), make_tokenizer(), ["demonstration"], ["preference"])
        learner.measure(1, 2, "start")
        seen.append([p if isinstance(p, str) else p["prompt"] for p in learner.prompts])
    assert seen[:2] == [(1, 2, "start"), ["preference"]]
    assert seen[2:] == [(1, 2, ("the policy", "the base")), ["open the file", "read it"]]


# ---- small runs ----
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random model, and a gold reward of letters that stand alone: 4 in the first half of the alphabet, -4 in the second."""
    folder = tmp_path_factory.mktemp("sentiment")
    make_model(folder / "model", window=64)
    weight = dict.fromkeys("abcdefghijklm", 4.0) | dict.fromkeys("nopqrstuvwxyz", -4.0)
    stored = {"bias": 0.0, "least_norm": 1.0, "peak_at": 0.0, "idf": dict.fromkeys(weight, 1.0), "weight": weight}
    (folder / "gold.json").write_text(json.dumps(stored))
    stream = np.random.default_rng(0)
    rows = [{"prompt": " ".join(stream.choice(WORDS, 4)), "completion": "e e."} for _ in range(60)]
    jsonl(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def ppo(place):
    words = ["benchmark/sentiment_gold.py", "--model", str(place / "model"), "--gold", str(place), *SMALL]
    words += [
        "--dataset",
        str(place / "rows.jsonl"),
        "--eval-dataset",
        str(place / "rows.jsonl"),
        "--eval-samples",
        "40",
    ]
    words += (
        "--optimizer adamw --learning-rate 4e-3 --total-episodes 640 --rollout-batch-size 64 --eval-updates 5".split()
    )
    words += "--missing-eos-penalty 0 --value-warmup-ratio 0 --seed 1".split()
    run([sys.executable, *words, "--output-dir", str(place / "ppo")])
    return place / "ppo"


def test_ppo_raises_the_gold_of_the_decoded_answers(place, ppo):
    gold = film.Gold(place)
    means = []
    for updates in (0, 5, 10):
        rows = read_pairs(ppo / "evals" / f"{updates:04d}.parquet")
        scores = gold.score([row["sample"] for row in rows])
        assert [row["reward/samples"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-6)
        means.append(scores.mean())
        assert (ppo / f"checkpoint_{updates}" / "model.safetensors").is_file()
    assert means[-1] > means[0] + 0.5
    logged = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    assert not any("reward/loss" in row for row in logged)  # nothing is learned about the reward
