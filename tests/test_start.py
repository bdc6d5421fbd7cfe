"""Runs with the flags of extras/flags.py: --smoke end to end, --stop-after and what follows it, --deterministic; one line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_launch
import torch
from helpers import ROOT, child_environment, command, metrics, run, slow_unless
from test_launch import FLAGS, argv
from test_repo import SCRIPTS

import irft
import sft
from common import UserError
from common.args import resolve_auto
from common.store import read_metrics
from extras import command_line, quiet, terminal
from extras.phases import PHASES, word_of

place = test_launch.place  # a fixture: models and data, for all tests of a file


def phases_of(out: Path) -> set[str]:
    """Words for the phases that a run has been through."""
    return {word_of(json.loads(line)["phase"]) for line in (out / "timing.jsonl").read_text().splitlines()}


# ---- --smoke ----
@pytest.mark.parametrize("script", slow_unless(lambda script: script in ("irft.py", "aihf.py"), SCRIPTS))
def test_smoke_is_the_whole_script_on_the_embedded_model_and_data(script, tmp_path):
    if script == "aihf_mujoco.py":
        pytest.importorskip("gymnasium")
    words = ["--data-dir", str(tmp_path / "data")] if script == "aihf_mujoco.py" else []
    out = tmp_path / "run"
    done = run([sys.executable, script, "--smoke", "--output-dir", str(out), *words])
    assert done.stdout.startswith("--smoke: the smallest sizes, to see a script run; its results mean nothing\n")
    saved = json.loads((out / "args.json").read_text())["args"]
    rows = read_metrics(out / "metrics.jsonl")
    assert saved["smoke"] and rows and all(math.isfinite(value) for row in rows for value in row.values())
    if script == "evaluate.py":
        assert saved["model"] == "tiny" and (out / "evaluation.json").exists()
    elif script == "aihf_mujoco.py":
        assert saved["env"] == "Pendulum-v1" and (out / "final.safetensors").exists()
    else:
        assert saved["model"] == "tiny" and (out / "final" / "model.safetensors").exists()
        assert set(PHASES[script.removesuffix(".py")]) - {"best-of-n"} <= phases_of(out)


# ---- --stop-after ----
@pytest.mark.parametrize("script", slow_unless(lambda script: script in ("irft.py", "rft.py"), FLAGS))
def test_a_run_that_stops_after_each_phase_and_is_resumed_equals_one_left_alone(place, script):
    """Each phase ends the run with status 0 and what it made; --resume makes the next one. The same bytes in the end."""
    words = [word for word in PHASES[script.removesuffix(".py")] if word != "best-of-n"]
    if script in ("sft.py", "irft.py"):
        words *= 2  # two epochs; two outer iterations
    if "--sft-epochs 0" in FLAGS[script]:
        words.remove("sft")
    outs = [place / f"{name}_{script}" for name in ("alone", "stopped")]
    run([sys.executable, *argv(place, "alone", script, 4)])
    steps = 0
    for i, word in enumerate(words):
        start = argv(place, "stopped", script, 4) if not i else [script, "--resume", str(outs[1])]
        done = run([sys.executable, *start, "--stop-after", word])
        assert f"--stop-after {word}: stopped; continue with --resume {outs[1]}" in done.stdout.splitlines()
        assert not (outs[1] / "final").exists() and word in phases_of(outs[1])
        position = max((p.name for p in (outs[1] / "checkpoint").iterdir()), default="0")
        assert (int(position[-8:]) > steps) == (word != "answers"), (word, position)
        steps = int(position[-8:])
    run([sys.executable, script, "--resume", str(outs[1])])
    for name in ("final/model.safetensors", "metrics.jsonl"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name


def test_a_phase_that_was_done_before_does_not_stop_a_resumed_run(place):
    """--resume --stop-after sft, twice: the second finds SFT done, and goes on to the end."""
    flags = FLAGS["rft.py"].replace("--sft-epochs 0", "--sft-epochs 1").split()
    out = place / "sft_first"
    start = command(
        "rft.py", place / "model", place / "data.jsonl", out, *flags, "--batch-size", "8", "--optimizer", "adamw"
    )
    run([*start, "--stop-after", "sft"])
    assert not (out / "generations" / "iter_0.parquet").exists() and not (out / "final").exists()
    assert not any("reward/loss" in row for row in metrics(out))
    assert "stopped" not in run([sys.executable, "rft.py", "--resume", str(out), "--stop-after", "sft"]).stdout
    assert (out / "final").exists()


# ---- --deterministic ----
@pytest.fixture
def nothing_set(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "1")  # so that it is put back, whatever is set
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("asked", [True, False])
def test_deterministic_sets_what_libraries_read_before_they_are_used(nothing_set, monkeypatch, asked):
    monkeypatch.setattr(sys, "argv", ["irft.py", *["--deterministic"] * asked])
    assert command_line.given_args(irft.Args, "").deterministic == asked
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if asked else None)
    assert os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == ("1" if asked else None)


def test_a_value_that_the_user_has_set_stays(nothing_set, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(sys, "argv", ["irft.py", "--deterministic"])
    command_line.given_args(irft.Args, "")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_deterministic_is_torchs_switch_and_a_cpu_gives_the_same_bytes_without_it(
    nothing_set, place, tmp_path, monkeypatch
):
    seen, step = [], sft.Run.step
    monkeypatch.setattr(
        sft.Run, "step", lambda *given: (seen.append(torch.are_deterministic_algorithms_enabled()), step(*given))[1]
    )
    for name in ("without", "with"):
        words = command("sft.py", place / "model", place / "data.jsonl", tmp_path / name, "--num-train-epochs", "1")[1:]
        monkeypatch.setattr(sys, "argv", [*words, *["--deterministic"] * (name == "with")])
        args = command_line.given_args(sft.Args, "")
        resolve_auto(args, sft.SETTINGS)
        sft.train(args)
    half = len(seen) // 2
    assert half and seen == [False] * half + [True] * half
    one, other = (tmp_path / name / "final" / "model.safetensors" for name in ("without", "with"))
    assert one.read_bytes() == other.read_bytes()


def test_an_operation_without_a_deterministic_form_is_named_in_one_line(capsys):
    try:
        torch.use_deterministic_algorithms(True)
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    except RuntimeError as error:
        status = terminal.report_failure(error)
    finally:
        torch.use_deterministic_algorithms(False)
    printed = capsys.readouterr().err
    assert status == 2 and printed.count("\n") == 1
    assert printed.startswith(
        "error: --deterministic: found put_, expected operations that torch can do deterministically"
    )


def test_deterministic_does_not_reach_vllm():
    args = irft.Args(deterministic=True, generation="vllm")
    resolve_auto(args, irft.SETTINGS)
    with pytest.raises(UserError, match="^--deterministic: found True, expected --generation hf beside it"):
        args.check()


# ---- one line under a launcher ----
def launched(*words: str) -> tuple[int, str]:
    start = [sys.executable, "-m", "extras.quiet", *words]
    done = subprocess.run(start, cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_launcher_adds_nothing_to_a_line_of_error_and_keeps_the_status(processes):
    config = [] if processes == 1 else ["--config_file", "configs/cpu.yaml"]
    status, errors = launched(*config, "--num_processes", str(processes), "irft.py", "--T", "0")
    lines = [line for line in errors.splitlines() if "--num_" not in line and "mixed_precision" not in line]
    assert status == 2 and "error: --T: found 0, expected 1 or more" in lines
    assert not any("Traceback" in line or "FAILED" in line or "exitcode" in line for line in lines)
    assert sum(line.startswith("error:") for line in lines) == 1


@pytest.mark.parametrize("code, status", [(2, 2), (1, 1), (-9, 137), (-15, 143)])
def test_the_status_of_a_process_is_the_shells(code, status):
    assert quiet.status(code) == status


@pytest.mark.parametrize("rank, waited", [("0", []), ("1", [2])])
def test_rank_0_says_first_what_every_rank_finds(monkeypatch, capsys, rank, waited):
    slept: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(terminal.time, "sleep", slept.append)
    assert terminal.report_failure(UserError("--T: found 0")) == 2
    assert slept == waited and capsys.readouterr().err == "error: --T: found 0\n"
