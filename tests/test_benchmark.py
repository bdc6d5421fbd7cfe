"""The benchmarks' own parts: a gold reward with its data, preferences drawn from it, and the tables of the AIHF and IRL comparisons."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, jsonl, make_classifier, make_model, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.store import read_pairs, write_pairs
from extras.statistics import bootstrap_interval

sys.path.append(str(ROOT / "benchmark"))
import aihf_table
import compare
import families
import fig2
import gold
import irl_table
import phases
import scale
import tables

SMALL = "--max-length 96 --max-new-tokens 8 --per-device-eval-batch-size 16 --mixed-precision no".split()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(folder, rows: list[dict], kind: str) -> np.ndarray:
    """The classifier's output on prompt and response, with EOS if it is finished, a row at a time, by plain transformers."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = None  # else its own search takes EOS, the last token, for padding
    found = []
    for r in rows:
        parts = f"### Instruction: {r['prompt']}\n\n### Response: ", r[kind]
        ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            end = [tokenizer.eos_token_id] if r[f"{kind}_finished"] or not r[kind] else []
            found.append(model(torch.tensor([[*ids, *end]])).logits.item())
    return np.array(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    make_model(folder / "model")
    make_classifier(folder / "gold", folder / "model")
    weights = load_file(folder / "gold" / "model.safetensors")
    weights["score.weight"] *= 0.3  # differences of a few units: labels that are neither coin flips nor certain
    save_file(weights, folder / "gold" / "model.safetensors", metadata={"format": "pt"})
    rows = package_rows(80)
    jsonl(folder / "data.jsonl", rows)
    jsonl(folder / "cut.jsonl", [{**r, "prompt": r["prompt"].partition("\n")[0]} for r in rows])
    return folder


def package_rows(n: int) -> list[dict]:
    """n families of three rows: two prompts that differ only beyond what gold.py keeps of them, and one with a word more."""
    words = "return the number of items in list open file and read it".split()
    stream, rows = np.random.default_rng(0), []
    for i in range(n):
        head = " ".join(stream.choice(words, 8))
        for prompt in (
            f"{head}\n{'x' * 160} library {i}",
            f"{head}\n{'x' * 160} headers {i}",
            f"one {head}\n{'x' * 160}",
        ):
            rows.append({"prompt": prompt, "completion": f"{head.split()[0]} {len(rows)}."})
    return rows


def head_of(prompt: str) -> str:
    return prompt.partition("\n")[0].removeprefix("one ")


def test_families_are_texts_that_share_half_of_their_runs_of_words():
    texts = [
        "libfoo1 is a fast library for parsing of XML files, version 1.2",
        "libfoo2 is a FAST library for parsing of\nXML files, version 2.0",
        "libfoo is a fast library for parsing of XML files (headers)",
        "an entirely different thing that draws pictures",
        "short",
        "short",
        "1 + 1",
    ]
    names = families.family_names(texts)
    assert [names.index(n) for n in names] == [0, 0, 0, 3, 4, 4, 6] and set(names) <= set(texts)
    chain = ["a b c d e f", "a b c d e z", "z b c d e z", "k l m n"]  # the second alone joins the third to the first
    runs = [families.word_runs(t) for t in chain]
    assert [len(runs[0] & r) / len(runs[0] | r) for r in runs] == [1, 3 / 5, 2 / 6, 0]
    assert len(set(families.family_names(chain))) == 2 and len(set(families.family_names(chain[::2]))) == 2


def test_families_are_found_as_by_comparing_every_two_texts():
    stream = np.random.default_rng(0)
    texts = [" ".join(stream.choice(list("abcd"), stream.integers(1, 9))) for _ in range(150)]
    runs = [families.word_runs(t) for t in texts]
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(runs[i] & runs[j]) / len(runs[i] | runs[j]) >= 0.5:
                group = [group[j] if g == group[i] else g for g in group]
    names = families.family_names(texts)
    assert len(set(group)) > 10 and [group.index(g) for g in group] == [names.index(n) for n in names]


def test_every_row_is_paired_once_with_another_one():
    rows = [{"prompt_ids": [i], "response_ids": [10 + i]} for i in range(7)]
    pairs = gold.with_others(rows, 1, 0)
    assert sorted(p["prompt_ids"][0] for p in pairs) == list(range(7))
    assert sorted(p["rejected_ids"][0] for p in pairs) == list(range(10, 17))
    assert all(p["chosen_ids"] == [10 + p["prompt_ids"][0]] != p["rejected_ids"] for p in pairs)
    assert pairs != gold.with_others(rows, 1, 1)


@pytest.fixture(scope="module")
def trained(place):
    """gold.py with a sampler, two epochs; and its split alone."""
    words = [
        sys.executable,
        "benchmark/gold.py",
        "--dataset",
        str(place / "data.jsonl"),
        "--model",
        str(place / "model"),
    ]
    words += [*SMALL, "--batch-size", "8", "--per-device-train-batch-size", "8"]
    run([*words, "--split-only", "--output-dir", str(place / "split")])
    flags = ["--sampler", str(place / "model"), "--num-train-epochs", "2", "--output-dir", str(place / "out")]
    run([*words, *flags])
    return place / "out"


def test_gold_reward_policies_and_held_out_rows_share_no_family(trained, place):
    given, held = lines(trained / "demonstrations.jsonl"), lines(trained / "held_out.jsonl")
    train, test, dropped = gold.split_rows(gold.Args(dataset=str(place / "data.jsonl")))
    labelled = [r for r in train if gold.for_gold(r)]
    assert len(train) + len(test) + dropped == 240 and len(given) == len(train) - len(labelled)
    assert [r["prompt"] for r in held] == [r["prompt"] for r in test]
    heads = [{head_of(r["prompt"]) for r in rows} for rows in (given, labelled, held)]
    assert all(heads) and len(set.union(*heads)) == sum(map(len, heads))  # nothing is in two of them
    assert len(heads[0]) < len(given) and 0 < dropped < 240 / 4
    for name in ("demonstrations", "held_out"):
        assert (trained / f"{name}.jsonl").read_bytes() == (place / "split" / f"{name}.jsonl").read_bytes()
    assert not (place / "split" / "final").exists()


def test_gold_reward_learns_both_kinds_of_pairs(trained):
    rows = lines(trained / "metrics.jsonl")
    unseen = [r for r in rows if "eval/accuracy" in r]
    assert len(unseen) == 2 and all(0 <= r["eval/accuracy_samples"] <= 1 for r in unseen)
    losses = [r["loss"] for r in rows if "loss" in r]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert AutoModelForSequenceClassification.from_pretrained(trained / "final").config.num_labels == 1


def test_preferences_follow_bradley_terry_with_the_gold_reward(place):
    """Labels are drawn with probability sigmoid of the difference, from the named stream; no prompt is demonstrated too."""
    words = [sys.executable, "benchmark/preferences.py", "--model", str(place / "model"), "--gold-reward-model"]
    words += [str(place / "gold"), "--dataset", str(place / "cut.jsonl"), *SMALL, "--max-preferences", "60"]
    run([*words, "--output-dir", str(place / "preferences")])
    pairs, given = (lines(place / "preferences" / f"{name}.jsonl") for name in ("preferences", "demonstrations"))
    assert len(pairs) == 60 and not {head_of(p["prompt"]) for p in pairs} & {head_of(r["prompt"]) for r in given}
    margin = scores(place / "gold", pairs, "chosen") - scores(place / "gold", pairs, "rejected")
    uniform = np.random.default_rng(1).random(60)

    def possible(margin: np.ndarray) -> np.ndarray:
        """Pairs whose chosen response, be it the first sample or the second, has won its draw."""
        return (uniform < 1 / (1 + np.exp(-margin))) | (uniform >= 1 / (1 + np.exp(margin)))

    assert possible(margin).all() and not possible(-margin).all()
    assert {p["chosen_finished"] for p in pairs} == {True, False}  # so the rows above are of both kinds
    assert 0.5 < (margin > 0).mean() < 1


def make_run(folder, gold_scores: list[list[float]]) -> None:
    """A finished run of one evaluation per list, with what the tables read."""
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "manifest.json").write_text("{}")
    (folder / "evals").mkdir()
    (folder / "eval").mkdir()
    judged = {"eval/rewards/accuracies": {"value": 0.7}}
    if "rlhf" in folder.name or "aihf" in folder.name:
        judged["eval/reward/accuracy"] = {"value": 0.8}
    (folder / "eval" / "evaluation.json").write_text(json.dumps({"measures": judged}))
    logged = []
    for k, values in enumerate(gold_scores):
        rows = [
            {
                "row": i, "gold/score": v, "gold/demonstrations": 9.0, "gold/win_rate_base": 0.5, "kl_k1": float(k), "nll": 3.0, "rouge_l": 0.1,
                "completions/mean_length": 4.0, "reward/samples": -v,
            }
            for i, v in enumerate(values)
        ]  # fmt: skip
        write_pairs(folder / "evals" / f"{k:04}.parquet", rows)
        logged.append({"step": 5 + k, "eval/nll": 3.0, "eval/reward/accuracy": 0.5 + 0.1 * k})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in logged))


def test_tables_are_means_over_seeds_paired_with_base_and_sft(tmp_path, capsys):
    """Base 0; SFT 1, 2, 3 on its rows; the others 2, 2 and 2.5 or 3.5 by seed, ranked by their reward the other way round."""
    for ratio in aihf_table.RATIOS:
        for seed in (1, 2):
            for method in aihf_table.METHODS if ratio == "1_1" else ("sft", "dpo", "rlhf", "aihf"):
                last = [1.0, 2.0, 3.0] if method == "sft" else [2.0, 2.0, 1.5 + seed]
                make_run(tmp_path / ratio / str(seed) / method, [[0.0, 0.0, 0.0], last])
    aihf_table.show(aihf_table.Args(runs=str(tmp_path), seeds=(1, 2), output=str(tmp_path / "out")))
    text = (tmp_path / "out" / "aihf.md").read_text()
    assert (tmp_path / "out" / "aihf.png").stat().st_size > 10_000
    tables = (
        {r.split("|")[1].strip(): [c.strip() for c in r.split("|")[2:-1]] for r in part.splitlines()}
        for part in text.split("\n\n")[1:]
    )
    assert text.startswith("2 seeds: 95% hierarchical bootstrap intervals, over seeds and held-out rows.\n\n")
    first, contrasts, second, third = tables
    columns = dict(zip(aihf_table.COLUMNS, first["AIHF (PPO)"], strict=True))
    low, high = bootstrap_interval(np.array([[2.0, 2.0, 2.5], [2.0, 2.0, 3.5]]))
    assert low < 2 and high > 3  # the two seeds differ
    assert columns["gold score"] == f"2.33 ±0.24 [{low:.2f}, {high:.2f}]" == columns["less the base's"]
    assert columns["win rate over SFT"].startswith("0.667 ±0.236")  # seed 1: 1, 1/2, 0; seed 2: 1, 1/2, 1
    sft = dict(zip(aihf_table.COLUMNS, first["SFT"], strict=True))
    assert sft["win rate over SFT"] == "0.500 ±0.000 [0.500, 0.500]"
    assert first["demonstrations"][0] == "9.00 [9.00, 9.00]"
    low, high = bootstrap_interval(np.array([[1.0, 0.0, -0.5], [1.0, 0.0, 0.5]]))
    assert contrasts["AIHF (PPO) less SFT"][:2] == [f"+0.33 [{low:.2f}, {high:.2f}]", "+0.17, +0.50"]
    assert contrasts["Direct AIHF less RLHF (online DPO)"] == [
        "+0.00 [0.00, 0.00]",
        "+0.00, +0.00",
        "+0.00 [0.00, 0.00]",
    ]
    assert second["10:1"][0].startswith("2.00 ±0.00") and second["1:10"][3].startswith("2.33 ±0.24")
    assert third["AIHF (PPO)"] == [f"{v} ({v}, {v})" for v in ("0.700", "0.800", "0.600", "-1.000")]
    assert third["DPO"] == ["0.700 (0.700, 0.700)", "", "", ""]
    aihf_table.show(aihf_table.Args(runs=str(tmp_path), seeds=(1, 2), ratio_seeds=(2,), output=str(tmp_path / "out")))
    text = (tmp_path / "out" / "aihf.md").read_text()
    assert "| 10:1 (1 seed) | " in text and "| 1:1 | " in text and "| 1:10 (1 seed) | " in text


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(aihf_table.UserError, match="--runs: found no finished run in .*sft"):
        aihf_table.load(tmp_path / "sft")


def make_irl_seed(folder, seed: int) -> None:
    """SFT with gold 0, two iterations with 1 and 2 + seed on the first of two rows; one of SPIN with -1."""

    def rows(gold_score: float, **more) -> list[dict]:
        shared = {"gold/demonstrations": 3.0, "gold/win_rate_demonstrations": 0.25, "rouge_l": 0.5, "nll": 7.0, **more}
        scores = ((0, gold_score), (1, 0.0))
        return [{"row": i, "sample": "x", "gold/score": v, "completions/mean_length": 4.0, **shared} for i, v in scores]

    (folder / "irl" / "evals").mkdir(parents=True)
    (folder / "irl" / "args.json").write_text('{"args": {"T": 2}}')
    for updates, value in ((0, 0.0), (5, 1.0), (10, 2.0 + seed)):
        write_pairs(folder / "irl" / "evals" / f"{updates:04}.parquet", rows(value))
    for t in range(2):
        pairs = [{"row": i, "chosen": 1.0, "rejected": r} for i, r in enumerate(((0.0, 1.0), (2.0, 1.0, 0.0, 0.0))[t])]
        write_pairs(folder / "irl" / "evals" / f"preferences_{t:04}.parquet", pairs)
        held = [{"row": i, "chosen": 1.0, "rejected": 0.0, "shuffled": 2.0 * i} for i in range(2)]
        write_pairs(folder / "irl" / "evals" / f"reward_{t:04}.parquet", held)
    implicit = {"rewards/accuracies": 1.0, "rewards/accuracies_shuffled": 0.0}
    for name, value in (("held_out", 1.0), ("preferences", 0.5)):
        (folder / f"spin_1_{name}" / "evals").mkdir(parents=True)
        write_pairs(
            folder / f"spin_1_{name}" / "evals" / "0000.parquet",
            rows(-1.0, **{**implicit, "rewards/accuracies": value}),
        )


def test_irl_table_has_each_methods_iterations_paired_with_sft(tmp_path):
    for seed in (0, 2):
        make_irl_seed(tmp_path / str(seed), seed)
    longer = (
        tmp_path / "2" / "spin_1_held_out" / "evals" / "0000.parquet"
    )  # with a row that the others lack, before them
    kept = read_pairs(longer)
    write_pairs(longer, [{**kept[0], "row": 9, "gold/score": 50.0}, *kept])
    irl_table.show(irl_table.Args(runs=str(tmp_path), seeds=(0, 2), output=str(tmp_path / "out")))
    assert (tmp_path / "out" / "irl.png").stat().st_size > 10_000
    lines_ = (tmp_path / "out" / "irl.md").read_text().splitlines()
    assert lines_[0].startswith("2 seeds: 95% hierarchical bootstrap")
    table = {r.split("|")[1].strip(): [c.strip() for c in r.split("|")[2:-1]] for r in lines_[4:]}
    assert list(table) == ["SFT", "IRL, iteration 1", "IRL, iteration 2", "SPIN, iteration 1", "people"]
    found = {name: dict(zip(irl_table.COLUMNS, cells, strict=True)) for name, cells in table.items()}
    accuracy, gold_score, gain = "(a) accuracy, labelled pairs", "(b) gold score", "less SFT's"
    assert [found[n][accuracy][:5] for n in table] == ["", "0.750", "0.250", "0.500", ""]
    assert [found[n][gold_score][:4] for n in table] == ["0.00", "0.50", "1.50", "-0.5", "3.00"]
    low, high = bootstrap_interval(np.array([[2.0, 0.0], [4.0, 0.0]]))
    assert (
        found["IRL, iteration 2"][gain] == f"1.50 [{low:.2f}, {high:.2f}]"
        and high > 3
        and found["people"][gain] == "3.00 [3.00, 3.00]"
    )
    assert found["IRL, iteration 1"]["accuracy, person over SFT's sample"] == "1.000 [1.000, 1.000]"
    assert found["IRL, iteration 1"]["accuracy, own over another's"][:5] == "0.500"
    assert found["SPIN, iteration 1"]["accuracy, own over another's"][:5] == "0.000"


def test_irl_runs_with_other_evaluations_are_refused(tmp_path):
    make_irl_seed(tmp_path / "1", 1)
    (tmp_path / "1" / "irl" / "evals" / "0005.parquet").unlink()
    with pytest.raises(irl_table.UserError, match="found 2 evaluations in .*, expected 3 with gold scores"):
        irl_table.load_irl(tmp_path / "1" / "irl")


# ---- intervals over seeds and rows ----
def test_interval_of_seeds_that_differ_is_wide_and_includes_what_they_include():
    """Seeds -0.19, +0.10, -0.52, each exact: rows alone would give -0.20 with no doubt at all."""
    values = np.array([-0.19, 0.10, -0.52])[:, None] + np.zeros((3, 50))
    low, high = bootstrap_interval(values)
    assert low < -0.52 and 0.10 < high < 1.5  # Student's t interval: -0.97 to 0.57
    assert low == pytest.approx(-0.97, abs=0.15) and high == pytest.approx(0.57, abs=0.15)


def test_interval_of_seeds_that_agree_is_that_of_the_rows():
    rows = np.random.default_rng(0).normal(size=40)
    alone = bootstrap_interval(rows)
    assert bootstrap_interval(rows[None]) == alone
    assert bootstrap_interval(np.stack([rows] * 3)) == pytest.approx(alone, abs=1e-12)
    picks = np.random.default_rng(0).integers(0, 40, (2000, 40))  # and that one is the plain bootstrap
    assert alone == pytest.approx(np.quantile(rows[picks].mean(1), [0.025, 0.975]))


@pytest.mark.parametrize(("seeds", "of_seeds", "of_rows"), [(2, 1.0, 0.5), (3, 1.0, 0.5), (3, 0.0, 1.0), (5, 0.3, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, of_seeds, of_rows):
    """95% of 300 experiments, within chance: seeds of their own effect, rows that are the same for all, and noise."""
    stream, held = np.random.default_rng(1), 0
    for _ in range(300):
        effects = of_seeds * stream.normal(size=(seeds, 1)) + of_rows * stream.normal(size=(1, 40))
        low, high = bootstrap_interval(effects + 0.5 * stream.normal(size=(seeds, 40)), draws=500)
        held += low <= 0 <= high
    assert 0.91 * 300 <= held


# ---- runs of every kind, and what is none ----
def make_script_run(folder, script: str, numbers=(0, 10, 20), start: float = 5.0, **measures) -> str:
    """The folder of a run of a script that evaluated after these iterations or updates, with three rows."""
    (folder / "evals").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": script, "args": {}}))
    logged = [{"step": 1, "loss": 1.0, "outer_iteration": 0}]
    for k, number in enumerate(numbers):
        values = {"nll": start - k, "logps/gap": 1.0, "rouge_l": 0.1, "completions/mean_length": 4.0, **measures}
        rows = [{"row": i, "sample": "x", **values, "nll": values["nll"] + i} for i in range(3)]
        write_pairs(folder / "evals" / f"{number:04}.parquet", rows)
        logged.append({"step": 7 * k, "outer_iteration": 0, "updates": number, "eval/nll": 0.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in logged))
    return str(folder)


def test_compare_takes_runs_of_every_script_and_marks_other_numbers_of_seeds(tmp_path, capsys):
    """Files named by updates; measures that one run lacks are left out for all; the second method has one seed of two."""
    implicit = {"rewards/accuracies": 0.5, "rewards/accuracies_shuffled": 0.5, "kl_k1": 0.0, "kl_k3": 0.0}
    one, two = (make_script_run(tmp_path / f"rft{i}", "rft", start=5.0 + 4 * i, **implicit) for i in range(2))
    other = make_script_run(tmp_path / "irft", "irft", numbers=(0, 1), **implicit | {"kl_k1": 1.0})
    cold = make_script_run(tmp_path / "cold", "irl_ppo_tldr", start=9.0)  # other temperature: no KL
    compare.compare(compare.Args(runs=(f"RFT={one},{two}", f"IRFT={other}"), output=str(tmp_path / "out")))
    text = (tmp_path / "out" / "table.md").read_text()
    assert "2 seeds: 95% hierarchical" in text and "| IRFT (1 seed) | " in text and "| IRFT (1 seed) - base | " in text
    assert "RFT starts from another policy than base, with NLL 6.00, 10.00: its difference to base is no gain." in text
    stored = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [stored[m]["eval/nll"]["mean"] for m in ("base", "RFT", "IRFT (1 seed)")] == [6.0, 6.0, 5.0]
    nll = stored["RFT"]["eval/nll"]
    assert nll["low"] < 4 and nll["high"] > 8 and nll["seeds"] == 2 and stored["RFT - base"]["eval/kl_k3"]["mean"] == 0
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    compare.compare(compare.Args(runs=(f"A={one}", f"B={cold}"), output=str(tmp_path / "cold_out")))
    text = (tmp_path / "cold_out" / "table.md").read_text()
    assert (
        "KL" not in text
        and "| NLL | " in text
        and text.startswith("One seed: 95% bootstrap intervals over held-out rows;")
    )


def test_fig2_is_means_over_seeds(tmp_path):
    names = ("win_rate_base", "win_rate_baseline")
    for seed in range(2):
        gold_values = {f"gold/{name}": 0.25 for name in names} | {"gold/score": 1.0 + 2 * seed, "reward/samples": 0.0}
        folder = tmp_path / str(seed)
        make_script_run(folder, "rft", **gold_values)
        levels = {"gold_demonstrations": 3.0, "gold_base": 0.0, "gold_baseline": 1.0}
        write_pairs(folder / "evals" / "reference.parquet", [{"row": i, **levels} for i in range(3)])
    fig2.fig2(fig2.Args(runs=(str(tmp_path / "0"), str(tmp_path / "1")), output=str(tmp_path / "out")))
    table = json.loads((tmp_path / "out" / "fig2.json").read_text())
    found = table["RFT, 20 updates"]["gold/score"]
    assert found["mean"] == 2.0 and found["seeds"] == [1.0, 3.0] and found["low"] < 1 and found["high"] > 3
    assert table["SFT, selected"]["gold/gain"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "seeds": [1.0, 1.0]}
    assert (tmp_path / "out" / "fig2.md").read_text().startswith("2 seeds: 95% hierarchical")


def broken_runs(place) -> dict[str, tuple]:
    """{case: (what is called, words of its error)}: every script that reads runs, with folders that are none of its own."""
    good = make_script_run(place / "good", "rft")
    gold_run = make_script_run(place / "gold_run", "gold", numbers=())
    once = make_script_run(place / "once", "evaluate", numbers=(0,))
    torn = make_script_run(place / "torn", "rft")
    (place / "torn" / "evals" / "0010.parquet").write_bytes(b"PAR1 torn")
    emptied = make_script_run(place / "emptied", "rft")
    write_pairs(place / "emptied" / "evals" / "0020.parquet", [])
    silent, half = make_script_run(place / "silent", "rft"), make_script_run(place / "half", "rft")
    (place / "silent" / "metrics.jsonl").unlink()
    (place / "half" / "metrics.jsonl").write_text('{"step": 1, "eval/nll": 2.0}\n{"step": ')
    fewer = make_script_run(place / "fewer", "rft", numbers=(0, 10))
    (place / "fewer" / "evals" / "0030.parquet").write_bytes((place / "good" / "evals" / "0000.parquet").read_bytes())
    short = make_script_run(place / "short", "rft", numbers=(0, 10))
    others = make_script_run(place / "others", "rft")
    rows = read_pairs(place / "others" / "evals" / "0020.parquet")
    write_pairs(place / "others" / "evals" / "0020.parquet", [{**r, "row": r["row"] + 5} for r in rows])
    bare = make_script_run(place / "bare", "rft")
    for path in (place / "bare" / "evals").iterdir():
        write_pairs(path, [{"row": 0, "sample": "x"}])
    (place / "nothing").mkdir()

    def compared(*words):
        return lambda: compare.compare(compare.Args(runs=words, output=str(place / "out")))

    def drawn(*words):
        return lambda: fig2.fig2(fig2.Args(runs=words, output=str(place / "out")))

    def timed(folder):
        return lambda: phases.phases(place / folder / "timing.jsonl")

    (place / "bare" / "timing.jsonl").write_text('{"loss": 1.0}\n')
    (place / "half" / "timing.jsonl").write_text("[1, 2]\n{")
    irl = place / "irl_runs" / "1" / "irl"
    irl.mkdir(parents=True)
    listed = lambda: irl_table.load_irl(place / "irl_runs" / "1" / "irl")  # noqa: E731
    aihf = aihf_table.Args(runs=str(place / "irl_runs"), seeds=(1,), output=str(place / "out"))
    return {
        "no folder": (compared("A=no/such"), "--runs: found no folder no/such"),
        "empty folder": (compared(f"A={place / 'nothing'}"), "found 0 evaluations in .*nothing, expected 2 or more"),
        "a gold reward": (compared(f"A={gold_run}"), "found 0 evaluations in .*gold_run"),
        "one evaluation": (compared(f"A={once}"), "found 1 evaluations in .*once"),
        "torn parquet": (compared(f"A={torn}"), "found no readable rows in .*0010.parquet"),
        "no rows": (compared(f"A={emptied}"), "found no readable rows in .*0020.parquet"),
        "no metrics": (compared(f"A={silent}"), "found no readable .*metrics.jsonl"),
        "torn metrics": (compared(f"A={half}"), "found no readable .*metrics.jsonl"),
        "a file too many": (compared(f"A={fewer}"), "found 3 evaluations in .* but 2 in its metrics.jsonl"),
        "seeds that differ": (compared(f"A={good},{short}"), r"found \[2, 3\] evaluations in the runs of A"),
        "other rows": (compared(f"A={good}", f"B={others}"), "found other held-out rows in .*others"),
        "no measures": (compared(f"A={bare}"), "found no nll in .*bare"),
        "one label twice": (compared(f"A={good}", f"A={good}"), "found A twice"),
        "one run twice": (compared(f"A={good},{good}"), "found a directory twice"),
        "no label": (compared(good), "expected LABEL=DIR"),
        "no directory": (compared(f"A={good},"), "expected LABEL=DIR"),
        "fig2 without gold": (drawn(good), "found no gold/score, .* in .*good, evaluation 0"),
        "fig2 of another script": (drawn(once), "found a run of evaluate.py in .*once, expected runs of rft.py"),
        "fig2 of nothing": (drawn(str(place / "nothing")), "found no readable .*nothing/args.json"),
        "phases of nothing": (timed("nothing"), "--run: found no readable .*timing.jsonl"),
        "phases torn": (timed("half"), "--run: found no readable .*timing.jsonl"),
        "phases of other rows": (timed("bare"), "--run: found rows without phase"),
        "irl without args": (listed, "--runs: found no readable .*args.json"),
        "aihf without runs": (lambda: aihf_table.show(aihf), "--runs: found no run of aihf, .* under .*1_1"),
    }


def test_what_is_no_run_of_the_right_kind_is_one_clear_line(tmp_path):
    cases = broken_runs(tmp_path)
    for name, (call, words) in cases.items():
        with pytest.raises(tables.UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value), name


def test_scale_measures_both_starts_and_lists_and_draws_them(tmp_path):
    """The second start encodes nothing; two processes read what one of them made; the same rows each time."""
    words = "--rows 30 --tokens 40 --processes 2 --lists 30 --output".split()
    done = run(
        [sys.executable, "benchmark/scale.py", *words, str(tmp_path / "scale.png")], CLEANIRL_CACHE=str(tmp_path)
    )
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [(row[0], row[2], row[3]) for row in table] == [("30", "2", start) for start in ("first", "second", "lists")]
    assert len({row[1] for row in table}) == 1 and all(float(cell) > 0 for row in table for cell in row[4:8])
    assert [float(row[8]) > 0 for row in table] == [True, True, False]
    assert done.stderr.count("are made once") == 2  # training and held-out rows, by one of both at the first start
    assert (tmp_path / "scale.png").stat().st_size > 5000


def test_scales_rows_have_about_the_tokens_asked_for(tmp_path):
    scale.write_rows(tmp_path / "d.jsonl", 50, 400)
    counts = [[len(row[name].split()) for name in ("prompt", "completion")] for row in lines(tmp_path / "d.jsonl")]
    assert 350 < np.sum(counts, 1).mean() < 450 and 0.3 < np.sum(counts, 0)[0] / np.sum(counts) < 0.36
