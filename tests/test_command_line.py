"""The command line: --help in groups, --config and --smoke under what is typed, and completion in bash."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, child_environment
from test_repo import SCRIPTS

import aihf_mujoco
import irft
import rft
import sft
from common import UserError
from common.args import flag, resolve_auto
from extras import command_line, config, help, phases
from extras.words import CHOSEN_ANEW, last_value

SHARED = ["method", "data", "model", "sampling", "optimisation", "evaluation", "run"]


def help_of(script: str, *words: str) -> str:
    """What --help prints at 100 columns."""
    start = [sys.executable, script, *words, "--help"]
    env = {**child_environment(), "COLUMNS": "100"}
    return subprocess.run(start, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def boxes(text: str) -> dict[str, str]:
    """{heading of a box of tyro's help: the text in it, without the frame}."""
    parts = re.split(r"╭─ (\w+)(?: options)? ─+╮\n", text)
    return {
        name: " ".join(re.sub("[│╰╯─]", " ", body).split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


# ---- --help ----
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_once_in_groups_the_methods_first(script):
    cls, text = SCRIPTS[script].Args, help_of(script)
    found = {
        name: re.findall(r"(?<![\w-])(--[\w-]+)(?=(?:,| --no-\w| [A-Z{]))", body) for name, body in boxes(text).items()
    }
    expected = [name for name in SHARED if name != "sampling" or script != "aihf_mujoco.py"]
    assert list(found) == ["options", *expected]
    groups = help.groups_of(cls)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(cls))
    for group, flags in groups.items():
        assert [name for name in found[group] if name in map(flag, flags)], group
        assert all(flag(name) in found[group] for name in flags), (group, flags)
    method = text[: text.index("╭─ data options")].splitlines()
    assert sum(max(1, math.ceil(len(line) / 100)) for line in method) <= 2 * 50


def test_no_group_names_a_flag_that_no_script_has():
    known = {f.name for module in SCRIPTS.values() for f in dataclasses.fields(module.Args)}
    named = [name for text in help.GROUPS.values() for name in text.split()]
    assert set(named) <= known and len(named) == len(set(named))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_auto_is_for_the_default_model(script):
    module = SCRIPTS[script]
    shown, args = " ".join(boxes(help_of(script)).values()), module.Args()
    if module is aihf_mujoco:
        values, name = module.SETTINGS[args.env], args.env
    else:
        resolve_auto(args, module.SETTINGS)
        values, name = vars(args), "tiny"
    resolved = [
        f for f in dataclasses.fields(module.Args) if f.default == "auto" and values.get(f.name, "auto") != "auto"
    ]
    assert len(resolved) >= 5
    for value in {values[f.name] for f in resolved}:
        count = sum(values[f.name] == value and type(values[f.name]) is type(value) for f in resolved)
        assert shown.count(f"(default: auto, {value!r} for {name})") == count, value


def test_help_beside_a_model_says_what_auto_is_for_that_one():
    shown = boxes(help_of("irft.py", "--model", "pythia-1.4b"))
    assert "(default: auto, 50000 for pythia-1.4b)" in shown["data"]
    assert "(default: auto, 768 for pythia-1.4b)" in shown["model"]  # a window of 1024 less 256 new tokens


# ---- --config and --smoke ----
@pytest.fixture
def given(tmp_path, monkeypatch):
    """A function: text of a file, words -> the args of irft.py."""

    def parse(text: str, *words: str, name: str = "run.yaml", module=irft):
        (tmp_path / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["irft.py", "--config", name, *words])
        return command_line.given_args(module.Args, "")

    return parse


def test_a_file_of_flags_is_read_as_the_command_line_is(given):
    """YAML would make a text of 5e-7, False of no, and an int of the 1 that stands for a float."""
    text = "learning-rate: 5e-7\nmixed_precision: no\n--beta: 1\nshare-prompts: off\nT: 3\nnum_chunks: auto\nmax-grad-norm: inf\n"
    args = given(text + "model: ~/models/x\nreport_to: none\neval_samples: 7\ntokens-per-second: 0.0\n")
    assert (args.learning_rate, args.mixed_precision, args.share_prompts, args.T) == (5e-7, "no", False, 3)
    assert (args.num_chunks, args.model, args.report_to, args.eval_samples) == ("auto", "~/models/x", "none", 7)
    assert type(args.beta) is float and args.beta == 1.0 and args.max_grad_norm == math.inf
    rest = {f.name: f.default for f in dataclasses.fields(irft.Args)}
    changed = {name for name, value in rest.items() if getattr(args, name) != value}
    assert changed == set(
        "learning_rate mixed_precision beta share_prompts T max_grad_norm model eval_samples config".split()
    )


def test_several_sources_are_a_list_in_the_file(given):
    text = "dataset: ['my data.jsonl:0.7', b:0.3]\ncolumns: [prompt=question]\n"
    args = given(text)
    assert args.columns == "prompt=question"
    assert (
        args.dataset
        == given("T: 3\n", "--dataset", "my data.jsonl:0.7", "b:0.3").dataset
        == "'my data.jsonl:0.7' b:0.3"
    )


def test_what_is_typed_wins_over_the_file_even_if_it_is_the_default(given):
    args = given("T: 3\nbeta: 0.5\n", "--T", "5", "--no-share-prompts")
    assert (args.T, args.beta, args.share_prompts) == (5, 0.5, False)
    assert given("dry_run: true\n", "--no-dry-run").dry_run is False


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "learning-rat: 1\n",
            "run.yaml: found learning-rat, which is no flag for a file, expected --learning-rate, or a flag that",
        ),
        ("beta: x\n", "run.yaml: found beta 'x', expected a number"),
        ("T: 1.5\n", "run.yaml: found T '1.5', expected a whole number"),
        ("T: [1, 2]\n", "run.yaml: found T ['1', '2'], expected a whole number"),
        ("share_prompts: maybe\n", "run.yaml: found share_prompts 'maybe', expected true or false"),
        ("loss_type: dpo\n", "run.yaml: found loss_type 'dpo', expected one of logistic, linear"),
        ("resume: runs/x\n", "run.yaml: found resume, which is no flag for a file"),
        ("config: other.yaml\n", "run.yaml: found config, which is no flag for a file"),
        ("- 1\n", "run.yaml: found ['1'], expected YAML with a flag: value per line, or the args.json of a run"),
        ("# T: 1\n", "run.yaml: found nothing in it, expected YAML"),
        ("T: {\n", "found run.yaml (while parsing"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(given, text, message):
    with pytest.raises(UserError) as error:
        given(text)
    assert str(error.value).startswith(f"--config: {message}") and "\n" not in str(error.value)


def test_a_number_of_the_file_outside_its_range_is_refused_as_on_the_command_line(given):
    args = given("beta: -1\n", "--max-length", "64", "--max-new-tokens", "8")
    resolve_auto(args, irft.SETTINGS)
    with pytest.raises(UserError, match="^--beta: found -1.0, expected a number above 0"):
        args.check()


def test_a_missing_file_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["irft.py", "--config", "nowhere.yaml"])
    with pytest.raises(UserError, match=r"^--config: found nowhere.yaml \(.*No such file"):
        command_line.given_args(irft.Args, "")


def stored(module, script: str, **changed) -> str:
    """The args.json of a run."""
    args = module.Args(**changed)
    resolve_auto(args, module.SETTINGS)
    return json.dumps({"script": script, "args": dataclasses.asdict(args), "inputs": {}, "commit": None})


def test_the_args_of_a_run_give_the_same_run_again_in_a_folder_of_its_own(given):
    """A value that was auto stays what it was then; output_dir and what else a run chooses anew does not."""
    text = stored(
        irft, "irft", learning_rate=1e-5, output_dir="runs/x", stop_after="answers", max_grad_norm=math.inf, seed=9
    )
    args = given(text, name="args.json")
    assert (args.output_dir, args.stop_after, args.resume, args.dry_run) == ("auto", "", "", False)
    saved = json.loads(text)["args"]
    assert {name: value for name, value in vars(args).items() if name not in CHOSEN_ANEW} == {
        name: value for name, value in saved.items() if name not in CHOSEN_ANEW
    }
    assert args.max_samples == irft.SETTINGS["tiny"]["max_samples"] and args.seed == 9
    assert given(text, "--seed", "10", name="args.json").seed == 10


def test_the_args_of_another_script_are_refused(given):
    with pytest.raises(UserError, match="^--config: args.json: found a run of sft.py, expected one of irft.py"):
        given(stored(sft, "sft"), name="args.json")


def test_a_resumed_run_takes_no_file(given, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(stored(irft, "irft"))
    with pytest.raises(UserError, match="^--config: found run.yaml, expected none beside --resume run"):
        given("T: 3\n", "--resume", "run")


def test_smoke_makes_a_run_small_and_what_is_typed_wins(given, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rft.py", "--smoke", "--T", "2", "--max-samples", "24"])
    args = command_line.given_args(rft.Args, "")
    fields = {f.name for f in dataclasses.fields(rft.Args)}
    small = {name: value for name, value in config.SMOKE.items() if name in fields}
    assert len(small) > 10 and {n: getattr(args, n) for n in small} == {**small, "T": 2, "max_samples": 24}
    # a file of a large run is made small; one that says smoke itself keeps what else it says
    assert given("T: 3\nbeta: 0.5\n", "--smoke").T == 1
    args = given("T: 3\nsmoke: true\n")
    assert (args.T, args.smoke, args.max_samples) == (3, True, config.SMOKE["max_samples"])
    assert given("T: 3\nsmoke: true\n", "--no-smoke").max_samples == config.SMOKE["max_samples"]
    assert given("T: 3\n", "--no-smoke").T == 3


def test_every_size_of_smoke_is_a_flag_of_a_script_and_of_its_type():
    known = {f.name: f for module in SCRIPTS.values() for f in dataclasses.fields(module.Args)}
    assert set(config.SMOKE) <= set(known)


# ---- --stop-after ----
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "evaluate.py"])
def test_an_unknown_phase_is_answered_with_the_list(script, monkeypatch):
    name = script.removesuffix(".py")
    monkeypatch.setattr(sys, "argv", [script, "--stop-after", "PPOO"])
    with pytest.raises(UserError) as error:
        command_line.given_args(SCRIPTS[script].Args, "")
    assert str(error.value) == f"--stop-after: found PPOO, expected one of {', '.join(phases.PHASES[name])}"
    for word in phases.PHASES[name]:
        monkeypatch.setattr(sys, "argv", [script, "--stop-after", word])
        assert command_line.given_args(SCRIPTS[script].Args, "").stop_after == word


@pytest.mark.parametrize(
    "phase, word",
    [("SFT", "sft"), ("epoch 12", "epoch"), ("iteration 3: PPO", "ppo"), ("iteration 10: online DPO", "online-dpo")],
)
def test_the_word_for_a_phase_is_its_name_on_the_screen(phase, word):
    assert phases.word_of(phase) == word


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in ("evaluate.py", "aihf_mujoco.py")])
def test_the_list_is_that_of_the_scripts_phases(script):
    """Loops over updates, which end with a checkpoint, and the answers, which are kept in a file."""
    text = (ROOT / script).read_text()
    names = re.findall(r'run\.updates\(\s*f?"([^"]+)"', text)
    if "iteration {t}: {name}" in names:
        names.remove("iteration {t}: {name}")
        names += [f"iteration {{t}}: {name}" for name in re.findall(r'name = .*"([^"]+)"$', text, re.M)]
    words = {phases.word_of(re.sub(r"\{\w+\}", "0", name)) for name in names}
    words |= {"answers"} if '"generations" / f"iter_{t}.parquet"' in text else set()
    assert words == set(phases.PHASES[script.removesuffix(".py")])


# ---- completion ----
@pytest.mark.parametrize(
    "typed, expected",
    [
        ("python irft.py --loss", ["--loss-type"]),
        ("python irft.py --loss-type l", ["linear", "logistic"]),
        ("python3 aihf_mujoco.py --num-s", ["--num-seeds"]),
        ("python README.md --loss", []),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_flags_and_their_values(typed, expected):
    words = typed.split()
    code = f"""
        source docs/completion.bash
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        _cleanirl; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = {**child_environment(), "PATH": path}
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == expected, done.stderr


def test_the_last_value_of_a_flag_counts():
    assert last_value(["--T", "1", "--config=a", "--config", "b"], "--config") == "b"
    assert last_value([], "--config") is None and last_value(["--config"], "--config") is None
    assert last_value(["--T", "1"], "--config") is None and last_value(["--config="], "--config") == ""
