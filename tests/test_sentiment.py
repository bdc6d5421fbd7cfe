"""The AIHF paper's sentiment task: PPO on a known reward, classes of answers, what the tables measure, and small runs."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, command, commands, jsonl, make_model, make_tokenizer, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import UserError, models
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
        {"row": row, "prompt": prompt, "text": f"{row}.{k}", "finished": bool(k % 2), "score": score, "checkpoint": k}
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
        for kind, answer in (("chosen", chosen), ("rejected", rejected)):
            assert (p[f"{kind}_finished"], p[f"checkpoint_{kind}"]) == (answer["finished"], answer["checkpoint"])
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
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<stop>{% endif %}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_tokens(["<stop>"])  # ends a turn, but a decoder does not skip it
    said = ["open the file", " read it", "it"]
    ids = [tokenizer(text)["input_ids"] for text in said]
    ids[0].append(tokenizer.convert_tokens_to_ids("<stop>"))
    seen = []

    def score(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([float(len(text)) for text in texts])

    padding = tokenizer("x")["input_ids"][0]  # a token that would be read
    batch = collate([(tokenizer("number of")["input_ids"], own) for own in ids], pad_token_id=padding)
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


def test_length_and_end_are_judged_on_rows_they_were_not_fitted_on(tmp_path):
    """Demonstrations are longer in all even rows and in six of eight odd ones: 6/8 by the even rows' fit, 8/8 by the odd rows'."""
    (tmp_path / "evals").mkdir()
    longer = [i % 2 == 0 or i >= 4 for i in range(16)]
    rows = [
        {
            "row": i, "lengths/demonstrations": 14.0 if more else 10.0, "completions/mean_length": 10.0 if more else 14.0,
            "completions/clipped_ratio": 0.0,
        }
        for i, more in enumerate(longer)
    ]  # fmt: skip
    write_pairs(tmp_path / "evals" / "0000.parquet", rows)
    assert table.length_alone(tmp_path, [{}] * 16) == pytest.approx((6 / 8 + 1) / 2)


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
        "--optimizer adamw --learning-rate 8e-3 --total-episodes 1280 --rollout-batch-size 64 --eval-updates 10".split()
    )
    words += "--missing-eos-penalty 0 --value-warmup-ratio 0 --seed 1".split()
    run([sys.executable, *words, "--output-dir", str(place / "ppo")])
    return place / "ppo"


def test_ppo_raises_the_gold_of_the_decoded_answers(place, ppo):
    gold = film.Gold(place)
    means = []
    for updates in (0, 10, 20):
        rows = read_pairs(ppo / "evals" / f"{updates:04d}.parquet")
        scores = gold.score([row["sample"] for row in rows])
        assert [row["reward/samples"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-6)
        means.append(scores.mean())
        assert (ppo / f"checkpoint_{updates}" / "model.safetensors").is_file()
    assert means[-1] > means[0] + 0.5
    logged = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    assert not any("reward/loss" in row for row in logged)  # nothing is learned about the reward


@pytest.fixture(scope="module")
def learned(place):
    """RLHF on other prompts than its preferences', from a model that is not the base to which its KL is measured."""
    make_model(place / "other", window=64, intermediate_size=32)
    prefs = [{"prompt": f"{' '.join(WORDS[i : i + 3])} {i}", "chosen": "e e", "rejected": "o"} for i in range(8)]
    jsonl(place / "prefs.jsonl", prefs)
    flags = ["--preference-dataset", str(place / "prefs.jsonl"), "--base", str(place / "other"), "--demo-weight", "0"]
    flags += ["--policy-prompts", str(place / "rows.jsonl"), "--reward-model", "", "--sft-epochs", "0", "--T", "1"]
    flags += "--total-prompts 4 --rollout-batch-size 4 --num-generations 2 --eval-updates 1 --max-preferences 0".split()
    flags += "--reward-learning-rate 1e-3 --sft-learning-rate 1e-3 --lr-scheduler-type linear --max-length 64".split()
    words = command("benchmark/sentiment_rl.py", place / "model", place / "rows.jsonl", place / "learned", *flags)
    words.insert(2, "aihf")
    run([*words, "--max-prompt-length", "50"])
    return place / "learned"


def test_the_kl_of_a_run_is_measured_to_the_base(learned):
    """The policy has not moved at the first evaluation, but it is not the base: so its KL is that of two random models."""
    start = read_pairs(learned / "evals" / "0000.parquet")
    assert abs(np.mean([row["kl_k3"] for row in start])) > 1e-3
    assert json.loads((learned / "args.json").read_text())["script"] == "aihf"


def test_pairs_are_judged_by_the_learned_reward_else_by_the_policy(place, learned, ppo):
    """The chosen responses are those that the run has scored; the PPO run has no reward folder, so its policy judges."""
    held = read_pairs(learned / "evals" / "reward_0000.parquet")
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": rows[h["row"]]["prompt"], "chosen": "e e.", "rejected": "read it", "checkpoint_chosen": i}
        | {"checkpoint_rejected": 1}
        for i, h in enumerate(held)
    ]
    file = jsonl(place / "pairs.jsonl", pairs)
    words = ["benchmark/sentiment_judge.py", "--model", str(place / "model"), "--pairs", file, *SMALL, "--runs"]
    words += [str(learned), str(ppo), "--output-dir", str(place / "judge")]
    run([sys.executable, *words])
    judged = read_pairs(learned / "pairs.parquet")
    moved = [j["chosen"] - h["chosen"] for j, h in zip(judged, held, strict=True)]
    assert moved == pytest.approx([-np.mean([h["chosen"] for h in held])] * len(held), abs=1e-4)  # centred since then
    assert [j["rejected"] for j in judged] != pytest.approx([j["chosen"] for j in judged], abs=1e-3)
    assert [j["later"] for j in judged] == [False, False, True, True]
    own = read_pairs(ppo / "pairs.parquet")
    model, base, tokenizer = (
        AutoModelForCausalLM.from_pretrained(ppo / "final"), AutoModelForCausalLM.from_pretrained(place / "model"),
        AutoTokenizer.from_pretrained(place / "model"),
    )  # fmt: skip
    for kind in ("chosen", "rejected"):
        expected = [log_prob(model, tokenizer, p, kind) - log_prob(base, tokenizer, p, kind) for p in pairs]
        assert [row[kind] for row in own] == pytest.approx(expected, abs=1e-3)


def log_prob(model, tokenizer, pair: dict, kind: str) -> float:
    """log pi of a response with its end, by plain transformers."""
    prompt = tokenizer(f"### Instruction: {pair['prompt']}\n\n### Response: ")["input_ids"]
    ids = torch.tensor([[*prompt, *tokenizer(pair[kind])["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    return logprobs[range(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum().item()


# ---- the tables, from made-up runs ----
TEXTS = {
    "sft": "b",
    "dpo": "c z",
    "rlhf": "n",
    "aihf": "b z",
    "rlhf_sft": "n",
    "aihf_sft": "b z",
}  # gold 4, 0, -4, 0 by the fixture's letters; the base: "z"


def made_up_run(folder: Path, method: str, rows: int, seed: int, script: str, kl: float = 2.0) -> None:
    (folder / "evals").mkdir(parents=True)
    args = {"num_policy_epochs": 1, "rollout_batch_size": 64, "batch_size": 32}
    (folder / "args.json").write_text(json.dumps({"script": script, "args": args}))
    (folder / "done").touch()
    steps = (0, 20) if script == "sft" else (0, 10)
    lines = [json.dumps({"step": step, "eval/nll": 1.0}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for number in steps:
        said = TEXTS[method] if number else "z"
        stored = [
            {
                "row": i, "sample": said if i else "a", "kl_k1": -0.1 * i, "kl_k3": kl * (number > 0),
                "nll": 50.0 + seed,
                "completions/mean_length": 5.0 + i, "completions/clipped_ratio": 0.0, "reward/samples": float(i),
                "lengths/demonstrations": 9.0 + i,
            }
            for i in range(rows)
        ]  # fmt: skip
        write_pairs(folder / "evals" / f"{number:04d}.parquet", stored)
    reward = [{"row": i, "chosen": 1.0, "rejected": float(i % 4 == 0) * 2, "shuffled": 1.0} for i in range(rows)]
    write_pairs(folder / "evals" / "reward_0000.parquet", reward)
    right = {"held_out_medium_low": 5, "held_out_high_medium": 5 - seed}  # of eight
    judged = [
        {"pairs": name, "row": i, "chosen": float(i < n), "rejected": 0.5, "later": i < 2}
        for name, n in right.items()
        for i in range(8)
    ]
    write_pairs(folder / "pairs.parquet", judged)


def test_tables_of_made_up_runs(place, tmp_path):
    for size in (100, 300):
        for seed in (1, 2):
            for method in TEXTS:
                script = "aihf" if method in table.LEARNED else "sft"
                made_up_run(tmp_path / str(size) / str(seed) / method, method, 8, seed, script)
    made_up_run(tmp_path / "w1" / "0.25" / "1" / "direct", "sft", 8, 1, "aihf_direct")
    (tmp_path / "data").mkdir()
    completions = ["n", "b z", "b"] * 3  # gold -4, 0, 4
    jsonl(tmp_path / "data" / "held_out.jsonl", [{"prompt": f"p {i}", "completion": completions[i]} for i in range(8)])
    table.show(table.Args(str(tmp_path), str(place), output=str(tmp_path / "out")))
    text = (tmp_path / "out" / "sentiment.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]

    def row(label: str, columns: int, **at: str) -> list[str]:
        """The first row of that label and size, without intervals; at: what its column of that number begins with."""
        own = [r for r in rows if r[0] == label and len(r) == columns]
        return [
            c.split(" ")[0] for c in next(r for r in own if all(r[int(k[1:])].startswith(v) for k, v in at.items()))
        ]

    assert [row(name, 7)[1] for name in ("demonstrations", "base", "SFT", "RLHF (online DPO)")] == [
        "-0.500", "-3.000", "4.000", "-3.000"
    ]  # fmt: skip
    aihf, less = "AIHF (online DPO)", "AIHF (online DPO) less RLHF (online DPO)"
    assert row(aihf, 7)[1:5] == ["0.500", "3.500", "2.00", "51.50"]
    assert row(less, 4, _2="+3.50, +3.50")[1::2] == ["+3.500", "+0.00"]
    assert row(less, 4, _2="+2.4")[1:] == [
        "+1.356",
        "+2.475",
        "",
    ]  # 3.5 sqrt(0.3/2), 3.5 sqrt(1/2), and 2 nats are the end
    assert row("AIHF from SFT less RLHF from SFT", 4, _2="+3.50")[1] == "+3.500"
    assert row("AIHF from SFT", 7, _1="learned")[2:6] == row(aihf, 7, _1="learned")[2:6]  # its reward was learned too
    assert row("SFT", 3)[1:] == ["not", "4.000"] and row(aihf, 3)[2] == "0.500"  # ten updates of two steps
    assert row(aihf, 7, _1="learned")[2:6] == ["0.625", "0.438", "0.625", "-0.577"]
    # 5/8; (4/8 + 3/8)/2; balanced: of two later pairs all, of six others 2/6 and 1/6; the high row has 0
    assert row("DPO", 7, _1="log")[5] == "0.577"  # its log pi/pi_base falls with the number of the row
    assert row(aihf, 5)[1:] == ["0.750", row(aihf, 5)[2], "0.500", "not:"]
    assert row("the gold reward itself", 5)[1::2] == ["0.750", "0.375"]  # of eight: 6; 3 above the next one
    assert (
        row("0.25 (1)", 8)[1:5] == ["4.000", "7.000", "2.00", "51.00"] and row("0 (2)", 8)[1] == "0.500"
    )  # w1; 0 is DPO
    assert (tmp_path / "out" / "sentiment.png").stat().st_size > 10_000
    assert "p 1" in (tmp_path / "out" / "samples.txt").read_text()


def test_the_commands_of_both_starts(tmp_path):
    out, base = tmp_path / "out", tmp_path / "base"
    for folder in ("split", "ppo/checkpoint_1", "data", "grid"):
        (out / folder).mkdir(parents=True)
    for name in ("split", "ppo", "data", "grid"):
        (out / name / "done").touch()
    rates = "".join(f"{name} 1e-3\n" for name in ("reward_aihf", "sft", "dpo", "rlhf", "aihf", "direct", "self_play"))
    for name in ("rates", "rates_of_rewards"):
        (out / "grid" / name).write_text(rates)
    said = commands(tmp_path, "benchmark/sentiment.sh", str(tmp_path / "world"), str(base), str(out), SEEDS="3")
    runs = {line.rsplit("/", 1)[1]: f"{line} " for line in said if f"{out}/300/3/" in line and "judge" not in line}
    for name in ("rlhf", "aihf"):
        start = f"--model {out}/300/3/sft/final "
        assert start in runs[f"{name}_sft"] and start not in runs[name]
        assert all(f"--base {base} " in runs[kind] for kind in (name, f"{name}_sft"))
        assert all(("--demo-weight 0 " in runs[kind]) == (name == "rlhf") for kind in (name, f"{name}_sft"))
        assert runs[f"{name}_sft"].count("--sft-epochs 0 ") == 1


@pytest.mark.parametrize(("most_kl", "expected"), [(5.0, "1e-3"), (10.0, "3e-3"), (1.0, "3e-3")])
def test_a_rate_that_goes_too_far_does_not_count_unless_all_do(place, tmp_path, most_kl, expected):
    made_up_run(tmp_path / "1e-3", "aihf", 4, 1, "aihf")  # less gold than SFT's
    made_up_run(tmp_path / "3e-3", "sft", 4, 1, "sft", kl=8.0)
    folders = [tmp_path / "1e-3", tmp_path / "3e-3"]
    scores, said = sentiment_grid.policies(folders, film.Gold(place), most_kl)
    assert sentiment_grid.best(scores) == expected and said["3e-3"].startswith("4.000 (KL 8.00")


def test_runs_on_other_rows_are_refused(place, tmp_path):
    for seed, rows in ((1, 8), (2, 7)):
        made_up_run(tmp_path / "300" / str(seed) / "sft", "sft", rows, seed, "sft")
    with pytest.raises(UserError, match="--runs: found other held-out rows"):
        table.show(table.Args(str(tmp_path), str(place), output=str(tmp_path / "out")))
