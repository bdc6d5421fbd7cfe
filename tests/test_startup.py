"""Start-up: what --help and a wrong flag import, what a run imports, and who reads a checkpoint."""

import dataclasses
import json
import subprocess
import sys
from typing import get_type_hints

import pytest
from helpers import ROOT, child_environment, make_data, make_model
from test_repo import SCRIPTS

from common.store import write_manifest
from extras import resume
from extras.command_line import read_flags

SLOW = set("torch numpy transformers accelerate pyarrow gymnasium".split())
UNUSED = set(  # by a run without a flag that names them; pandas is not among them, since pyarrow imports it
    "datasets scipy sklearn vllm deepspeed peft tensorboard trackio wandb gymnasium openai".split()
)
RUN = """
import runpy, sys
status = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    status = stop.code or 0
print("status", status, *sorted({name for name, module in sys.modules.items() if module and "." not in name}))
"""


def start(script: str, *words: str) -> tuple[int, set[str], str]:
    """(exit status, modules that were imported, all that was printed) of a script in a process of its own.

    scikit-learn and scipy are hidden, since transformers imports them wherever they are installed; our own import of them
    would be an error.
    """
    code = f"import sys\nsys.modules['sklearn'] = sys.modules['scipy'] = None\nsys.argv = {[script, *words]!r}\nsys.path[0] = '.'{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=child_environment()
    )
    *printed, last = done.stdout.splitlines()
    _, status, *modules = last.split()
    return int(status), set(modules), "\n".join([*printed, done.stderr])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_wrong_flag_are_answered_without_torch(script, tmp_path):
    (tmp_path / "run.yaml").write_text("sede: 1\n")
    cases = (
        (["--help"], 0, "--output-dir"),
        (["--sede", "1"], 2, "expected --seed, or one"),
        (["--config", str(tmp_path / "run.yaml")], 2, "expected --seed, or a flag"),
        (["--tyro-write-completion", "bash", "-"], 0, "complete -F"),
    )
    for words, status, said in cases:
        found, modules, printed = start(script, *words)
        assert found == status and said in printed, printed
        assert ("tyro" in modules) == (status == 0) and not (imported := modules & SLOW), imported


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_that_help_shows_are_those_of_the_script(script, monkeypatch):
    def flags(cls) -> list[tuple]:
        kinds = get_type_hints(cls, include_extras=True)
        return [(field.name, field.default, kinds[field.name]) for field in dataclasses.fields(cls)]

    monkeypatch.setitem(sys.modules, "__main__", SCRIPTS[script])  # a script that is started has its annotations' names
    (early, settings), whole = read_flags(ROOT / script), SCRIPTS[script].Args
    assert flags(early) == flags(whole) and len(flags(early)) > 10
    assert settings == SCRIPTS[script].SETTINGS and len(settings) > 2


def test_a_run_imports_nothing_that_it_does_not_use(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl", 8)
    words = {
        "model": tmp_path / "model", "dataset": tmp_path / "data.jsonl", "eval-dataset": tmp_path / "data.jsonl",
        "output-dir": tmp_path / "run", "max-length": 96, "max-prompt-length": 64,
    }  # fmt: skip
    status, modules, printed = start(
        "irft.py", "--smoke", *(part for k, v in words.items() for part in (f"--{k}", str(v)))
    )
    assert status == 0, printed
    assert "accelerate" in modules and not (found := modules & UNUSED), found


def test_every_file_of_a_checkpoint_is_read_by_one_rank(tmp_path, monkeypatch):
    for i in range(5):
        (tmp_path / f"part_{i}").write_text(str(i))
    write_manifest(tmp_path)
    read, digest = [], resume.digest
    monkeypatch.setattr(resume, "digest", lambda path: read.append(path.name) or digest(path))
    assert not any(resume.manifest_problem(tmp_path, rank, 3) for rank in range(3))
    assert sorted(read) == sorted(json.loads((tmp_path / "manifest.json").read_text()))
    for i in range(5):
        (tmp_path / f"part_{i}").write_text("9")
        problems = [resume.manifest_problem(tmp_path, rank, 3) for rank in range(3)]
        assert [p for p in problems if p] == [f"part_{i} differs from its checksum"]
        (tmp_path / f"part_{i}").write_text(str(i))
