"""benchmark/rivals.sh: our side of every case and the plain PPO work and agree, and the table's arithmetic on made-up numbers."""

import dataclasses
import json
import math
import random
import signal
import statistics
import sys

import pytest
import torch
from helpers import ROOT, child_environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import UserError
from extras.terminal import SIGNALS

sys.path.append(str(ROOT / "benchmark"))
import plain_ppo
import rivals
from turns import Child

SMALL = rivals.Shape(
    "small", "llama",
    dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
        tie_word_embeddings=True,
    ),
    4, 2, 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rivals.SHAPES, "17m", SMALL)
        rivals.make_models("17m", folder)
    return folder


@pytest.fixture
def make_case(models, tmp_path, monkeypatch):
    monkeypatch.setitem(rivals.SHAPES, "17m", SMALL)

    def make(what: str, lengths: str = "prompts", lora_r: int = 0, **given) -> rivals.Case:
        case = rivals.make_case(what, "17m", lengths, lora_r, 2)
        case.precision = "no"
        for name, value in given.items():
            setattr(case, name, value)
        case.folder, case.model, case.reward = str(tmp_path), str(models / "model"), str(models / "reward")
        return case

    return make


@pytest.fixture
def turns_of(monkeypatch):
    """The lines that one side of a case reports, in this process: its first losses, then its turns."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def measure(case: rivals.Case, side: str, count: int = 2) -> list[dict]:
        lines: list[dict] = []

        class Turns:
            report = staticmethod(lambda **row: lines.append(row))
            wait = staticmethod(lambda: len(lines) <= count)

        monkeypatch.setattr(rivals, "Turns", Turns)
        rivals.measure(case, side)
        return lines

    yield measure
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("what, lora_r", [("dpo", 0), ("dpo", 2), ("sft", 0), ("reward", 0), ("reward", 2)])
def test_our_side_of_training_reports_its_first_losses_and_its_turns(what, lora_r, make_case, turns_of):
    case = make_case(what, lora_r=lora_r, learning_rate=1e-3)
    first, *turns = turns_of(case, "ours")
    assert len(first["losses"]) == case.first == (1 if lora_r else 2)
    assert all(turn.keys() == {"seconds"} and turn["seconds"].keys() == {"wall", "cpu"} for turn in turns)
    assert all(min(turn["seconds"].values()) > 0 for turn in turns)
    if what == "dpo":
        assert first["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert {"chosen", "rejected"} <= first.keys() and (lora_r or first["losses"][1] < math.log(2) - 1e-3)
    if what == "sft":  # the mean over the tokens of the first update, by plain transformers
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
        logps = []
        for r in case.rows[: case.batch]:
            ids = torch.tensor([r["prompt_ids"] + r["chosen_ids"]])
            logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            logps += logp[-len(r["chosen_ids"]) :].tolist()
        assert first["losses"][0] == pytest.approx(-statistics.mean(logps), rel=1e-5)


def test_both_sides_of_ppo_get_the_same_losses_of_the_same_answers(make_case, turns_of):
    case = make_case("ppo")
    ours, *our_turns = turns_of(case, "ours")
    assert len(our_turns) == 2
    plain, *plain_turns = turns_of(case, "plain")
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4) and len(ours["losses"]) == 3
    assert all(abs(x) > 1e-3 for x in ours["losses"])
    for turn in our_turns + plain_turns:
        assert turn.keys() == {"seconds", "learning"}
        assert 0 < turn["learning"]["wall"] < turn["seconds"]["wall"]


@pytest.mark.parametrize("what", ["sample", "sample_uneven"])
def test_our_side_of_sampling_counts_its_tokens(what, make_case, turns_of):
    case = make_case(what, new_tokens=6)
    first, *turns = turns_of(case, "ours", 1)
    most = case.batch * 6
    assert first["tokens"] == turns[0]["tokens"] == most if what == "sample" else first["tokens"] < most


def test_the_tokenizer_gives_back_the_ids(make_case):
    """TRL gets texts: of a prompt, a space, and a response whose end it writes itself."""
    case = make_case("dpo")
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    row = case.rows[0]
    prompt, answer = (" ".join(f"w{i}" for i in ids) for ids in (row["prompt_ids"], row["chosen_ids"][:-1]))
    assert tokenizer(f"{prompt} {answer}{tokenizer.eos_token}")["input_ids"] == row["prompt_ids"] + row["chosen_ids"]
    assert tokenizer(f"{prompt} ")["input_ids"] == row["prompt_ids"]


# ---- the same work ----
def firsts(case: rivals.Case, **theirs) -> dict:
    ours = {"losses": [math.log(2), 0.65], "chosen": -900.0, "rejected": -800.0}
    return {"ours": ours, "best": {**ours, **theirs}, "default": {"losses": [math.log(2), 0.7]}}


def test_the_same_work_is_accepted_whatever_the_order_of_the_rows(make_case):
    rivals.check_same_work(make_case("dpo"), firsts(make_case("dpo")))
    rivals.check_same_work(make_case("dpo"), firsts(make_case("dpo"), losses=[0.6935, 0.653], chosen=-900.05))


@pytest.mark.parametrize(
    "theirs",
    [
        {"losses": [0.71, 0.65]},  # policy and reference differ
        {"losses": [math.log(2), math.log(2)]},  # no update was made
        {"chosen": -890.0},  # other rows
        {"rejected": -790.0},
        {"chosen": -800.0, "rejected": -900.0},  # swapped
    ],
)
def test_other_work_gives_no_ratio(theirs, make_case):
    with pytest.raises(UserError, match="not the same work"):
        rivals.check_same_work(make_case("dpo"), firsts(make_case("dpo"), **theirs))


def test_a_loss_that_is_not_log_2_is_refused_on_our_side_and_as_it_comes(make_case):
    for side in ("ours", "default"):
        found = firsts(make_case("dpo"))
        found[side] = {**found[side], "losses": [0.72, 0.65]}
        with pytest.raises(UserError, match=f"found 0.72 .{side}"):
            rivals.check_same_work(make_case("dpo"), found)


# ---- the table ----
def made_up(rates: dict[str, list[float]], **about) -> list[dict]:
    about = {"what": "dpo", "shape": "tiny", "lengths": "answers", "lora_r": 0, **about}
    return [
        {**about, "side": side, "turn": turn, "wall": rate, "cpu": rate / 2}
        for side, own in rates.items()
        for turn, rate in enumerate(own)
    ]


def test_a_ratio_is_the_median_of_ours_over_theirs_turn_by_turn():
    lines = made_up({"ours": [10.0, 30.0, 80.0], "best": [5.0, 10.0, 100.0], "default": [2.0, 3.0, 4.0]})
    random.Random(0).shuffle(lines)
    assert sorted(rivals.ratios(lines, "best", "wall")) == [0.8, 2.0, 3.0]  # the ratio of the medians would be 3
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rivals.table(lines).splitlines()[2:]]
    assert [row[5] for row in rows] == ["TRL", "TRL as it comes"]
    assert [row[4] for row in rows] == ["30 pairs/s"] * 2 and [row[6] for row in rows] == ["10 pairs/s", "3 pairs/s"]
    assert [row[7] for row in rows] == ["**2.00** [0.80, 3.00]", "**10.00** [5.00, 20.00]"]
    assert "15 pairs/s" in rivals.table(lines, "cpu")


def test_every_case_has_its_own_rows_in_the_table():
    lines = made_up({"ours": [4.0], "best": [1.0]}) + made_up({"ours": [9.0], "best": [3.0]}, lora_r=8)
    lines += made_up({"ours": [1.0], "plain": [2.0]}, what="ppo_learn", lengths="prompts", shape="17m")
    rows = rivals.table(lines).splitlines()[2:]
    assert [row.count("**4.00**") for row in rows] == [1, 0, 0] and "all weights" in rows[0]
    assert "**3.00**" in rows[1] and "LoRA, r = 8" in rows[1]
    assert "**0.50**" in rows[2] and "plain PPO" in rows[2] and "96 to 224, 8 to 48" in rows[2]


def test_units_are_those_of_the_turn(make_case):
    case = make_case("sft")
    begin = (case.first + case.updates) * case.batch
    rows = case.rows[begin : begin + case.batch * case.updates]
    assert rivals.units(case, 1) == sum(len(r["prompt_ids"] + r["chosen_ids"]) for r in rows)
    assert rivals.units(make_case("dpo"), 0) == SMALL.batch * SMALL.updates


# ---- the plain PPO, and the processes ----
def test_the_plain_ppo_cuts_answers_at_their_first_end():
    s = plain_ppo.Settings(pad=1, eos=0, response_length=4, micro_batch=2, learning_rate=1e-3)
    cut = plain_ppo.cut_at_eos(torch.tensor([[5, 0, 6, 0], [5, 6, 7, 8]]), s)
    assert cut.tolist() == [[5, 0, 1, 1], [5, 6, 7, 8]]


def test_a_child_works_when_it_is_told_to_and_ends_with_its_pipe(make_case, tmp_path):
    path = tmp_path / "case.json"
    path.write_text(json.dumps(dataclasses.asdict(make_case("dpo"))))
    words = [sys.executable, rivals.__file__, "--case", str(path), "--side", "ours"]
    child = Child(words, tmp_path / "log", child_environment())
    assert child.row()["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert [child.turn().keys() for _ in range(2)] == [{"seconds"}] * 2
    child.end()
    assert child.process.returncode == 0, (tmp_path / "log").read_text()


def test_what_no_process_answers_is_one_clear_line(make_case, tmp_path):
    path = tmp_path / "case.json"
    path.write_text("{}")
    child = Child([sys.executable, rivals.__file__, "--case", str(path)], tmp_path / "log", child_environment())
    with pytest.raises(RuntimeError, match="found exit status 1 of .*Case.__init__"):
        child.row()
    child.end()
