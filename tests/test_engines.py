"""DeepSpeed ZeRO-2 and ZeRO-3 and torch FSDP2, two processes on CPU: the weights of one plain process.

`make test-engines` runs them: deepspeed and ninja are not among the suite's dependencies.
"""

import importlib.util
import json
import math
import os
import signal

import pytest
import torch
from helpers import assert_same_metrics, command, drive, jsonl, make_data, make_model, metrics, tldr_rows, weights

from common.store import read_pairs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-engines has it"
)

ENGINES = ("zero2", "zero3", "fsdp2")
SHARED = "--mixed-precision no --batch-size 5 --per-device-train-batch-size 2 --per-device-eval-batch-size 3".split()
SHARED += "--eval-samples 2 --max-new-tokens 4".split()
RFT = "--T 2 --num-train-epochs 1 --sft-epochs 1 --total-episodes 10 --rollout-batch-size 5 --num-ppo-epochs 2 --eval-updates 2"
RATES = "--learning-rate 1e-4 --reward-learning-rate 1e-4 --sft-learning-rate 1e-4 --optimizer adamw"
FLAGS = {  # batches that two processes share unevenly, in micro-batches that they cannot fill; AdamW, whose state counts steps
    "sft.py": "--num-train-epochs 1 --learning-rate 1e-4".split(),
    "irft.py": "--T 2 --num-train-epochs 1 --replay all --learning-rate 1e-4".split(),
    "rft.py": f"{RFT} {RATES} --ref previous --init initial --reward-init sft".split(),
    "aihf_ppo.py": f"{RFT} {RATES}".split(),
    "aihf.py": f"--T 2 --sft-epochs 1 --total-prompts 6 --rollout-batch-size 3 --num-generations 2 --eval-updates 1 {RATES}".split(),
    "aihf_direct.py": "--T 1 --learning-rate 1e-4".split(),
    "irl_ppo_tldr.py": f"{RFT} {RATES} --prompts demonstrations --max-length 72 --reward-normalisation mean_std".split(),
    "irl_dpo_ultrachat.py": f"--T 2 --sft-epochs 1 --total-prompts 6 --rollout-batch-size 3 --num-generations 2 --eval-updates 1 {RATES}".split(),
}
SCRIPTS = os.environ.get("ENGINE_SCRIPTS", " ".join(FLAGS)).split()  # fewer of them where time is short
LORA = ("irft.py", "rft.py")  # once more with adapters: on the policy, and on models with a scalar head
TOLERANCE = 1e-5  # float32, on weights that moved by 3e-4 and more: sums in another order
KILLED = (("irft.py", 4), ("rft.py", 4), ("rft.py", 10))  # (script, step): in iteration 1; after SFT; in PPO


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model large enough for ZeRO-3 to cut up its matrices (it leaves tensors below 100,000 numbers whole), and data."""
    folder = tmp_path_factory.mktemp("engines")
    make_model(folder / "model", hidden_size=192, intermediate_size=768)
    make_data(folder / "data.jsonl", 11)
    make_data(folder / "prefs.jsonl", 11, preference=True)
    jsonl(folder / "posts.jsonl", tldr_rows(11))
    scenarios = [{"argv": argv(script, folder, "plain")} for script in SCRIPTS]
    statuses, printed = drive([*scenarios, *with_lora(folder, "plain")])
    assert statuses == [0] * (len(SCRIPTS) + len(LORA)), printed
    return folder


def argv(script: str, place, name: str) -> list[str]:
    flags = [*SHARED, *FLAGS[script]]
    if script.startswith("aihf"):
        flags += ["--preference-dataset", str(place / "prefs.jsonl")]
    data = place / ("posts.jsonl" if script == "irl_ppo_tldr.py" else "data.jsonl")
    return command(script, place / "model", data, place / f"{name}_{script}", *flags)[1:]


def with_lora(place, name: str) -> list[dict]:
    return [{"argv": [*argv(script, place, f"{name}_lora"), "--lora-r", "4"]} for script in LORA]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, place):
    """Name of the engine; all scripts have run under it, and some of them once more, killed on one rank and resumed."""
    name = request.param
    parameters = sum(1 for _ in weights(place / "plain_sft.py"))
    # of the reference on held-out rows and of two evaluations, answers and scores each; saving
    phases = 2 + 2 * 2 + 1
    chunks = {"set": {"extras.fused_head.CHUNK": 2000}}  # logits of 6 tokens, made again in the backward pass
    scenarios = [{"argv": argv(script, place, name), **chunks} for script in SCRIPTS] + with_lora(place, name)
    expected = [0] * (len(SCRIPTS) + len(LORA))
    for script, n in KILLED:
        killed = {"argv": argv(script, place, f"{name}_killed{n}"), "at": "common.run.Run.step", "n": n}
        resumed = {"argv": [script, "--resume", str(place / f"{name}_killed{n}_{script}")]}
        scenarios += [{**killed, **chunks}, {**resumed, **chunks}]
        expected += [-signal.SIGKILL, 0]
    bf16 = argv("irft.py", place, f"{name}_bf16")
    scenarios.append({"argv": [*bf16, "--mixed-precision", "bf16"]})
    expected.append(0)
    sharded = name != "zero2"
    for n in (phases * parameters, phases * parameters + 1):
        scenarios.append(
            {"argv": argv("sft.py", place, f"{name}_gather{n}"), "at": "extras.sharding.gather_parameter", "n": n}
        )
    expected += [-signal.SIGKILL if sharded else 0, 0]
    scenarios.append({"argv": argv("sft.py", place, f"{name}_moved"), "at": "common.run.Run.step", "n": 3})
    resume = ["sft.py", "--resume", str(place / f"{name}_moved_sft.py")]
    scenarios.append({"argv": resume, "file_limit": 20_000})
    scenarios.append({"argv": [*argv("sft.py", place, f"{name}_4bit"), "--lora-r", "4", "--load-in-4bit"]})
    expected += [-signal.SIGKILL, 2, 2]
    if name != "fsdp2":
        scenarios.append({"argv": [*argv("sft.py", place, f"{name}_dtype"), "--dtype", "bfloat16"]})
        expected.append(2)
    statuses, printed = drive(scenarios, config=f"{name}.yaml")
    assert statuses == expected, printed[-4000:]
    (place / f"{name}_printed").write_text(printed)
    return name


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_give_the_weights_of_one(engine, place, script):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    plain, found = place / f"plain_{script}", place / f"{engine}_{script}"
    assert same_models(plain, found, TOLERANCE) > 1e-4
    assert_same_metrics(plain, found)
    for path in (plain / "generations").iterdir():
        ids = [[p["rejected_ids"] for p in read_pairs(out / "generations" / path.name)] for out in (plain, found)]
        assert ids[0] == ids[1]
    policy, loaded = AutoModelForCausalLM.from_pretrained(found / "final", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    sums = [sum(p.double().sum().item() for p in x) for x in (policy.parameters(), weights(found).values())]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)
    if (found / "reward").exists():
        reward = AutoModelForSequenceClassification.from_pretrained(found / "reward")
        centers = [json.loads((out / "reward" / "config.json").read_text())["reward_center"] for out in (plain, found)]
        assert reward.config.num_labels == 1 and centers[1] == pytest.approx(centers[0], abs=1e-4) and centers[0]


@pytest.mark.parametrize("script", LORA)
def test_adapters_are_trained_and_merged_as_in_one_process(engine, place, script):
    """The reference is the adapter switched off, of weights that no process has whole."""
    plain, found = place / f"plain_lora_{script}", place / f"{engine}_lora_{script}"
    assert same_models(plain, found, TOLERANCE) > 1e-4
    assert_same_metrics(plain, found)


def same_models(one, other, tolerance: float) -> float:
    """Asserts that all models of two runs agree; returns how far the first run's policy moved from where it started."""
    from safetensors.torch import load_file

    for name in [p.parent.name for p in one.glob("*/model.safetensors")]:
        a, b = (load_file(out / name / "model.safetensors") for out in (one, other))
        assert a.keys() == b.keys()
        # no difference of two scores depends on the last bias: its gradient is rounding, which AdamW makes a step of
        told = [k for k in a if (name, k) != ("reward", "gpt_neox.final_layer_norm.bias")]
        assert max((a[k] - b[k]).abs().max() for k in told) <= tolerance, name
    start, end = load_file(one.parent / "model" / "model.safetensors"), weights(one)
    return max((start[k] - end[k]).abs().max() for k in end)


def test_in_bf16_policy_and_reference_coincide_at_first(engine, place):
    """The script itself checks it too; what is saved has the type of the engine's own weights."""
    plain, found = place / "plain_irft.py", place / f"{engine}_bf16_irft.py"
    (first,) = [row for row in metrics(found) if row["step"] == 1 and "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-3)
    stored = torch.bfloat16 if engine.startswith("zero") else torch.float32
    assert {p.dtype for p in weights(found).values()} == {stored}
    a, b = weights(plain), weights(found)
    assert max((a[k] - b[k].float()).abs().max() for k in a) < 2e-2


@pytest.mark.parametrize("script, n", KILLED)
def test_killed_and_resumed_equals_left_alone(engine, place, script, n):
    """To the bit: two ranks add two numbers, in whatever order."""
    whole, resumed = place / f"{engine}_{script}", place / f"{engine}_killed{n}_{script}"
    same_models(whole, resumed, 0.0)
    assert metrics(whole) == metrics(resumed)
    last = max((resumed / "checkpoint").iterdir())
    assert f'"engine": "{engine}"' in (last / "position.json").read_text()


def test_a_full_disk_leaves_the_last_good_checkpoint(engine, place):
    """Every process then writes a part of it, and one that cannot says so in one line."""
    printed = (place / f"{engine}_printed").read_text().splitlines()
    errors = [line for line in printed if "could not be written" in line]
    assert 1 <= len(errors) <= 2
    for error in errors:
        assert error.startswith("error: checkpoint could not be written to")
        assert "last good checkpoint" in error and "0000_00000002; free space" in error
    assert [p.name for p in (place / f"{engine}_moved_sft.py" / "checkpoint").glob("0*")] == ["0000_00000002"]


def test_types_of_weights_that_an_engine_cannot_hold_are_refused(engine, place):
    expected = f"error: --load-in-4bit: found {engine}, expected one process, or DDP (configs/ddp.yaml)"
    assert expected in (place / f"{engine}_printed").read_text()
    refused = f"error: --dtype: found bfloat16 without mixed precision, under {engine}, expected --mixed-precision bf16"
    assert (refused in (place / f"{engine}_printed").read_text()) == engine.startswith("zero")


def test_a_checkpoint_of_another_engine_or_number_of_processes(engine, place):
    """FSDP2's is cut up anew; ZeRO's cannot be, and says so; no other engine's is taken for one's own."""
    killed = place / f"{engine}_moved_sft.py"
    resume = {"argv": ["sft.py", "--resume", str(killed)]}
    statuses, printed = drive([resume])
    assert statuses == [2] and f"of {engine} on 2 process(es), but this is plain on 1" in printed
    statuses, printed = drive([resume], config=f"{engine}.yaml", processes=1)
    if engine == "fsdp2":
        assert statuses == [0], printed
        same_models(place / "fsdp2_sft.py", killed, TOLERANCE)
    else:
        assert statuses == [2] and f"but this is {engine} on 1; expected the same engine" in printed
