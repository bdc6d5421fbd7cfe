"""Two processes started as a user starts them: shapes of a batch that give the same weights, and what ends a run."""

import json
import os
import signal
import socket
import subprocess
import time
import weakref

import psutil
import pytest
import torch
import yaml
from helpers import (
    ROOT,
    OnDemand,
    assert_same_metrics,
    child_environment,
    command,
    drive,
    jsonl,
    launch,
    make_data,
    make_model,
    metrics,
    slow_unless,
    tldr_rows,
    weights,
)

from common.engine import all_weights
from common.store import read_pairs
from extras import sharding

PPO = "--sft-epochs 0 --total-episodes 16 --rollout-batch-size 8 --num-ppo-epochs 1 --eval-updates 2"
ONLINE_DPO = "--sft-epochs 0 --total-prompts 16 --rollout-batch-size 8 --num-generations 2 --eval-updates 2"
FLAGS = {
    "sft.py": "--num-train-epochs 2",
    "irft.py": "--T 2 --num-train-epochs 1",
    "rft.py": f"--T 1 --num-train-epochs 1 {PPO}",
    "aihf.py": f"--T 1 {ONLINE_DPO}",
    "aihf_ppo.py": f"--T 1 {PPO}",
    "aihf_direct.py": "--T 1",
    "irl_ppo_tldr.py": f"--T 1 {PPO} --prompts demonstrations --max-length 72",
    "irl_dpo_ultrachat.py": f"--T 1 {ONLINE_DPO}",
}
SHAPES = [(script, micro) for script in FLAGS for micro in (4, 2)]
TOLERANCE = 1e-5  # float32, on weights that moved by 1e-4 and more: sums in another order


def argv(place, name: str, script: str, micro: int) -> list[str]:
    flags = (
        f"--mixed-precision no --batch-size 8 --per-device-train-batch-size {micro} --eval-samples 2 {FLAGS[script]}"
    )
    if "--eval-updates" in flags:  # a reward is learned
        flags += " --reward-learning-rate 1e-4 --optimizer adamw"
    if script.startswith("aihf"):
        flags += f" --preference-dataset {place / 'prefs.jsonl'}"
    data, out = place / ("posts.jsonl" if script == "irl_ppo_tldr.py" else "data.jsonl"), place / f"{name}_{script}"
    return command(script, place / "model", data, out, "--learning-rate", "1e-4", *flags.split())[1:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 20)
    make_data(folder / "prefs.jsonl", 16, preference=True)
    jsonl(folder / "posts.jsonl", tldr_rows(20))
    return folder


@pytest.fixture(scope="module")
def runs(place):
    """{(script, micro): (folder, what was printed)}: on one process in batches of 8, on two in micro-batches of 4 and 2."""

    def make(key: tuple[str, int]):
        script, micro = key
        name, ranks = (f"2x{micro}", 2) if micro < 8 else ("8", 0)
        scenario = {"argv": argv(place, name, script, micro), "report_writes": str(place)}
        statuses, printed = drive([scenario], ranks=ranks)
        assert statuses == [0], printed
        return place / f"{name}_{script}", printed

    return OnDemand(make)


@pytest.mark.parametrize(
    "shape", slow_unless(lambda shape: shape == ("rft.py", 2), SHAPES), ids=lambda shape: f"{shape[0]}-{shape[1]}"
)
def test_one_process_with_8_is_two_with_4_or_with_twice_2(runs, place, shape):
    from safetensors.torch import load_file

    one, two = (runs[key][0] for key in ((shape[0], 8), shape))
    a, b, start = weights(one), weights(two), load_file(place / "model" / "model.safetensors")
    assert max((a[k] - start[k]).abs().max() for k in a) > 1e-4
    assert max((a[k] - b[k]).abs().max() for k in a) < TOLERANCE
    assert_same_metrics(one, two)
    for path in (one / "generations").iterdir():
        rows = [[p["rejected_ids"] for p in read_pairs(out / "generations" / path.name)] for out in (one, two)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "shape", slow_unless(lambda shape: shape == ("rft.py", 2), SHAPES), ids=lambda shape: f"{shape[0]}-{shape[1]}"
)
def test_rank_0_alone_writes(runs, shape):
    """Python sees no write of the other one, but into the folder of a checkpoint being made."""
    out, printed = runs[shape]
    wrote = [line for line in printed.splitlines() if line.startswith("WROTE")]
    assert wrote and all("/checkpoint/.partial_" in line for line in wrote)
    assert printed.count("2 process(es)") == 1 and (out / "checkpoint").exists()


def start(place, name: str, *more: str, script="sft.py", scenario=None, flags: tuple = ()) -> subprocess.Popen:
    """A script on two processes, in a process group of its own; a scenario of kill_at.py may strike it."""
    words = [*argv(place, name, script, 4), *flags]
    if scenario is not None:
        words = [str(ROOT / "tests" / "kill_at.py"), json.dumps({"argv": words, **scenario})]
    words = [*launch("cpu.yaml"), *more, *words]
    pipe, env = subprocess.PIPE, child_environment()
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def ends(process: subprocess.Popen) -> tuple[str, str]:
    """What it printed; AssertionError if it, or a process of its group, goes on for long."""
    try:
        printed = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the run hangs: {process.communicate()}") from None
    return printed


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_run_with_its_text(place):
    strike = {"at": "common.run.Run.step", "n": 2, "rank": 1, "signal": 0}
    process = start(place, "error", scenario=strike)
    _, errors = ends(process)
    assert process.returncode != 0
    assert "RuntimeError: failure that the test asked for in common.run.Run.step" in errors
    assert not (place / "error_sft.py" / "final").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_one_process_can_resume_it(runs, place):
    strike = {"at": "common.run.Run.step", "n": 4, "rank": 1, "signal": int(signal.SIGKILL)}
    process = start(place, "killed", scenario=strike)
    ends(process)
    out = place / "killed_sft.py"
    assert process.returncode != 0 and sorted(p.name for p in (out / "checkpoint").iterdir())[-1][-1] in "23"
    statuses, printed = drive([{"argv": ["sft.py", "--resume", str(out)]}])
    assert statuses == [0], printed
    a, b = weights(runs["sft.py", 8][0]), weights(out)
    assert max((a[k] - b[k]).abs().max() for k in a) < TOLERANCE


@pytest.mark.slow
def test_sigterm_to_launcher_and_ranks_writes_one_checkpoint_that_can_be_resumed(place):
    """The ranks get the signal twice, the launcher passes it on as well. A port in use is no obstacle."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = ["--main_process_port", str(taken.getsockname()[1])]
        flags = ("--T", "1", "--num-train-epochs", "500", "--save-steps", "100000")
        process = start(place, "stopped", *port, script="irft.py", flags=flags)
        out, deadline = place / "stopped_irft.py", time.time() + 400
        while time.time() < deadline and not ((out / "metrics.jsonl").exists() and len(metrics(out)) > 3):
            time.sleep(0.05)
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.send_signal(signal.SIGTERM)
        printed, _ = ends(process)
    assert process.returncode != 0 and f"SIGTERM: stopped; continue with --resume {out}" in printed
    steps = max(row["step"] for row in metrics(out))
    assert [p.name[-8:] for p in (out / "checkpoint").iterdir()] == [f"{steps:08d}"]
    last = next((out / "checkpoint").iterdir())
    assert json.loads((last / "position.json").read_text())["processes"] == 2
    scenario = {"argv": ["irft.py", "--resume", str(out)], "at": "common.run.Run.step", "n": 3}
    assert drive([scenario])[0] == [-signal.SIGKILL]
    assert [row["step"] for row in metrics(out) if "loss" in row] == list(range(1, steps + 3))


@pytest.mark.slow
def test_a_checkpoint_of_another_engine_is_refused(runs, tmp_path):
    out, _ = runs["sft.py", 4]
    for path in [p / "position.json" for p in (out / "checkpoint").iterdir()]:
        text = path.read_text()
        assert '"engine": "plain"' in text and '"processes": 2' in text
        path.write_text(text.replace('"plain"', '"zero3"'))
        manifest = path.parent / "manifest.json"
        seals = json.loads(manifest.read_text())
        del seals["position.json"]
        manifest.write_text(json.dumps(seals))
    (out / "final").rename(tmp_path / "final")
    statuses, printed = drive([{"argv": ["sft.py", "--resume", str(out)]}])
    assert statuses == [2] and "of zero3 on 2 process(es), but this is plain on 1; expected the same engine" in printed


def test_every_config_is_read_by_accelerate_and_named_in_the_docs():
    from accelerate.commands.config.config_args import load_config_from_file

    page = (ROOT / "docs" / "engines.md").read_text()
    files = sorted((ROOT / "configs").iterdir())
    names = ["cpu.yaml", "ddp.yaml", "fsdp2.yaml", "multi_node.yaml", "zero2.yaml", "zero3.yaml"]
    assert [f.name for f in files] == names
    for file in files:
        config = load_config_from_file(str(file))
        assert config.num_processes >= 2 and f"--config_file configs/{file.name} " in page
        settings = yaml.safe_load(file.read_text())
        text = json.dumps(settings)
        # what the scripts say themselves: precision, clipping, and how an update is cut up
        assert not any(word in text for word in ("mixed_precision", "gradient", "batch"))


def test_a_twin_has_weights_inside_whole_alone():
    """They are the model's, in the type of training or as stored; its buffers and ties too. A part may be whole already."""
    model = torch.nn.Module()
    model.a = torch.nn.Linear(3, 3)
    model.b = torch.nn.Linear(3, 3)
    model.b.weight = model.a.weight
    model.register_buffer("center", torch.zeros(()))
    model.a.forward = lambda x: x
    twin = sharding.empty_copy(model)
    assert all(p.is_meta and not p.requires_grad for p in twin.parameters())
    assert twin.b.weight is twin.a.weight and "forward" not in vars(twin.a)
    for path, part in twin.named_modules():
        part.__dict__["shards"] = weakref.ref(model.get_submodule(path)), torch.bfloat16
    with all_weights(twin.a) as a, all_weights(twin):
        assert a.weight.dtype == torch.bfloat16 and torch.equal(a.weight, model.a.weight.bfloat16())
        assert not twin.b.bias.is_meta
    with all_weights(twin, cast=False):
        assert torch.equal(twin.b.weight, model.a.weight) and twin.b.weight is twin.a.weight
        twin.center += 2.0
    assert all(p.is_meta for p in twin.parameters()) and model.center == 2.0
    with all_weights(model) as same:
        assert same is model
