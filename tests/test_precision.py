"""Tests of the promises of bf16 on any CPU; it is emulated where it is not native. All other tests say that they mean float32.

Bounds are those of bf16's rounding: 2^-9 of a number, relatively. The random model's logits are below 0.25, so a token's
log-prob is off by up to 5e-4 nats, and a response of 9 tokens by up to 0.005.
"""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import command, drive, make_data, make_model, metrics, weights
from safetensors.torch import load_file

import aihf_direct
import irft
from common import UserError
from common.store import read_pairs

PPO = "--sft-epochs 1 --total-episodes 8 --rollout-batch-size 4 --num-ppo-epochs 2 --reward-learning-rate 1e-3"
SFT = "--num-train-epochs 1 --batch-size 8 --per-device-train-batch-size"
RUNS = {  # name -> a run of a script on one process
    "sft": f"sft.py {SFT} 8 --mixed-precision bf16",
    "sft_float32": f"sft.py {SFT} 8 --mixed-precision no",
    "irft": "irft.py --T 2 --num-train-epochs 1 --num-chunks 1 --mixed-precision bf16",
    "irft_previous": "irft.py --T 2 --num-train-epochs 1 --ref previous --mixed-precision bf16 --dtype bfloat16 --learning-rate 4e-3",
    "rft": f"rft.py --T 1 --num-train-epochs 1 {PPO} --mixed-precision bf16",
}
KILLED = {"irft": 4, "irft_previous": 5, "rft": 12}  # name -> the step in which it dies: iteration 0, iteration 1, PPO


def argv(place, name: str, out: str, *flags: str) -> list[str]:
    script, *given = RUNS[name].split()
    return command(script, place / "model", place / "data.jsonl", place / out, *given)[1:] + [*flags]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """All runs; some of them killed on a CPU with native bf16, and resumed on one without; SFT on two processes too."""
    folder = tmp_path_factory.mktemp("precision")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 20)
    scenarios = [{"argv": argv(folder, name, name)} for name in RUNS]
    for name, n in KILLED.items():
        given = argv(folder, name, f"{name}_killed", "--mixed-precision", "auto")
        scenarios.append({"argv": given, "at": "common.run.Run.step", "n": n})
    statuses, printed = drive(scenarios, NATIVE_BF16="1")
    assert statuses == [0] * len(RUNS) + [-signal.SIGKILL] * len(KILLED), printed
    resumed = [{"argv": [RUNS[name].split()[0], "--resume", str(folder / f"{name}_killed")]} for name in KILLED]
    statuses, printed = drive(resumed, NATIVE_BF16="0")
    assert statuses == [0] * len(KILLED), printed
    two = argv(folder, "sft", "sft_two", "--per-device-train-batch-size", "2")
    statuses, printed = drive([{"argv": two}], ranks=2)
    assert statuses == [0], printed
    return folder


@pytest.mark.parametrize("name", KILLED)
def test_a_run_keeps_the_precision_it_began_with_and_resumes_to_the_byte(place, name):
    """auto is decided once, at the run's start; whatever machine resumes it."""
    whole, resumed = place / name, place / f"{name}_killed"
    assert json.loads((resumed / "args.json").read_text())["args"]["mixed_precision"] == "bf16"
    expected, found = weights(whole), weights(resumed)
    assert {p.dtype for p in found.values()} == {torch.bfloat16 if "bfloat16" in RUNS[name] else torch.float32}
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["irft", "irft_previous"])
def test_the_first_loss_is_log_2(place, name):
    """Policy and reference score the same responses in batches of other sizes: four sums, each off by 0.005 at most."""
    rows = [r for r in metrics(place / name) if "loss" in r]
    firsts = [next(r for r in rows if r["outer_iteration"] == t) for t in range(2)]
    for row in firsts if name == "irft_previous" else firsts[:1]:
        assert row["loss"] == pytest.approx(math.log(2), abs=0.1 / 2 * 4 * 0.005)
    assert rows[-1]["loss"] < 0.65


@pytest.mark.parametrize(
    "script, check, name",
    [
        (irft, irft.check_first_loss, "loss"),
        (aihf_direct, aihf_direct.check_first_losses, "demonstrations/loss"),
        (aihf_direct, aihf_direct.check_first_losses, "preferences/loss"),
    ],
)
def test_the_check_of_the_first_loss_leaves_room_for_rounding_alone(script, check, name):
    run = SimpleNamespace(args=script.Args(beta=0.1), accelerator=SimpleNamespace(mixed_precision="bf16"))
    check(run, {name: math.log(2) + 0.04})
    for wrong in (math.log(2) - 0.06, math.log(2) + 0.06, float("nan")):
        with pytest.raises(UserError, match=f"first {name}"):
            check(run, {name: wrong})


def test_the_reference_is_the_policy_of_the_start(place):
    """In iteration 0 the policy itself scores for it, in iteration 1 a model loaded anew, and both round alike."""
    first, second = (read_pairs(place / "irft" / "generations" / f"iter_{t}.parquet") for t in range(2))
    assert len(first) == 20
    for a, b in zip(first, second, strict=True):
        assert a["chosen"] == b["chosen"] and a["ref_chosen"] == pytest.approx(b["ref_chosen"], abs=1e-5)
    exact = [r["eval/nll"] for name in ("sft", "sft_float32") for r in metrics(place / name)[:1]]
    assert 1e-4 < abs(exact[0] - exact[1]) < 0.005  # float32's scores are others


def test_ppo_starts_at_its_reference(place):
    """The sampler's log-probs and the reference's, of 9 tokens each."""
    first = next(r for r in metrics(place / "rft") if "objective/kl" in r)
    assert first["objective/kl"] == pytest.approx(0, abs=2 * 0.005)


def test_two_processes_agree_with_one_and_both_with_float32(place):
    """RMSprop's first step is as long for a tiny gradient as for a large one. So rounding turns a weight round where the
    gradients of an update's rows nearly cancel, to within 2^-8 of them, as in 1 of 400 weights: a distance of
    2 sqrt(1/400) of the way that all weights go.
    """
    start = load_file(place / "model" / "model.safetensors")
    way = {n: torch.cat([(w[k] - start[k]).flatten() for k in start]) for n in ("sft", "sft_two", "sft_float32")
           for w in [weights(place / n)]}  # fmt: skip
    for one, other in (("sft", "sft_two"), ("sft", "sft_float32"), ("sft_two", "sft_float32")):
        assert 0 < (way[one] - way[other]).norm() < 0.1 * way["sft_float32"].norm(), (one, other)
    for a, b in zip(metrics(place / "sft"), metrics(place / "sft_two"), strict=True):
        told = {"loss", "nll", "grad_norm", "eval/nll"} & a.keys()
        assert told and {k: a[k] for k in told} == pytest.approx({k: b[k] for k in told}, rel=2**-8)
