"""Rows of large sources in mapped Arrow files: what is read is what lists hold, and no wrong file is ever read."""

import errno
import json
import math
import os
import random
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, ZEPHYR_TEMPLATE, child_environment, command, jsonl, make_model, make_tokenizer, metrics, run
from helpers import weights as final_weights

import irl_ppo_tldr
from common import UserError, demos
from common.store import read_pairs, write_pairs
from extras import arrow_rows, encoded, gather, lazy, preference_data
from extras.arrow_rows import Row, kept
from extras.sources import Source, load_rows

WORDS = "return the number of items in list open file and read it".split()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEANIRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(monkeypatch):
    """Every source is a large one, and a batch of an Arrow file has 16 rows."""
    monkeypatch.setattr(lazy, "LARGE", 0)
    monkeypatch.setattr(arrow_rows, "SIZE", 16)


def text(stream: random.Random, most: int) -> str:
    return " ".join(stream.choices(WORDS, k=stream.randint(1, most)))


def make_rows(n: int, kind: str = "mixed") -> list[dict]:
    """Rows with prompts as texts and as dialogues, some too long, some unusable, some cut, in an order without a pattern."""
    stream, rows = random.Random(5), []
    for i in range(n):
        prompt, answer = f"{i} {text(stream, 12)}", text(stream, 30)
        if kind == "pairs":
            rows.append({"prompt": prompt, "chosen": answer, "rejected": answer if i % 7 == 0 else text(stream, 30)})
        elif i % 3 == 0:
            turns = [(r, text(stream, 8)) for r in ("user", "assistant", "user", "assistant")]
            rows.append({"messages": [{"role": r, "content": f"{i} {t}"} for r, t in turns]})
        else:
            rows.append({"prompt": prompt, "completion": "" if i % 11 == 1 else answer, "finished": i % 4 != 1})
    return rows


def arguments(path, **given) -> SimpleNamespace:
    usual = dict(
        max_samples=0, turns="auto", columns="", seed=3, max_length=80, max_prompt_length=76, max_new_tokens=30
    )
    usual |= dict(
        cut_demonstrations=False,
        select_top_k=0,
        dataset=str(path),
        eval_dataset="auto",
        eval_samples=5,
        max_preferences=0,
    )
    return SimpleNamespace(**{**usual, "preference_dataset": str(path), **given})


def heard(work) -> tuple:
    """(what work() gives, the texts of its warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = work()
    return value, [str(w.message) for w in caught]


def both_ways(monkeypatch, work) -> tuple[tuple, tuple, tuple]:
    """(rows, warnings) of the work in lists, of its first start in Arrow, and of its second."""
    expected = heard(work)
    monkeypatch.setattr(lazy, "LARGE", 0)
    monkeypatch.setattr(arrow_rows, "SIZE", 16)
    return expected, heard(work), heard(work)


# ---- rows ----
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        pa.field("prompt", pa.large_string(), metadata=arrow_rows.JSON),
        ("ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("done", pa.bool_()),
    ]
)


def stored_rows(n: int) -> list[dict]:
    stream = random.Random(0)
    return [
        {
            "row": i,
            "prompt": [{"role": "user", "content": f"é{i}"}] if i % 2 else f"text {i}",
            "ids": [stream.randrange(1 << stream.choice((3, 17, 25))) for _ in range(i % 9)],
            "logprobs": [stream.uniform(-9, 0) for _ in range(i % 4)] + [-math.inf],
            **({"done": False} if i % 3 == 0 else {}),
        }
        for i in range(n)
    ]


def test_a_row_is_as_its_dict(tmp_path, large):
    rows = stored_rows(70)  # four batches and a part of one
    found = kept(tmp_path / "a.arrow", "key", lambda into: [into.append(r) for r in rows], SCHEMA, sparse=True)
    assert found == rows and all(type(row) is Row for row in found)
    for row, expected in zip(found, rows, strict=True):
        assert {**row} == expected and list(row) == list(expected) and len(row) == len(expected)
        assert ("done" in row) == ("done" in expected) and row.get("done", True) == expected.get("done", True)
        assert all(type(a) is type(b) for a, b in zip(row["ids"], expected["ids"], strict=True))
        with pytest.raises(KeyError):
            row["other"]
    changed = found[3] | {"ids": [1], "more": 2}
    assert {**changed} == {**rows[3], "ids": [1], "more": 2} and found[3] == rows[3]
    found[4]["ids"] = [7]
    assert {**found[4]} == {**rows[4], "ids": [7]} and "more" not in found[4] and found[5] == rows[5]


def test_keys_of_rows_and_of_dicts_are_renamed_alike(tmp_path, large):
    rows = stored_rows(40)
    found = kept(tmp_path / "a.arrow", "key", lambda into: [into.append(r) for r in rows], SCHEMA, sparse=True)
    names = {"row": "row", "tokens": "ids", "finished": "done", "other": "none"}
    plain, mapped = arrow_rows.renamed(rows, names), arrow_rows.renamed(found, names)
    assert mapped == plain and plain[0] == {"row": 0, "tokens": [], "finished": False} and "finished" not in plain[1]


def test_lists_of_ids_share_their_numbers():
    import numpy as np

    big = np.array([3, 70_000, arrow_rows.MOST_INTS, 5])
    for ids in (np.array([70_000, 3, 70_000]), big, big - 4, np.array([], dtype=np.int32)):
        assert arrow_rows.number_list(ids) == ids.tolist()
    one, other = (arrow_rows.number_list(np.array([70_001, 9])) for _ in range(2))
    assert one[0] is other[0]


# ---- large sources against small ones ----
def write_source(folder, form: str, rows: list[dict]):
    """The rows as a file or a folder of this form."""
    import datasets

    if form == "jsonl":
        lines = [json.dumps(r) for r in rows]
        (folder / "d.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
        return folder / "d.jsonl"
    if form == "json":
        (folder / "d.json").write_text(json.dumps(rows))
        return folder / "d.json"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=9)
        return folder / "d.parquet"
    if form == "files":
        (folder / "set").mkdir()
        jsonl(folder / "set" / "train-0.jsonl", rows[: len(rows) // 3])
        pq.write_table(pa.Table.from_pylist(rows[len(rows) // 3 :]), folder / "set" / "train-1.parquet")
        return folder / "set"
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "files", "saved"])
def test_rows_of_a_large_source_are_those_of_a_list(tmp_path, monkeypatch, form):
    rows = [r for r in make_rows(90) if "messages" not in r] if form in ("parquet", "files", "saved") else make_rows(90)
    path = write_source(tmp_path, form, rows)
    for turns in ("last", "all"):
        for split in ("train", "test", "all", "whole"):
            how = dict(split="train", whole=True) if split == "whole" else dict(split=split)
            work = lambda h=how, t=turns: load_rows(str(path), turns=t, **h)  # noqa: E731
            monkeypatch.setattr(lazy, "LARGE", 1 << 40)
            expected, first, _ = both_ways(monkeypatch, work)
            assert isinstance(expected[0], list) and isinstance(first[0], list) == (form == "json")  # one value
            assert list(first[0]) == expected[0] and first[1] == expected[1] and len(first[0]) == len(expected[0]) > 3
            assert first[0][2:5] == expected[0][2:5] and first[0][-1] == expected[0][-1]
            with pytest.raises(IndexError):
                first[0][len(expected[0])]


@pytest.mark.parametrize("n", [0, 30])
@pytest.mark.parametrize("template", [None, ZEPHYR_TEMPLATE])
def test_encoded_rows_and_warnings_are_those_of_a_list_at_both_starts(tmp_path, monkeypatch, n, template, cache):
    path, tokenizer = jsonl(tmp_path / "d.jsonl", make_rows(90)), make_tokenizer(chat_template=template)
    args = arguments(path, max_samples=n)
    expected, first, second = both_ways(monkeypatch, lambda: demos.load_demonstrations(args, tokenizer))
    assert first == expected and second == expected and len(expected[0]) > 20
    numbers = [row["row"] for row in second[0]]
    assert numbers == sorted(set(numbers)) and len(numbers) == (n or len(numbers))
    assert all(type(row) is Row for row in [*first[0], *second[0]]) and [dict(r) for r in second[0]] == expected[0]
    kinds = ("cannot be used", "longer than --max-prompt-length", "longer than their room", "--max-new-tokens")
    assert all(any(kind in text for text in second[1]) for kind in kinds)
    assert [p.suffix for p in cache.iterdir()] == [".arrow"]


def test_tldr_and_preferences_and_held_out_rows_are_those_of_a_list(tmp_path, monkeypatch):
    path, tokenizer = jsonl(tmp_path / "p.jsonl", make_rows(120, "pairs")), make_tokenizer()
    args = arguments(path, max_samples=12, eval_preference_dataset=str(path))

    def work():
        tldr = demos.load_demonstrations(args, tokenizer, irl_ppo_tldr.encode_tldr)
        chosen = demos.load_demonstrations(args, tokenizer)
        preferences = preference_data.load_preferences(args, tokenizer, chosen)
        held = preference_data.load_eval_preferences(args, tokenizer)
        return tldr, chosen, preferences, held

    expected, first, second = both_ways(monkeypatch, work)
    assert first == expected and second == expected and all(expected[0])
    taken = {row["row"] for row in second[0][1]}
    assert len(taken) == 12 and taken.isdisjoint(p["row"] for p in second[0][2])
    assert any("pairs with chosen equal to rejected" in said for said in second[1])


def test_a_broken_line_of_a_large_file_is_named(tmp_path, large):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": \n')
    with pytest.raises(UserError, match=r"^--dataset: .*a.jsonl line 3: found broken JSON .*expected an object$"):
        load_rows(str(tmp_path / "a.jsonl"), "all")
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "p", "completion": "c"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"^--dataset: found .*b.jsonl, expected UTF-8 text \(line 2: "):
        load_rows(str(tmp_path / "b.jsonl"), "all")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"^--dataset: found .*c.parquet, expected readable Parquet \("):
        load_rows(str(tmp_path / "c.parquet"), "all")


def test_no_usable_row_of_a_large_source_is_the_error_of_a_small_one(tmp_path, monkeypatch, cache):
    path, tokenizer = jsonl(tmp_path / "d.jsonl", make_rows(40)), make_tokenizer()
    found = []
    for size in (1 << 40, 0):
        monkeypatch.setattr(lazy, "LARGE", size)
        with pytest.raises(UserError) as caught:
            demos.load_demonstrations(arguments(path, max_prompt_length=2), tokenizer)
        found.append(str(caught.value))
    assert found[0] == found[1] and "no row is left" in found[0] and list(cache.iterdir()) == []


# ---- which file is read ----
def test_rows_are_made_again_when_anything_they_depend_on_changes(tmp_path, large, monkeypatch, cache):
    """Every change gives what lists give; the first settings find their file again."""
    rows, made = make_rows(60), []
    path, tokenizer = jsonl(tmp_path / "d.jsonl", rows), make_tokenizer()
    original = Source.rows
    monkeypatch.setattr(Source, "rows", lambda self: (made.append(self.split), original(self))[1])

    def load(tokenizer=tokenizer, encode=demos.encode, split="train", **given):
        args = arguments(path, **given)
        source = Source(args.dataset, split, turns=args.turns)
        how = dict(encode=encode, longest_response=given.get("longest", 0), flag=given.get("flag", "--dataset"))
        return heard(lambda: demos.encode_subset(args, tokenizer, source, args.max_samples, args.seed, **how))

    def check(**changed) -> None:
        """The rows are made once, are those of lists, and are found afterwards."""
        before = len(made)
        found, again = load(**changed), load(**changed)
        assert len(made) == before + 1, changed
        monkeypatch.setattr(lazy, "LARGE", 1 << 40)
        expected = load(**changed)
        monkeypatch.setattr(lazy, "LARGE", 0)
        assert found == expected and again == expected, changed

    check()
    other_end = make_tokenizer()
    other_end.add_special_tokens({"eos_token": "<end>"})
    changes = [
        dict(tokenizer=make_tokenizer(280)), dict(tokenizer=make_tokenizer(chat_template=ZEPHYR_TEMPLATE)),
        dict(tokenizer=other_end), dict(max_length=70), dict(max_prompt_length=60), dict(max_samples=20),
        dict(max_samples=20, seed=4), dict(turns="all"), dict(turns="first"), dict(longest=9), dict(split="test"),
        dict(split="all"), dict(flag="--eval-dataset"), dict(encode=irl_ppo_tldr.encode_tldr, turns="first", split="test"),
    ]  # fmt: skip
    for change in changes[:-1]:
        check(**change)
    size, when = os.path.getsize(path), os.stat(path).st_mtime_ns
    jsonl(
        tmp_path / "d.jsonl",
        [{**r, "completion": r["completion"].replace("read", "dear")} if "completion" in r else r for r in rows],
    )
    os.utime(path, ns=(when, when))
    assert os.path.getsize(path) == size
    check()
    jsonl(tmp_path / "d.jsonl", rows)
    before = len(made)
    load()
    assert len(made) == before and len(list(cache.iterdir())) == len(changes) + 1


def test_code_and_versions_are_part_of_the_key(tmp_path, large, monkeypatch):
    path, tokenizer = jsonl(tmp_path / "d.jsonl", make_rows(20)), make_tokenizer()
    source = Source(path, "train")
    key = lambda encode=demos.encode, source=source: encoded.cache_key(source, "c", tokenizer, encode, {})  # noqa: E731
    first = key()
    assert key() == first
    assert key(irl_ppo_tldr.encode_tldr) != first and key(source=Source(path, "train", taken=frozenset({3}))) != first
    for name in encoded.CODE:
        with monkeypatch.context() as patch:
            patch.setattr(encoded, "digest", lambda p, name=name: "x" if str(p).endswith(name) else "y")
            with_one = key()
            patch.setattr(encoded, "digest", lambda p: "y")
            assert with_one != key(), name
    monkeypatch.setattr(encoded, "version", lambda name: "0")
    assert key() != first


def test_tokens_read_alike_in_another_process_have_the_same_key(tmp_path):
    make_tokenizer(chat_template=ZEPHYR_TEMPLATE).save_pretrained(tmp_path / "t")
    words = "from transformers import AutoTokenizer as A; from extras.encoded import tokenizer_digest as d;"
    words += f" print(d(A.from_pretrained({str(tmp_path / 't')!r})))"
    two = [subprocess.run([sys.executable, "-c", words], cwd=ROOT, env=child_environment(), capture_output=True, text=True)
           for _ in range(2)]  # fmt: skip
    assert two[0].stdout == two[1].stdout and len(two[0].stdout.strip()) == 64, two[0].stderr


def damage(path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "cut by a byte":
        path.write_bytes(data[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        path.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "another key":
        kept(path.with_name("b.arrow"), "other", lambda into: into.append({"row": 9}), SCHEMA, sparse=True)
        path.with_name("b.arrow").rename(path)


@pytest.mark.parametrize("how", ["cut", "cut by a byte", "empty", "one bit", "zeros", "another key"])
def test_a_damaged_file_is_made_again_with_one_line(tmp_path, large, how):
    rows, path = stored_rows(70), tmp_path / "a.arrow"

    def make(into):
        for row in rows:
            into.append(row)
        warnings.warn("a row was left out", stacklevel=1)

    load = lambda: heard(lambda: kept(path, "key", make, SCHEMA, sparse=True))  # noqa: E731
    load()
    whole = path.read_bytes()
    damage(path, how)
    found, said = load()
    assert found == rows and path.read_bytes() == whole
    assert [("damaged" in text, "left out" in text) for text in said] == [(True, False), (True, False), (False, True)]
    assert load() == (rows, ["a row was left out"])


def test_a_process_that_fails_leaves_no_file_and_a_killed_ones_part_is_removed(tmp_path, large):
    rows, path = stored_rows(40), tmp_path / "cache" / "a.arrow"

    def fail(into):
        for row in rows:
            into.append(row)
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        kept(path, "key", fail, SCHEMA)
    assert list(path.parent.iterdir()) == []
    (path.parent / ".partial_99_a.arrow").write_bytes(b"half")
    (path.parent / ".partial_99_b.arrow").write_bytes(b"of another file")
    assert kept(path, "key", lambda into: [into.append(r) for r in rows], SCHEMA, sparse=True) == rows
    assert sorted(p.name for p in path.parent.iterdir()) == [".partial_99_b.arrow", "a.arrow"]


@pytest.mark.parametrize("where", ["no folder", "full disk", "no locks"])
def test_without_a_place_the_rows_stay_in_memory_with_one_line(tmp_path, large, monkeypatch, where):
    rows, folder = stored_rows(70), tmp_path / "cache"

    def make(into):
        for row in rows:
            into.append(row)
        warnings.warn("a row was left out", stacklevel=1)

    if where == "no folder":
        folder.write_text("a file")
    elif where == "full disk":
        monkeypatch.setattr(
            arrow_rows.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
        )
    else:
        import fcntl

        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    found, said = heard(lambda: kept(folder / "a.arrow", "key", make, SCHEMA, sparse=True))
    assert found == rows
    if where == "no locks":
        assert said == ["a row was left out"] and [p.name for p in folder.iterdir()] == ["a.arrow"]
    else:
        assert len(said) == 2 and said[1] == "a row was left out"
        assert (
            "found no place for rows" in said[0] and "kept in memory" in said[0] and not (folder / "a.arrow").exists()
        )


def test_rows_that_no_column_takes_stay_a_list(tmp_path, large):
    odd = [{"row": 0, "prompt": [{"role": "user", "content": "x", "when": (1, 2)}], "ids": [1], "logprobs": []}]
    for rows in (
        odd,
        [{**odd[0], "prompt": {1}}],
        [{"row": "text", "prompt": "p"}],
        [{"row": 0, "prompt": "p", "new": 1}],
    ):
        found = kept(tmp_path / "a.arrow", "key", lambda into, rows=rows: [into.append(r) for r in rows], SCHEMA)
        assert found == rows and type(found[0]) is dict and list(tmp_path.glob("*a.arrow*")) == []


RACE = """
import sys, time
sys.path[:0] = {paths!r}
from test_arrow import SCHEMA, stored_rows
from extras.arrow_rows import kept
from pathlib import Path
def make(into):
    print("MADE", flush=True)
    time.sleep(1.0)
    for row in stored_rows(70):
        into.append(row)
print(kept(Path({path!r}), "key", make, SCHEMA, sparse=True) == stored_rows(70), flush=True)
"""


def test_one_of_two_processes_makes_the_rows_and_the_other_waits(tmp_path):
    words = RACE.format(paths=[str(ROOT), str(ROOT / "tests")], path=str(tmp_path / "c" / "a.arrow"))
    start = [sys.executable, "-c", words]
    two = [
        subprocess.Popen(start, cwd=ROOT, env=child_environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = "".join(child.communicate(timeout=120)[0] for child in two)
    assert sorted(printed.split()) == ["MADE", "True", "True"]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["a.arrow"]


# ---- stored rows of a run ----
def test_large_parquet_files_are_read_as_small_ones_and_never_an_older_one(tmp_path, monkeypatch):
    path = tmp_path / "iter_0.parquet"
    rows = [{**r, "prompt": "p", "done": r.get("done"), "nested": {"a": [i]}} for i, r in enumerate(stored_rows(50))]
    write_pairs(path, rows)
    expected, first, second = both_ways(monkeypatch, lambda: read_pairs(path))
    assert type(expected[0][0]) is dict and type(first[0][0]) is Row
    assert expected == (rows, []) and first == expected and second == expected
    assert first[0][1]["done"] is None and "done" in first[0][1]  # null is a value here
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["cache-iter_0.arrow", "iter_0.parquet"]
    write_pairs(path, rows[::-1])
    found, said = heard(lambda: read_pairs(path))
    assert found == rows[::-1]
    second = first[0][0]
    second["row"] = 77
    assert read_pairs(path)[-1]["row"] == 0


LARGE_RUN = """
import runpy, sys
sys.path[:0] = {paths!r}
from extras import arrow_rows, lazy
lazy.LARGE, arrow_rows.SIZE = 0, 4
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_on_mapped_rows_is_the_run_on_lists_and_two_processes_share_them(tmp_path, cache):
    model = make_model(tmp_path / "model")
    rows = [
        {"prompt": f"say {i}: {WORDS[i % 12]}", "completion": " ".join(WORDS[i % 9 :]) if i % 6 else ""}
        for i in range(24)
    ]
    data = jsonl(tmp_path / "data.jsonl", rows)
    flags = "--T 2 --replay all --num-train-epochs 1 --ref previous --max-samples 9 --seed 2".split()
    words = lambda out: command("irft.py", model, data, tmp_path / out, *flags)  # noqa: E731
    script = lambda out: LARGE_RUN.format(paths=[str(ROOT)], argv=[str(ROOT / "irft.py"), *words(out)[2:]])  # noqa: E731
    run(words("lists"))
    done = []
    for out, ranks in (("mapped", 0), ("two", 2)):
        (tmp_path / f"{out}.py").write_text(script(out))
        done.append(run([sys.executable, str(tmp_path / f"{out}.py")], ranks=ranks))
    assert metrics(tmp_path / "mapped") == metrics(tmp_path / "lists")
    one, other = final_weights(tmp_path / "lists"), final_weights(tmp_path / "mapped")
    assert all(one[name].equal(other[name]) for name in one)
    ids = [
        [p["rejected_ids"] for p in read_pairs(tmp_path / out / "generations" / "iter_1.parquet")]
        for out in ("lists", "two")
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 9
    assert done[0].stderr.count("are made once, for") == 2  # training and held-out rows
    assert "are made once" not in done[1].stderr  # both processes found them
    assert all(d.stderr.count("found an empty response") == 2 for d in done)  # at the second start too, from rank 0
    assert (tmp_path / "two" / "generations" / "cache-iter_0.arrow").is_file()


def test_sequences_are_scored_as_those_of_a_list():
    rows = [{"prompt_ids": [i] * (1 + i % 3), "response_ids": [i, i + 1][: 1 + i % 2]} for i in range(7)]
    expected = [(r["prompt_ids"], r["response_ids"]) for r in rows]
    found = lazy.sequences(rows, "response_ids")
    assert list(found) == expected and found[-1] == expected[-1] and len(found) == 7
    assert list(lazy.pick(found, [5, 0, 3])) == lazy.pick(expected, [5, 0, 3]) == [expected[i] for i in (5, 0, 3)]


# ---- results of all processes ----
FORMS = {
    "numbers": lambda i: i * 0.1 - 1,
    "wide numbers": lambda i: i << 40,
    "answers": lambda i: ([i] * (i % 3), i % 2 == 0, [math.nan if i == 4 else -0.1 * i] * (i % 4)),
    "candidates": lambda i: {"ids": [[i, 70_000], []], "done": [True, i == 1], "score": 1 / (i + 1), "text": f"é{i}"},
    "nothing": lambda i: [],
    "some": lambda i: None if i % 2 else 0.5,
}


@pytest.mark.parametrize("name", FORMS)
def test_results_come_back_to_the_bit(name):
    results = [FORMS[name](i) for i in range(9)]
    found = gather.unpack(gather.pack(results))
    assert repr(found) == repr(results)  # repr: NaN is NaN, 1 is not 1.0 and not True
    assert gather.unpack(gather.pack([])) == []


def test_results_that_no_column_takes_are_refused():
    for results in ([1, "a"], [object()], [[1], 2]):
        with pytest.raises(TypeError, match="no Arrow column takes these results"):
            gather.pack(results)


RANKS = """
import sys
sys.path[:0] = {paths!r}
from test_arrow import FORMS
import evaluate
from common.run import Run

run = Run(evaluate.Args(output_dir={out!r}, mixed_precision="no"), "evaluate", {{}})
good = []
for n in (1, 2, 3, 8):  # fewer than processes, and shares of unequal size
    for form in FORMS.values():
        found = run.map_rows(n, lambda mine: [form(i) for i in mine])
        good.append(repr(found) == repr([form(i) for i in range(n)]))
sys.stdout.write(f"RANK {{run.rank}} {{len(good)}} {{all(good)}}" + chr(10))
"""


def test_all_ranks_have_all_results_in_order(tmp_path):
    here = [str(ROOT), str(ROOT / "tests")]
    (tmp_path / "ranks.py").write_text(RANKS.format(paths=here, out=str(tmp_path / "out")))
    done = run([sys.executable, str(tmp_path / "ranks.py")], ranks=2)
    assert {f"RANK {rank} {4 * len(FORMS)} True" for rank in (0, 1)} <= set(done.stdout.splitlines()), done.stdout


def test_a_large_hub_set_is_known_by_its_fingerprint_and_read_as_a_list(monkeypatch):
    import datasets

    rows = make_rows(40, "pairs")
    sets = [datasets.Dataset.from_list(rows[i:]) for i in (0, 1)]
    current = [0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: sets[current[0]])
    source = Source("ultrafeedback_binarized", "train", "preferences")
    assert encoded.content_of(source) == "" and isinstance(expected := source.rows(), list)
    monkeypatch.setattr(lazy, "LARGE", 0)
    found, first = source.rows(), encoded.content_of(source)
    assert list(found) == expected and not isinstance(found, list) and found[3] == expected[3]
    current[0] = 1
    assert first and encoded.content_of(source) not in ("", first)
