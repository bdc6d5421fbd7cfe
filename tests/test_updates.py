"""run.updates, log_update, stored and the batches of a phase: what is skipped, saved, logged, evaluated and read again."""

import copy
import json
import signal
import sys
from collections import Counter

import pytest
import torch

import sft
from common import UserError, checkpoint
from common.args import resolve_auto
from common.engine import all_weights, evaluating, zero_of
from common.run import Run
from common.store import read_pairs
from common.streams import make_optimizer
from extras import resume, terminal


@pytest.fixture
def make_run(tmp_path):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}

    def make(**given) -> Run:
        args = sft.Args(output_dir=str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"), mixed_precision="no", **given)
        resolve_auto(args, sft.SETTINGS)
        args.eval_updates, args.rollout_batch_size = 2, 3
        run = Run(args, "sft", {"loss": ""})
        run.saves = []
        run.save_checkpoint = lambda *_: run.saves.append(dict(run.position))
        return run

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_position_moves_after_the_body_and_checkpoints_are_saved_where_due(make_run):
    run, seen = make_run(save_steps=2), []
    for k, batch in run.updates("p", list("abcde"), outer_iteration=1, first=10):
        seen.append((k, batch, run.position["step"]))
    assert seen == [(0, "a", 0), (1, "b", 11), (2, "c", 12), (3, "d", 13), (4, "e", 14)]
    assert run.position == {"outer_iteration": 1, "step": 15}
    assert [p["step"] for p in run.saves] == [12, 14, 15]  # every second update, and the last one


def test_an_update_of_several_steps_is_saved_after_as_many_steps_as_asked_for(make_run):
    run = make_run(save_steps=6)
    list(run.updates("p", range(5), first=1, per_update=3))
    assert [p["step"] for p in run.saves] == [7, 13, 16]
    run = make_run(save_steps=2)
    list(run.updates("p", range(2), per_update=3))
    assert [p["step"] for p in run.saves] == [3, 6]


@pytest.mark.parametrize("done", range(7))
def test_a_resumed_run_does_what_is_left(make_run, done):
    run = make_run()
    run.position["step"] = 10 + 3 * done
    seen = [k for k, _ in run.updates("p", range(6), first=10, per_update=3)]
    assert seen == list(range(done, 6))
    (row,) = map(json.loads, (run.dir / "timing.jsonl").read_text().splitlines())
    assert (row["phase"], row["items"]) == ("p", 6)


@pytest.mark.parametrize(
    "t, done, expected", [(0, 0, [0, 2, 4, 5]), (1, 0, [2, 4, 5]), (0, 2, [2, 4, 5]), (0, 5, [5]), (0, 3, [4, 5])]
)
def test_evaluations_come_before_the_first_update_every_few_and_at_the_end(make_run, t, done, expected):
    """Each is preceded by a checkpoint: a stop inside it loses nothing. A resumed run repeats the one it stopped in."""
    run, events = make_run(), []
    run.position["step"] = done
    run.save_checkpoint = lambda *_: events.append("save")
    for k, _ in run.updates("p", range(5), t, evaluate=lambda k: events.append(f"evaluate {k}")):
        events.append(k)
    assert [int(e.split()[1]) for e in map(str, events) if e.startswith("evaluate")] == expected
    assert all(events[i - 1] == "save" for i, e in enumerate(events) if str(e).startswith("evaluate"))
    assert "evaluate" in json.loads((run.dir / "timing.jsonl").read_text())
    run.position["step"] = 6  # the next phase has begun
    assert not list(run.updates("p", range(5), t, evaluate=lambda k: pytest.fail("evaluated again")))


def test_a_stop_that_was_asked_for_comes_after_the_update(make_run, monkeypatch):
    run, seen = make_run(save_steps=100), []
    monkeypatch.setattr(terminal, "leave", lambda number: (_ for _ in ()).throw(SystemExit(128 + number)))
    with pytest.raises(SystemExit) as stop:
        for k, _ in run.updates("p", range(5)):
            seen.append(k)
            if k == 1:
                run.stop_signal = signal.SIGTERM
    assert stop.value.code == 143 and seen == [0, 1] and run.saves == [{"outer_iteration": 0, "step": 2}]


def test_rows_are_logged_with_the_place_of_their_update(make_run):
    run = make_run(logging_steps=2)
    for k, _ in run.updates("p", range(5), outer_iteration=3, first=10, per_update=4):
        run.log_update({"loss": float(k)}, episodes=k)
    for k, _ in run.updates("q", range(3), outer_iteration=4, first=30):
        run.log_update({"loss": float(k)}, 30 + k + 1)
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 18, "outer_iteration": 3, "episodes": 1, "loss": 1.0},
        {"step": 26, "outer_iteration": 3, "episodes": 3, "loss": 3.0},
        {"step": 32, "outer_iteration": 4, "loss": 1.0},
    ]


def test_stored_rows_are_made_once_and_missed_once_they_are_trained_on(make_run):
    run, made = make_run(), []

    def make():
        made.append(1)
        return [{"a": [1, 2], "b": 0.1}]

    path = run.dir / "new" / "rows.parquet"
    assert (
        run.stored(path, make, since=5)
        == run.stored(path, make, since=5)
        == read_pairs(path)
        == [{"a": [1, 2], "b": 0.1}]
    )
    assert len(made) == 1
    path.unlink()
    run.position["step"] = 5  # where training on them begins
    assert run.stored(path, make, since=5) and len(made) == 2
    path.unlink()
    run.position["step"] = 6
    with pytest.raises(UserError, match=f"^--resume: found no {path}, expected the rows that"):
        run.stored(path, make, since=5)
    assert run.stored(path, make) and len(made) == 3


def test_batches_of_a_phase(make_run):
    run = make_run(batch_size=4)
    epochs = run.epochs(10, 2, 7)
    assert list(map(len, epochs)) == [4, 4, 2] * 2 and epochs == run.batches(10, 7, 0) + run.batches(10, 7, 1)
    batches = run.prompt_batches(5, 14, 7)
    assert list(map(len, batches)) == [3, 3, 3, 3, 2]
    drawn = [i for batch in batches for i in batch]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5)) and max(Counter(drawn).values()) == 3
    assert drawn[:5] != drawn[5:10]


def test_a_run_in_one_process_needs_nothing_of_the_engines_that_cut_weights_up(make_run, monkeypatch):
    """Training, scoring, a checkpoint and its way back, with their module out of reach."""
    monkeypatch.setitem(sys.modules, "extras.sharding", None)  # its import is an ImportError
    run, model = make_run(), torch.nn.Linear(2, 1)
    start = copy.deepcopy(model)
    policy, optimizer = run.prepare(model, make_optimizer("adamw", model.parameters()))
    rows = [[1.0, 2.0], [3.0, 4.0]]
    run.step(policy, optimizer, rows, lambda part: (policy(torch.tensor(part)).squeeze(-1), {}), len, 0.1)
    with evaluating(run.unwrap(policy)), all_weights(policy) as same:
        assert same is policy and not policy.training and zero_of(policy).item() == 0.0
    trained = copy.deepcopy(policy.state_dict())
    run.position["step"] = 1
    checkpoint.save_checkpoint(run)
    run.position["step"] = 0
    run.load_weights(policy, start)
    assert torch.equal(policy.weight, start.weight) and not torch.equal(policy.weight, trained["weight"])
    assert resume.load_checkpoint(run)["step"] == run.position["step"] == 1
    assert torch.equal(policy.weight, trained["weight"])
