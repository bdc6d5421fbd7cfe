"""The scripts as a user meets them: help, plans, bad input, the launchers, and what a run leaves behind."""

import dataclasses
import json
import sys
import time

import pytest
from helpers import (
    ROOT,
    ZEPHYR_TEMPLATE,
    assert_phases_as_planned,
    assert_same_metrics,
    command,
    drive,
    launcher,
    make_classifier,
    make_data,
    make_model,
    make_tokenizer,
    metrics,
    run,
    weights,
)

import irft
import sft
from common import UserError
from extras.metrics import JUDGE_METRICS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 20)
    make_classifier(folder / "gold", folder / "model")
    return folder


def judged(place) -> list[str]:
    """Flags with which a run makes every measurement there is."""
    return ["--gold-reward-model", str(place / "gold"), "--baseline", str(place / "model")]


PAPERS = {"aihf.py": "2406.06874", "aihf_direct.py": "2406.06874", "aihf_ppo.py": "2406.06874"}


@pytest.mark.parametrize("script", [*PAPERS, "irft.py", "sft.py", "rft.py", "evaluate.py"])
def test_help_works_offline_and_is_quick(script):
    started = time.time()
    done = run([sys.executable, script, "--help"])
    assert time.time() - started < 15  # 4 s on an idle machine; the suite may run beside other work
    assert "--per-device-eval-batch-size" in done.stdout and f"arXiv:{PAPERS.get(script, '2405.17888')}" in done.stdout


# ---- bad input ----
def bad_inputs(place):
    """{name: (argv of irft.py, what its one line must say)}"""
    model, data = place / "model", place / "data.jsonl"
    write = lambda name, text: (place / name).write_text(text) and place / name  # noqa: E731
    row = '{"prompt": "a", "completion": "b"}\n'
    used = place / "used"
    used.mkdir(exist_ok=True)
    (used / "something").write_text("x")
    large = make_tokenizer()
    large.add_tokens([f"<extra{i}>" for i in range(5)])
    make_model(place / "mismatch")
    large.save_pretrained(place / "mismatch")
    make_model(place / "no_eos")
    config = json.loads((place / "no_eos" / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (place / "no_eos" / "tokenizer_config.json").write_text(json.dumps(config))
    (place / "not_a_model").mkdir(exist_ok=True)

    def flags(*extra, model=model, data=data, out=None):
        return command("irft.py", model, data, out or place / "never_made", *extra)[1:]

    return {
        "missing file": (flags(data=place / "no.jsonl"), "--dataset: found no file"),
        "missing column": (flags(data=write("c.jsonl", '{"question": "a"}\n')), "found columns question, expected one of"),
        "empty set": (flags(data=write("e.jsonl", "\n")), "found no rows"),
        "empty response": (flags(data=write("r.jsonl", '{"prompt": "a", "completion": ""}\n')), "row 0: found an empty response"),
        "non-text response": (flags(data=write("n.jsonl", '{"prompt": "a", "completion": [1]}\n')), "row 0: found list"),
        "not an object": (flags(data=write("o.jsonl", "7\n")), "row 0: found a int, expected an object"),
        "broken line": (flags(data=write("b.jsonl", row + row + '{"prompt": \n')), "line 3: found broken JSON"),
        "all too long": (flags("--max-prompt-length", "2"), "no row is left"),
        "window": (flags("--max-length", "1000"), "--max-length: found 1000, expected at most 128"),
        "vocabulary": (flags(model=place / "mismatch"), "embeddings in the model; expected a tokenizer made for this model"),
        "no eos": (flags(model=place / "no_eos"), "found a tokenizer without an EOS token"),
        "unknown model": (flags(model="no-such-model"), "--model no-such-model: found no local folder ./no-such-model"),
        "not a model": (flags(model=place / "not_a_model"), "the folder could not be read"),
        "unknown data": (flags(data="no-such-set"), "found no local path no-such-set"),
        "negative beta": (flags("--beta", "-0.1"), "--beta: found -0.1, expected a number above 0"),
        "zero beta": (flags("--beta", "0"), "--beta: found 0.0, expected a number above 0"),
        "T too large": (flags("--T", "50"), "--T: found 50, expected at most"),
        "T zero": (flags("--T", "0"), "--T: found 0, expected 1 or more"),
        "chunks too many": (flags("--T", "2", "--num-chunks", "99"), "--num-chunks: found 99, expected at most"),
        "batch": (flags("--batch-size", "0"), "--batch-size: found 0, expected a number above 0"),
        "warm-up": (flags("--warmup-ratio", "1.5"), "--warmup-ratio: found 1.5, expected at least 0 and below 1"),
        "folder in use": (flags(out=used), f"--output-dir: {used} already holds files"),
        "resume nothing": (["irft.py", "--resume", str(place / "nowhere")], "--resume: found no args.json"),
        "diverged": (flags("--learning-rate", "1e30", "--T", "1", "--save-steps", "1", out=place / "diverged"), "training diverged: found loss"),
    }  # fmt: skip


BAD = [
    "missing file", "missing column", "empty set", "empty response", "non-text response", "not an object", "broken line",
    "all too long", "window", "vocabulary", "no eos", "unknown model", "not a model", "unknown data", "negative beta",
    "zero beta", "T too large", "T zero", "chunks too many", "batch", "warm-up", "folder in use", "resume nothing", "diverged",
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(place):
    cases = bad_inputs(place)
    assert list(cases) == BAD
    out = {}
    scenarios = [{"argv": argv, "mark": name} for name, (argv, _) in cases.items()]
    statuses, printed = drive(scenarios)
    parts = printed.split("=== ")[1:]
    for (name, (_, expected)), status, part in zip(cases.items(), statuses, parts, strict=True):
        assert part.startswith(name)
        out[name] = (status, part, expected)
    return out


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_clear_line(outcomes, name):
    status, printed, expected = outcomes[name]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and expected in errors[0], printed
    assert "Traceback" not in printed


def test_a_run_that_its_first_update_breaks_has_no_checkpoint_to_call_good(outcomes, place):
    """Its weights are finite, but no longer what they compute. Of a later divergence: tests/test_stop.py."""
    assert not list((place / "diverged" / "checkpoint").iterdir())
    assert "last good checkpoint: none yet" in outcomes["diverged"][1]


def test_nothing_was_written_where_nothing_ran(outcomes, place):
    assert sorted(p.name for p in (place / "used").iterdir()) == ["something"]


# ---- a plan, and a run ----
def test_dry_run_prints_the_plan_and_writes_nothing(place):
    out = place / "dry"
    words = command("irft.py", place / "model", place / "data.jsonl", out, "--T", "3", "--replay", "all", "--dry-run")
    done = run(words)
    assert not out.exists()
    assert "iteration 2" in done.stdout and "memory per device, train" in done.stdout
    args = irft.Args(
        T=3, replay="all", batch_size=4, max_samples=0, learning_rate=1e-3, later_learning_rate=1e-4, num_chunks=3
    )
    n = sum(int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("  iteration"))
    plan = irft.make_plan(n, args)
    for t in range(3):
        assert f"{plan.K[t]} updates on {plan.pairs[t]} pairs" in done.stdout


def test_a_run_leaves_what_it_promises(place):
    out = place / "run"
    flags = [*judged(place), "--select-top-k", "12", "--T", "2", "--report-to", "tensorboard"]
    run(command("irft.py", place / "model", place / "data.jsonl", out, *flags), CLEANIRL_CACHE=str(place / "cache"))
    assert_phases_as_planned(out, 12)
    rows = metrics(out)
    training = [r for r in rows if "loss" in r]
    measured = [r for r in rows if "eval/nll" in r]
    assert [r["outer_iteration"] for r in measured] == [0, 1, 2]
    names = set().union(*(r.keys() for r in rows)) - {"step", "outer_iteration", "episodes"}
    assert names == set(irft.METRICS) - set(JUDGE_METRICS)
    assert training[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert training[-1]["rewards/margins"] > 0.01
    assert measured[0]["eval/kl_k1"] == pytest.approx(0, abs=1e-5) and measured[0]["eval/rewards/accuracies"] == 0.5
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.data import encode
    from common.store import read_pairs
    from extras.sources import load_rows

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "final"), AutoTokenizer.from_pretrained(out / "final")
    assert model.config.model_type == "gpt_neox" and tokenizer.eos_token == "</s>"
    card = (out / "final" / "README.md").read_text()
    assert "Base model: `" in card and "IRFT" in card and "eval/nll" in card
    pairs = [read_pairs(out / "generations" / f"iter_{t}.parquet") for t in range(2)]
    assert not {p["row"] for p in pairs[0]} & {p["row"] for p in pairs[1]}  # chunks are disjoint
    assert {"prompt", "prompt_text", "chosen", "rejected", "ref_chosen", "ref_rejected"} <= pairs[0][0].keys()
    given_back = encode(load_rows(str(out / "generations" / "iter_0.parquet"), "all"), tokenizer, 96, 64)
    for kind in ("prompt", "response"):  # the file as --dataset: what was trained on, rendered once
        stored = [p[f"{'chosen' if kind == 'response' else kind}_ids"] for p in pairs[0]]
        assert [r[f"{kind}_ids"] for r in given_back] == stored
    assert len(list((out / "samples").glob("*.md"))) == 3
    assert list(out.rglob("events.out.tfevents*"))
    saved = json.loads((out / "args.json").read_text())
    assert saved["args"]["T"] == 2 and "torch" in saved["versions"]
    phases = {json.loads(line)["phase"] for line in (out / "timing.jsonl").read_text().splitlines()}
    assert {"iteration 0: answers", "iteration 1: training", "evaluation 2"} <= phases


VARIANTS = [
    [
        "--ref",
        "previous",
        "--optimizer-state",
        "restart",
        "--num-train-epochs",
        "1",
        "--negatives",
        "greedy",
    ],  # released code
    ["--T", "1"],  # SPIN
    ["--T", "2", "--num-chunks", "1", "--ref", "previous", "--replay", "previous"],  # SPIN iterations 0 and 1
    ["--loss-type", "linear", "--replay", "all", "--optimizer", "adamw", "--temperature", "0.8"],
    ["--lora-r", "4", "--gradient-checkpointing", "--T", "2"],
    ["--mixed-precision", "bf16", "--dtype", "bfloat16", "--T", "2"],
]


def test_every_flag_of_the_papers_and_codes_runs_and_starts_at_log_2(place):
    outs = [place / f"variant_{i}" for i in range(len(VARIANTS))]
    scenarios = [
        {"argv": command("irft.py", place / "model", place / "data.jsonl", out, *flags)[1:], "mark": str(flags)}
        for out, flags in zip(outs, VARIANTS, strict=True)
    ]
    statuses, printed = drive(scenarios)
    assert statuses == [0] * len(VARIANTS), printed
    for out, flags in zip(outs, VARIANTS, strict=True):
        rows = [r for r in metrics(out) if "loss" in r]
        first = [
            next(r for r in rows if r["outer_iteration"] == t) for t in sorted({r["outer_iteration"] for r in rows})
        ]
        coincide = first if "previous" in flags[:5] and "--ref" in flags else first[:1]
        for row in coincide:
            assert row["loss"] == pytest.approx(
                0.0 if "linear" in flags else 0.6931, abs=0.05 if "bfloat16" in flags else 2e-4
            )
        assert (out / "final" / "model.safetensors").is_file()


def test_first_loss_check_catches_a_reference_that_is_not_the_policy():
    class Fake:
        args = irft.Args(beta=0.1)
        accelerator = type("A", (), {"mixed_precision": "no"})

    irft.check_first_loss(Fake, {"loss": 0.693147})
    with pytest.raises(UserError, match="first loss: found 0.70"):
        irft.check_first_loss(Fake, {"loss": 0.70})


def test_plan_covers_every_demonstration_once_per_pass():
    shared = dict(batch_size=8, learning_rate=5e-7, later_learning_rate=1e-7, max_samples=0)
    plan = irft.make_plan(103, irft.Args(T=10, num_chunks=5, **shared))  # Table 3: T = 10 on 5 chunks is a second pass
    assert sorted(i for chunk in plan.chunks for i in chunk) == list(range(103))
    assert [p for _, _, p in plan.schedule] == [5e-7] * 5 + [1e-7] * 5
    assert plan.schedule[0][:2] == (0, sum(plan.K[:5])) and plan.schedule[7][:2] == (sum(plan.K[:5]), sum(plan.K[5:]))
    restart = irft.make_plan(103, irft.Args(T=5, num_chunks=5, optimizer_state="restart", **shared))
    assert [s[:2] for s in restart.schedule] == [(sum(restart.K[:t]), restart.K[t]) for t in range(5)]
    spin = irft.make_plan(103, irft.Args(T=1, num_chunks=1, **shared))
    assert spin.K == [2 * 13] and spin.pairs == [103]
    replay = irft.make_plan(100, irft.Args(T=4, num_chunks=4, replay="all", **shared))
    assert replay.pairs == [25, 50, 75, 100]
    assert irft.make_plan(100, irft.Args(T=4, num_chunks=4, replay="previous", **shared)).pairs == [25, 50, 50, 50]


def test_sft_lowers_the_loss_and_reductions_differ(place):
    outs = {r: place / f"sft_{r}" for r in ("token", "sequence")}
    scenarios = [
        {
            "argv": command(
                "sft.py",
                place / "model",
                place / "data.jsonl",
                out,
                "--loss-reduction",
                r,
                "--num-train-epochs",
                "6",
                "--learning-rate",
                "2e-3",
                *judged(place),
            )[1:]
        }
        for r, out in outs.items()
    ]
    assert drive(scenarios)[0] == [0, 0]
    for out in outs.values():
        rows = metrics(out)
        training, measured = [r for r in rows if "loss" in r], [r for r in rows if "eval/nll" in r]
        assert measured[-1]["eval/nll"] < 0.7 * measured[0]["eval/nll"]
        assert set().union(*rows) - {"step", "outer_iteration"} == set(sft.METRICS) - set(JUDGE_METRICS)
        ratio = training[0]["nll"] / training[0]["loss"]
        assert ratio == pytest.approx(1.0) if "sequence" in out.name else ratio > 3


# ---- the launchers ----
@pytest.fixture
def paper_folder(tmp_path):
    """A folder from which the paper's command runs: small copies stand in for the model and the data set."""
    from common.store import write_pairs

    make_model(tmp_path / "zephyr-7b-sft-full", "mistral", make_tokenizer(chat_template=ZEPHYR_TEMPLATE), window=2048)
    rows = [json.loads(line) for line in make_data(tmp_path / "rows.jsonl", 30).read_text().splitlines()]
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows
    ]
    (tmp_path / "ultrachat_200k" / "data").mkdir(parents=True)
    write_pairs(tmp_path / "ultrachat_200k" / "data" / "train_sft-0.parquet", chats[:24])
    write_pairs(tmp_path / "ultrachat_200k" / "data" / "test_sft-0.parquet", chats[24:])
    (tmp_path / "irft.py").symlink_to(ROOT / "irft.py")
    return tmp_path


@pytest.mark.slow
def test_the_papers_command_works_as_typed(paper_folder):
    words = [launcher("accelerate"), "launch", "irft.py", "--T", "5", "--model", "zephyr-7b-sft-full"]
    run(words, cwd=paper_folder, PYTHONPATH="")
    (out,) = (paper_folder / "runs").iterdir()
    saved = json.loads((out / "args.json").read_text())["args"]
    assert (saved["dataset"], saved["learning_rate"], saved["beta"], saved["max_length"]) == (
        "ultrachat_200k",
        5e-7,
        0.1,
        2048,
    )
    assert (saved["optimizer"], saved["num_train_epochs"], saved["max_samples"]) == ("rmsprop", 2, 50_000)
    assert json.loads((out / "final" / "config.json").read_text())["model_type"] == "mistral"
    assert "<|user|>" in (out / "samples" / "0005.md").read_text()


@pytest.mark.slow
def test_without_folder_and_hub_the_papers_command_says_so_in_one_line(tmp_path):
    (tmp_path / "irft.py").symlink_to(ROOT / "irft.py")
    words = [launcher("accelerate"), "launch", "irft.py", "--T", "5", "--model", "zephyr-7b-sft-full"]
    done = run(words, cwd=tmp_path, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert (
        "found no local folder ./zephyr-7b-sft-full" in errors[0]
        and "alignment-handbook/zephyr-7b-sft-full" in errors[0]
    )
    direct = run([sys.executable, "irft.py", "--model", "zephyr-7b-sft-full"], cwd=tmp_path, check=False)
    assert direct.returncode == 2 and "Traceback" not in direct.stderr


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(place):
    flags = ["--T", "2", "--replay", "all", "--batch-size", "5", "--learning-rate", "1e-4"]  # uneven shares
    from safetensors.torch import load_file

    one, two = place / "one", place / "two"
    assert drive([{"argv": command("irft.py", place / "model", place / "data.jsonl", one, *flags)[1:]}])[0] == [0]
    words = command("irft.py", place / "model", place / "data.jsonl", two, *flags)[1:]
    run([launcher("torchrun"), "--standalone", "--nproc_per_node", "2", *words], ACCELERATE_USE_CPU="true")
    a, b = weights(one), weights(two)
    start = load_file(place / "model" / "model.safetensors")
    assert max((a[k] - start[k]).abs().max() for k in a) > 1e-3
    assert max((a[k] - b[k]).abs().max() for k in a) < 2e-6
    assert_same_metrics(one, two, rel=2e-3, abs_=2e-4)
    from common.store import read_pairs

    for t in range(2):
        ids = [[p["rejected_ids"] for p in read_pairs(out / "generations" / f"iter_{t}.parquet")] for out in (one, two)]
        assert ids[0] == ids[1]


@pytest.mark.slow
def test_the_launch_that_would_train_one_process_is_refused(place):
    words = command("irft.py", place / "model", place / "data.jsonl", place / "refused")[1:]
    done = run([launcher("accelerate"), "launch", "--cpu", "--num_processes", "2", *words], check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "launched for several processes, but accelerate runs 1" in errors[0]
    assert "accelerate launch --config_file configs/cpu.yaml --num_processes N irft.py" in errors[0]
    assert not (place / "refused").exists()


def test_flags_of_both_scripts_have_help():
    for cls in (irft.Args, sft.Args):
        assert all(f.type for f in dataclasses.fields(cls))
