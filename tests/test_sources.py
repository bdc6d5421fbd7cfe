"""Sources as users have them: other column names, packed files, several sources in shares, hub sets at a revision or streamed."""

import gzip
import json
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from helpers import ROOT, child_environment, jsonl, make_tokenizer
from hub import Hub

import aihf
import evaluate
import irft
from common import UserError, demos
from common.streams import data_order
from extras import arrow_rows, encoded, hub_names, lazy, mixture, packed, preference_data, provenance, sources
from extras.command_line import command_line, wrong_word
from extras.sources import Source, load_rows
from extras.stream import MOST_UNUSABLE, Stream
from extras.value_lists import join_values, words_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEANIRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pairs(n: int, tag: str = "") -> list[dict]:
    return [{"prompt": f"{tag} question {i}", "completion": f"{tag} answer {i}"} for i in range(n)]


def preferences(n: int, tag: str = "") -> list[dict]:
    return [{"prompt": f"{tag} question {i}", "chosen": f"{tag} yes {i}", "rejected": "no"} for i in range(n)]


def one(tmp_path, row: dict, columns: str = "", kind: str = "demonstrations") -> dict:
    (parsed,) = load_rows(jsonl(tmp_path / "one.jsonl", [row]), "all", kind, columns=columns)
    return parsed


def line_of(work) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def heard(work) -> tuple:
    """(what work() gives, the texts of its warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = work()
    return value, [str(w.message) for w in caught]


# ---- forms ----
def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be kind"}
FORMS = {  # raw row -> prompt, response
    "alpaca": ({"instruction": "add", "input": "2, 3", "output": "5"}, "add\n\n2, 3", "5"),
    "alpaca without input": ({"instruction": "add", "input": "", "output": "5", "text": "x"}, "add", "5"),
    "alpaca with null": ({"instruction": "add", "input": None, "output": "5"}, "add", "5"),
    "alpaca with history": (
        {"instruction": "c", "output": "d", "system": "be kind", "history": [["a", "b"]]},
        [SYSTEM, user("a"), assistant("b"), user("c")],
        "d",
    ),
    "sharegpt": (
        {"id": "7", "conversations": [
            {"from": "system", "value": "be kind"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"},
        ]},
        [SYSTEM, user("a"), assistant("b"), user("c")], "d",
    ),
    "conversations of messages": ({"conversations": [user("a"), assistant("b")]}, [user("a")], "b"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_alpaca_and_sharegpt_rows_are_known_without_a_flag(tmp_path, name):
    raw, prompt, response = FORMS[name]
    assert one(tmp_path, raw) == {"row": 0, "prompt": prompt, "response": response}


def test_turns_of_sharegpt_are_learned_as_those_of_messages(tmp_path):
    row = FORMS["sharegpt"][0]
    rows = load_rows(jsonl(tmp_path / "s.jsonl", [row]), "all", turns="all")
    assert [r["response"] for r in rows] == ["b", "d"]
    (first,) = load_rows(str(tmp_path / "s.jsonl"), "all", turns="first")
    assert first["response"] == "b" and first["prompt"] == [SYSTEM, user("a")]


def test_a_prompt_column_goes_before_an_instruction(tmp_path):
    """Both could be meant: the row is read by the names that were known before, here as a prompt without an answer."""
    row = {"prompt": "p", "instruction": "i", "output": "o"}
    assert "found columns prompt, instruction, output" in line_of(lambda: one(tmp_path, row))
    assert one(tmp_path, row | {"completion": "c"})["response"] == "c"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]},
            "found a turn from 'tool'",
        ),
        ({"conversations": [{"from": "human"}]}, "found from in conversations, expected from and value"),
        ({"conversations": ["a", "b"]}, "found str in conversations, expected from and value"),
        ({"conversations": "a"}, "found str, expected a list of messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "without an assistant turn"),
        ({"instruction": 3, "output": "b"}, "found int as instruction, expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "found int as input, expected text"),
        ({"instruction": "a", "output": ""}, "found an empty response"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "as history, expected [question, answer] pairs"),
    ],
)
def test_a_bad_row_is_named_with_its_source_and_number(tmp_path, row, words):
    name = jsonl(tmp_path / "bad.jsonl", [*pairs(2), row])
    rows, said = heard(lambda: load_rows(name, "all"))
    assert [r["row"] for r in rows] == [0, 1] and len(said) == 1
    assert said[0].startswith(f"--dataset {name} row 2: found") and words in said[0] and "\n" not in said[0]


# ---- columns ----
@pytest.mark.parametrize(
    ("row", "columns", "prompt", "response"),
    [
        ({"question": "q", "answer": "a"}, "prompt=question completion=answer", "q", "a"),
        ({"prompt": "q", "answer": "a"}, "completion=answer", "q", "a"),
        ({"My question": "q", "a": "a"}, "'prompt=My question' completion=a", "q", "a"),
        ({"prompt": "q", "my answer": "a"}, "completion=my answer", "q", "a"),
        ({"dialogue": [user("q"), assistant("a")]}, "messages=dialogue", [user("q")], "a"),
        ({"messages": [user("x"), assistant("y")], "q": "q", "a": "a"}, "prompt=q completion=a", "q", "a"),
        ({"prompt": "x", "completion": "y", "q": "q", "a": "a"}, "prompt=q completion=a", "q", "a"),
        ({"prompt": "a", "completion": "q"}, "prompt=completion completion=prompt", "q", "a"),
        ({"chosen": "x", "rejected": "y", "prompt": "q", "a": "a"}, "completion=a", "q", "a"),
        ({"prompt": "q", "completion": "a"}, "prompt=other completion=more", "q", "a"),
        ({"messages": "q", "completion": "a"}, "prompt=messages", "q", "a"),
    ],
)
def test_columns_get_the_names_that_the_flag_gives(tmp_path, row, columns, prompt, response):
    assert one(tmp_path, row, columns) == {"row": 0, "prompt": prompt, "response": response}


def test_columns_of_preferences(tmp_path):
    row, columns = {"q": "q", "good": "a", "bad": "b", "completion": "x"}, "prompt=q chosen=good rejected=bad"
    assert one(tmp_path, row, columns, "preferences") == {"row": 0, "prompt": "q", "chosen": "a", "rejected": "b"}
    both = f"{columns} completion=answer"
    assert one(tmp_path, {"q": "q", "answer": "a"}, both)["response"] == "a"  # one flag for both kinds of sources


@pytest.mark.parametrize("columns", ["promt=q", "prompt", "prompt=", "prompt=a prompt=b", "=a"])
def test_a_wrong_word_of_columns_is_one_line(tmp_path, columns):
    line = line_of(lambda: one(tmp_path, {"q": "q"}, columns))
    assert line.startswith("--columns: found ") and "expected NAME=COLUMN" in line


def test_the_flag_reaches_training_held_out_rows_and_preferences(tmp_path):
    rows = [{"q": f"question {i}", "good": f"yes {i}", "bad": "no"} for i in range(60)]
    args = arguments(jsonl(tmp_path / "d.jsonl", rows), columns="prompt=q chosen=good rejected=bad")
    shown, held = demos.load_demonstrations(args, make_tokenizer()), demos.load_held_out(args, make_tokenizer(), [])
    args.preference_dataset = args.eval_preference_dataset = args.dataset
    asked = preference_data.load_preferences(args, make_tokenizer(), shown)
    assert (
        len(shown) == 20
        and held
        and asked
        and {r["prompt"].split()[0] for r in (*shown, *held, *asked)} == {"question"}
    )
    assert {r["row"] for r in shown}.isdisjoint(r["row"] for r in asked)
    assert preference_data.load_eval_preferences(args, make_tokenizer())
    args.columns = ""
    assert "found columns q, good, bad, expected one of" in line_of(
        lambda: demos.load_demonstrations(args, make_tokenizer())
    )


# ---- packed files ----
def pack(path: Path, data: bytes) -> str:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else pa.compress(data, codec="zstd", asbytes=True))
    return str(path)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst", "d.json.gz", "d.json.zst"])
@pytest.mark.parametrize("large", [False, True])
def test_packed_files_hold_the_rows_of_plain_ones(tmp_path, monkeypatch, name, large):
    rows = pairs(40, "é")
    expected = load_rows(jsonl(tmp_path / "plain.jsonl", rows), "train")
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    monkeypatch.setattr(lazy, "LARGE", 0 if large else 1 << 40)
    path = tmp_path / name
    for data in (lines, b"\xef\xbb\xbf" + lines, *([json.dumps(rows).encode()] if ".json." in name else [])):
        found = load_rows(pack(path, data), "train")
        assert list(found) == expected and isinstance(found, list) == (not large or data[:1] == b"[")
    pack(path, lines[: len(lines) // 2])
    half = path.read_bytes()
    pack(path, lines[len(lines) // 2 :])
    path.write_bytes(
        half + path.read_bytes()
    )  # two packed streams, one after the other, as parallel packers write them
    assert list(load_rows(str(path), "train")) == expected


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst"])
@pytest.mark.parametrize("large", [False, True])
def test_a_damaged_packed_file_is_one_line(tmp_path, monkeypatch, name, large):
    monkeypatch.setattr(lazy, "LARGE", 0 if large else 1 << 40)
    path = tmp_path / name
    pack(path, "".join(json.dumps(r) + "\n" for r in pairs(500)).encode())
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"no packed file at all", whole[:20] + b"?" * 9 + whole[29:]):
        path.write_bytes(data)
        assert f"found {path}, expected a whole {path.suffix} file" in line_of(lambda: load_rows(str(path), "train"))
    pack(path, b'{"prompt": "a", "completion": "b"}\n{oops\n')
    assert f"{path} line 2: found broken JSON" in line_of(lambda: load_rows(str(path), "train"))
    assert "expected a .json, .jsonl or .parquet file, or JSON in .gz" in line_of(
        lambda: load_rows(pack(tmp_path / "d.csv.gz", b"a,b"), "train")
    )


def test_packed_files_of_a_folder_are_its_splits_and_part_of_its_digest(tmp_path):
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        pack(tmp_path / "set" / f"{split}.jsonl.gz", "".join(json.dumps(r) + "\n" for r in pairs(3, split)).encode())
    for split in ("train", "test"):
        assert {r["prompt"].split()[0] for r in load_rows(str(tmp_path / "set"), split)} == {split}
    before = provenance.data_digest(str(tmp_path / "set"))
    pack(tmp_path / "set" / "train.jsonl.gz", b'{"prompt": "a", "completion": "b"}\n')
    assert provenance.data_digest(str(tmp_path / "set")) != before


def test_a_packed_file_counts_as_what_it_holds(tmp_path):
    path = Path(pack(tmp_path / "d.jsonl.gz", b"a" * 1000))
    assert lazy.size_of(path) == packed.RATIO * path.stat().st_size
    assert lazy.size_of(tmp_path) == lazy.size_of(path)


# ---- several sources ----
def arguments(dataset: str, **given) -> SimpleNamespace:
    usual = dict(max_samples=20, eval_samples=10, max_preferences=0, turns="auto", columns="", seed=3, max_length=96)
    usual |= dict(
        max_prompt_length=64, max_new_tokens=32, cut_demonstrations=False, select_top_k=0, eval_dataset="auto"
    )
    usual |= dict(gold_reward_model="", baseline="", judge_model="", model="tiny", trust_remote_code=False)
    return SimpleNamespace(**{**usual, "dataset": dataset, "preference_dataset": "none", **given})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files in the current folder: a.jsonl, b.jsonl and c.jsonl."""
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 120), ("b", 120), ("c", 40)):
        jsonl(tmp_path / f"{name}.jsonl", pairs(n, name))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["a.jsonl"], [("a.jsonl", None)]),
        (["a.jsonl:0.7", "b.jsonl:0.3"], [("a.jsonl", "0.7"), ("b.jsonl", "0.3")]),
        (["a.jsonl", "b.jsonl"], [("a.jsonl", None), ("b.jsonl", None)]),
        (["C:\\data\\a.jsonl:2", "D:\\b c.jsonl:1"], [("C:\\data\\a.jsonl", "2"), ("D:\\b c.jsonl", "1")]),
        (["C:\\data\\a.jsonl"], [("C:\\data\\a.jsonl", None)]),
        (["owner/name:v2", "b.jsonl"], [("owner/name:v2", None), ("b.jsonl", None)]),
        (["owner/name:7"], [("owner/name:7", None)]),
        (["it's.jsonl", "b.jsonl"], [("it's.jsonl", None), ("b.jsonl", None)]),
        (["it's.jsonl"], [("it's.jsonl", None)]),
        (["my rows.jsonl"], [("my rows.jsonl", None)]),
        (["pydoc", "hh-rlhf", "o/n"], [("pydoc", None), ("hh-rlhf", None), ("o/n", None)]),
        (["o/n@refs/pr/1:1e-1", "stream:o/m:0.9"], [("o/n@refs/pr/1", "0.1"), ("stream:o/m", "0.9")]),
    ],
)
def test_sources_and_weights_of_a_flag(files, words, names):
    (_, *given) = join_values(["--dataset", *words])
    expected = [(name, weight and Fraction(weight)) for name, weight in names]
    assert mixture.split_names(*given) == expected


def test_a_file_of_such_a_name_is_itself(files):
    jsonl(files / "x:0.5", pairs(3))
    jsonl(files / "two words.jsonl", pairs(3))
    assert mixture.split_names("two words.jsonl") == [("two words.jsonl", None)]
    assert mixture.split_names("x:0.5 a.jsonl") == [("x:0.5", None), ("a.jsonl", None)]
    many = " ".join(f"{'n' * 30}{i}.jsonl:1" for i in range(50))  # longer than a name may be
    assert len(mixture.split_names(many)) == 50
    assert "found no file my rows.jsonl, expected" in line_of(lambda: load_rows("my rows.jsonl", "train"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a.jsonl:0 b.jsonl:1", "found the weight 0 of a.jsonl, expected a number above 0"),
        ("a.jsonl:-1 b.jsonl:1", "found the weight -1 of a.jsonl"),
        ("a.jsonl:0.5 b.jsonl", "found no weight for b.jsonl, expected one for every source"),
        ("a.jsonl:1 ./a.jsonl:1", "found ./a.jsonl twice, expected different sources"),
    ],
)
def test_wrong_weights_are_one_line(files, given, words):
    assert f"--dataset: {words}" in line_of(lambda: mixture.split_names(given))


def test_wrong_weights_of_preferences_name_their_flag(files):
    args = arguments("a.jsonl", preference_dataset="b.jsonl:0 c.jsonl:1", needs_demonstrations=lambda: False)
    line = line_of(lambda: preference_data.load_both(args, make_tokenizer()))
    assert line.startswith("--preference-dataset: found the weight 0 of b.jsonl")


def test_the_command_line_joins_the_values_of_a_flag(monkeypatch, tmp_path):
    words = "--model tiny --dataset a:0.7 b:0.3 --columns prompt=q completion=a --T 2 --eval-dataset=c d".split()
    joined = join_values(words)
    assert joined == [
        "--model", "tiny", "--dataset", "a:0.7 b:0.3", "--columns", "prompt=q completion=a", "--T", "2", "--eval-dataset", "c d",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["irft.py", *words])
    args = command_line(irft.Args, "", irft.Args())
    assert (args.dataset, args.columns, args.eval_dataset, args.T) == ("a:0.7 b:0.3", "prompt=q completion=a", "c d", 2)
    assert not wrong_word(irft.Args, words) and not wrong_word(irft.Args, ["--preference_dataset", "a", "--T", "2"][2:])
    assert "b: found a word without a flag" in wrong_word(irft.Args, ["--model", "a", "b"])
    assert not wrong_word(evaluate.Args, ["--lm-eval", "a.json", "b c"])
    assert words_of(join_values(["--lm-eval", "a.json", "b c"])[1]) == ["a.json", "b c"]
    (tmp_path / "b c").mkdir()
    assert words_of(str(tmp_path / "b c")) == [str(tmp_path / "b c")]
    assert join_values(["--preference_dataset", "a b", "c"]) == ["--preference_dataset", "'a b' c"]
    assert not wrong_word(aihf.Args, ["--preference_dataset", "a", "b"])


@pytest.mark.parametrize(
    ("n", "weights", "expected"),
    [
        (10, ["0.7", "0.3"], [7, 3]),
        (100, ["0.29", "0.71"], [29, 71]),
        (10, ["1", "1", "1"], [4, 3, 3]),
        (3, ["2", "1", "1"], [1, 1, 1]),
        (4, ["97", "2", "1"], [4, 0, 0]),
        (0, ["0.7", "0.3"], [0, 0]),
        (1000, ["0.333", "0.333", "0.334"], [333, 333, 334]),
    ],
)
def test_shares_are_exact(n, weights, expected):
    assert mixture.shares(n, [Fraction(w) for w in weights]) == expected and sum(expected) == n


def own_rows(rows: list[dict], m: int, k: int) -> list[int]:
    """Row numbers of source k of m in its own file."""
    return [row["row"] // m for row in rows if row["row"] % m == k]


@pytest.mark.parametrize("large", [False, True])
def test_a_mixture_has_the_exact_shares_of_its_sources_by_the_seed(files, monkeypatch, large):
    monkeypatch.setattr(lazy, "LARGE", 0 if large else 1 << 40)
    monkeypatch.setattr(arrow_rows, "SIZE", 16)
    args, tokenizer = arguments("a.jsonl:0.7 b.jsonl:0.3"), make_tokenizer()
    rows = demos.load_demonstrations(args, tokenizer)
    assert [type(row) is arrow_rows.Row for row in rows] == [large] * 20
    numbers = [row["row"] for row in rows]
    assert numbers == sorted(set(numbers)) and len(numbers) == 20
    for k, (name, count) in enumerate((("a", 14), ("b", 6))):
        source = load_rows(f"{name}.jsonl", "train")
        order = data_order(len(source), args.seed, k, 2)
        drawn = sorted(source[i]["row"] for i in order[:count])
        assert own_rows(rows, 2, k) == drawn
        texts = [row["prompt"] for row in rows if row["row"] % 2 == k]
        assert texts == [f"{name} question {i}" for i in drawn]
    again = demos.load_demonstrations(arguments("a.jsonl:0.7 b.jsonl:0.3", seed=4), tokenizer)
    assert own_rows(again, 2, 0) != own_rows(rows, 2, 0) and len(own_rows(again, 2, 1)) == 6
    held = demos.load_held_out(arguments("a.jsonl:0.5 b.jsonl:0.5", eval_samples=6), tokenizer, rows)
    assert len(own_rows(held, 2, 0)) == len(own_rows(held, 2, 1)) == 3
    assert all(sources.held_out(row["prompt"]) for row in held)


def test_a_mixture_of_large_and_small_sources_is_that_of_lists(files, monkeypatch):
    args, tokenizer = arguments("a.jsonl c.jsonl", max_samples=0), make_tokenizer()
    expected = demos.load_demonstrations(args, tokenizer)
    size = (files / "c.jsonl").stat().st_size + 1
    monkeypatch.setattr(lazy, "LARGE", size)  # a is large, c is small
    monkeypatch.setattr(arrow_rows, "SIZE", 16)
    rows = demos.load_demonstrations(args, tokenizer)
    assert [dict(row) for row in rows] == expected and {type(row) for row in rows} == {dict, arrow_rows.Row}
    assert len(rows) == len(load_rows("a.jsonl", "train")) + len(load_rows("c.jsonl", "train"))
    names = {"row": "row", "tokens": "prompt_ids"}
    assert arrow_rows.renamed(rows, names) == arrow_rows.renamed(expected, names)  # numbers stay those of the mixture


def test_weights_beside_all_rows_and_shares_without_a_row_are_said(files):
    tokenizer = make_tokenizer()
    rows, said = heard(
        lambda: demos.load_demonstrations(arguments("a.jsonl:0.7 b.jsonl:0.3", max_samples=0), tokenizer)
    )
    assert len(rows) > 190 and len(said) == 1 and "found weights beside 0 rows" in said[0]
    rows, said = heard(
        lambda: demos.load_demonstrations(arguments("a.jsonl:0.99 b.jsonl:0.01", max_samples=8), tokenizer)
    )
    assert own_rows(rows, 2, 1) == [] and len(rows) == 8 and "found no row for b.jsonl among 8" in said[0]
    rows, said = heard(
        lambda: demos.load_demonstrations(arguments("a.jsonl:0.5 c.jsonl:0.5", max_samples=100), tokenizer)
    )
    assert any("--dataset c.jsonl: found" in text and "fewer than its share of 50" in text for text in said)


def test_rows_that_cannot_be_used_are_named_by_their_own_source(files):
    bad = [{"prompt": "x " * 99, "completion": "y"}, {"prompt": "p", "completion": ""}]
    jsonl(files / "b.jsonl", [*pairs(9, "b"), *bad])
    said = heard(lambda: demos.load_demonstrations(arguments("a.jsonl b.jsonl", max_samples=0), make_tokenizer()))[1]
    assert any("--dataset b.jsonl row 10: found an empty response" in text for text in said)
    assert any("--dataset b.jsonl: found 1 of" in text and "(row 9 has" in text for text in said)


@pytest.mark.parametrize(
    ("dataset", "preference_dataset"),
    [
        ("p.jsonl", "./p.jsonl"),
        ("a.jsonl p.jsonl", "p.jsonl"),
        ("p.jsonl", "q.jsonl p.jsonl"),
        ("a.jsonl q.jsonl p.jsonl", "p.jsonl q.jsonl"),
    ],
)
def test_no_row_is_both_demonstration_and_preference(files, dataset, preference_dataset):
    jsonl(files / "p.jsonl", preferences(60, "p"))
    jsonl(files / "q.jsonl", preferences(60, "q"))
    args = arguments(dataset, preference_dataset=preference_dataset)
    args.needs_demonstrations = lambda: True
    shown, asked = preference_data.load_both(args, make_tokenizer())
    texts = {row["prompt"] for row in shown}
    assert len(texts) == 20 and texts.isdisjoint(row["prompt"] for row in asked)
    names = [word.removeprefix("./") for word in preference_dataset.split()]
    usable = sum(len(load_rows(name, "train")) for name in names)
    assert len(asked) == usable - sum(
        row["prompt"][0] in "pq" and f"{row['prompt'][0]}.jsonl" in names for row in shown
    )
    args.needs_demonstrations = lambda: False
    assert [row["row"] for row in preference_data.load_both(args, make_tokenizer())[1]] == [row["row"] for row in asked]


def test_a_changed_source_of_a_mixture_is_seen_at_resume(files):
    args = SimpleNamespace(dataset="a.jsonl:0.7 b.jsonl:0.3", model="", resume="run")
    saved = {"inputs": provenance.digests(args)}
    provenance.changed_inputs(args, saved)
    jsonl(files / "b.jsonl", pairs(119, "b"))
    assert "--dataset a.jsonl:0.7 b.jsonl:0.3" in line_of(lambda: provenance.changed_inputs(args, saved))


# ---- the hub ----
CHILD = """
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import datasets
from huggingface_hub import constants
from transformers import AutoTokenizer

import tiny
from common import UserError, demos
from extras import provenance
from extras.sources import Source, load_rows

old, args = sys.argv[1], json.loads(sys.argv[2])
found = {}
for name in ("someone/set", f"someone/set@{old}", "someone/set@main", f"stream:someone/set@{old}", "stream:someone/set"):
    rows = Source(name, "train").draw(3, (1,))
    texts = [row["prompt"] for row in rows[:3]], [row["prompt"] for row in load_rows(name, "test")]
    found[name] = [*texts, provenance.data_digest(name)]
lines = []
for name in ("someone/set@no-such", "stream:someone/set@no-such", "stream:someone/none"):
    try:
        load_rows(name, "train")
    except UserError as error:
        lines.append(str(error))
shown = demos.load_demonstrations(SimpleNamespace(**args), AutoTokenizer.from_pretrained(tiny.MODEL))
datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
for name in ("someone/set", f"someone/set@{old}", "someone/set@" + "0" * 40):
    try:
        found[f"offline {name}"] = [[row["prompt"] for row in load_rows(name, "train")[:1]]]
    except UserError as error:
        found[f"offline {name}"] = str(error)
print(json.dumps([found, lines, [[row["row"], row["prompt"]] for row in shown]]))
"""


def put(hub, name: str, files: dict[str, list[dict]]) -> str:
    lines = {path: "".join(json.dumps(r) + "\n" for r in rows).encode() for path, rows in files.items()}
    return hub.commit("dataset", name, {"README.md": b"A set.\n", **lines})


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the real client of the hub reads of a stand-in: (its sets, lines of errors, streamed rows, commits, files read)."""
    place = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        old = put(hub, "someone/set", {"train.jsonl": pairs(300, "old"), "test.jsonl": pairs(5, "held")})
        new = put(hub, "someone/set", {"train.jsonl": pairs(300, "new"), "test.jsonl": pairs(5, "held")})
        put(hub, "someone/many", {f"data/train-{i:05d}-of-00040.jsonl": pairs(20, f"part{i}") for i in range(40)})
        args = vars(arguments("stream:someone/many", max_samples=12))
        online = child_environment(
            HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1"
        )
        online |= {
            "HF_HOME": str(place / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "CLEANIRL_CACHE": str(place / "cache"),
        }
        (place / "child.py").write_text(CHILD)
        done = subprocess.run(
            [sys.executable, str(place / "child.py"), old, json.dumps(args)],
            cwd=ROOT, env=online, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield *json.loads(done.stdout.splitlines()[-1]), (old, new), hub.resolved


def test_a_hub_set_is_read_at_its_revision(seen):
    found, _, _, (old, new), _ = seen
    online = {name: values for name, values in found.items() if not name.startswith("offline")}
    assert len(online) == 5
    for name, (train, test, digest) in online.items():
        word, sha = ("old", old) if old in name else ("new", new)
        assert {prompt.split()[0] for prompt in train} == {word} and digest == sha, name
        assert test == [f"held question {i}" for i in range(5)]
        assert (train == [f"{word} question {i}" for i in range(3)]) == name.startswith("stream:")


def test_without_the_hub_no_other_revision_takes_the_place_of_the_one_that_is_asked_for(seen):
    """`datasets` then takes the commit that it loaded last, here the old one or the new one, whatever the revision."""
    found, _, _, (old, new), _ = seen
    last = found["offline someone/set"][0][0].split()[0]
    assert last in ("old", "new")
    asked = found[f"offline someone/set@{old}"]
    if last == "old":
        assert asked[0][0].startswith("old question")
    else:
        assert (
            f"found the commit {new[:12]} in place of the hub, expected {old[:12]}, which is not in the cache" in asked
        )
    assert "in place of the hub, expected 000000000000" in found["offline someone/set@" + "0" * 40]


def test_a_stream_is_read_only_as_far_as_it_is_needed(seen):
    """The first rows of a set in 40 files need its first file; what is held out of it is what the hash says."""
    *_, shown, _, resolved = seen
    train = [i for i, row in enumerate(pairs(20, "part0")) if not sources.held_out(row["prompt"])]
    assert shown == [[i, f"part0 question {i}"] for i in train[:12]] and len(train) > 12
    read = {path.rpartition("/")[2] for path in resolved if "train-" in path}
    assert "train-00000-of-00040.jsonl" in read and len(read) < 5, read


def test_a_hub_set_or_revision_that_is_not_there_is_one_line(seen):
    lines = seen[1]
    assert len(lines) == 3
    assert all(line.startswith("--dataset: found no local path") and "\n" not in line for line in lines)


def test_names_of_the_hub():
    name = hub_names.hub_name("stream:ultrachat_200k@v1")
    assert (name.id, name.revision, name.streamed, name.train) == (
        "HuggingFaceH4/ultrachat_200k",
        "v1",
        True,
        "train_sft",
    )
    assert (
        sources.default_turns("stream:ultrachat_200k@v1") == "first"
        and sources.default_turns("a/b@ultrachat_200k") == "last"
    )
    assert (
        sources.source_id("stream:hh-rlhf") == sources.source_id("Anthropic/hh-rlhf") != sources.source_id("hh-rlhf@v1")
    )
    sha = "0123456789abcdef" * 2 + "01234567"
    assert provenance.data_digest(f"a/b@{sha}") == provenance.data_digest(f"stream:a/b@{sha}") == sha
    assert encoded.content_of(Source("stream:a/b", "train")) == ""


# ---- streams ----
@pytest.mark.parametrize("whole", [False, True])
def test_a_stream_beside_held_out_data_is_trained_on_as_a_whole(monkeypatch, whole):
    rows = pairs(60, "")
    monkeypatch.setattr(sources, "open_hub", lambda name, split, flag: ([iter(rows)], False))
    found = [row["row"] for row in load_rows("stream:a/b", "train", whole=whole)]
    assert found == [i for i, row in enumerate(rows) if whole or not sources.held_out(row["prompt"])]
    assert (len(found) == 60) == whole


def test_a_stream_reads_ahead_of_nothing_and_knows_its_length_at_its_end():
    read = []

    def raw():
        for i in range(10):
            read.append(i)
            yield i

    stream = Stream(raw(), lambda r, i: {"row": i} if r % 2 else None, "empty")
    assert stream[1] == {"row": 3} and read == [0, 1, 2, 3] and len(stream) == sys.maxsize
    assert [row["row"] for row in stream[1:4]] == [3, 5, 7] and read[-1] == 7
    assert [row["row"] for row in stream] == [1, 3, 5, 7, 9] and len(stream) == 5 and stream[4:9] == [{"row": 9}]


def test_rows_of_a_stream_that_cannot_be_used_are_left_out_and_a_stream_without_rows_is_an_error():
    def parse(r, i):
        if r:
            return {"row": i}
        raise sources.UnusableRow(f"row {i}: found nothing")

    rows, said = heard(lambda: Stream([1, 0, 0, 1], parse, "empty")[:2])
    assert [row["row"] for row in rows] == [0, 3] and len(said) == 1 and said[0].startswith("row 1: found nothing")
    assert "all 2 rows are like this" in line_of(lambda: heard(lambda: Stream([0, 0], parse, "empty")[:1]))
    count = iter(range(10**9))
    endless = (0 * i for i in count)
    assert f"all {MOST_UNUSABLE} rows are like this" in line_of(
        lambda: heard(lambda: Stream(endless, parse, "empty")[:1])
    )
    assert next(count) == MOST_UNUSABLE
    assert "nothing here (3 rows read)" in line_of(lambda: Stream([1, 1, 1], lambda r, i: None, "nothing here")[:1])


def test_streams_of_all_rows_or_turns_and_rows_that_are_taken(monkeypatch):
    import datasets

    sets = datasets.Dataset.from_list(preferences(30)).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": sets, "test": sets})
    assert "beside 0 rows, which means all" in line_of(lambda: Source("stream:a/b", "train").draw(0, ()))
    assert "--turns: found all beside stream:a/b" in line_of(lambda: load_rows("stream:a/b", "train", turns="all"))
    source = Source("stream:a/b", "train", "preferences", taken=frozenset({0, 2, 3}))
    assert [row["row"] for row in source.draw(3, (1,))[:3]] == [1, 4, 5]
    everything = Source("stream:a/b", "train", taken=frozenset(range(30)))
    assert "found no row of stream:a/b that --dataset has left over" in line_of(lambda: everything.draw(3, ())[:1])
