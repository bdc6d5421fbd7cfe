"""Bad input to every script: exit status 2, one line that begins with `error:` and names the flag or row, nothing written.

Three groups: what the declared ranges, choices and types of all flags rule out (generated, more than a thousand); a table of
whole command lines with their files; and what surrounds them: launches, trackers, resumes, warnings, names of models.
"""

import dataclasses
import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from helpers import ROOT, jsonl, make_data, make_model, make_tokenizer, slow_unless

from common import UserError, args
from common.args import LARGEST, flag, main, parse_args, ranges_of, resolve_auto, settings_row
from extras import launch, trackers
from extras.words import kinds_of

sys.path[:0] = [str(ROOT / "docs")]
from generate import MODULES, flag_rows  # noqa: E402

SCRIPTS = {module.__name__: module for module in MODULES}
SCRIPTS |= {f"benchmark.{name}": importlib.import_module(f"benchmark.{name}") for name in ("gold", "preferences")}
TOYS = {name: importlib.import_module(name) for name in ("example1", "example2", "two_actions", "exact")}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function: script, words -> the one line of its refusal; checks status, traceback, time, and what was left behind."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(script: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        started, problem = time.monotonic(), None
        try:
            if script in TOYS:
                import bandit

                bandit.run(lambda: TOYS[script].example(bandit.parse_args(TOYS[script].Args, "")))
            else:
                module = SCRIPTS[script]
                entry = next(getattr(module, n) for n in ("train", "evaluate", "make") if hasattr(module, n))
                parse = getattr(module, "parse", lambda: parse_args(module.Args, "", module.SETTINGS))
                main(lambda: entry(parse()))
        except SystemExit as stop:
            problem = None if stop.code == 2 else f"exit status {stop.code}"
        except BaseException as error:  # what a user would see as a traceback
            problem = repr(error)
        else:
            problem = "no refusal"
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        problem = problem or (None if len(lines) == 1 else f"{len(lines)} lines that begin with error:")
        problem = problem or (None if time.monotonic() - started < 20 else "slow")
        problem = problem or (f"left {left}" if (left := [p.name for p in here.iterdir()]) else None)
        return f"{problem}: {script} {' '.join(map(str, words))}" if problem else lines[0]

    return call


# ---- generated: what the flags of every script declare ----
def wrong_values(name: str, kind, cls) -> list[str]:
    """Words that are no value of a flag."""
    kinds = kinds_of(kind)
    if any(k in (int, float) for k in kinds):
        tried = ["-1", "0", "1", "1.5"] if int in kinds else ["-1", "0", "1", "inf", "-inf", "nan"]
        fits = ranges_of(cls)[name].holds
        wrong = [t for t in tried if not fits(float(t)) or (t == "1.5" and int in kinds)]
        wrong += [t for t in tried if t in ("inf", "-inf", "nan") and name not in cls.may_be_infinite]
        wrong += [str(LARGEST + 1), "1e3"] if int in kinds else ["1,5"]
        return list(dict.fromkeys([*wrong, "", "many"]))
    if bool in kinds:
        return []
    if any(get_origin(k) is Literal for k in kinds):
        return [str(get_args(kinds[0])[-1]) + "x", ""]
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    return ["", " "] if default and name not in cls.may_be_empty else []


@pytest.mark.parametrize("script", slow_unless(lambda script: script in ("sft", "irft", "evaluate"), SCRIPTS))
def test_no_flag_takes_a_value_outside_what_it_declares(script, refused):
    cls = SCRIPTS[script].Args
    kinds, tried, failed = get_type_hints(cls), 0, []
    for field in dataclasses.fields(cls):
        cases = [[flag(field.name), value] for value in wrong_values(field.name, kinds[field.name], cls)]
        cases += [[flag(field.name), "yes"], [f"{flag(field.name)}=yes"]] if kinds[field.name] is bool else []
        cases += [[f"{flag(field.name)}x", "1"]]
        for words in cases:
            line, tried = refused(script, *words), tried + 1
            if not line.startswith(f"error: {words[0].partition('=')[0]}: found "):
                failed.append(line)
    assert not failed, failed
    assert tried >= 40


STATED = {  # in a flag's help -> its declared range
    "> 0": "a number above 0", ">= 0": "0 or more", ">= 1": "1 or more", ">= 2": "2 or more, to choose a pair from",
    "in [0, 1)": "at least 0 and below 1", "in (0, 1]": "a number above 0 and at most 1", "in [0, 1]": "between 0 and 1",
    "in (0, 1)": "a share above 0 and below 1", "0 means all": "0 or more", "0 keeps all": "0 or more",
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_declares_a_range_and_its_help_says_the_same(script):
    cls = SCRIPTS[script].Args
    kinds, ranges = get_type_hints(cls), ranges_of(cls)
    docs = {name: meaning for name, (_, meaning) in flag_rows(cls).items()}
    numbers = [f.name for f in dataclasses.fields(cls) if {int, float} & set(kinds_of(kinds[f.name]))]
    assert set(numbers) == set(ranges)
    for name in numbers:
        for stated, expected in STATED.items():
            if f", {stated}" in docs[name] or f" {stated}:" in docs[name] or f"; {stated}" in docs[name]:
                assert ranges[name].expected == expected, (name, docs[name])


# ---- a table: script, words, what the one line says ----
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, data and runs, whole and spoilt, that the table names as {place}/..."""
    folder = tmp_path_factory.mktemp("bad")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    make_data(folder / "pairs.jsonl", preference=True)
    jsonl(folder / "one_prompt.jsonl", [{"prompt": "return", "completion": f"b {i}"} for i in range(120)])
    jsonl(folder / "strings.jsonl", ["a", "b"])
    jsonl(folder / "columns.jsonl", [{"question": "a", "answer": "b"}])
    jsonl(folder / "numbers.jsonl", [{"prompt": 1, "completion": 2}])
    jsonl(folder / "blank.jsonl", [{"prompt": " ", "completion": "a"}])
    jsonl(folder / "users.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    jsonl(folder / "rows.txt", [{"prompt": "a", "completion": "b"}])
    (folder / "broken.json").write_text('[{"prompt": "a", ')
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    (folder / "number.json").write_text("3")
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    (folder / "empty.jsonl").write_text("")
    (folder / "empty").mkdir()
    make_model(folder / "no_eos")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "no_eos")
    make_model(folder / "long", tokenizer=make_tokenizer(vocab_size=290))
    make_tokenizer(vocab_size=299).save_pretrained(folder / "long")
    (folder / "nested.json").write_text("[" * 100_000)
    make_model(folder / "no_tokenizer")
    for path in (folder / "no_tokenizer").glob("token*"):
        path.unlink()
    for name, text in SAVED.items():
        (folder / name).mkdir()
        (folder / name / "args.json").write_text(text)
    return folder


def stored(script: str = "irft", **changes) -> str:
    """args.json of a run of irft.py, with some of its args changed; None takes one out."""
    args = SCRIPTS["irft"].Args()
    resolve_auto(args, SCRIPTS["irft"].SETTINGS)
    args.num_chunks = args.T
    values = {k: v for k, v in {**dataclasses.asdict(args), **changes}.items() if v is not None}
    return json.dumps({"script": script, "args": values, "commit": "abc123"})


SAVED = {  # run folder -> its args.json
    "run_broken": '{"script": "irft", ', "run_null": "null", "run_list": "[]", "run_text": '"irft"', "run_empty": "", "run_nested": "[" * 100_000,
    "run_no_args": '{"script": "irft"}', "run_args_list": '{"script": "irft", "args": []}', "run_of_rft": stored("rft"),
    "run_unknown": stored(older_flag=3, other_flag="a"), "run_word": stored(learning_rate="fast"),
    "run_null_value": stored().replace('"beta": 0.1', '"beta": null'), "run_list_value": stored(beta=[0.1]),
    "run_number": stored(model=7), "run_true": stored(T=True), "run_choice": stored(loss_type="hinge"),
    "run_half": stored(T=1.5), "run_negative": stored(beta=-1.0), "run_nan": stored(beta=float("nan")), "run_auto": stored(learning_rate=None),
    "run_fine": stored(beta=0.3),
}  # fmt: skip

SMALL = "--model {place}/model --max-length 96 --max-new-tokens 8 --max-prompt-length 64 --output-dir out"
DATA = f"{SMALL} --dataset {{place}}/data.jsonl"
BAD = [  # script, words, what the line says
    # models and data that cannot be what they are given for
    ("irft", f"{DATA} --model {{place}}/data.jsonl", "--model {place}/data.jsonl: found no local folder"),
    ("irft", f"{DATA} --model {{place}}/no_tokenizer", "--model {place}/no_tokenizer: found a tokenizer that knows no word"),
    ("irft", f"{SMALL} --dataset {{place}}/nested.json", "nested.json: found broken JSON"),
    ("irft", f"{SMALL} --dataset {{place}}/model", "found a model or an adapter in {place}/model"),
    ("irft", f"{DATA} --output-dir {{place}}/data.jsonl", "--output-dir"),
    ("irft", "--resume {place}/run_fine --output-dir other", "--output-dir: found other, expected none beside --resume"),
    # words of the command line
    ("irft", "foo", "foo: found a word without a flag"),
    ("irft", "-x", "-x: found a word without a flag"),
    ("sft", "--T 3", "--T: found no flag of this name"),
    ("irft", "--betta 0.3", "--betta: found no flag of this name, expected --beta, or"),
    ("irft", "--beta", "--beta: found no value, expected a number"),
    ("irft", "--beta --T 3", "--beta: found --T, expected a number"),
    ("irft", "--beta 0.1 0.2", "0.2: found a word without a flag"),
    ("rft", "--num-mini-batches 3", "--num-mini-batches: found 3, expected a divisor of --rollout-batch-size 64"),
    ("rft", "--gradient-checkpointing true", "--gradient-checkpointing: found the value true, expected none"),
    ("evaluate", "--resume runs/x", "--resume: found no flag of this name"),
    ("evaluate", "--lora-r 8", "--lora-r: found no flag of this name"),
    ("benchmark.gold", "--sampler", "--sampler: found no value"),
    # values that do not go together
    ("irft", "--max-new-tokens 500 --max-length 160", "--max-length: found 160, expected room for a query and an answer: 1 + 500"),
    ("sft", "--max-prompt-length 250", "--max-length: found 256, expected room for a query and an answer: 250 + 48"),
    ("evaluate", "--max-prompt-length 256", "--max-prompt-length: found 256, expected less than --max-length 256"),
    ("irft", "--lora-r 8 --lora-alpha 0", "--lora-alpha: found 0, expected a number above 0"),
    ("irft", "--load-in-4bit", "--load-in-4bit: found True, expected --lora-r above 0"),
    ("rft", "--load-in-4bit --lora-r 8", "--load-in-4bit: found True, expected --lora-r above 0"),
    ("sft", "--select-top-k 5", "--select-top-k: found 5, expected --gold-reward-model beside it"),
    ("sft", "--baseline tiny", "--baseline: found tiny, expected --gold-reward-model beside it"),
    ("sft", "--judge-base-url http://localhost:1/v1", "--judge-base-url: found http://localhost:1/v1, expected --judge-model"),
    ("sft", "--judge-base-url localhost --judge-model m", "--judge-base-url: found localhost, expected http"),
    ("rft", "--reward-init sft --reward-model tiny", "--reward-init: found sft, expected --reward-model '' beside it"),
    ("aihf", "--reward-init sft --reward-model tiny", "--reward-init: found sft, expected --reward-model '' beside it"),
    ("aihf_ppo", "--num-mini-batches 5", "--num-mini-batches: found 5, expected a divisor"),
    ("irl_ppo_tldr", "--num-mini-batches 5", "--num-mini-batches: found 5, expected a divisor"),
    ("aihf", "--preference-dataset none", "--preference-dataset: found none, expected a source of preferences"),
    ("aihf_ppo", "--preference-dataset none", "--preference-dataset: found none, expected a source of preferences"),
    ("aihf", "--dataset x.jsonl", "--preference-dataset: found none beside --dataset x.jsonl"),
    ("aihf_direct", "--preference-dataset x.jsonl", "--dataset: found none beside --preference-dataset x.jsonl"),
    ("aihf_direct", "--preference-dataset none --demo-weight 0", "--demo-weight: found 0.0, expected a number above 0"),
    ("irl_dpo_ultrachat", "--candidates-from nowhere", "--candidates-from: found nowhere, expected the directory of a run"),
    ("irft", "--generation vllm", "--generation: found vllm, which is not installed here"),
    ("irft", "--report-to wandb", "--report-to: found wandb, which is not installed here"),
    ("rft", "--report-to trackio", "--report-to: found trackio, which is not installed here"),
    # runs to go on with
    ("irft", "--resume nowhere", "--resume: found no args.json in nowhere"),
    ("irft", "--resume {place}/data.jsonl", "--resume: found no args.json in"),
    ("irft", "--resume {place}/empty", "--resume: found no args.json in"),
    ("irft", ["--resume", ""], "--resume: found an empty text"),
    ("irft", ["--resume="], "--resume: found an empty text"),
    ("irft", "--resume {place}/run_broken", "args.json: found broken JSON"),
    ("irft", "--resume {place}/run_empty", "args.json: found broken JSON"),
    ("irft", "--resume {place}/run_nested", "args.json: found broken JSON"),
    ("irft", "--resume {place}/run_null", "args.json: found null, expected script and args"),
    ("irft", "--resume {place}/run_list", "args.json: found [], expected script and args"),
    ("irft", "--resume {place}/run_text", 'args.json: found "irft", expected script and args'),
    ("irft", "--resume {place}/run_no_args", "expected script and args"),
    ("irft", "--resume {place}/run_args_list", "expected script and args"),
    ("irft", "--resume {place}/run_of_rft", "--resume: found a run of rft.py in"),
    ("sft", "--resume {place}/run_fine", "--resume: found a run of irft.py in"),
    ("irft", "--resume {place}/run_unknown", "found --older-flag, --other-flag, which this version does not know"),
    ("irft", "--resume {place}/run_word", 'found --learning-rate "fast", expected a number or auto'),
    ("irft", "--resume {place}/run_null_value", "found --beta null, expected a number"),
    ("irft", "--resume {place}/run_list_value", "found --beta [0.1], expected a number"),
    ("irft", "--resume {place}/run_number", "found --model 7, expected a text"),
    ("irft", "--resume {place}/run_true", "found --T true, expected a whole number"),
    ("irft", "--resume {place}/run_half", "found --T 1.5, expected a whole number"),
    ("irft", "--resume {place}/run_choice", 'found --loss-type "hinge", expected one of logistic, linear'),
    ("irft", "--resume {place}/run_negative", "--beta: found -1.0, expected a number above 0"),
    ("irft", "--resume {place}/run_nan", "--beta: found nan, expected a finite number"),
    ("irft", "--resume {place}/run_auto", "found no --learning-rate, whose value depends on the model"),
    ("irft", "--resume {place}/run_fine --beta 0.2", "--beta: found 0.2, but the run in"),
    ("irft", "--resume {place}/run_fine --beta 0.1", "--beta: found 0.1, but the run in"),  # the default, but not the run's
    ("irft", "--resume {place}/run_fine --gradient-checkpointing", "--gradient-checkpointing: found True, but the run in"),
    # data
    ("irft", f"{SMALL} --dataset nowhere.jsonl", "--dataset: found no file nowhere.jsonl"),
    ("sft", f"{SMALL} --dataset ./nowhere", "--dataset: found no file ./nowhere"),
    ("sft", f"{SMALL} --dataset /nowhere/at/all", "--dataset: found no file /nowhere/at/all"),
    ("sft", f"{SMALL} --dataset ~/nowhere-at-all", "--dataset: found no file ~/nowhere-at-all"),
    ("rft", f"{SMALL} --dataset {{place}}/rows.txt", "rows.txt, expected a .json, .jsonl or .parquet file"),
    ("rft", f"{SMALL} --dataset {{place}}/empty", "--dataset: found no .json, .jsonl or .parquet file in"),
    ("irft", f"{SMALL} --dataset {{place}}/empty.jsonl", "--dataset: found no rows in"),
    ("irft", f"{SMALL} --dataset {{place}}/broken.json", "broken.json: found broken JSON"),
    ("irft", f"{SMALL} --dataset {{place}}/broken.jsonl", "broken.jsonl line 2: found broken JSON"),
    ("irft", f"{SMALL} --dataset {{place}}/number.json", "number.json: found a JSON int, expected a list"),
    ("irft", f"{SMALL} --dataset {{place}}/bytes.json", "bytes.json, expected UTF-8 text"),
    ("irft", f"{SMALL} --dataset {{place}}/cut.parquet", "cut.parquet, expected readable Parquet"),
    ("irft", f"{SMALL} --dataset {{place}}/strings.jsonl", "row 0: found a str, expected an object"),
    ("irft", f"{SMALL} --dataset {{place}}/columns.jsonl", "row 0: found columns question, answer"),
    ("irft", f"{SMALL} --dataset {{place}}/numbers.jsonl", "row 0: found int as prompt, expected text"),
    ("irft", f"{SMALL} --dataset {{place}}/blank.jsonl", "row 0: found an empty prompt, expected text; all 1 rows"),
    ("irft", f"{SMALL} --dataset {{place}}/users.jsonl", "row 0: found messages without an assistant turn"),
    ("irft", f"{SMALL} --dataset {{place}}/one_prompt.jsonl", "expected more rows with other prompts (here are 1)"),
    ("evaluate", f"{SMALL} --dataset {{place}}/broken.json", "broken.json: found broken JSON"),
    ("evaluate", f"{SMALL} --eval-dataset nowhere.jsonl", "--eval-dataset: found no file nowhere.jsonl"),
    ("aihf", f"{DATA} --preference-dataset {{place}}/data.jsonl", "expected a preference: prompt/chosen/rejected"),
    ("aihf_ppo", f"{DATA} --preference-dataset nowhere.jsonl", "--preference-dataset: found no file nowhere.jsonl"),
    ("aihf_direct", f"{DATA} --preference-dataset {{place}}/broken.json", "--preference-dataset: {place}/broken.json"),
    ("irl_ppo_tldr", f"{SMALL} --dataset {{place}}/users.jsonl", "row 0: found messages without an assistant turn"),
    ("irl_dpo_ultrachat", f"{SMALL} --dataset {{place}}/columns.jsonl", "row 0: found columns question, answer"),
    ("irft", f"{DATA} --max-prompt-length 1", "no row is left"),
    ("irft", f"{DATA} --T 100", "--T: found 100, expected at most"),
    ("irft", f"{DATA} --num-chunks 100", "--num-chunks: found 100, expected at most"),
    # models
    ("irft", "--model nowhere --max-length 96 --max-new-tokens 8 --output-dir out", "--model nowhere: found no local folder"),
    ("sft", "--model some/where --output-dir out", "--model some/where: found no local folder"),
    ("evaluate", "--model {place}/empty --output-dir out", "--model {place}/empty: "),
    ("irft", f"{DATA} --model {{place}}/no_eos", "found a tokenizer without an EOS token"),
    ("irft", f"{DATA} --model {{place}}/long", "found a tokenizer of"),
    ("irft", f"{DATA} --max-length 1000", "--max-length: found 1000, expected at most 128, the window of --model"),
    ("evaluate", f"{DATA} --ref-model nowhere", "--ref-model nowhere: found no local folder"),
    ("evaluate", f"{DATA} --reward-model nowhere", "--reward-model nowhere: found no local folder"),
    ("sft", f"{DATA} --gold-reward-model nowhere", "--gold-reward-model nowhere: found no local folder"),
    ("sft", f"{DATA} --gold-reward-model {{place}}/model --baseline nowhere", "--baseline nowhere: found no local folder"),
    # toy examples
    ("example1", "--seed -1", "--seed is -1, expected 0 to"),
    ("example1", f"--seed {2**64}", f"--seed is {2**64}, expected 0 to"),
    ("example1", "--seed x", "--seed: invalid literal"),
    ("example1", "--foo", "--foo"),
    ("example1", ["--output-dir", ""], "--output-dir is '', expected a folder"),
    ("example1", "--output-dir {place}/data.jsonl", "data.jsonl', expected a folder"),
    ("example1", "--output-dir {place}/data.jsonl/below", "below', expected a folder"),
    ("example2", "--seed -1", "--seed is -1, expected 0 to"),
    ("example2", "--actions 2", "--actions is 2, expected 3 to"),
    ("example2", "--actions 5000", "--actions is 5000, expected 3 to"),
    ("example2", "--covered 0", "--covered is 0, expected 1 to"),
    ("example2", "--covered 60", "--covered is 60, expected 1 to 50"),
    ("example2", "--demonstrations -3", "--demonstrations is -3, expected 1 to"),
    ("example2", "--comparisons -1", "--comparisons is -1, expected 0 to"),
    ("example2", f"--comparisons {10**30}", "expected 0 to"),
    ("example2", "--comparisons 0.5", "--comparisons: invalid literal"),
    ("two_actions", "--draws 0", "--draws is 0, expected 5000 to"),
    ("two_actions", "--draws -20000", "--draws is -20000, expected 5000 to"),
    ("two_actions", f"--draws {10**12}", "expected 5000 to"),
    ("two_actions", "--seed -7", "--seed is -7, expected 0 to"),
    ("two_actions", "--output-dir {place}/data.jsonl", "expected a folder"),
    ("exact", "--draws 0", "--draws is 0, expected 100 to"),
    ("exact", "--draws -1", "--draws is -1, expected 100 to"),
    ("exact", "--seeds 0", "--seeds is 0, expected 1 to"),
    ("exact", "--seeds -5", "--seeds is -5, expected 1 to"),
    ("exact", f"--seeds {10**20}", "expected 1 to"),
    ("exact", "--draws many", "--draws: invalid literal"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=[f"{s} {w if isinstance(w, str) else ' '.join(w)}"[:90] for s, w, _ in BAD])
@pytest.mark.filterwarnings("ignore")
def test_bad_input_ends_with_one_clear_line(case, place, refused):
    script, words, expected = case
    words = words.split() if isinstance(words, str) else words
    line = refused(script, *(word.replace("{place}", str(place)) for word in words))
    assert line.startswith("error: ") and expected.replace("{place}", str(place)) in line


# ---- around the command line ----
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: found 2 in the environment but no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "but no MASTER_PORT, expected"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: found 'two' in the environment"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: found '' in the environment"),
        ({"RANK": "first", "WORLD_SIZE": "1"}, "RANK: found 'first' in the environment"),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK: found 3 in the environment, expected 0 to 1"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "launched for several processes, but accelerate runs 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "found it not installed here, expected pip install -r requirements-engines.txt"),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_work_is_refused_before_anything_runs(monkeypatch, environment, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    launch.check_launch()  # without a launcher there is nothing to refuse
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["irft.py"])
    with pytest.raises(UserError) as error:
        parse_args(SCRIPTS["irft"].Args, "", SCRIPTS["irft"].SETTINGS)
    assert expected in str(error.value)


@pytest.mark.parametrize(("set_by_launcher", "processes"), [(None, 2), ("2", 1), ("1", 2)])
def test_another_number_of_processes_than_was_launched_is_refused(monkeypatch, set_by_launcher, processes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if set_by_launcher:
        monkeypatch.setenv("WORLD_SIZE", set_by_launcher)
    expected = int(set_by_launcher or 1)
    with pytest.raises(UserError, match=f"launched for {expected} processes, but accelerate runs {processes}"):
        launch.check_engine(SCRIPTS["irft"].Args(), "plain", processes, "irft")
    launch.check_engine(SCRIPTS["irft"].Args(), "plain", expected, "irft")


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("tiny", "tiny"), ("TinyLlama-1.1B-Chat", "other"), ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "other"), ("tiny-random-gpt2", "other"),
        ("pythia-1.4b", "pythia"), ("EleutherAI/pythia-1.4b-deduped", "pythia"), ("pythia-160m-seed1", "pythia"), ("./Pythia-1B", "pythia"),
        ("pythia-6.9b", "other"), ("EleutherAI/pythia-12b-deduped", "other"), ("pythia", "other"), ("pythia-1.4bx", "other"),
        ("OpenAssistant/pythia-chat", "other"), ("zephyr-7b-sft-full", "other"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2"), ("./smollm2-135m", "smollm2"), ("SmolLM2-1.7B", "other"),
    ],
)  # fmt: skip
def test_a_model_takes_the_settings_of_its_own_name_alone(model, row, monkeypatch, capsys):
    module = SCRIPTS["irft"]
    monkeypatch.setattr(sys, "argv", ["irft.py", "--model", model])
    assert settings_row(model, module.SETTINGS) == row
    args = parse_args(module.Args, "", module.SETTINGS)
    assert (args.dataset == "pydoc") == (row in ("tiny", "smollm2"))
    said = {"tiny": "tiny", "pythia": "pythia up to 2.8b", "smollm2": "smollm2-135m", "other": "any other model"}[row]
    assert f"settings: those for {said} (--model {model})" in capsys.readouterr().out


def test_every_row_of_settings_is_found_by_some_name():
    names = {"pythia": "pythia-1.4b", "smollm2": "SmolLM2-135M-Instruct", "other": "llama"}
    of_models = [module for module in SCRIPTS.values() if hasattr(module.Args, "model")]
    assert len(of_models) == len(SCRIPTS) - 1  # aihf_mujoco.py goes by the environment
    for module in of_models:
        for key in module.SETTINGS:
            assert settings_row(names.get(key, key), module.SETTINGS) == key
    assert settings_row("zephyr-7b-sft-full-2", SCRIPTS["irl_dpo_ultrachat"].SETTINGS) == "other"


def test_a_run_whose_model_is_named_after_itself_has_a_name(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "args.json").write_text(json.dumps({"args": {"model": str(tmp_path / "final")}}))
    assert args.first_model(str(tmp_path / "final")) == "final"


# ---- trackers ----
def test_wandb_without_a_key_is_refused_and_with_one_or_offline_is_not(tmp_path, monkeypatch):
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_BASE_URL",
        "WANDB_CONFIG_DIR",
        "WANDB_DIR",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or None)
    with pytest.raises(UserError, match="--report-to: found wandb, which has no key here, expected none, or a key"):
        trackers.check_tracker("wandb")
    with pytest.raises(UserError, match="--report-to: found tensorboard, which is not installed here"):
        trackers.check_tracker("tensorboard")
    trackers.check_tracker("none")
    for name, value in (("WANDB_API_KEY", "k"), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            trackers.check_tracker("wandb")
    (tmp_path / ".netrc").write_text("machine elsewhere.org login user password word\n")
    assert not trackers.wandb_can_start()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password word\n")
    assert trackers.wandb_can_start()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not trackers.wandb_can_start()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # what `wandb offline` writes
    assert trackers.wandb_can_start()
    plan = SCRIPTS["irft"].Args(report_to="trackio", dry_run=True, mixed_precision="no")
    args.resolve_auto(plan, SCRIPTS["irft"].SETTINGS)
    plan.check()  # the plan for another machine


def test_a_tracked_run_has_its_folders_name_and_keeps_its_id(tmp_path):
    first, again, other = tmp_path / "one", tmp_path / "one", tmp_path / "two"
    first.mkdir(), other.mkdir()
    given = trackers.tracker_settings("wandb", first)
    assert given["wandb"]["name"] == "one" and given["wandb"]["resume"] == "allow"
    assert given["trackio"]["name"] == f"one-{given['wandb']['id']}"
    assert trackers.tracker_settings("wandb", again) == given
    assert trackers.tracker_settings("wandb", other)["wandb"]["id"] != given["wandb"]["id"]


# ---- resume ----
def test_a_run_older_than_a_flag_goes_on_as_before_and_says_so(tmp_path, monkeypatch, capsys):
    module = SCRIPTS["irft"]
    (tmp_path / "args.json").write_text(stored(judge_task=None, beta=0.3))
    monkeypatch.setattr(sys, "argv", ["irft.py", "--resume", str(tmp_path)])
    args = parse_args(module.Args, "", module.SETTINGS)
    assert (args.judge_task, args.beta, args.resume) == ("answer", 0.3, str(tmp_path))
    assert f"{tmp_path}/args.json is older than --judge-task 'answer'" in capsys.readouterr().out
    monkeypatch.setattr(
        module.Args, "before", {"judge_task": "summary"}
    )  # had such runs asked otherwise than the default
    assert parse_args(module.Args, "", module.SETTINGS).judge_task == "summary"
    (tmp_path / "args.json").write_text(stored(attn_implementation=None))  # an auto that meant what it means
    monkeypatch.setattr(module.Args, "before", {"attn_implementation": "auto"})
    assert parse_args(module.Args, "", module.SETTINGS).attn_implementation == "auto"


def test_a_resumed_run_takes_its_own_settings_given_again(tmp_path, monkeypatch):
    module = SCRIPTS["irft"]
    (tmp_path / "args.json").write_text(stored(beta=0.3, gradient_checkpointing=True))
    words = ["--beta", "0.3", "--learning-rate", "auto", "--gradient-checkpointing", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["irft.py", "--resume", str(tmp_path), *words])
    args = parse_args(module.Args, "", module.SETTINGS)
    assert (
        args.gradient_checkpointing and args.dry_run and args.learning_rate == module.SETTINGS["tiny"]["learning_rate"]
    )


# ---- warnings ----
def test_a_warning_is_one_line_of_the_first_process(monkeypatch):
    seen = []
    shown = warnings.formatwarning

    def script() -> None:
        seen.append(warnings.formatwarning("rows\n left out", UserWarning, str(Path(__file__)), 3, "    source()"))
        monkeypatch.setenv("RANK", "1")
        seen.append(warnings.formatwarning("rows left out", UserWarning, "data.py", 3))
        monkeypatch.delenv("RANK")
        warnings.warn("seen by pytest", stacklevel=1)

    monkeypatch.delenv("RANK", raising=False)
    with pytest.warns(UserWarning, match="seen by pytest"):
        main(script)
    assert seen == ["warning: rows left out\n", ""] and warnings.formatwarning is shown


def test_a_message_of_several_lines_is_printed_as_one(capsys):
    def script() -> None:
        raise UserError("--dataset: found a\nb, expected c")

    with pytest.raises(SystemExit):
        main(script)
    assert capsys.readouterr().err == "error: --dataset: found a b, expected c\n"
