"""What --dry-run says of memory against what is measured; out of memory; checkpointing; adapters' checkpoints; attention."""

import copy
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, command, drive, make_data, make_model, run
from safetensors import safe_open
from safetensors.torch import load_file

import irft
import rft
import sft
from common import UserError, models, rewards
from common.data import collate
from common.engine import Engine
from common.logprobs import response_logprobs
from common.run import Run
from extras import adapters, loading, memory
from extras.adapters import fingerprint

sys.path.append(str(ROOT / "benchmark"))
import gpu
import memory as benchmark


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    benchmark.make_model(folder / "tiny", "tiny")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 16)
    return folder


# ---- the plan ----
CASES = [
    ("irft", "train", {}),
    ("irft", "train", {"gradient_checkpointing": True}),
    ("irft", "train", {"lora_r": 8, "batch_size": 4}),
    ("irft", "generate", {}),
    ("irft", "score", {}),
    ("rft", "reward step", {}),
    ("rft", "policy update", {}),
    ("rft", "policy update", {"gradient_checkpointing": True, "lora_r": 8}),
    ("rft", "answers", {}),
]


@pytest.mark.parametrize(("script", "phase", "settings"), CASES)
def test_the_plan_of_tiny_is_within_a_fifth_of_what_is_measured(place, script, phase, settings):
    args = benchmark.phase_args(script, place / "tiny", **settings)
    found = benchmark.measure_phase(phase, args)
    assert benchmark.planned(args)[phase] == pytest.approx(found, rel=0.2)


def test_deep_models_are_reckoned_from_two_and_three_layers(place):
    args = benchmark.phase_args("irft", place / "tiny")
    config = models.load_config(args.model)
    config.num_hidden_layers = 7
    plan = memory.forward_costs(args, config, 4)
    whole = memory.per_layer
    try:
        memory.per_layer = lambda measure, layers: measure(layers)
        assert plan == pytest.approx(memory.forward_costs(args, config, 4), rel=0.01)
    finally:
        memory.per_layer = whole


ENGINES = {  # engine -> what the launcher sets
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true"},
}


def launched_as(monkeypatch, engine: str, processes: int = 4) -> None:
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for name, value in ENGINES.get(engine, {}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("bf16", "given"),
    [(False, {}), (False, {"lora_r": 4}), (True, {}), (True, {"lora_r": 4}), (True, {"dtype": "bfloat16"})],
)
@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_what_an_engine_shares_out_is_divided(place, monkeypatch, engine, bf16, given):
    """Bytes per weight by hand, on four processes; RMSprop keeps one number for each that is trained."""
    args = benchmark.phase_args("rft", place / "tiny", mixed_precision="bf16" if bf16 else "no", **given)
    monkeypatch.setattr(memory, "device", lambda: "cpu")  # a CUDA update takes more
    policy = models.prepare_policy(args)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in policy.parameters()) - trained
    launched_as(monkeypatch, engine)
    plan = memory.Plan(args)
    loaded = 2 if "dtype" in given else 4
    weight, rest, state = {  # bytes of a weight that is trained, of a frozen one, of the optimizer's state
        "plain": (loaded, loaded, loaded),
        "zero": (2, 2, 4 + 4) if bf16 else (4, 4, 4 + 4),  # float32 weights beside the state
        "fsdp2": (4, loaded, 4),
    }["zero" if engine.startswith("zero") else engine]
    parts = {"plain": (1, 1, 1), "zero2": (1, 4, 4), "zero3": (4, 4, 4), "fsdp2": (4, 4, 4)}[engine]
    assert plan.held()["policy"] == (weight * trained + rest * frozen) / parts[0]
    assert plan.optimizer(plan.policy)["optimizer"] == state * trained / parts[1]
    step = plan.step(4 * 4 + 1, plan.policy["trained"], 8, 24, 4)
    assert step["gradients"] == weight * trained / parts[2] and ("ddp_buckets" in step) == (engine == "plain")
    assert "update" in plan.step(4 * 4, plan.policy["trained"], 8, 24, 4)  # one pass: no gradient before it
    phases = plan.answering()
    assert ("gathered" in phases["answers"]) == ("save" in phases) == (engine in ("zero3", "fsdp2"))
    if "save" in phases:
        assert phases["save"]["gathered"] == weight * trained + rest * frozen
        if not given:
            assert phases["answers"]["gathered"] == pytest.approx((2 if bf16 else 4) * trained, rel=0.01)
    found = (plan.computed.dtype, plan.computed.mixed_precision)
    asked = (args.dtype, "bf16" if bf16 else "no")
    assert found == (("bfloat16", "no") if bf16 and engine != "plain" else asked)


def test_gradients_add_up_where_an_update_takes_several_passes(place, monkeypatch):
    """Of PPO's minibatch, not of --batch-size."""
    given = dict(rollout_batch_size=8, num_mini_batches=2, batch_size=6)
    for micro, gradients in ((4, 0), (2, 8)):
        plan = memory.Plan(benchmark.phase_args("rft", place / "tiny", per_device_train_batch_size=micro, **given))
        assert plan.step(8 // 2, 8, 1, 24, 4)["gradients"] == gradients
    rows = []
    monkeypatch.setattr(memory.Plan, "step", lambda self, n, *rest: rows.append(n) or {})
    plan.training(True)
    assert rows == [6, 4]  # of the reward, of PPO


def test_vllm_takes_a_share_and_none_of_our_batches(place, capsys):
    args = benchmark.phase_args("irft", place / "tiny", generation="vllm")
    phases = memory.Plan(args).answering()
    assert "kv_cache" not in phases["generate"] and "activations" in phases["generate"]
    memory.print_memory_plan(args)
    assert "vLLM: 30% of each GPU besides, while it answers" in capsys.readouterr().out


def test_dry_run_prints_every_phase_with_and_without_checkpointing(place, capsys):
    memory.print_memory_plan(benchmark.phase_args("rft", place / "tiny"))
    printed = capsys.readouterr().out
    for phase in ("reward step", "policy update", "answers"):
        assert f"memory per device, {phase}: about 0." in printed
    assert printed.count("with --gradient-checkpointing: about 0.") == 2
    for part in ("policy", "value", "reward", "reference", "optimizer", "gradients", "activations", "kv_cache"):
        assert f"{part} 0." in printed


# ---- out of memory ----
def fake_run(args) -> Run:
    from accelerate import Accelerator

    run = Run.__new__(Run)
    run.args, run.engine, run.rank, run.world = args, Engine(Accelerator(cpu=True)), 0, 1
    run.accelerator = run.engine.accelerator
    return run


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")])
def test_out_of_memory_names_the_flag_and_the_estimate(place, error):
    def work(rows):
        if error:
            raise error
        torch.empty(2**50)  # the CPU allocator's own error

    run = fake_run(benchmark.phase_args("irft", place / "tiny"))
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError) as caught:
        run.step(model, torch.optim.SGD(model.parameters()), [1, 2], work, lambda row: row, 0.1)
    text = str(caught.value)
    assert text.startswith("out of memory: found ") and "\n" not in text
    assert "less than --per-device-train-batch-size 4, or than --max-length 256" in text
    assert text.endswith(f"train {benchmark.planned(run.args)['train'] / 2**30:.2f} GiB")
    with pytest.raises(UserError, match="less than --per-device-eval-batch-size 8.*generate .* GiB, score .* GiB$"):
        run.map_rows(3, work)


def test_other_errors_are_left_alone(place):
    run = fake_run(benchmark.phase_args("irft", place / "tiny"))
    with pytest.raises(RuntimeError, match="something else"):
        run.map_rows(3, lambda rows: (_ for _ in ()).throw(RuntimeError("something else")))


# ---- gradient checkpointing ----
def gradients_and_layers(model, layer, forward) -> tuple[torch.Tensor, int]:
    """(gradient of all that is trained, how often a layer ran)."""
    calls = []
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.zero_grad()
    forward().sum().backward()
    handle.remove()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), len(calls)


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("scalar", [False, True])
def test_checkpointing_changes_no_gradient_and_runs_layers_twice(place, lora_r, scalar):
    batch = collate([([3, 4, 5], [6, 7]), ([8], [9, 10, 11])], 0)
    found = []
    for checkpointing in (False, True):
        args = irft.Args(model=str(place / "model"), lora_r=lora_r, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        if scalar:
            model = rewards.prepare_scalar(args, args.model, "--reward-model").double().train()
            inner, forward = model.model, lambda model=model: model(batch, every=True)
        else:
            model = models.prepare_policy(args).double().train()
            inner, forward = model, lambda model=model: response_logprobs(model, batch).logprobs
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        layer = (inner.get_base_model() if lora_r else inner).gpt_neox.layers[0]
        found.append(gradients_and_layers(model, layer, forward))
    assert found[0][0].norm() > 1e-3
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)
    assert [calls for _, calls in found] == [1, 2]


# ---- LoRA: checkpoints, merging, four bits ----
RUNS = {
    "sft": ["sft.py", "--num-train-epochs", "1", "--lora-r", "2"],
    "rft": "rft.py --lora-r 2 --T 2 --sft-epochs 1 --num-train-epochs 1 --total-episodes 8 --rollout-batch-size 4"
    " --num-ppo-epochs 1 --reward-init sft --init initial".split(),
}


@pytest.fixture(scope="module")
def lora(place):
    """{name: (folder of a whole run, of one killed in its third checkpoint and resumed)}."""
    scenarios, expected, out = [], [], {}
    for name, (script, *flags) in RUNS.items():
        out[name] = place / f"whole_{name}", place / f"resumed_{name}"
        for folder in out[name]:
            argv = command(script, place / "model", place / "data.jsonl", folder, *flags, "--save-steps", "1")[1:]
            scenarios.append({"argv": argv})
            expected.append(0)
        n = 3 if name == "sft" else 9
        scenarios[-1] |= {"at": "common.run.Run.step", "n": n}
        expected[-1] = -9
        scenarios.append({"argv": [script, "--resume", str(out[name][1])]})
        expected.append(0)
    statuses, printed = drive(scenarios)
    assert statuses == expected, printed
    return out


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_lora_run_resumes_to_the_same_bytes(lora, name):
    whole, resumed = lora[name]
    for kind in ("final", "reward") if name == "rft" else ("final",):
        expected, found = (load_file(folder / kind / "model.safetensors") for folder in (whole, resumed))
        assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()


def stored(path) -> set[str]:
    with safe_open(path, "pt") as f:
        return set(f.keys())


def test_a_checkpoint_holds_adapters_and_no_base(lora):
    (last,) = sorted((lora["sft"][0] / "checkpoint").iterdir())[-1:]
    names = stored(last / "model.safetensors")
    assert names and all("lora_" in name for name in names)
    # in rft.py the reward's base is the SFT policy and no longer --model: it is kept; the head is trained whole
    (last,) = sorted((lora["rft"][0] / "checkpoint").iterdir())[-1:]
    reward = stored(last / "model_1.safetensors")
    assert any("score" in name for name in reward) and any("base_layer" in name for name in reward)


def test_frozen_weights_are_known_by_their_bits():
    p = torch.randn(7, 5)
    before = fingerprint(p)
    assert fingerprint(p.clone()) == before
    p[2, 3] += 1e-3
    assert fingerprint(p) != before
    assert fingerprint(p.bfloat16()) != before


def test_merging_leaves_the_model_as_it_was(place):
    args = irft.Args(model=str(place / "model"), lora_r=2)
    model = models.prepare_policy(args)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    before = copy.deepcopy(model.state_dict())
    batch = collate([([3, 4], [5, 6])], 0)
    expected = response_logprobs(model, batch).logprobs
    for four_bits in (False, True):  # with True the base is loaded again; here it never had four bits
        args.load_in_4bit = four_bits
        whole = adapters.merged(args, model)
        assert not any("lora" in name for name in whole.state_dict())
        torch.testing.assert_close(response_logprobs(whole, batch).logprobs, expected, rtol=0, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_four_bits_are_refused_without_a_gpu(place, monkeypatch):
    argv = command("sft.py", place / "model", place / "data.jsonl", place / "four", "--load-in-4bit")
    done = run(argv, check=False)
    assert done.returncode == 2 and "--load-in-4bit: found True, expected --lora-r above 0" in done.stderr
    args = sft.Args(model=str(place / "model"), lora_r=2, load_in_4bit=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = "no CUDA GPU" if importlib.util.find_spec("bitsandbytes") else "no bitsandbytes"
    with pytest.raises(
        UserError, match=f"--load-in-4bit: found {found}, expected bitsandbytes on a machine with a CUDA"
    ):
        models.load_model(args)
    with pytest.raises(UserError, match="in a script without a reward model"):
        small = benchmark.phase_args("rft", place / "model", lora_r=2, load_in_4bit=True)
        settings = {k: v for k, v in rft.SETTINGS["tiny"].items() if getattr(small, k) == "auto"}
        for name, value in settings.items():
            setattr(small, name, value)
        small.check()


# ---- attention ----
@pytest.mark.parametrize(
    ("asked", "card", "precision", "installed", "expected"),
    [
        ("auto", 0, "bf16", (True, True), "sdpa"),
        ("auto", 9, "bf16", (False, False), "sdpa"),
        ("auto", 9, "no", (True, True), "sdpa"),
        ("auto", 9, "bf16", (True, False), "flash_attention_2"),
        ("auto", 9, "bf16", (True, True), "flash_attention_3"),
        ("auto", 8, "bf16", (True, True), "flash_attention_2"),
        ("eager", 9, "bf16", (True, True), "eager"),
    ],
)
def test_attention_is_chosen_by_device_model_and_precision(monkeypatch, asked, card, precision, installed, expected):
    import transformers.utils
    from transformers import BloomConfig, GPTNeoXConfig

    monkeypatch.setattr(torch.cuda, "is_available", lambda: card > 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (card, 0))
    for version, there in zip((2, 3), installed, strict=True):
        monkeypatch.setattr(transformers.utils, f"is_flash_attn_{version}_available", lambda there=there: there)
    args = irft.Args(attn_implementation=asked, mixed_precision=precision)
    assert loading.attention(args, GPTNeoXConfig()) == expected
    assert loading.attention(args, BloomConfig()) == "eager"  # has neither flash attention nor sdpa


# ---- benchmark/gpu.sh ----
def gpu_benchmark(*flags: str):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # its python is the one that runs the tests
    return run(["bash", "benchmark/gpu.sh", *flags], check=False, PATH=path, CUDA_VISIBLE_DEVICES="")


def test_the_gpu_benchmark_refuses_a_machine_without_a_card():
    done = gpu_benchmark()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --device cuda: found no CUDA card") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_gpu_benchmark_prints_a_row_for_every_step():
    done = gpu_benchmark("--device", "cpu", "--shape", "tiny")
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "tiny" in line
    ]
    models = ["tiny"] + ["tiny, ZeRO-3"] * (importlib.util.find_spec("deepspeed") is not None)
    steps = ["SFT", "IRFT training", "reward step", "PPO learning", "generation"]
    expected = [[models[0], step] for step in [*steps, "IRFT training, checkpointing"]]
    assert [row[:2] for row in rows] == expected + [[model, s] for model in models[1:] for s in steps], done.stdout
    for row in rows:
        assert float(row[3].replace(",", "")) > 0 and float(row[4]) > 0, done.stdout
        assert re.fullmatch(r"\d+% of [\d.]+ T/s", row[5])


TORCHRUN = """Traceback (most recent call last):
  File "run.py", line 1, in main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============
gpu.py FAILED
------------
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : 1 (pid: 7)
  traceback : To enable traceback see: https://pytorch.org
============
"""
CHAINED = """[rank1]: Traceback (most recent call last):
[rank1]: KeyError: 'a'

[rank1]: During handling of the above exception, another exception occurred:

[rank1]: Traceback (most recent call last):
[rank1]:   File "x.py", line 2, in f
[rank1]: RuntimeError: the cause
[rank1]: in two lines
"""
PEER = """[rank0]: Traceback (most recent call last):
[rank0]:   File "y.py", line 3, in g
[rank0]: RuntimeError: Connection closed by peer
"""


@pytest.mark.parametrize(
    "stderr, expected",
    [
        (CHAINED + PEER + TORCHRUN, "RuntimeError: the cause"),
        ("W1 a warning\nerror: --x: found 1, expected 2\n" + PEER + TORCHRUN, "error: --x: found 1, expected 2"),
        (PEER + TORCHRUN.replace("To enable", "Signal 9 (SIGKILL) received by PID 7; to enable"), "Signal 9 (SIGKILL)"),
        (CHAINED.replace("[rank1]: ", ""), "RuntimeError: the cause"),
        ("a warning\nKilled\n=====\n", "Killed"),
        ("", ""),
    ],
)
def test_the_gpu_benchmark_names_the_cause_of_a_failure(stderr, expected):
    found = gpu.cause(stderr)
    assert found.startswith(expected) and (expected or not found)


def test_a_models_operations_are_those_that_torch_counts():
    """Forward and backward, against torch's own counter, for a model whose every position is a response token's."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    size = dict(vocab_size=512, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256)
    shape = gpu.Shape("gpt_neox", size, 1, 32, 32, 1, 1)
    for lora_r in (0, 4):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **size), attn_implementation="eager")
        model = models.make_trainable(model, irft.Args(lora_r=lora_r))
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids=torch.zeros(1, 32, dtype=torch.long)).logits.sum()
            forward = counter.get_total_flops()
            loss.backward()
        inner = model.get_base_model() if lora_r else model
        # torch counts whole attention matrices, of which causality needs half
        assert gpu.operations(inner, shape, False) == pytest.approx(forward, rel=0.1)
        assert gpu.operations(inner, shape, True) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_a_scalar_models_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForSequenceClassification

    size = dict(vocab_size=512, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256)
    shape = gpu.Shape("gpt_neox", size, 1, 32, 32, 1, 1)
    for lora_r in (0, 4):
        config = AutoConfig.for_model("gpt_neox", **size, num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
        model = models.make_trainable(model, irft.Args(lora_r=lora_r), "SEQ_CLS")
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros(1, 32, dtype=torch.long)).logits.sum().backward()
        inner = model.get_base_model() if lora_r else model
        assert gpu.scalar_operations(inner, shape) == pytest.approx(counter.get_total_flops(), rel=0.1)
