"""The demo's expert, the lines of theory in its figure, and what it reads from runs."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, command, jsonl, run

from common.store import read_pairs

sys.path.append(str(ROOT / "benchmark"))
import best_of
import demo


def test_the_first_good_sample_is_chosen_else_the_first():
    reward = best_of.reward_of("Return")
    assert best_of.choose(reward(["Read it", "Return x", "Returns y"])) == 1
    assert best_of.choose(reward(["Read it", "to Return", " Return"])) == 0


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_lines_of_theory_are_those_of_a_sum_over_answers(beta):
    """Two good and two bad answers; D by listing every draw of three."""
    policy, good, n = np.array([0.1, 0.2, 0.3, 0.4]), [True, True, False, False], 3
    expert = np.zeros(4)
    for draw in itertools.product(range(4), repeat=n):
        expert[next((i for i in draw if good[i]), draw[0])] += np.prod(policy[list(draw)])
    end = policy * (expert / policy) ** (1 / beta)
    p = np.array([0.3])
    assert demo.expert_share(p, n)[0] == pytest.approx(expert[:2].sum(), rel=1e-12)
    assert demo.limit_share(p, n, beta)[0] == pytest.approx(end[:2].sum() / end.sum(), rel=1e-12)


class Letters:
    """A tokenizer and a model of eight tokens, whose next-token distribution depends on the last token."""

    pieces, eos_token_id, device = ["R", "e", "t", "Re", "Ret", "x", " ", "<end>"], 7, "cpu"
    logits = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 8

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.pieces[token] for token in row) for row in rows]

    def __call__(self, input_ids):
        return SimpleNamespace(logits=self.logits[input_ids])


def test_the_probability_of_a_word_counts_every_way_to_cut_it():
    """Against the share of 40,000 answers; four standard errors are 0.008 here, and no part of the sum is as small."""
    language, n = Letters(), 40_000
    found = best_of.probability(language, language, [5, 0], "Ret")
    stream, chances = torch.Generator().manual_seed(1), language.logits.softmax(-1)
    ids = torch.zeros(n, 1, dtype=torch.long)
    for _ in range(9):
        ids = torch.cat([ids, torch.multinomial(chances[ids[:, -1]], 1, generator=stream)], 1)
    texts = [text.partition("<end>")[0].lstrip() for text in language.batch_decode(ids[:, 1:].tolist())]
    assert found == pytest.approx(np.mean([best_of.is_good(text, "Ret") for text in texts]), abs=0.008)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An expert made from the embedded model, and a run that learns from it."""
    folder = tmp_path_factory.mktemp("demo")
    words = "return the number of items in list open file and read it".split()
    stream = np.random.default_rng(0)
    rows = [{"prompt": " ".join(stream.choice(words, 9)), "completion": "the file."} for _ in range(60)]
    data = jsonl(folder / "data.jsonl", rows)
    small = "--max-length 96 --max-new-tokens 6 --per-device-eval-batch-size 16 --mixed-precision no --eval-samples 4".split()
    words = ["benchmark/best_of.py", "--model", "tiny", "--dataset", data, *small]
    words += ["--best-of", "3", "--max-samples", "20", "--output-dir", str(folder / "expert")]
    run([sys.executable, *words])
    train, held = folder / "expert" / "train.jsonl", folder / "expert" / "held_out.jsonl"
    run(command("sft.py", "tiny", train, folder / "sft", "--eval-dataset", str(held), "--num-train-epochs", "1"))
    return folder


def test_demonstrations_are_the_best_of_their_samples(place):
    said = json.loads((place / "expert" / "expert.json").read_text())
    rows = [json.loads(line) for line in (place / "expert" / "train.jsonl").read_text().splitlines()]
    good = [best_of.is_good(row["completion"], "Return") for row in rows]
    assert said["train"]["policy"] < said["train"]["expert"] == pytest.approx(np.sum(good) / said["train"]["prompts"])
    assert len(said["probabilities"]) == said["held_out"]["prompts"] == 4
    held = {json.loads(line)["prompt"] for line in (place / "expert" / "held_out.jsonl").read_text().splitlines()}
    assert held and not held & {row["prompt"] for row in rows}


def test_the_table_has_shares_of_the_samples_and_lines_of_theory(place, tmp_path):
    flags = ["--expert", str(place / "expert"), "--runs", f"SFT={place / 'sft'}", "--output", str(tmp_path)]
    printed = run([sys.executable, "benchmark/demo.py", *flags]).stdout
    last = read_pairs(sorted((place / "sft" / "evals").glob("[0-9]*.parquet"))[-1])
    share = np.mean([row["sample"].startswith("Return") for row in last])
    p = np.array(json.loads((place / "expert" / "expert.json").read_text())["probabilities"])
    table = {
        cells[1].strip(): cells[2].split()[0]
        for cells in (line.split("|") for line in printed.splitlines())
        if len(cells) > 5
    }
    assert table["SFT"] == f"{share:.3f}"
    assert table["the expert, exact"] == f"{(1 - (1 - p) ** 3).mean():.3f}"
    assert all(row["sample"] in printed for row in last) and (tmp_path / "figure.png").stat().st_size > 10_000


def test_runs_that_are_not_named_are_refused(place, tmp_path):
    flags = ["--expert", str(place / "expert"), "--runs", str(place / "sft"), "--output", str(tmp_path)]
    done = run([sys.executable, "benchmark/demo.py", *flags], check=False)
    assert done.returncode == 2 and "--runs: found" in done.stderr and "expected LABEL=DIR" in done.stderr
