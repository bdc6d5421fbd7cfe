"""evaluate.py and what it stands on: measures against hand computation, a policy against itself, gold rewards, calibration."""

import contextlib
import json
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import jsonl, make_classifier, make_data, make_model, make_tokenizer, run

import evaluate
from common import UserError, demos, evals, models
from common.args import RunArgs, main, parse_args, resolve_auto
from common.data import encode
from common.run import Run
from common.store import read_pairs
from extras import gold, lm_eval_table, records, reward_pairs, statistics, tokenizers
from extras.metrics import JUDGE_METRICS
from extras.sources import load_rows
from extras.tokenizers import check_same_tokenizer

N = 12  # held-out rows of every run here


def moved(folder: Path, source: Path, seed: int) -> Path:
    """A copy of a causal model with other weights."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A policy, two others, a reward model, a gold model with a tokenizer of its own, and two data sets."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_model(folder / "base")
    for seed, name in enumerate(("model", "ref", "other")):
        moved(folder / name, folder / "base", seed)
    make_classifier(folder / "reward", folder / "ref")
    make_model(folder / "gold_base", tokenizer=make_tokenizer(270))
    make_classifier(folder / "gold", folder / "gold_base", seed=1)
    make_classifier(folder / "two_labels", folder / "base", labels=2)
    make_data(folder / "data.jsonl", N)
    make_data(folder / "preferences.jsonl", N, preference=True)
    return folder


def words(place: Path, out: str, *flags: str, data: str = "data.jsonl") -> list[str]:
    small = "--max-length 96 --max-new-tokens 8 --max-prompt-length 64 --eval-samples 99 --mixed-precision no"
    small += "" if "--per-device-eval-batch-size" in flags else " --per-device-eval-batch-size 5"
    files = ["--dataset", str(place / data), "--eval-dataset", str(place / data), "--output-dir", str(place / out)]
    model = [] if "--model" in flags else ["--model", str(place / "model")]
    return ["evaluate.py", *model, *files, *small.split(), *(str(f) for f in flags)]


@contextlib.contextmanager
def as_typed(argv: list[str]):
    """sys.argv, and the signal handler that a run takes, put back afterwards."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with mock.patch.object(sys, "argv", argv):
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def measure(place: Path, out: str, *flags: str, data: str = "data.jsonl") -> tuple[dict, dict]:
    """A run of the script in this process -> (evaluation.json, {file: rows of evals/file.parquet})."""
    with as_typed(words(place, out, *flags, data=data)):
        main(lambda: evaluate.evaluate(parse_args(evaluate.Args, evaluate.__doc__, evaluate.SETTINGS)))
    tables = {p.stem: read_pairs(p) for p in (place / out / "evals").glob("*.parquet")}
    return json.loads((place / out / "evaluation.json").read_text()), tables


def everything(place: Path) -> list[str]:
    names = {"ref": "--ref-model", "reward": "--reward-model", "gold": "--gold-reward-model", "other": "--baseline"}
    return [word for name, flag in names.items() for word in (flag, str(place / name))]


@pytest.fixture(scope="module")
def full(place):
    return measure(place, "full", *everything(place))


def column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([r[name] for r in rows])


def half_ties(a, b) -> float:
    return float(np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in zip(a, b, strict=True)]))


# ---- the numbers ----
def test_the_json_agrees_with_the_rows(full):
    result, tables = full
    measures, rows, reference = result["measures"], tables["0000"], tables["reference"]
    assert set(measures) == set(evaluate.METRICS) - set(JUDGE_METRICS) and result["rows"] == len(rows) == N
    per_row = {f"eval/{k}": column(rows, k) for k in rows[0] if k not in ("row", "sample")}
    scores = tables["reward_0000"]
    chosen, rejected, shuffled = (column(scores, k) for k in ("chosen", "rejected", "shuffled"))
    per_row |= {"eval/reward/margin": chosen - rejected, "eval/reward/demonstrations": chosen}
    per_row["eval/reward/samples"] = column(scores, "samples")
    assert len(per_row) == len(measures) - 3  # two accuracies and the calibration error are below
    for name, values in per_row.items():
        assert measures[name]["value"] == pytest.approx(values.mean(), abs=1e-12), name
        assert (measures[name]["low"], measures[name]["high"]) == statistics.bootstrap_interval(values), name
        assert measures[name]["low"] <= measures[name]["value"] <= measures[name]["high"]
    assert measures["eval/reward/accuracy"]["value"] == half_ties(chosen, rejected)
    assert measures["eval/reward/accuracy_shuffled"]["value"] == half_ties(chosen, shuffled)
    assert measures["eval/reward/calibration_error"]["value"] == statistics.calibration(chosen - rejected)[0]
    assert sum(b["pairs"] for b in result["calibration"]["bins"]) == N
    gold = column(rows, "gold/score")
    for name in ("base", "baseline", "demonstrations"):
        against = column(reference, f"gold_{name}")
        assert measures[f"eval/gold/win_rate_{name}"]["value"] == half_ties(gold, against)
    margins = column(rows, "rewards/margins")
    assert measures["eval/rewards/accuracies"]["value"] == half_ties(margins, np.zeros(N))
    assert len(set(margins)) == N and len(set(gold)) > N / 2  # the cases above are not trivial


def test_margins_are_beta_times_the_difference_of_the_gaps(full, place):
    _, tables = full
    gap, reference = column(tables["0000"], "logps/gap"), tables["reference"]
    ref_gap = column(reference, "ref_chosen") - column(reference, "ref_rejected")
    assert column(tables["0000"], "rewards/margins") == pytest.approx(0.1 * (gap - ref_gap), abs=1e-9)
    _, doubled = measure(place, "beta", "--ref-model", place / "ref", "--beta", "0.2")
    found = column(doubled["0000"], "rewards/margins")
    assert found == pytest.approx(2 * column(tables["0000"], "rewards/margins"), rel=1e-6)


def held_out_rows(place: Path, data: str = "data.jsonl") -> tuple[list[dict], object]:
    tokenizer = make_tokenizer()
    return encode(load_rows(str(place / data), "all"), tokenizer, 96, 64), tokenizer


def log_prob(model, prompt: list[int], response: list[int]) -> float:
    """log pi of a response from transformers' logits of the one sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


def test_rows_agree_with_transformers_one_sequence_at_a_time(full, place):
    """NLL, gap, reward and gold score of each row from plain models, with no code of ours below the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    _, tables = full
    rows, _ = held_out_rows(place)
    policy = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    reward = AutoModelForSequenceClassification.from_pretrained(place / "reward").eval()
    gold = AutoModelForSequenceClassification.from_pretrained(place / "gold").eval()
    gold_tokenizer = AutoTokenizer.from_pretrained(place / "gold")
    assert len(gold_tokenizer) != len(make_tokenizer())
    for model in (reward, gold):  # with pad = eos transformers would skip the EOS that ends a response
        model.config.pad_token_id = None
    score = lambda model, ids: model(torch.tensor([ids])).logits.item()  # noqa: E731
    for i in (0, 4, 7):
        row, stored, reference = rows[i], tables["0000"][i], tables["reference"][i]
        assert row["row"] == stored["row"]
        chosen = log_prob(policy, row["prompt_ids"], row["response_ids"])
        assert stored["nll"] == pytest.approx(-chosen, abs=1e-3)
        rejected = log_prob(policy, row["prompt_ids"], reference["rejected_ids"])
        assert stored["logps/gap"] == pytest.approx(chosen - rejected, abs=1e-3)
        found = tables["reward_0000"][i]["chosen"]
        assert found == pytest.approx(score(reward, row["prompt_ids"] + row["response_ids"]), abs=1e-4)
        text = f"### Instruction: {row['prompt']}\n\n### Response: "
        ends = {"gold/demonstrations": row["response_text"], "gold/score": stored["sample"]}
        for name, answer in ends.items():
            cut = name == "gold/score" and stored["completions/clipped_ratio"]
            ids = [
                *gold_tokenizer(text)["input_ids"],
                *gold_tokenizer(answer)["input_ids"],
                *([] if cut else [gold_tokenizer.eos_token_id]),
            ]
            assert stored[name] == pytest.approx(score(gold, ids), abs=1e-4), name


def test_a_policy_against_itself(place):
    model = str(place / "model")
    flags = ["--ref-model", model, "--baseline", model, "--gold-reward-model", str(place / "gold")]
    result, tables = measure(place, "itself", *flags)
    found = {name: (m["value"], m["low"], m["high"]) for name, m in result["measures"].items()}
    for name in ("rewards/accuracies", "rewards/accuracies_shuffled", "gold/win_rate_base", "gold/win_rate_baseline"):
        assert found[f"eval/{name}"] == (0.5, 0.5, 0.5), name
    for name in ("kl_k1", "kl_k3", "rewards/margins"):
        assert found[f"eval/{name}"] == (0, 0, 0), name
    assert found["eval/gold/win_rate_demonstrations"][0] != 0.5
    assert [r["sample"] for r in tables["0000"]] == [r["base_sample"] for r in tables["reference"]]


def test_without_a_reference_its_measures_are_left_out_and_the_rest_is_the_same(full, place):
    with_reference, tables = full
    flags = everything(place)
    result, alone = measure(place, "alone", *flags[2:])
    absent = {n for n in evaluate.METRICS if "/rewards/" in n or "/kl_" in n} | {"eval/gold/win_rate_base"}
    assert set(result["measures"]) == set(with_reference["measures"]) - absent and len(absent) == 6
    samples = [r["sample"] for r in alone["0000"]]
    assert samples == [r["sample"] for r in tables["0000"]]
    for name in ("eval/nll", "eval/rouge_l", "eval/gold/score", "eval/gold/win_rate_baseline", "eval/reward/samples"):
        assert result["measures"][name] == pytest.approx(with_reference["measures"][name], abs=1e-6), name
    _, tokenizer = held_out_rows(place)
    rejected = [tokenizer.decode(r["rejected_ids"], skip_special_tokens=True).strip() for r in alone["reference"]]
    assert rejected == samples  # the policy's own, since the data have none
    assert column(alone["reward_0000"], "rejected").tolist() == column(alone["reward_0000"], "samples").tolist()


@pytest.mark.parametrize("with_reference", [True, False])
def test_nothing_is_computed_twice(place, monkeypatch, with_reference):
    """Sequences through policy and reference, samples, rewards and gold scores are as many as there are measures for."""
    counts = {}

    def counted(name, original, position):
        def wrapper(*args, **kwargs):
            counts[name] = counts.get(name, 0) + len(args[position])
            return original(*args, **kwargs)

        return wrapper

    for name, position in (("sequence_logprobs", 2), ("sample_rows", 2), ("sequence_scores", 2)):
        monkeypatch.setattr(evals, name, counted(name, getattr(evals, name), position))
    monkeypatch.setattr(gold.GoldReward, "score", counted("gold", gold.GoldReward.score, 1))
    flags = everything(place)[:6]
    measure(place, f"counted_{with_reference}", *(flags if with_reference else flags[2:]))
    if with_reference:  # chosen, rejected, shuffled and samples by both; samples of both
        assert counts == {"sequence_logprobs": 8 * N, "sample_rows": 2 * N, "sequence_scores": 4 * N, "gold": 3 * N}
    else:  # the samples are the rejected responses
        assert counts == {"sequence_logprobs": 3 * N, "sample_rows": N, "sequence_scores": 3 * N, "gold": 2 * N}


def test_preference_data_keep_their_own_rejected_responses(place):
    rows, _ = held_out_rows(place, "preferences.jsonl")
    assert all(r["rejected_text"].startswith("no ") for r in rows)
    for out, flags in (("pairs", ["--reward-model", place / "reward"]), ("pairs_ref", ["--ref-model", place / "ref"])):
        _, tables = measure(place, out, *flags, data="preferences.jsonl")
        assert [r["rejected_ids"] for r in tables["reference"]] == [r["rejected_ids"] for r in rows]
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    gap = [
        log_prob(policy, rows[5]["prompt_ids"], rows[5][name]) * sign for name, sign in (("response_ids", 1), ("rejected_ids", -1))
    ]  # fmt: skip
    assert tables["0000"][5]["logps/gap"] == pytest.approx(sum(gap), abs=1e-3)
    scores = read_pairs(place / "pairs" / "evals" / "reward_0000.parquet")
    assert np.abs(column(scores, "rejected") - column(scores, "samples")).min() > 0


def test_scores_do_not_depend_on_the_batch_size(full, place):
    _, tables = full
    _, small = measure(place, "small", *everything(place), "--per-device-eval-batch-size", "1")
    for file, rows in tables.items():
        for name, value in rows[0].items():
            found, expected = ([r[name] for r in table] for table in (small[file], rows))
            assert found == (pytest.approx(expected, abs=1e-4) if isinstance(value, float) else expected), (file, name)


# ---- what a run leaves ----
def test_the_figure_has_every_panel_and_each_is_drawn_in(full, place):
    from matplotlib.image import imread

    for out, panels in (("full", 4), ("beta", 2)):
        image = imread(place / out / "figure.png")[..., :3]
        assert image.shape[1] == pytest.approx(panels * 3.6 * 130, abs=2)
        blue = (image[..., 2] - image[..., 0]) > 0.15
        for part in np.array_split(blue, panels, axis=1):
            assert 0.0005 < part.mean() < 0.5  # axes and labels are black


def test_table_and_files_of_a_run(place, capsys):
    measure(place, "files", "--reward-model", place / "reward")
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "eval/reward/calibration_error" in line)
    assert "if calibrated" in line and "eval/nll" in out and ".." in out
    made = {str(p.relative_to(place / "files")) for p in (place / "files").rglob("*") if p.is_file()}
    assert made == {
        ".lock", "args.json", "evaluation.json", "figure.png", "metrics.jsonl", "timing.jsonl", "samples/0000.md",
        "evals/0000.parquet", "evals/reference.parquet", "evals/reward_0000.parquet",
    }  # fmt: skip
    assert {p.name for p in (place / "files").iterdir() if p.is_dir()} == {"evals", "samples"}
    logged = json.loads((place / "files" / "metrics.jsonl").read_text())
    measures = json.loads((place / "files" / "evaluation.json").read_text())["measures"]
    assert {k: v for k, v in logged.items() if k != "step"} == {k: m["value"] for k, m in measures.items()}


BAD = {  # name -> (flags, what the one line says, whether it is said before anything is written)
    "baseline alone": (["--baseline", "other"], "--baseline: found", "--gold-reward-model beside it", True),
    "beta": (["--beta", "0"], "--beta: found 0.0, expected a number above 0", "", True),
    "gold without head": (["--gold-reward-model", "base"], "found no weights for score.weight", "scalar head", True),
    "gold of two labels": (["--gold-reward-model", "two_labels"], "several labels, expected one label", "", True),
    "gold missing": (["--gold-reward-model", "nowhere"], "--gold-reward-model", "found no local folder", True),
    "baseline missing": (
        ["--gold-reward-model", "gold", "--baseline", "nowhere"], "--baseline", "found no local folder", True,
    ),
    "reward without head": (["--reward-model", "base"], "--reward-model", "found no weights for score.weight", True),
    "reward of two labels": (["--reward-model", "two_labels"], "--reward-model", "several labels", True),
    "reward of another tokenizer": (["--reward-model", "gold"], "--reward-model", "a tokenizer of 270 tokens", True),
    "reference of another tokenizer": (["--ref-model", "gold_base"], "--ref-model", "a tokenizer of 270 tokens", True),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_clear_line(place, capsys, name):
    flags, first, second, before = BAD[name]
    named = [word if word.startswith("--") or word == "0" else str(place / word) for word in flags]
    out = "bad_" + name.replace(" ", "_")
    with pytest.raises(SystemExit) as stop:
        measure(place, out, *named)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and first in errors[0] and second in errors[0], errors
    assert before != (place / out).exists()


def test_a_folder_in_use_is_refused_without_a_word_of_resuming(full, place, capsys):
    before = (place / "full" / "evaluation.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        measure(place, "full")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "already holds files; expected a new or empty folder" in message
    assert "resume" not in message and (place / "full" / "evaluation.json").read_bytes() == before


def test_the_command_as_typed(place):
    done = run([sys.executable, *words(place, "typed", "--beta", "-1")], check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "--beta: found -1.0" in line]


def test_two_processes_measure_what_one_does(full, place):
    result, tables = full
    run([sys.executable, *words(place, "two", *everything(place))], ranks=2)
    found = json.loads((place / "two" / "evaluation.json").read_text())["measures"]
    for name, m in result["measures"].items():
        assert found[name] == pytest.approx(m, abs=1e-4), name
    samples = read_pairs(place / "two" / "evals" / "0000.parquet")
    assert [r["sample"] for r in samples] == [r["sample"] for r in tables["0000"]]


# ---- names ----
def test_a_model_of_a_run_takes_the_settings_of_the_model_it_came_from(tmp_path):
    (tmp_path / "final").mkdir()
    args = evaluate.Args(model=str(tmp_path / "final"))
    assert resolve_auto(args, evaluate.SETTINGS) == "other"
    (tmp_path / "args.json").write_text(json.dumps({"args": {"model": "somewhere/tiny"}}))
    args = evaluate.Args(model=str(tmp_path / "final"))
    assert resolve_auto(args, evaluate.SETTINGS) == "tiny" and (args.dataset, args.max_length) == ("pydoc", 256)
    (tmp_path / "args.json").write_text("[]")  # some other program's
    assert resolve_auto(evaluate.Args(model=str(tmp_path / "final")), evaluate.SETTINGS) == "other"


def test_a_pad_token_more_is_the_same_tokenizer_and_anything_else_is_not(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    make_model(tmp_path / "policy", vocab_size=310)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    args = evaluate.Args(model=str(tmp_path / "policy"), max_length=96)
    for name, grow in (("reward", tokenizers.pad_for_readers), ("more", lambda _, t: t.add_tokens(["other"]))):
        shutil.copytree(tmp_path / "policy", tmp_path / name)
        changed = AutoTokenizer.from_pretrained(tmp_path / name)
        grow(AutoConfig.from_pretrained(tmp_path / name), changed)
        changed.save_pretrained(tmp_path / name)
        assert len(changed) == len(tokenizer) + 1
    check_same_tokenizer(args, tokenizer, str(tmp_path / "reward"), "--reward-model")
    with pytest.raises(UserError, match="--reward-model .*more: found a tokenizer"):
        check_same_tokenizer(args, tokenizer, str(tmp_path / "more"), "--reward-model")


# ---- statistics ----
def test_calibration_of_known_margins():
    rng = np.random.default_rng(0)
    size = rng.exponential(2.0, 40_000)
    right = rng.random(len(size)) < 1 / (1 + np.exp(-size))
    error, table = statistics.calibration(np.where(right, size, -size))
    assert error < 0.01 and len(table) == 10 and sum(n for *_, n in table) == len(size)
    assert all(abs(confidence - accuracy) < 0.04 for confidence, accuracy, _ in table)
    assert statistics.calibration(np.where(right, size, -size) * 3)[0] > 0.05  # overconfident
    error, table = statistics.calibration(np.full(50, -12.0))  # always wrong and sure of it
    assert error == pytest.approx(1, abs=1e-4) and [(a, n) for _, a, n in table] == [(0.0, 50)]
    assert statistics.calibration(np.zeros(7)) == (0.0, [(0.5, 0.5, 7)])  # ties: no claim, no error
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    margins = logit(0.72) * np.array([1, 1, 1, -1]), logit(0.93) * np.array([1, -1])
    error, table = statistics.calibration(np.concatenate(margins))
    assert table == [(pytest.approx(0.72), 0.75, 4), (pytest.approx(0.93), 0.5, 2)]
    assert error == pytest.approx((0.03 * 4 + 0.43 * 2) / 6)


def test_the_range_of_a_calibrated_reward_holds_95_of_100_calibrated_rewards():
    rng = np.random.default_rng(1)
    size = rng.exponential(1.5, 150)
    low, high = statistics.calibrated_range(size, draws=1000)
    drawn = [
        statistics.calibration(np.where(rng.random(len(size)) < 1 / (1 + np.exp(-size)), size, -size))[0]
        for _ in range(400)
    ]
    assert 0 < low < high and 0.91 < np.mean([low <= d <= high for d in drawn]) < 0.99
    assert statistics.calibration(-size)[0] > high


def test_bootstrap_intervals_have_the_width_of_the_standard_error():
    rng = np.random.default_rng(2)
    values = rng.normal(3.0, 2.0, 400)
    low, high = statistics.bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.04)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)
    assert statistics.bootstrap_interval(values) == (low, high)
    narrow = statistics.bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert statistics.bootstrap_interval(np.full(9, 0.5)) == (0.5, 0.5)
    covered = []
    for _ in range(150):
        sample = rng.normal(0.0, 1.0, 60)
        low, high = statistics.bootstrap_interval(sample, draws=400)
        covered.append(low <= 0 <= high)
    assert 0.88 < np.mean(covered) <= 1


def test_ties_are_half_a_win():
    assert evals.pairwise_wins(np.array([1.0, 2.0, 2.0, -1.0]), np.array([0.0, 2.0, 3.0, -1.0])).tolist() == [
        1,
        0.5,
        0,
        0.5,
    ]


# ---- gold rewards ----
def test_the_prompt_format_of_beaver():
    tokenizer = make_tokenizer()
    turns = ["hi {there}", "hello", "more"]
    prompt = [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(turns)]
    expected = "BEGINNING OF CONVERSATION: USER: hi {there} ASSISTANT:hello</s>USER: more ASSISTANT:"
    assert gold.render_gold("models/beaver-7b-v3.0-reward", tokenizer, prompt) == expected
    assert gold.render_gold("beaver-7b", tokenizer, "q") == "BEGINNING OF CONVERSATION: USER: q ASSISTANT:"
    assert gold.render_gold("models/other", tokenizer, "q") == "### Instruction: q\n\n### Response: "


def test_a_long_prompt_loses_its_beginning_not_the_response(place):
    args = evaluate.Args(gold_reward_model=str(place / "gold"))
    config = models.load_config(str(place / "gold"))
    rows = [{"prompt": "a long one " * 60}, {"prompt": "short"}]
    (long, answer), (short, _) = gold.gold_sequences(args, rows, ["yes", "no"], [True, True], config)
    whole, _ = gold.gold_sequences(args, rows[:1], ["yes"], [True], type(config)(max_position_embeddings=10_000))[0]
    assert len(long) + len(answer) == config.max_position_embeddings < len(whole)
    assert long == whole[-len(long) :] and len(short) < len(long)
    tokenizer = make_tokenizer(270)
    assert answer == [*tokenizer("yes")["input_ids"], tokenizer.eos_token_id]


def test_a_sample_that_was_cut_gets_no_end_from_the_gold_reward(place):
    args, tokenizer = evaluate.Args(gold_reward_model=str(place / "gold")), make_tokenizer(270)
    config = models.load_config(str(place / "gold"))
    found = gold.gold_sequences(args, [{"prompt": "q"}] * 3, ["yes", "yes", ""], [True, False, False], config)
    yes, end = tokenizer("yes")["input_ids"], tokenizer.eos_token_id
    assert [answer for _, answer in found] == [[*yes, end], yes, [end]]  # something must be there to score


def test_responses_that_were_cut_are_read_again_without_an_end(tmp_path):
    """Every way in which a file of ours says so: generations/*.parquet, preferences.jsonl, selected.parquet."""
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    pair, one = {"prompt": "p", "chosen": "return", "rejected": "read"}, {"prompt": "p", "completion": "read"}
    for raw, kind, without in (
        ({**pair, "finished": False}, "demonstrations", {"rejected"}),
        ({**pair, "finished": True, "chosen_finished": False}, "demonstrations", {"response"}),
        ({**pair, "chosen_finished": False, "rejected_finished": False}, "preferences", {"response", "rejected"}),
        ({**pair, "chosen_finished": True, "rejected_finished": True}, "preferences", set()),
        ({**one, "finished": False}, "demonstrations", {"response"}),
        ({**one, "finished": "yesterday"}, "demonstrations", set()),
        (one, "demonstrations", set()),
    ):
        file = jsonl(tmp_path / "data.jsonl", [raw])
        (row,) = encode(load_rows(file, "all", kind), tokenizer, 96, 64)
        found = {name for name in ("response", "rejected") if f"{name}_ids" in row and row[f"{name}_ids"][-1] != end}
        assert found == without, raw
        assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == raw.get("chosen", "read")


# ---- what the models at hand were trained on ----
@pytest.fixture
def trained_runs(place, tmp_path, monkeypatch):
    """A function (name, model, rows) that makes the folder of a run on these rows, with a model in it."""
    handler = signal.getsignal(signal.SIGTERM)

    def make(name: str, model: str, *rows: list[dict]) -> Path:
        run_ = Run(RunArgs(model=model, output_dir=str(tmp_path / name), mixed_precision="no"), "test", {})
        records.record_prompts(run_, None, *rows)
        shutil.copytree(place / "model", run_.dir / "final")
        return run_.dir / "final"

    yield make
    signal.signal(signal.SIGTERM, handler)


def said(recwarn, args, tokenizer) -> list[str]:
    recwarn.clear()
    demos.load_held_out(args, tokenizer, [])
    return [str(w.message) for w in recwarn]


def held_out_args(place: Path, **more) -> evaluate.Args:
    sizes = dict(eval_samples=N, max_length=96, max_prompt_length=64, max_new_tokens=8)
    return evaluate.Args(eval_dataset=str(place / "data.jsonl"), dataset=str(place / "data.jsonl"), **sizes, **more)


def test_held_out_prompts_that_a_model_or_one_before_it_was_trained_on_are_counted(place, trained_runs, recwarn):
    rows, tokenizer = held_out_rows(place)
    others = encode([{"row": 0, "prompt": "another", "response": "a"}], tokenizer, 96, 64)
    first = trained_runs("first", str(place / "model"), rows[:5])
    second = trained_runs("second", str(first), others, rows[4:7])  # 4 is in both: 7 of 12 in all
    third = trained_runs("third", str(second), others)
    whole = f"--eval-dataset: found %d of {N} held-out prompts among those that --model {{}} was trained on,"
    for model, count in ((first, 5), (second, 7), (third, 7)):
        assert said(recwarn, held_out_args(place, model=str(model)), tokenizer) == [
            f"{whole.format(model) % count} by its run or by one before it"
        ]
    assert (
        said(recwarn, held_out_args(place, model=str(trained_runs("apart", str(place / "model"), others))), tokenizer)
        == []
    )
    assert said(recwarn, held_out_args(place, model=str(place / "model")), tokenizer) == []  # lies in no run folder
    found = said(
        recwarn, held_out_args(place, ref_model=str(first), reward_model=str(second), model=str(third)), tokenizer
    )
    assert [line.partition("that ")[2].split()[0] for line in found] == ["--model", "--ref-model", "--reward-model"]


def test_prompts_are_known_again_under_another_template_and_after_a_cut(place):
    from helpers import ZEPHYR_TEMPLATE

    plain, chat = make_tokenizer(), make_tokenizer(chat_template=ZEPHYR_TEMPLATE)
    row = {"row": 0, "prompt": "Return  the list\n", "response": "a"}
    asked = [{**row, "prompt": [{"role": "user", "content": "return the list"}]}]
    (one,), (other,) = encode([row], plain, 96, 64), encode(asked, chat, 96, 64)
    assert one["prompt_text"] != other["prompt_text"] and records.prompt_keys(one) & records.prompt_keys(other)
    cut = [{"prompt": f"a post and its {end}", "prompt_text": "a post"} for end in ("one end", "other end")]
    assert records.prompt_keys(cut[0]) & records.prompt_keys(cut[1])
    assert not records.prompt_keys(one) & records.prompt_keys({"prompt": "return the lists"})


def test_a_run_without_a_record_and_runs_that_come_from_each_other(place, trained_runs, recwarn):
    rows, tokenizer = held_out_rows(place)
    first = trained_runs("first", str(place / "model"), rows[:5])
    second = trained_runs("second", str(first), rows[:1])
    settings = json.loads((first.parent / "args.json").read_text())
    (first.parent / "args.json").write_text(
        json.dumps({**settings, "args": {**settings["args"], "model": str(second)}})
    )
    assert len(said(recwarn, held_out_args(place, model=str(second)), tokenizer)) == 1
    (first.parent / records.TRAINED).unlink()
    counted, unknown = said(recwarn, held_out_args(place, model=str(second)), tokenizer)
    assert counted.startswith(f"--eval-dataset: found 1 of {N}")
    assert unknown.startswith(
        f"--eval-dataset: found no trained_prompts.parquet in {first.parent}: held-out prompts may"
    )


def test_the_embedded_model_was_trained_on_pydocs_training_rows(monkeypatch):
    train = [{"prompt": "seen", "response": "a"}]
    monkeypatch.setattr(records, "load_rows", lambda name, split: {("pydoc", "train"): train}[name, split])
    assert records.trained_before("tiny") == (records.prompt_keys(train[0]), [])


@pytest.fixture
def selecting(place, tmp_path, monkeypatch):
    """(a function that opens a run with --select-top-k, demonstrations), with a cache folder and a gold model to change."""
    monkeypatch.setenv("CLEANIRL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(place / "gold", tmp_path / "gold")
    demonstrations, _ = held_out_rows(place)
    handler = signal.getsignal(signal.SIGTERM)

    def open_run(name: str, k: int = 4):
        args = RunArgs(
            select_top_k=k, gold_reward_model=str(tmp_path / "gold"), per_device_eval_batch_size=5,
            output_dir=str(tmp_path / name), mixed_precision="no",
        )  # fmt: skip
        return Run(args, "test", {})

    yield open_run, demonstrations
    signal.signal(signal.SIGTERM, handler)


def texts(demonstrations: list[dict]) -> list[str]:
    return [d["response_text"] for d in demonstrations]


def refuse(*_):
    raise AssertionError("the gold model was loaded")


def test_selection_keeps_the_highest_and_ties_go_to_the_earlier_row(selecting, monkeypatch):
    open_run, demonstrations = selecting
    scores = [1.0, 5.0, 2.0, 2.0, 7.0, 2.0, 0.0, 2.0, -1.0, 1.0, 2.0, 0.5]
    monkeypatch.setattr(gold, "cached_gold_scores", lambda *_: scores)
    one = open_run("a")
    demonstrations[2]["response_finished"] = False  # an answer of --expert-model that was cut
    kept = demos.select_demonstrations(one, demonstrations)
    assert [demonstrations.index(d) for d in kept] == [1, 2, 3, 4]  # 5.0, 7.0 and the first two of five 2.0
    stored = read_pairs(one.dir / "generations" / "selected.parquet")
    assert [r["gold_score"] for r in stored] == [5.0, 2.0, 2.0, 7.0]
    assert [r["row"] for r in stored] == [d["row"] for d in kept]
    assert [r["completion"] for r in stored] == texts(kept)
    assert [r["finished"] for r in stored] == [True, False, True, True]
    monkeypatch.setattr(gold, "cached_gold_scores", refuse)
    assert demos.select_demonstrations(one, demonstrations) == kept  # a resumed run reads what it kept
    assert demos.select_demonstrations(open_run("b", k=0), demonstrations) == demonstrations


def test_scores_are_kept_for_other_runs_until_the_gold_model_changes(selecting, monkeypatch, tmp_path):
    from transformers import AutoModelForSequenceClassification

    open_run, demonstrations = selecting
    first = open_run("a")
    kept = demos.select_demonstrations(first, demonstrations)
    plain = gold.GoldReward(first).score(demonstrations, texts(demonstrations), [True] * N)
    assert {d["row"] for d in kept} == {demonstrations[i]["row"] for i in np.argsort(plain)[-4:]}
    with monkeypatch.context() as patched:
        patched.setattr(gold, "GoldReward", refuse)
        assert demos.select_demonstrations(open_run("b"), demonstrations) == kept
        with pytest.raises(AssertionError, match="was loaded"):  # a row that was never scored
            gold.cached_gold_scores(first, demonstrations[:1], ["something else"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "gold")
    with torch.no_grad():
        model.score.weight.neg_()
    model.save_pretrained(tmp_path / "gold")
    changed = gold.cached_gold_scores(open_run("c"), demonstrations, texts(demonstrations))
    assert changed == pytest.approx([-s for s in plain], abs=1e-5)
    cut = [
        {**d, "response_finished": False} for d in demonstrations
    ]  # other tokens: another score, with a key of its own
    found = gold.cached_gold_scores(open_run("d"), cut, texts(cut))
    assert min(abs(a - b) for a, b in zip(found, changed, strict=True)) > 1e-4


def test_an_interrupted_scoring_keeps_its_finished_blocks(selecting, monkeypatch):
    open_run, demonstrations = selecting
    one, original, scored = open_run("a"), gold.GoldReward.score, []

    def stops_in_the_third_block(self, rows, responses, finished, advance):
        if len(scored) == 10:
            raise KeyboardInterrupt
        scored.extend(r["row"] for r in rows)
        return original(self, rows, responses, finished, advance)

    monkeypatch.setattr(gold.GoldReward, "score", stops_in_the_third_block)
    with pytest.raises(KeyboardInterrupt):
        gold.cached_gold_scores(one, demonstrations, texts(demonstrations), block=5)
    monkeypatch.setattr(gold.GoldReward, "score", original)
    later = []
    monkeypatch.setattr(
        gold.GoldReward, "score", lambda self, rows, *rest: later.extend(r["row"] for r in rows) or original(self, rows, *rest)
    )  # fmt: skip
    found = gold.cached_gold_scores(one, demonstrations, texts(demonstrations), block=5)
    assert len(scored) == 10 and sorted(scored + later) == sorted(d["row"] for d in demonstrations)
    monkeypatch.setattr(gold.GoldReward, "score", original)
    direct = gold.GoldReward(one).score(demonstrations, texts(demonstrations), [True] * N)
    assert found == pytest.approx(direct, abs=1e-5)


# ---- rewards on labelled pairs ----
def labelled_rows() -> list[dict]:
    """Seven pairs of two subsets; the prompt of the first is too long for the window, and the third has as many tokens in both."""
    texts = [
        ("so", "so it is"),
        ("yes", "yes it is so"),
        ("a b", "b a"),
        ("no no no no", "no"),
        ("on", "on and on"),
        ("up", "up it"),
        ("in it", "in"),
    ]
    prompts = ["x" * 400, *(f"question {i}" for i in range(1, 7))]
    subsets = ["easy", "hard", "easy", "hard", "easy", "easy", "hard"]
    rows = zip(prompts, texts, subsets, strict=True)
    return [{"id": i, "prompt": p, "chosen": c, "rejected": r, "subset": s} for i, (p, (c, r), s) in enumerate(rows)]


def measure_pairs(place: Path, out: str, rows: list[dict], *flags: str) -> tuple[dict, list[dict]]:
    file = jsonl(place / f"{out}.jsonl", rows)
    with as_typed(words(place, out, "--reward-pairs", file, *flags)):
        main(lambda: evaluate.evaluate(parse_args(evaluate.Args, evaluate.__doc__, evaluate.SETTINGS)))
    return json.loads((place / out / "reward_pairs.json").read_text()), read_pairs(
        place / out / "evals" / "reward_pairs.parquet"
    )


@pytest.fixture(scope="module")
def labelled(place):
    return measure_pairs(
        place, "labelled", labelled_rows(), "--ref-model", place / "ref", "--reward-model", place / "reward"
    )


def test_scores_of_pairs_are_those_of_transformers_one_sequence_at_a_time(labelled, place):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    result, stored = labelled
    assert [r["row"] for r in stored] == [1, 2, 3, 4, 5, 6]
    assert [r["subset"] for r in stored] == ["hard", "easy", "hard", "easy", "easy", "hard"]
    policy, ref = (AutoModelForCausalLM.from_pretrained(place / name).eval() for name in ("model", "ref"))
    reward = AutoModelForSequenceClassification.from_pretrained(place / "reward").eval()
    reward.config.pad_token_id = None  # else it would skip the EOS that ends a response
    tokenizer = make_tokenizer()
    for r in stored:
        row = labelled_rows()[r["row"]]
        prompt = tokenizer(f"### Instruction: {row['prompt']}\n\n### Response: ")["input_ids"]
        for kind in ("chosen", "rejected"):
            ids = [*tokenizer(row[kind])["input_ids"], tokenizer.eos_token_id]
            log_pi, log_ref = log_prob(policy, prompt, ids), log_prob(ref, prompt, ids)
            assert r[f"log_prob_{kind}"] == pytest.approx(log_pi, abs=1e-3)
            assert r[f"implicit_{kind}"] == pytest.approx(0.1 * (log_pi - log_ref), abs=1e-4)
            with torch.no_grad():
                assert r[f"learned_{kind}"] == pytest.approx(
                    reward(torch.tensor([prompt + ids])).logits.item(), abs=1e-4
                )
            assert r[f"shorter_{kind}"] == -len(ids)
    for name in reward_pairs.REWARDS:
        wins = [half_ties([r[f"{name}_chosen"]], [r[f"{name}_rejected"]]) for r in stored]
        assert result["accuracy"][name]["all pairs"]["value"] == pytest.approx(np.mean(wins))


def test_accuracy_by_subset_of_a_reward_that_is_known(labelled):
    """Shorter is better: the pairs of `easy` are a tie and two wins, of `hard` a win and two losses."""
    found = labelled[0]["accuracy"]["shorter"]
    assert {name: (e["value"], e["pairs"]) for name, e in found.items()} == {
        "hard": (pytest.approx(1 / 3), 3), "easy": (pytest.approx(2.5 / 3), 3),
        "mean over subsets": (pytest.approx(3.5 / 6), 6), "all pairs": (pytest.approx(3.5 / 6), 6),
    }  # fmt: skip


def test_intervals_are_drawn_within_subsets_and_the_mean_weighs_them_alike():
    wins = np.array([1.0, 0.0, 1.0, 0.5, 1.0, 1.0])
    found = reward_pairs.accuracies(wins, ["a", "a", "b", "a", "a", "a"])
    assert (found["a"]["value"], found["b"]["value"]) == (0.7, 1.0) and (found["a"]["pairs"], found["b"]["pairs"]) == (
        5,
        1,
    )
    assert found["mean over subsets"]["value"] == 0.85 and found["all pairs"]["value"] == pytest.approx(4.5 / 6)
    for end in ("low", "high"):  # b has one pair, which is right in every draw
        assert found["b"][end] == 1
        assert found["mean over subsets"][end] == pytest.approx((found["a"][end] + 1) / 2)
        assert found["all pairs"][end] == pytest.approx((5 * found["a"][end] + 1) / 6)
    assert found["a"]["low"] < 0.5 < 0.9 < found["a"]["high"]
    many = np.random.default_rng(0).random(400) < 0.6
    wide = reward_pairs.accuracies(many.astype(float), ["a"] * 400)["a"]
    assert wide["high"] - wide["low"] == pytest.approx(2 * 1.96 * many.std() / 20, rel=0.08)


def test_a_reward_on_pairs_turned_round_has_the_other_accuracy(labelled, place):
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in labelled_rows()]
    for row in turned:
        del row["subset"]
    flags = ("--ref-model", place / "ref", "--reward-model", place / "reward", "--beta", "0.3")
    found, _ = measure_pairs(place, "turned", turned, *flags)
    for name, table in found["accuracy"].items():
        assert set(table) == {"all", "mean over subsets", "all pairs"}
        assert table["all"]["value"] == pytest.approx(1 - labelled[0]["accuracy"][name]["all pairs"]["value"]), name


def test_a_policy_without_a_reference_has_no_implicit_reward_and_one_equal_to_it_has_ties(place, capsys):
    alone, _ = measure_pairs(place, "pairs_alone", labelled_rows())
    assert list(alone["accuracy"]) == ["log_prob", "shorter"] and "all pairs" in capsys.readouterr().out
    itself, _ = measure_pairs(place, "pairs_itself", labelled_rows(), "--ref-model", place / "model")
    assert all(e["value"] == e["low"] == e["high"] == 0.5 for e in itself["accuracy"]["implicit"].values())


# ---- results of lm-eval ----
def lm_eval_results(**changes) -> dict:
    """The parts of a result file of lm-eval 0.4.13 that are read."""
    return {
        "results": {
            "truthfulqa_mc2_local": {"alias": "t", "acc,none": 0.4, "acc_stderr,none": 0.0123},
            "gsm8k": {
                "alias": "g", "exact_match,strict-match": 0.015, "exact_match_stderr,strict-match": 0.003,
                "exact_match,flexible-extract": 0.02, "exact_match_stderr,flexible-extract": 0.004,
            },
            "arc_challenge": {"alias": "a", "acc,none": 0.2, "acc_norm,none": 0.25, "acc_stderr,none": 0.1, "acc_norm_stderr,none": "N/A"},
            "other": {"alias": "o", "acc,none": 0.5, "acc_stderr,none": 0.05, "f1,none": 0.6, "f1_stderr,none": 0.06},
        },
        "n-shot": {"truthfulqa_mc2_local": 0, "gsm8k": 5, "arc_challenge": 0, "other": 3},
        "n-samples": {"truthfulqa_mc2_local": {"original": 817, "effective": 817}, "gsm8k": {"original": 1319, "effective": 100}},
        "model_name": "runs/x/final",
    } | changes  # fmt: skip


def tabulated(folder: Path, *words: str) -> str:
    with as_typed(["evaluate.py", "--lm-eval", *words, "--output-dir", str(folder)]):
        main(lambda: evaluate.evaluate(parse_args(evaluate.Args, evaluate.__doc__, evaluate.SETTINGS)))
    return (folder / "lm_eval.md").read_text()


def test_the_table_of_lm_eval_has_the_papers_metrics_and_tells_other_shots(tmp_path):
    for name, value, time in (("b", 0.1, "01"), ("b", 0.3, "02")):  # an older and a newer result of one model
        (tmp_path / "out" / name).mkdir(parents=True, exist_ok=True)
        results = {"gsm8k_local": {"exact_match,strict-match": value, "exact_match_stderr,strict-match": 0.0}}
        file = tmp_path / "out" / name / f"results_2026-01-{time}T00-00-00.json"
        file.write_text(json.dumps(lm_eval_results(results=results, model_name="base")))
    (tmp_path / "one.json").write_text(json.dumps(lm_eval_results()))
    text = tabulated(tmp_path / "table", str(tmp_path / "one.json"), str(tmp_path / "out"))
    assert text.splitlines()[2:] == [
        "| base | gsm8k_local | exact_match, strict-match |  |  | 30.00 ± 0.00 |",
        "| runs/x/final | truthfulqa_mc2_local | acc | 0 | 817 | 40.00 ± 1.23 |",
        "| runs/x/final | gsm8k | exact_match, strict-match | 5 | 100 | 1.50 ± 0.30 |",
        "| runs/x/final | arc_challenge | acc_norm | 0 (usual: 25) |  | 25.00 |",
        "| runs/x/final | other | acc | 3 |  | 50.00 ± 5.00 |",
        "| runs/x/final | other | f1 | 3 |  | 60.00 ± 6.00 |",
    ]
    rows = json.loads((tmp_path / "table" / "lm_eval.json").read_text())["rows"]
    assert [r["value"] for r in rows] == [0.3, 0.4, 0.015, 0.25, 0.5, 0.6] and rows[3]["stderr"] is None
    assert set(lm_eval_table.SHOTS) == set(lm_eval_table.METRICS)


OTHER_JOBS = {  # name -> (flags, what the one line says)
    "no such pairs": (["--reward-pairs", "nowhere.jsonl"], "--reward-pairs: found no file nowhere.jsonl"),
    "two jobs": (
        ["--reward-pairs", "a.jsonl", "--mt-bench", "b.jsonl"],
        "found --reward-pairs and --mt-bench, expected one",
    ),
    "no judge": (["--mt-bench", "b.jsonl"], "--mt-bench: found b.jsonl, expected --judge-model beside it"),
    "no results": (["--lm-eval", "nowhere"], "--lm-eval: found no results_*.json at nowhere"),
    "no result file": (["--lm-eval", "{place}/preferences.jsonl"], "expected a result file of lm-eval 0.4"),
    "demonstrations": (["--reward-pairs", "{place}/data.jsonl"], "expected a preference: prompt/chosen/rejected"),
}


@pytest.mark.parametrize("name", OTHER_JOBS)
def test_bad_input_of_the_other_jobs_ends_with_one_clear_line(place, capsys, name):
    given, expected = OTHER_JOBS[name]
    with pytest.raises(SystemExit) as stop:
        measure(place, f"bad_{name.replace(' ', '_')}", *(word.format(place=place) for word in given))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and expected in errors[0], errors
