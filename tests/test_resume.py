"""A run killed anywhere and resumed ends with the bytes of the run that was left alone; damaged checkpoints are noticed."""

import os
import signal
import sys
import time

import pytest
import torch
from helpers import chosen, command, drive, make_data, make_model, metrics, slow_unless, start, weights

POINTS = [  # (script, function, n-th call): one or more in every phase
    ("irft.py", "common.evals.sequence_logprobs", 2),  # reference on held-out rows
    ("irft.py", "common.evals.evaluate", 1),
    ("irft.py", "common.evals.sample_rows", 3),  # answers of iteration 0
    ("irft.py", "common.run.write_pairs", 2),  # pairs scored, not yet on disk
    ("irft.py", "common.run.Run.step", 1),
    ("irft.py", "common.run.Run.step", 4),  # between checkpoints
    ("irft.py", "common.checkpoint.write_manifest", 1),  # first checkpoint written but not sealed
    ("irft.py", "common.checkpoint.write_manifest", 3),
    ("irft.py", "common.evals.evaluate", 2),  # after iteration 0
    ("irft.py", "common.models.reference_policy", 4),  # iteration 1, the reference is another model now
    ("irft.py", "common.run.Run.step", 8),  # iteration 1
    ("irft.py", "common.evals.save_evaluation", 3),
    ("irft.py", "common.run.Run.save_final", 1),
    ("sft.py", "common.run.Run.step", 1),
    ("sft.py", "common.run.Run.step", 6),
    ("sft.py", "common.evals.evaluate", 2),
    ("rft.py", "common.run.Run.step", 2),  # SFT: steps 1 to 5
    ("rft.py", "common.run.Run.save_final", 1),  # sft/ not yet kept
    ("rft.py", "common.evals.evaluate", 1),
    ("rft.py", "common.evals.sample_rows", 2),  # held-out samples of the reference
    ("rft.py", "common.run.write_pairs", 2),  # answers sampled, not yet on disk
    ("rft.py", "common.run.Run.step", 8),  # reward step: 6 to 10
    ("rft.py", "common.evals.evaluate_reward", 1),
    ("rft.py", "rft.collect", 1),  # first rollout of PPO
    ("rft.py", "common.run.Run.step", 12),  # inside a PPO update
    ("rft.py", "rft.collect", 3),
    ("rft.py", "rft.add_advantages", 4),
    ("rft.py", "common.evals.evaluate", 3),
    ("rft.py", "rft.RFT.start_policy", 2),  # iteration 1: the reference is another policy now
    ("rft.py", "rft.collect", 6),
    ("rft.py", "common.evals.evaluate_reward", 2),
    ("rft.py", "common.run.Run.save_final", 3),  # reward/
    ("rft.py", "common.run.Run.save_final", 4),
]
QUICK = [
    ("irft.py", "common.run.Run.step", 8),
    ("sft.py", "common.run.Run.step", 6),
    ("rft.py", "common.run.Run.step", 12),
]
FLAGS = {
    "rft.py": [
        "--T",
        "2",
        "--num-train-epochs",
        "1",
        "--sft-epochs",
        "1",
        "--total-episodes",
        "16",
        "--rollout-batch-size",
        "4",
    ]
    + ["--num-ppo-epochs", "2", "--eval-updates", "2", "--reward-learning-rate", "1e-3", "--ref", "previous"],
    "irft.py": ["--T", "2", "--num-train-epochs", "2", "--replay", "all", "--lora-r", "0"],
    "sft.py": ["--num-train-epochs", "2"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 18)
    return folder


def argv(script: str, place, out, *flags: str) -> list[str]:
    return command(script, place / "model", place / "data.jsonl", out, *FLAGS[script], *flags)[1:]


@pytest.fixture(scope="module")
def runs(place, request):
    """{name: folder} of undisturbed runs, and of runs that were killed at each point and resumed."""
    scenarios, statuses = [], []
    for script in FLAGS:
        scenarios.append({"argv": argv(script, place, place / f"whole_{script}")})
        statuses.append(0)
    for i in chosen(request, "i"):
        (script, at, n), out = POINTS[i], place / f"killed_{i}"
        scenarios.append({"argv": argv(script, place, out), "at": at, "n": n})
        scenarios.append({"argv": [script, "--resume", str(out)]})
        statuses += [-signal.SIGKILL, 0]
    assert drive(scenarios)[0] == statuses
    return place


@pytest.mark.parametrize(
    "i", slow_unless(lambda i: POINTS[i] in QUICK, range(len(POINTS))), ids=lambda i: "-".join(map(str, POINTS[i]))
)
def test_killed_and_resumed_equals_left_alone(runs, i):
    from safetensors.torch import load_file

    script = POINTS[i][0]
    whole, resumed = runs / f"whole_{script}", runs / f"killed_{i}"
    for name in ("final", "reward") if script == "rft.py" else ("final",):
        expected, found = (load_file(out / name / "model.safetensors") for out in (whole, resumed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    for name in ("samples", "evals"):
        assert sorted(p.name for p in (whole / name).iterdir()) == sorted(p.name for p in (resumed / name).iterdir())
    for path in (whole / "samples").iterdir():
        assert path.read_bytes() == (resumed / "samples" / path.name).read_bytes()


def test_training_moved_the_weights(runs):
    """Guards the tests above against comparing runs that did nothing."""
    from safetensors.torch import load_file

    before = load_file(runs / "model" / "model.safetensors")
    for script in ("irft.py", "rft.py"):
        after = weights(runs / f"whole_{script}")
        assert max((before[k] - after[k]).abs().max() for k in before) > 1e-3
    whole = runs / "whole_rft.py"
    sft, middle = (load_file(whole / name / "model.safetensors") for name in ("sft", "policy_1"))
    assert max((sft[k] - middle[k]).abs().max() for k in sft) > 1e-4  # PPO of iteration 0
    assert max((after[k] - middle[k]).abs().max() for k in after) > 1e-4  # and of iteration 1


def damage(file, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.slow
def test_damaged_checkpoint_is_noticed_and_the_one_before_used(runs, place):
    kinds = ("cut", "flip", "missing")
    outs = [place / f"damaged_{kind}" for kind in kinds]
    killed = [{"argv": argv("irft.py", place, out), "at": "common.run.Run.step", "n": 5} for out in outs]
    assert drive(killed)[0] == [-signal.SIGKILL] * 3
    for out, kind in zip(outs, kinds, strict=True):
        kept = sorted(p.name for p in (out / "checkpoint").iterdir())
        assert kept == ["0000_00000002", "0000_00000004"]
        damage(out / "checkpoint" / kept[-1] / "model.safetensors", kind)
    statuses, printed = drive([{"argv": ["irft.py", "--resume", str(out)]} for out in outs])
    assert statuses == [0, 0, 0]
    assert printed.count("0000_00000004 is damaged (model.safetensors") == 3
    expected = weights(runs / "whole_irft.py")
    for out in outs:
        assert f"resumed from {out}/checkpoint/0000_00000002" in printed
        found = weights(out)
        assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.slow
def test_full_disk_leaves_the_last_good_checkpoint(place):
    """The kernel refuses to write past a file size limit, as a full disk would, once the first checkpoint stands."""
    out = place / "full"
    words = command("irft.py", place / "model", place / "data.jsonl", out, *FLAGS["irft.py"])
    assert drive([{"argv": words[1:], "at": "common.run.Run.step", "n": 4}])[0] == [-signal.SIGKILL]
    assert [p.name for p in (out / "checkpoint").iterdir()] == ["0000_00000002"]
    before = {p.name: p.read_bytes() for p in (out / "checkpoint" / "0000_00000002").iterdir()}
    limit = os.path.getsize(out / "checkpoint" / "0000_00000002" / "model.safetensors") // 2
    statuses, printed = drive([{"argv": ["irft.py", "--resume", str(out)], "file_limit": limit}])
    assert statuses == [2]
    error = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "checkpoint could not be written" in error[0] and "0000_00000002" in error[0]
    assert [p.name for p in (out / "checkpoint").iterdir()] == ["0000_00000002"]
    assert before == {p.name: p.read_bytes() for p in (out / "checkpoint" / "0000_00000002").iterdir()}
    assert drive([{"argv": ["irft.py", "--resume", str(out)]}])[0] == [0]
    assert (out / "final" / "model.safetensors").is_file()


def test_sigterm_writes_a_checkpoint_and_the_run_can_be_resumed(place):
    out = place / "sigterm"
    words = command("irft.py", place / "model", place / "data.jsonl", out, "--T", "1", "--num-train-epochs", "500")
    words += ["--save-steps", "100000"]
    deadline = time.time() + 120
    with start(words) as process:
        while (
            time.time() < deadline
            and process.alive()
            and not ((out / "metrics.jsonl").exists() and len(metrics(out)) > 5)
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        done = process.wait(60)
    assert done.returncode == 143 and f"--resume {out}" in done.stdout
    steps = len(metrics(out)) - 1
    assert [p.name for p in (out / "checkpoint").iterdir()] == [f"0000_{steps:08d}"]
    with start([sys.executable, "irft.py", "--resume", str(out)]) as process:
        while time.time() < deadline and process.alive() and len(metrics(out)) < steps + 6:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        done = process.wait(60)
    assert done.returncode == 143 and f"0000_{steps:08d}" in done.stdout
    assert [row["step"] for row in metrics(out)[1:]] == list(range(1, len(metrics(out))))  # no step lost or repeated


@pytest.mark.parametrize("at", ["common.generation.Generator._answer", "common.evals.evaluate", "common.run.Run.step"])
def test_sigterm_in_any_phase_ends_the_run_soon_and_loses_nothing(runs, place, at):
    out = place / f"term_{at}"
    scenario = {"argv": argv("irft.py", place, out), "at": at, "n": 2, "signal": signal.SIGTERM}
    statuses, printed = drive([scenario, {"argv": ["irft.py", "--resume", str(out)]}])
    assert statuses == [143, 0] and f"SIGTERM: stopped; continue with --resume {out}" in printed
    expected, found = weights(runs / "whole_irft.py"), weights(out)
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert (runs / "whole_irft.py" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "at, n, after",
    [
        ("rft.collect", 1, "common.generation.Generator._answer"),
        ("rft.collect", 2, "rft.add_advantages"),
        ("common.evals.evaluate", 2, "common.evals.evaluate"),
        ("rft.ppo_update", 1, "rft.collect"),
    ],
)
@pytest.mark.slow
def test_sigterm_in_ppo_and_again_after_the_resume_changes_nothing(runs, place, at, n, after):
    """Around evaluations and the centring of the reward, whose rows must not be logged, nor made, twice."""
    out = place / f"term_{at}_{n}"
    resume = {"argv": ["rft.py", "--resume", str(out)]}
    scenarios = [
        {"argv": argv("rft.py", place, out), "at": at, "n": n, "signal": signal.SIGTERM},
        {**resume, "at": after, "n": 1, "signal": signal.SIGTERM},
        resume,
    ]
    statuses, printed = drive(scenarios)
    assert statuses == [143, 143, 0], printed
    expected, found = weights(runs / "whole_rft.py"), weights(out)
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert (runs / "whole_rft.py" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


def test_resume_refuses_other_settings_and_says_when_finished(runs):
    out = runs / "whole_irft.py"
    statuses, printed = drive(
        [{"argv": ["irft.py", "--resume", str(out), *extra]} for extra in (["--beta", "0.3"], [])]
    )
    assert statuses == [2, 0]
    assert "error: --beta: found 0.3, but the run in" in printed and "has 0.1" in printed
    assert "is finished" in printed


def test_only_two_checkpoints_are_kept_and_nothing_partial(runs):
    names = sorted(p.name for p in (runs / "whole_irft.py" / "checkpoint").iterdir())
    assert len(names) == 2 and not any(n.startswith(".") for n in names)
    assert not list((runs / "whole_irft.py").rglob(".partial*"))
