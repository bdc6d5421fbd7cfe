"""What ends a run before its end, and what is kept: signals, divergence, full disks, closed streams, changed inputs, two at once."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from helpers import ROOT, command, drive, jsonl, launch, make_data, make_model, run, slow_unless, tldr_rows, weights

import tiny
from common import UserError
from common.engine import Engine, not_finite
from common.run import Run
from common.store import read_metrics, without_nan
from extras import provenance, terminal
from extras.resume import manifest_problem
from extras.run_directory import lock, new_directory, untouched
from extras.terminal import report_failure

PPO = (
    "--total-episodes 8 --rollout-batch-size 4 --num-ppo-epochs 1 --sft-epochs 1 --num-train-epochs 1 --eval-updates 2"
)
ONLINE = (
    "--total-prompts 8 --rollout-batch-size 4 --num-generations 2 --sft-epochs 1 --num-train-epochs 1 --eval-updates 2"
)
FLAGS = {
    "sft.py": "--num-train-epochs 3",
    "irft.py": "--T 3 --num-train-epochs 2",
    "rft.py": f"--T 1 {PPO}",
    "aihf.py": f"--T 1 {ONLINE}",
    "aihf_ppo.py": f"--T 1 {PPO}",
    "aihf_direct.py": "--T 3",
    "irl_ppo_tldr.py": f"--T 1 {PPO} --prompts demonstrations --max-length 72",
    "irl_dpo_ultrachat.py": f"--T 1 {ONLINE}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 12)
    make_data(folder / "prefs.jsonl", 10, preference=True)
    jsonl(folder / "posts.jsonl", tldr_rows(12))
    return folder


def argv(script: str, place, out, *flags: str) -> list[str]:
    words = ["--mixed-precision", "no", "--eval-samples", "2", *FLAGS[script].split()]
    if "--eval-updates" in words:
        words += ["--reward-learning-rate", "1e-3", "--optimizer", "adamw"]
    if script.startswith("aihf"):
        words += ["--preference-dataset", str(place / "prefs.jsonl")]
    data = place / ("posts.jsonl" if script == "irl_ppo_tldr.py" else "data.jsonl")
    given = {f for f in flags if f.startswith("--")}
    kept = [w for i, w in enumerate(words) if w not in given and (not i or words[i - 1] not in given)]
    return command(script, place / "model", data, out, *kept, *flags)[1:]


def parts(printed: str) -> list[str]:
    """Return the text that each scenario of drive printed."""
    return printed.split("=== ")[1:]


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def same_run(one, other) -> None:
    """Two finished runs have the same bytes of weights and metrics."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


# ---- signals ----
SLOW = ("torch", "numpy", "tyro", "matplotlib")
PROGRAMS = [*sorted(FLAGS), "evaluate.py", *(f"toy/{n}.py" for n in ("exact", "example1", "example2", "two_actions"))]


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_a_program_imports_has_no_traceback(tmp_path, program):
    """Stand-ins for what is slow to import send the signal; the scripts of the repository's root say one line."""
    for name in SLOW:
        strike = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
        (tmp_path / f"{name}.py").write_text(strike)
    words = [sys.executable, str(ROOT / program)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == (-signal.SIGINT if "/" in program else 128 + signal.SIGINT), done.stderr
    assert done.stderr == ("" if "/" in program else "SIGINT: stopped\n") and not done.stdout


CHAIN = [  # where Ctrl-C comes, in one run that is resumed each time; the call counts from the resume
    ("common.demos.load_demonstrations", 1),  # no run directory yet: typed again, not resumed
    ("common.models.load_model", 1),
    ("common.run.Run.step", 2),
    ("common.generation.Generator._answer", 1),
    ("common.run.Run.step", 2),
    ("common.evals.evaluate", 1),
    ("common.run.Run.step", 1),
    ("common.run.Run.save_final", 1),
    ("common.evals.print_table", 1),
]


@pytest.mark.parametrize("script", slow_unless(lambda script: script == "sft.py", FLAGS))
def test_ctrl_c_in_every_phase_is_one_line_and_costs_nothing(place, script):
    whole, out = place / f"whole_{script}", place / f"chain_{script}"
    again = [script, "--resume", str(out)]
    starts = [argv(script, place, out)] * 2 + [again] * (len(CHAIN) - 2)
    strikes = [
        {"argv": words, "at": at, "n": n, "signal": int(signal.SIGINT), "mark": at}
        for words, (at, n) in zip(starts, CHAIN, strict=True)
    ]
    statuses, printed = drive([{"argv": argv(script, place, whole)}, *strikes, {"argv": again}])
    assert statuses == [0, *[130] * len(CHAIN), 0], printed
    assert "Traceback" not in printed
    for i, part in enumerate(parts(printed)[1:-1]):
        said = [line for line in part.splitlines() if "SIGINT" in line]
        assert said == [f"SIGINT: stopped; continue with --resume {out}" if i else "SIGINT: stopped"], part
    same_run(whole, out)
    assert not list(out.rglob(".partial*"))


def test_every_signal_has_its_status_and_a_checkpoint_between_updates(place):
    names = ("SIGHUP", "SIGTERM", "SIGINT")
    outs = [place / f"by_{name}" for name in names]
    strikes = [
        {
            "argv": argv("sft.py", place, o, "--save-steps", "1000"),
            "at": "common.run.Run.step",
            "n": 2,
            "signal": int(s),
        }
        for o, s in zip(outs, (getattr(signal, name) for name in names), strict=True)
    ]
    statuses, printed = drive(strikes)
    assert statuses == [128 + 1, 128 + 15, 128 + 2]
    for name, out, part in zip(names, outs, parts(printed), strict=True):
        assert f"{name}: stopped; continue with --resume {out}" in part
        assert [p.name for p in (out / "checkpoint").iterdir()] == ["0000_00000002"]


def test_a_signal_that_the_shell_ignores_stays_ignored():
    before = {n: signal.getsignal(n) for n in terminal.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        terminal.catch(print)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is print
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_stop_that_something_holds_up_is_forced():
    code = "import time\nfrom extras import terminal\nterminal.PATIENCE = 0.2\ntry:\n    terminal.leave(2)\n"
    code += "except BaseException:\n    time.sleep(60)\n"
    started = time.time()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 130 and time.time() - started < 20


def test_a_rank_that_has_finished_takes_no_status_from_the_interpreters_end():
    """A thread of gloo may abort there, and the launcher would call the whole run a failure."""
    program = "import atexit, os; atexit.register(os.abort); from extras import terminal; terminal.run(lambda: print('saved'))"
    for rank, status in ({}, -signal.SIGABRT), ({"RANK": "0"}, 0):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=os.environ | rank, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (status, "saved\n"), done.stderr


def test_a_signal_that_comes_again_is_the_same_one_for_ten_seconds(monkeypatch, capfd):
    """As a launcher passes it on; later it means at once, updates or not."""
    left = []
    monkeypatch.setattr(terminal, "leave", left.append)
    monkeypatch.setattr(terminal, "asked", 0)
    monkeypatch.setattr(terminal, "hint", " continue with --resume x")
    run_ = types.SimpleNamespace(in_updates=True, stop_requested=0.0, stop_signal=0, is_main=True)
    terminal.on_signal(run_, signal.SIGINT)
    terminal.on_signal(run_, signal.SIGTERM)
    assert not left and run_.stop_signal == signal.SIGINT
    run_.stop_requested -= 11
    terminal.on_signal(run_, signal.SIGINT)
    assert left == [signal.SIGINT]
    run_.in_updates, run_.stop_requested = False, 0.0
    terminal.on_signal(run_, signal.SIGHUP)
    assert left == [signal.SIGINT, signal.SIGHUP]
    said = [line for line in capfd.readouterr().out.splitlines() if ": stopped" in line]
    assert said == [f"{name}: stopped; continue with --resume x" for name in ("SIGINT", "SIGHUP")]


def test_an_error_on_the_way_to_a_stop_is_that_stop(monkeypatch, capfd):
    """vLLM's process ends by Ctrl-C before the update does that would be the last."""
    monkeypatch.setattr(terminal, "asked", int(signal.SIGINT))
    monkeypatch.delenv("RANK", raising=False)
    assert report_failure(RuntimeError("engine is dead")) == 130
    assert capfd.readouterr().out.startswith("SIGINT: stopped (RuntimeError on the way)")
    assert report_failure(UserError("no room")) == 2 and capfd.readouterr().err == "error: no room\n"


def test_evaluate_says_one_line_too(place):
    words = ["evaluate.py", "--model", str(place / "model"), "--eval-dataset", str(place / "data.jsonl")]
    words += "--max-length 96 --max-new-tokens 8 --eval-samples 2".split() + ["--output-dir", str(place / "evaluated")]
    strike = {"argv": words, "at": "common.evals.evaluate", "n": 1, "signal": int(signal.SIGINT)}
    statuses, printed = drive([strike])
    assert statuses == [130] and "SIGINT: stopped\n" in printed and "Traceback" not in printed, printed


def test_ctrl_c_reaches_two_processes_and_rank_0_alone_speaks(place):
    """In a phase without updates, where one may end while the other waits for it."""
    out = place / "ranks"
    strike = {"at": "common.evals.evaluate", "n": 1, "signal": int(signal.SIGINT)}
    statuses, printed = drive([{"argv": argv("sft.py", place, out), **strike}], ranks=2)
    assert statuses == [130] and "Traceback" not in printed, printed
    assert [line for line in printed.splitlines() if "SIGINT" in line] == [
        f"SIGINT: stopped; continue with --resume {out}"
    ]


@pytest.mark.slow
def test_a_failing_rank_says_how_to_go_on_and_the_other_only_that_it_lost_it(place):
    out = place / "failing"
    scenario = {"argv": argv("sft.py", place, out), "at": "common.run.Run.step", "n": 2, "rank": 1, "signal": 0}
    words = [*launch("cpu.yaml"), str(ROOT / "tests" / "kill_at.py"), json.dumps(scenario)]
    done = run(words, check=False)
    assert done.returncode != 0
    assert "rank 1 failed: RuntimeError: failure that the test asked for" in done.stderr
    ours = done.stderr[: done.stderr.index("ChildFailedError")] if "ChildFailedError" in done.stderr else done.stderr
    assert ours.count("Traceback (most recent call last)") <= 2  # rank 1's, and the launcher's own


# ---- divergence ----
def test_divergence_in_the_last_update_is_no_success(place):
    """Its weights are finite, 1e30, and what they compute is not."""
    scripts = ("sft.py", "irft.py", "rft.py")
    flags = "--learning-rate 1e30 --optimizer rmsprop --batch-size 64 --num-train-epochs 1".split()
    own = {
        "sft.py": [],
        "irft.py": ["--T", "1"],
        "rft.py": "--sft-epochs 0 --total-episodes 4 --value-warmup-ratio 0".split(),
    }
    outs = {script: place / f"diverged_{script}" for script in scripts}
    statuses, printed = drive([{"argv": argv(s, place, outs[s], *flags, *own[s])} for s in scripts])
    assert statuses == [2, 2, 2], printed
    for script, part in zip(scripts, parts(printed), strict=True):
        (error,) = errors(part)
        assert "training diverged: found loss " in error and "Lower --learning-rate" in error, error
        assert not (outs[script] / "final").exists()
        kept = [p.name for p in (outs[script] / "checkpoint").iterdir()]
        assert kept == (["0000_00000001"] if script == "rft.py" else [])  # of the reward's update, which was good
        assert f"last good checkpoint: {outs[script] / 'checkpoint' / kept[0] if kept else 'none yet'}" in error


def test_a_checkpoint_that_is_called_good_is(place):
    """A run that diverges later than its first checkpoint names that one, and --resume goes on from it."""
    out = place / "later"
    flags = "--save-steps 1 --optimizer rmsprop".split()
    strike = {"argv": argv("sft.py", place, out, *flags), "at": "common.run.Run.step", "n": 3}
    assert drive([strike])[0] == [-signal.SIGKILL]
    text = (out / "args.json").read_text()
    (out / "args.json").write_text(text.replace('"learning_rate": 0.001', '"learning_rate": 1e30'))
    statuses, printed = drive([{"argv": ["sft.py", "--resume", str(out)]}])
    assert statuses == [2] and f"last good checkpoint: {out}/checkpoint/0000_00000002" in printed, printed
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["0000_00000001", "0000_00000002"]
    (out / "args.json").write_text(text)
    assert drive([{"argv": ["sft.py", "--resume", str(out)]}])[0] == [0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_weight_that_is_not_finite_is_found(value, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 1)).to(dtype)
    assert not_finite(model) == ""
    with torch.no_grad():
        model[1].weight[0, 66] = value
    assert not_finite(model) == "1.weight"


def test_what_is_probed_is_left_as_it_was():
    model = torch.nn.Linear(2, 2).train()
    state = torch.random.get_rng_state()
    assert Engine(None).probe(model, lambda rows: (model(rows).sum(-1), {}), torch.full((3, 2), math.inf)) != 0
    assert model.training and model.weight.grad is None and torch.equal(state, torch.random.get_rng_state())


def test_a_model_that_is_not_finite_and_a_number_too_large_are_named_as_the_cause(place):
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "model", place / "nan_model", dirs_exist_ok=True)
    state = load_file(place / "nan_model" / "model.safetensors")
    name = sorted(state)[0]
    state[name][0] = math.nan
    save_file(state, place / "nan_model" / "model.safetensors", {"format": "pt"})
    scenarios = [
        {"argv": argv("sft.py", place, place / "of_nan", "--model", str(place / "nan_model"))},
        {"argv": argv("irft.py", place, place / "large_beta", "--beta", "1e38")},
    ]
    statuses, printed = drive(scenarios)
    of_nan, large = parts(printed)
    assert statuses == [2, 2]
    assert f"error: --model {place / 'nan_model'}: found weights that are not finite" in of_nan
    (error,) = errors(large)
    assert error.startswith("error: first update: found loss ") and error.endswith(
        "is not the cause: look at --beta 1e+38"
    )


def test_metrics_hold_null_and_readers_read_it_as_nan(tmp_path):
    row = {"step": 1, "a": math.nan, "b": math.inf, "c": 2.0}
    text = json.dumps(without_nan(row), allow_nan=False)
    assert json.loads(text) == {"step": 1, "a": None, "b": None, "c": 2.0}
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["a"]) and math.isnan(read["b"]) and read["c"] == 2.0
    (tmp_path / "metrics.jsonl").write_text(text + "\n" + text[:9])
    with pytest.raises(UserError, match="metrics.jsonl line 2: found"):
        read_metrics(tmp_path / "metrics.jsonl")


# ---- streams and disks ----
@pytest.mark.slow
def test_stdout_that_closes_or_is_full_costs_no_model(place):
    flags = ["--num-train-epochs", "1"]
    outs = [place / "to_head", place / "to_full", place / "to_nothing"]
    commands = [" ".join([sys.executable, *argv("sft.py", place, out, *flags)]) for out in outs]
    ends = [f"set -o pipefail; {commands[0]} | true", f"{commands[1]} > /dev/full", f"{commands[2]} >&- 2>&-"]
    done = [run(["bash", "-c", text], check=False) for text in ends]
    assert [d.returncode for d in done] == [0, 1, 0], done
    assert all((out / "final" / "model.safetensors").is_file() for out in outs)
    assert not any("Traceback" in d.stderr or "Exception" in d.stderr for d in done)
    (error,) = errors(done[1].stderr)
    assert "stdout: [Errno 28] No space left on device" in error
    same_run(outs[0], outs[1])
    same_run(outs[0], outs[2])


@pytest.mark.parametrize("script", ["sft.py", "rft.py"])
def test_a_full_disk_while_the_model_is_saved_is_one_line_and_leaves_nothing_half_written(place, script):
    whole, out = place / f"room_{script}", place / f"no_room_{script}"
    killed = {"argv": argv(script, place, out), "at": "common.evals.print_table", "n": 1}
    statuses, _ = drive([{"argv": argv(script, place, whole)}, killed])
    assert statuses == [0, -signal.SIGKILL]
    shutil.rmtree(out / "final")
    limit = (whole / "final" / "model.safetensors").stat().st_size // 2
    again = {"argv": [script, "--resume", str(out)]}
    statuses, printed = drive([{**again, "file_limit": limit}, again])
    assert statuses == [2, 0], printed
    (error,) = errors(printed)
    assert (
        f"the model could not be written to {out}" in error
        and f"free space, then continue with --resume {out}" in error
    )
    assert not list(out.rglob(".partial*"))
    same_run(whole, out)


def test_any_file_that_a_full_disk_refuses_is_one_line(monkeypatch, capsys):
    """A row of metrics, say. Another error of the system keeps its traceback, with how to go on below it."""
    monkeypatch.setattr(terminal, "hint", " continue with --resume x")
    monkeypatch.delenv("RANK", raising=False)
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    assert report_failure(full) == 2
    expected = "error: [Errno 28] No space left on device: 'metrics.jsonl'; free space, then continue with --resume x\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(KeyError) as caught:
        report_failure(KeyError("a bug"))
    assert caught.value.__notes__ == ["What is saved is kept; continue with --resume x"]


def test_a_model_whose_answers_are_not_finite_is_not_saved(tmp_path):
    """Found by an evaluation; the row is kept, as valid JSON."""
    fake = types.SimpleNamespace(
        metrics={"eval/nll": ""}, last_step=0, is_main=True, dir=tmp_path, args=types.SimpleNamespace(report_to="none")
    )
    with pytest.raises(UserError, match="found eval/nll nan on held-out rows"):
        Run.log(fake, {"eval/nll": math.nan}, step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "eval/nll": null}\n'


def test_output_dirs_that_cannot_be_made_are_refused(place):
    (place / "a_file").write_text("x")
    outs = [place / "a_file", place / "a_file" / "below", "/proc/none"]
    statuses, printed = drive([{"argv": argv("sft.py", place, out)} for out in outs])
    assert statuses == [2, 2, 2], printed
    for out, part in zip(outs, parts(printed), strict=True):
        (error,) = errors(part)
        assert error.startswith(f"error: --output-dir: {out} could not be opened: "), part


# ---- the run directory ----
def test_a_run_that_is_alive_keeps_others_out(place):
    out = place / "locked"
    assert drive([{"argv": argv("sft.py", place, out), "at": "common.run.Run.step", "n": 3}])[0] == [-signal.SIGKILL]
    before = (out / "metrics.jsonl").read_bytes()
    held = lock(out)
    scenarios = [{"argv": ["sft.py", "--resume", str(out)]}]
    statuses, printed = drive(scenarios)
    assert statuses == [2] and f"error: {out} is in use by process {os.getpid()} on " in printed, printed
    assert (out / "metrics.jsonl").read_bytes() == before
    held.close()
    assert drive(scenarios)[0] == [0]  # and no lock is left by a run that was killed


def test_the_folder_of_a_run_that_failed_before_it_had_anything_can_be_used_again(place):
    out = place / "failed_early"
    words = argv("sft.py", place, out)
    fails = {"argv": [*words, "--warmup-ratio", "0.5"], "at": "common.models.prepare_policy", "n": 1, "signal": 0}
    statuses, printed = drive([fails, {"argv": words}, {"argv": words}])
    assert statuses == [1, 0, 2], printed
    assert json.loads((out / "args.json").read_text())["args"]["warmup_ratio"] == 0.1
    assert f"--output-dir: {out} already holds files" in errors(printed)[-1]


def test_what_counts_as_untouched(tmp_path):
    assert untouched(tmp_path)
    (tmp_path / "args.json").write_text("{}")
    assert not untouched(tmp_path)  # somebody else's
    (tmp_path / ".lock").touch()
    (tmp_path / "evals").mkdir()
    assert untouched(tmp_path)
    (tmp_path / "evals" / "reference.parquet").touch()
    assert not untouched(tmp_path)


def test_two_runs_in_one_second_have_two_folders(tmp_path):
    names = [new_directory(tmp_path / "runs" / "sft__1__20261121-120000").name for _ in range(3)]
    assert names == [f"sft__1__20261121-120000{end}" for end in ("", "-2", "-3")]


def test_output_dir_beside_resume_is_refused(place):
    out = place / "locked"
    statuses, printed = drive([{"argv": ["sft.py", "--resume", str(out), "--output-dir", str(place / "x")]}])
    assert (
        statuses == [2] and f"error: --output-dir: found {place / 'x'}, expected none beside --resume {out}" in printed
    )


# ---- what a resume reads ----
def test_resume_notices_other_data_and_another_model(place, tmp_path):
    """The same size and the same time of change, and yet not the same content."""
    outs = [tmp_path / name for name in ("data", "weights", "same")]
    for out in outs:
        out.mkdir()
        for name in ("model", "data.jsonl"):
            (shutil.copytree if (place / name).is_dir() else shutil.copy2)(place / name, out / name)
    strike = {"at": "common.run.Run.step", "n": 3}
    assert drive([{"argv": argv("sft.py", out, out / "run"), **strike} for out in outs])[0] == [-signal.SIGKILL] * 3
    for file in (outs[0] / "data.jsonl", outs[1] / "model" / "model.safetensors"):
        content, times = file.read_bytes(), file.stat()
        file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    statuses, printed = drive([{"argv": ["sft.py", "--resume", str(out / "run")]} for out in outs])
    assert statuses == [2, 2, 0], printed
    data, model, _ = parts(printed)
    found, file = "error: --resume: found other content in {} than when the run in", outs[0] / "data.jsonl"
    assert found.format(f"--dataset {file} and --eval-dataset {file}") in data
    assert found.format(f"--model {outs[1] / 'model'}") in model


def test_digests_are_of_content(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "WHOLE", 1 << 16)
    folder = tmp_path / "model"
    folder.mkdir()
    content = bytearray(os.urandom(1 << 22))
    content[:8] = (100).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(content)
    (folder / "README.md").write_text("a")
    before = provenance.model_digest(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("b")
    assert provenance.model_digest(str(tmp_path / "copy")) == before
    for change in (50, len(content) - 1):  # the header; the last weight
        other = bytearray(content)
        other[change] ^= 1
        (folder / "model.safetensors").write_bytes(other)
        assert provenance.model_digest(str(folder)) != before
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("1")
    first = provenance.data_digest(str(data))
    (data / "notes.txt").write_text("no data")
    assert provenance.data_digest(str(data)) == first
    (data / "test.jsonl").write_text("1")
    assert provenance.data_digest(str(data)) != first
    args = types.SimpleNamespace(dataset=str(data), eval_dataset="auto", preference_dataset="none", model="a/b")
    assert provenance.digests(args) == {"dataset": provenance.data_digest(str(data))}


def test_digests_of_what_is_embedded_are_those_of_its_files():
    assert provenance.data_digest("pydoc") == provenance.data_digest(str(tiny.DATA))
    assert provenance.model_digest("tiny") == provenance.model_digest(str(tiny.MODEL))


def test_a_stored_file_that_is_not_whole_or_gone_is_named(place):
    """Of a run that was killed after updates on these answers: what they and the reference were cannot be made again."""
    out = place / "broken"
    killed = {"argv": argv("irft.py", place, out), "at": "common.run.Run.step", "n": 3}
    assert drive([killed])[0] == [-signal.SIGKILL]
    names = ("generations/iter_0.parquet", "evals/reference.parquet")
    cases = [("metrics.jsonl", "half"), *((name, left) for name in names for left in ("half", "none", "gone"))]
    copies = [place / f"broken_{i}" for i in range(len(cases))]
    for (name, left), copy in zip(cases, copies, strict=True):
        shutil.copytree(out, copy)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2] if left == "half" else b"")
        if left == "gone":
            (copy / name).unlink()
    statuses, printed = drive([{"argv": ["irft.py", "--resume", str(path)]} for path in (*copies, out)])
    assert statuses == [2] * len(cases) + [0], printed
    for (name, left), copy, part in zip(cases, copies, parts(printed), strict=False):
        (error,) = errors(part)
        expected = f"found no {copy / name}" if left == "gone" else f"{copy / name}: found no readable Parquet"
        expected = f"found {copy / name} of " if name == "metrics.jsonl" else expected
        assert expected in error and ("delete it" in error) == (left != "gone"), error


@pytest.mark.parametrize("text", ["", "null", "[]", '{"model.safetensors": 3}', '{"x": {}}'])
def test_a_manifest_of_anything_else_is_damage(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert "manifest.json" in manifest_problem(tmp_path)


def test_answers_that_no_update_was_made_on_are_made_again(place):
    """Deleted as the message says, they come back the same."""
    whole, out = place / "whole_again", place / "made_again"
    killed = {"argv": argv("irft.py", place, out), "at": "common.run.Run.step", "n": 1}
    assert drive([{"argv": argv("irft.py", place, whole)}, killed])[0] == [0, -signal.SIGKILL]
    (out / "generations" / "iter_0.parquet").unlink()
    (out / "evals" / "reference.parquet").unlink()
    (out / "metrics.jsonl").unlink()
    assert drive([{"argv": ["irft.py", "--resume", str(out)]}])[0] == [0]
    same_run(whole, out)
