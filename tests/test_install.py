"""Installation: the build of torch that make chooses, the lock against the ranges, and what the project file names."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.append(str(ROOT / "requirements"))
import lock
import torch_build


# ---- the build of torch ----
@pytest.fixture(scope="module")
def index():
    """Address of a server on this machine that has /cpu/torch/ and nothing else."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/cpu/torch/" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def executable(path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


DRIVER = {  # what a machine has -> what its nvidia-smi does
    "a GPU": 'echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"',
    "a driver without a GPU": 'echo "No devices were found"',
    "a driver that fails": 'echo "GPU? NVIDIA-SMI has failed because it could not talk to the driver"; exit 9',
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function: what the machine has -> its PATH, with an nvidia-smi of ours or none. It has no device file of a GPU."""
    real = torch_build.glob.glob
    monkeypatch.setattr(
        torch_build.glob, "glob", lambda pattern: [] if pattern.startswith("/dev/nvidia") else real(pattern)
    )

    def make(has: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        if has in DRIVER:
            executable(folder / "nvidia-smi", DRIVER[has])
        monkeypatch.setenv("PATH", str(folder))
        return str(folder)

    return make


@pytest.mark.parametrize("has", [*DRIVER, "nothing"])
def test_a_gpu_is_one_that_the_driver_lists(machine, has):
    machine(has)
    assert torch_build.has_gpu() == (has == "a GPU")


def test_a_device_file_is_a_gpu_too(machine, tmp_path):
    machine("nothing")
    (tmp_path / "nvidiactl").touch()
    assert not torch_build.has_gpu(str(tmp_path / "nvidia[0-9]*"))
    (tmp_path / "nvidia0").touch()
    assert torch_build.has_gpu(str(tmp_path / "nvidia[0-9]*"))


@pytest.mark.parametrize(
    "has, path, pip_args, platform, takes",
    [
        ("nothing", "/cpu", [], "linux", True),
        ("a driver that fails", "/cpu/", ["-c", "requirements-lock.txt"], "linux", True),
        ("a GPU", "/cpu", [], "linux", False),
        ("nothing", "/cpu", [], "darwin", False),
        ("nothing", "/gone", [], "linux", False),  # an error page
        ("nothing", "/cpu", ["--index-url", "http://x"], "linux", False),
        ("nothing", "/cpu", ["--extra-index-url=http://x"], "linux", False),
        ("nothing", "/cpu", ["-ihttp://x"], "linux", False),
        ("nothing", "/cpu", ["--no-index", "-f", "wheels"], "linux", False),
    ],
)
def test_the_cpu_build_is_chosen_where_there_is_no_gpu_and_its_index_answers(
    machine, index, has, path, pip_args, platform, takes
):
    machine(has)
    arguments, reason = torch_build.choose(index + path, pip_args, platform)
    assert arguments == (["--extra-index-url", index + path] if takes else []), reason


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/cpu", "no address", ""])
def test_an_index_that_does_not_answer_is_left_out(machine, address):
    machine("nothing")
    arguments, reason = torch_build.choose(address, [], "linux")
    assert arguments == [] and "does not answer" in reason


@pytest.mark.skipif(
    sys.platform != "linux" or torch_build.has_gpu() or not shutil.which("make"), reason="a GPU, or no make"
)
@pytest.mark.parametrize(
    "path, pip_args, source", [("/cpu", "", True), ("/gone", "", False), ("/cpu", "--no-index", False)]
)
def test_make_install_gives_pip_the_chosen_index(tmp_path, index, path, pip_args, source):
    """With a pip that writes down what it is asked for. torch comes first, so that the second line finds it installed."""
    pip = tmp_path / "pip"
    executable(pip, f'echo "$@" >> {tmp_path}/asked')
    executable(
        tmp_path / "python", f'[ "$1" = -m ] && mkdir -p "$3/bin" && exec cp {pip} "$3/bin"\nexec {sys.executable} "$@"'
    )
    words = [
        f"PYTHON={tmp_path}/python",
        f"VENV={tmp_path}/venv",
        f"TORCH_CPU_INDEX={index}{path}",
        f"PIP_ARGS={pip_args}",
    ]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PIP_ARGS")}
    done = subprocess.run(["make", "install", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "torch: " in done.stderr, done.stderr
    first, second = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    common = ["install", "--quiet", "--disable-pip-version-check", *pip_args.split()]
    chosen = ["--extra-index-url", index + path] if source else []
    assert first == [*common, *chosen, "torch==2.13.0"] and second == [*common, "-r", "requirements.txt"]


def test_make_installs_the_torch_of_the_lists():
    (pinned,) = [str(one) for one in lock.stated(ROOT / "requirements" / "core.txt") if one.name == "torch"]
    assert re.findall(r"torch==[\d.]+", (ROOT / "Makefile").read_text()) == [pinned]


# ---- the lock ----
def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements-lock.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_lock_satisfies_the_ranges():
    found = pins()
    wanted = [one for name in lock.LISTS for one in lock.stated(ROOT / "requirements" / f"{name}.txt")]
    assert len(wanted) > 20 and len(found) > 60
    for one in wanted:
        assert one.specifier.contains(found[canonicalize_name(one.name)], prereleases=False), one
    read = (ROOT / "requirements.txt").read_text()
    assert [f"requirements/{name}.txt" for name in lock.LISTS] == re.findall("^-r (.*)$", read, re.M)


def test_the_lock_has_names_and_numbers_alone():
    """No address, no path, no build of one machine: +cpu would not be found on a machine with a GPU."""
    for line in (ROOT / "requirements-lock.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line


def test_the_lock_follows_what_packages_need(monkeypatch):
    """Through extras and markers; a package that another system would need is left out, and a build has no name."""
    needs = {
        "a": ["B>=1 ; extra == 'x'", "c ; extra == 'y'", "d[z]"], "b": ["a"], "d": ["e ; extra == 'z'", "f ; os_name == 'nowhere'"],
    }  # fmt: skip
    monkeypatch.setattr(lock, "requires", lambda name: needs.get(name))
    monkeypatch.setattr(lock, "version", lambda name: {"a": "1.0+cpu"}.get(name, "2"))
    assert lock.installed([Requirement("A[x]")]) == {"a": "1.0", "b": "2", "d": "2", "e": "2"}
    assert list(lock.installed([Requirement("a")])) == ["a", "d", "e"]


# ---- the project file ----
def test_the_wheel_has_every_file_that_the_embedded_model_and_data_are_made_of():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tiny"]
    inside = {path for pattern in data for path in (ROOT / "tiny").glob(pattern)}
    others = {path for path in (ROOT / "tiny").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others and others == inside
