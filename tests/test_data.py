"""Every format, every kind of bad input, templates, EOS and masks."""

import json
import re
import sys
import sysconfig
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ZEPHYR_TEMPLATE, jsonl, make_model, make_tokenizer
from safetensors import safe_open

import sft
import tiny
from common import UserError, data, demos, models, store
from common.data import collate, encode, render_prompt
from common.store import read_pairs, write_pairs
from common.streams import data_order
from extras import hub_names, preference_data, sources
from extras.sources import load_rows
from tiny import make

USER, ASSISTANT = {"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}
WRONG = {"role": "assistant", "content": "five"}
FORMATS = {  # raw row -> prompt, response, rejected
    "completion": ({"prompt": "q", "completion": "a"}, "q", "a", None),
    "response": ({"prompt": "q", "response": "a"}, "q", "a", None),
    "messages_completion": ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], "four", None),
    "messages": ({"messages": [USER, ASSISTANT, USER, WRONG]}, [USER, ASSISTANT, USER], "five", None),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a", "b"),
    "ultrafeedback": ({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]}, [USER], "four", "five"),
    "conversational": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WRONG]}, [USER], "four", "five"),
    "spin": ({"real": [USER, ASSISTANT], "generated": [USER, WRONG]}, [USER], "four", "five"),
    "hh": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: q\n\nAssistant: b", "rejected": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: q\n\nAssistant: c"},
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}], "b", "c",
    ),
    "tldr": ({"subreddit": "x", "title": "t", "post": "p", "summary": "s"}, "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", "s", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    raw, prompt, response, rejected = FORMATS[name]
    (row,) = load_rows(jsonl(tmp_path / "d.jsonl", [raw]), "all")
    expected = {"row": 0, "prompt": prompt, "response": response}
    assert row == (expected if rejected is None else expected | {"rejected": rejected})
    if rejected is not None:
        (row,) = load_rows(str(tmp_path / "d.jsonl"), "all", kind="preferences")
        assert row == {"row": 0, "prompt": prompt, "chosen": response, "rejected": rejected}


def test_sources_give_the_same_rows(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(30)]
    sources = {"a.jsonl": jsonl(tmp_path / "a.jsonl", rows)}
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    write_pairs(tmp_path / "d.parquet", rows)
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "e"))
    expected = load_rows(sources["a.jsonl"], "train")
    for name in ("b.json", "c.json", "d.parquet", "e"):
        assert load_rows(str(tmp_path / name), "train") == expected
    assert 15 < len(expected) < 30
    folder = tmp_path / "f"
    (folder / "data").mkdir(parents=True)
    write_pairs(folder / "data" / "train_sft-00000.parquet", rows[:20])
    write_pairs(folder / "data" / "test_sft-00000.parquet", rows[20:])
    DatasetDict(train=Dataset.from_list(rows[:20]), test=Dataset.from_list(rows[20:])).save_to_disk(str(tmp_path / "g"))
    for name in ("f", "g"):
        assert [r["prompt"] for r in load_rows(str(tmp_path / name), "train")] == [r["prompt"] for r in rows[:20]]
        assert [r["prompt"] for r in load_rows(str(tmp_path / name), "test")] == [r["prompt"] for r in rows[20:]]


def test_held_out_tenth_never_shares_a_prompt(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": f"q{i % 100}", "completion": f"a{i}"} for i in range(400)])
    train, test = load_rows(path, "train"), load_rows(path, "test")
    assert len(train) + len(test) == 400 and 8 < len(test) < 120
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}


BAD = {
    "no_file": (None, "--dataset: found no file {path}, expected"),
    "broken": ('{"prompt": "a", "completion": "b"}\n{oops\n', "{path} line 2: found broken JSON"),
    "not_object": ('[1]\n[2]\n', "row 0: found a list, expected an object; all 2 rows"),
    "columns": ('{"question": "a", "answer": "b"}\n', "row 0: found columns question, answer, expected one of prompt/completion"),
    "empty_set": ("\n", "found no rows in {path}, expected at least one"),
    "all_empty": ('{"prompt": "a", "completion": " "}\n', "row 0: found an empty response, expected text; all 1 rows"),
    "number": ('{"prompt": "a", "completion": 3}\n', "row 0: found int as response, expected text"),
    "null": ('{"prompt": null, "completion": "b"}\n', "row 0: found NoneType as prompt, expected text"),
    "no_answer": ('{"messages": [{"role": "user", "content": "a"}]}\n', "row 0: found messages without an assistant turn"),
    "not_messages": ('{"messages": "hello"}\n', "row 0: found str, expected a list of messages"),
    "transcript": ('{"chosen": "a", "rejected": "b"}\n', "row 0: found no prompt column and no transcript"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(tmp_path, name):
    text, expected = BAD[name]
    path = tmp_path / "d.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        load_rows(str(path), "all")
    message = str(error.value)
    assert expected.format(path=path) in message and "\n" not in message and "--dataset" in message


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}])
    with pytest.warns(UserWarning, match="row 1: found an empty response, expected text; 1 of 2 rows"):
        assert [r["row"] for r in load_rows(path, "all")] == [0]


def test_preferences_need_a_rejected_response(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="found columns prompt, completion, expected a preference"):
        load_rows(path, "all", kind="preferences")


@pytest.mark.parametrize("name", ["no-such-set", "ultrachat_200k", "someone/some-set"])
def test_unknown_name_without_a_hub_is_one_line(name):
    with pytest.raises(UserError) as error:
        load_rows(name, "train")
    message = str(error.value)
    assert f"found no local path {name}" in message and f"./{name} would do" in message and "\n" not in message


# ---- the embedded data ----
@pytest.fixture(scope="module")
def pydoc():
    return read_pairs(tiny.DATA)


def test_pydoc_is_real_and_large(pydoc):
    assert len(pydoc) > 4000
    for row in pydoc:
        assert 8 <= len(row["response"]) <= 160 and row["response"] not in row["prompt"]
        assert row["prompt"].startswith(("def ", "class "))
    held = [row for row in pydoc if row["test"]]
    assert 0.04 < len(held) / len(pydoc) < 0.2
    assert any(row["response"].startswith("Return a list") for row in pydoc)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another Python's library has other docstrings")
def test_pydoc_is_what_make_harvests(pydoc):
    """Patch versions, and systems that leave modules out, differ in a few rows."""
    own, shipped = (
        {(r["module"], r["prompt"], r["response"]): r["test"] for r in rows} for rows in (make.harvest(), pydoc)
    )
    both = own.keys() & shipped.keys()
    assert len(both) > 0.7 * len(shipped) and all(own[key] == shipped[key] for key in both)


def test_pydoc_prompts_are_not_shared_between_splits(pydoc):
    assert not {r["prompt"] for r in pydoc if r["test"]} & {r["prompt"] for r in pydoc if not r["test"]}


# ---- templates and tokens ----
def test_template_is_the_tokenizers_or_the_papers():
    plain, chat = make_tokenizer(), make_tokenizer(chat_template=ZEPHYR_TEMPLATE)
    assert render_prompt(plain, "q") == "### Instruction: q\n\n### Response: "
    assert render_prompt(chat, "q") == "<|user|>\nq</s>\n<|assistant|>\n"
    assert render_prompt(chat, [USER, ASSISTANT, USER]).endswith(
        "four</s>\n<|user|>\ntwo plus two?</s>\n<|assistant|>\n"
    )
    assert render_prompt(plain, [USER]) == render_prompt(plain, "two plus two?")
    assert "Human: two plus two?\n\nAssistant: four" in render_prompt(plain, [USER, ASSISTANT, USER])


@pytest.mark.parametrize("response", ["four", "four</s>"])
@pytest.mark.parametrize("template", [None, ZEPHYR_TEMPLATE])
def test_eos_is_trained_exactly_once_and_pad_may_be_eos(response, template):
    tokenizer = make_tokenizer(chat_template=template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [
        {"row": 0, "prompt": "q", "response": response},
        {"row": 1, "prompt": "a longer question", "response": "a much longer answer"},
    ]
    encoded = encode(rows, tokenizer, 96, 64)
    ids = encoded[0]["response_ids"]
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "four"
    batch = collate([(e["prompt_ids"], e["response_ids"]) for e in encoded], tokenizer.pad_token_id)
    assert batch.response_mask.sum(-1).tolist() == [len(e["response_ids"]) for e in encoded]
    last = batch.response_mask.sum(-1) - 1
    assert (batch.response_ids[torch.arange(2), last] == tokenizer.eos_token_id).all()
    assert batch.attention_mask.sum(-1).tolist() == [len(e["prompt_ids"]) + len(e["response_ids"]) for e in encoded]


def test_cut_response_has_no_eos():
    tokenizer = make_tokenizer()
    (item,) = encode([{"row": 0, "prompt": "q", "response": "word " * 50}], tokenizer, 60, 55)
    assert len(item["prompt_ids"]) + len(item["response_ids"]) == 60
    assert tokenizer.eos_token_id not in item["response_ids"]


def test_bos_is_added_once_where_the_tokenizer_would_add_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    row = [{"row": 0, "prompt": "q", "response": "a"}]
    assert bos not in encode(row, tokenizer, 96, 64)[0]["prompt_ids"]  # GPT-NeoX: has the token, never adds it
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert encode(row, tokenizer, 96, 64)[0]["prompt_ids"].count(bos) == 1
    tokenizer.chat_template = "<s>" + ZEPHYR_TEMPLATE
    ids = encode(row, tokenizer, 96, 64)[0]["prompt_ids"]
    assert ids.count(bos) == 1 and ids[0] == bos


def test_long_prompts_are_left_out_and_counted_and_none_left_is_an_error():
    tokenizer = make_tokenizer()
    rows = [{"row": 5, "prompt": "word " * 60, "response": "a"}, {"row": 6, "prompt": "q", "response": "a"}]
    with pytest.warns(
        UserWarning, match=r"found 1 of 2 prompts longer than --max-prompt-length 64 \(row 5 has \d+ tokens\)"
    ):
        assert [r["row"] for r in encode(rows, tokenizer, 96, 64)] == [6]
    with pytest.raises(UserError, match="no row is left"):
        encode(rows[:1], tokenizer, 96, 64)


def test_pairs_survive_parquet(tmp_path):
    rows = [{"row": 1, "prompt": "q", "chosen": "a", "rejected": "b", "rejected_ids": [3, 4], "ref_chosen": -1.5}]
    write_pairs(tmp_path / "p.parquet", rows)
    assert read_pairs(tmp_path / "p.parquet") == rows
    from datasets import load_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_dataset(
            "parquet", data_files=str(tmp_path / "p.parquet"), cache_dir=str(tmp_path / "c"), split="train"
        )
    assert {"prompt", "chosen", "rejected", "row"} <= set(loaded.column_names)  # what a DPO trainer reads


# ---- sources and formats in detail ----
def turns(*contents: str) -> list[dict]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def pairs(n: int, tag: str = "") -> list[dict]:
    return [{"prompt": f"{tag} question {i}", "completion": f"{tag} answer {i}"} for i in range(n)]


def write(path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def one(tmp_path, row: dict, kind: str = "demonstrations") -> dict:
    """The row that a source holding only this one gives."""
    (parsed,) = load_rows(write(tmp_path / "one.jsonl", [row]), "all", kind)
    return parsed


def error_of(name, split: str = "all", kind: str = "demonstrations", flag: str = "--dataset") -> str:
    with pytest.raises(UserError) as caught:
        load_rows(str(name), split, kind, flag)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(flag), message
    return message


def encode_one(row: dict, tokenizer, max_length: int = 200, max_prompt_length: int = 150) -> dict:
    (encoded,) = encode([{"row": 0, **row}], tokenizer, max_length, max_prompt_length)
    return encoded


def test_jsonl_with_byte_order_mark_blank_lines_and_line_separators(tmp_path):
    path = tmp_path / "data.jsonl"
    row = json.dumps({"prompt": "a\u2028b\x85c", "completion": "d"}, ensure_ascii=False)
    path.write_text(f"\ufeff{row}\r\n\n{row}", encoding="utf-8", newline="")
    assert [r["prompt"] for r in load_rows(str(path), "all")] == ["a\u2028b\x85c"] * 2


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train.json", "validation.json"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train_sft-00000.parquet", "test_sft-00000.parquet"),
        ("train/part.jsonl", "test/part.jsonl"),
    ],
)
def test_folder_with_splits(tmp_path, train, test):
    write(tmp_path / "set" / train, pairs(30, "seen"))
    write(tmp_path / "set" / test, pairs(3, "unseen"))
    name = str(tmp_path / "set")
    assert {r["prompt"].split()[0] for r in load_rows(name, "train")} == {"seen"}
    for split in ("test", "all"):  # named as held-out data, a source gives none of its training rows
        assert {r["prompt"].split()[0] for r in load_rows(name, split)} == {"unseen"}
    assert len(load_rows(name, "train")) == 30


def test_folder_without_splits_reads_every_file(tmp_path):
    write(tmp_path / "set" / "a.jsonl", pairs(60, "a"))
    write(tmp_path / "set" / "b.parquet", pairs(60, "b"))
    train, test = (load_rows(str(tmp_path / "set"), split) for split in ("train", "test"))
    assert len(train) + len(test) == 120 and test
    assert {r["prompt"].split()[0] for r in train} == {"a", "b"}


def save_to_disk(path, splits):
    from datasets import Dataset, DatasetDict

    if isinstance(splits, dict):
        DatasetDict({k: Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(str(path))
    else:
        Dataset.from_list(splits).save_to_disk(str(path))


@pytest.mark.parametrize("saved", [True, False])
def test_local_copy_uses_the_splits_of_the_table(tmp_path, saved):
    kinds = {"ultrafeedback_binarized": ("gen", "prefs", "sft"), "ultrachat_200k": ("gen", "sft")}
    for name, suffixes in kinds.items():
        splits = {f"{half}_{s}": pairs(2, f"{half}_{s}") for half in ("train", "test") for s in suffixes}
        if saved:
            save_to_disk(tmp_path / name, splits)
        else:
            for split, rows in splits.items():
                write(tmp_path / name / "data" / f"{split}-00000-of-00001.parquet", rows)
        for split, expected in zip(("train", "test"), hub_names.DATASETS[name][2:], strict=True):
            assert {r["prompt"].split()[0] for r in load_rows(str(tmp_path / name), split)} == {expected}


def test_datasets_folder_without_test_split(tmp_path):
    save_to_disk(tmp_path / "plain", pairs(100))
    save_to_disk(tmp_path / "no_test", {"train": pairs(100), "extra": pairs(5, "extra")})
    for name in ("plain", "no_test"):
        train, test = (load_rows(str(tmp_path / name), split) for split in ("train", "test"))
        assert len(train) + len(test) == 100 and test


def test_local_path_wins_over_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pydoc", "hh-rlhf"):
        write(tmp_path / name / "train.jsonl", pairs(2, name))
        assert [r["prompt"] for r in load_rows(name, "all")] == [f"{name} question 0", f"{name} question 1"]


def test_hub_splits(monkeypatch):
    """A short name asks for the table's split; another id takes the splits that the hub has."""
    import datasets

    asked = []
    sets = {split: datasets.Dataset.from_list(pairs(2, split)) for split in ("train_sft", "test_sft", "train", "extra")}

    def load_dataset(hub, config=None, split=None):
        asked.append((hub, split))
        whole = datasets.DatasetDict({k: sets[k] for k in ("train", "extra")})
        return sets[split] if split else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("ultrachat_200k", "test")[0]["prompt"] == "test_sft question 0"
    assert {r["prompt"].split()[0] for r in load_rows("someone/something", "all")} == {"train"}
    assert asked == [("HuggingFaceH4/ultrachat_200k", "test_sft"), ("someone/something", None)]


def test_hh_turns(tmp_path):
    head = "\n\nHuman: hi\nthere\n\nAssistant: hello\n\nHuman: tell me"
    row = one(tmp_path, {"chosen": f"{head}\n\nAssistant: no\n\nHuman: oh", "rejected": f"{head}\n\nAssistant: yes "})
    assert row["prompt"] == turns("hi\nthere", "hello", "tell me")
    assert (row["response"], row["rejected"]) == ("no", "yes")  # what a human says afterwards is not the response


def test_tldr_subreddit_or_section(tmp_path):
    row = {"subreddit": "tifu", "title": "T", "post": "P\nQ", "summary": " S"}
    text = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: P\nQ\n\nTL;DR:"
    assert one(tmp_path, row) == {"row": 0, "prompt": text, "response": " S"}
    row["section"] = row.pop("subreddit")
    assert one(tmp_path, row)["prompt"] == text


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"chosen": turns("p", "a"), "rejected": turns("q", "b")},
        {"real": turns("p", "a"), "generated": turns("q", "b")},
        {"prompt": "p", "chosen": "a", "rejected": " "},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
    ],
)
def test_unusable_rows_are_left_out_and_counted(tmp_path, row):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    name = write(tmp_path / "data.json", [good, row, good, row])
    with pytest.warns(UserWarning, match=r"--dataset .*data.json row 1: found .*2 of 4 rows") as caught:
        rows = load_rows(name, "all", "preferences")
    assert [r["row"] for r in rows] == [0, 2] and len(caught) == 1
    assert "row 0" in (message := error_of(write(tmp_path / "bad.json", [row]))) and "all 1 rows" in message


# ---- bad input in detail ----
def test_missing_source_names_the_flag_given(tmp_path):
    assert "nothing.jsonl" in error_of(tmp_path / "nothing.jsonl", flag="--eval-dataset")
    assert "no_folder" in error_of(tmp_path / "no_folder")


def test_broken_json_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": \n')
    message = error_of(tmp_path / "a.jsonl")
    assert "a.jsonl line 3" in message and "broken JSON" in message and "expected an object" in message
    (tmp_path / "a.json").write_text("[{]")
    assert "a.json" in (message := error_of(tmp_path / "a.json")) and "expected a list" in message
    (tmp_path / "b.json").write_text('"text"')
    assert "found a JSON str, expected a list" in error_of(tmp_path / "b.json")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_unreadable_bytes(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b'{"prompt": "\xe9"}')
    assert f"a.{suffix}, expected" in error_of(tmp_path / f"a.{suffix}")


def test_other_files(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    assert "a.csv, expected a .json, .jsonl or .parquet" in error_of(tmp_path / "a.csv")
    assert "expected a data set folder" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["p", "c"], "found a list, expected an object"),
        ({"text": "t", "label": 1}, "found columns text, label, expected one of prompt/completion"),
        ({}, "found columns none"),
        ({"prompt": "p", "completion": 3}, "found int as response, expected text"),
        ({"prompt": "p", "completion": None}, "found NoneType as response, expected text"),
        ({"prompt": 3, "completion": "c"}, "found int as prompt, expected text"),
        ({"prompt": "p", "chosen": "c", "rejected": 3}, "found int as rejected, expected text"),
        ({"prompt": ["p"], "completion": "c"}, "non-text prompt, expected messages with text"),
        ({"prompt": [{"role": "user"}], "completion": "c"}, "non-text prompt, expected messages with text"),
        ({"prompt": [], "completion": "c"}, "empty or non-text prompt"),
        ({"messages": "text"}, "found str, expected a list of messages"),
        ({"messages": turns("p")}, "without an assistant turn"),
        ({"messages": turns("", "c")[1:]}, "empty or non-text prompt"),
        ({"chosen": "c", "rejected": "r"}, "no prompt column and no transcript"),
        ({"messages": []}, "without an assistant turn"),
        ({"messages": None}, "found NoneType, expected a list of messages"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "found NoneType as response, expected text"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}, USER, ASSISTANT]},
            "non-text prompt, expected messages with text",
        ),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "found NoneType as prompt, expected text"),
        ({"subreddit": "x", "title": "t", "post": None, "summary": "s"}, "found NoneType as post, expected text"),
        ({"prompt": "p", "completion": "c", "label": False}, "found label False, an answer that people rejected"),
        ({"messages": [USER, ASSISTANT], "label": 0}, "found label 0, an answer that people rejected"),
    ],
)
def test_one_bad_row_is_left_out_and_counted_and_all_bad_are_an_error(tmp_path, row, words):
    name = write(tmp_path / "bad.json", [*pairs(2), row, *pairs(1, "more"), row])
    with pytest.warns(UserWarning) as caught:
        assert [r["row"] for r in load_rows(name, "all", flag="--eval-dataset")] == [0, 1, 3]
    (message,) = [str(w.message) for w in caught]
    assert message.startswith(f"--eval-dataset {name} row 2: ") and words in message
    assert message.endswith("2 of 5 rows cannot be used and were left out") and "\n" not in message
    message = error_of(write(tmp_path / "all.json", [row, row]), flag="--eval-dataset")
    assert message.startswith(f"--eval-dataset {tmp_path / 'all.json'} row 0: ") and words in message
    assert message.endswith("all 2 rows are like this")


def test_empty_sets_and_splits(tmp_path):
    assert "found no rows" in error_of(write(tmp_path / "a.jsonl", []))
    name = write(tmp_path / "b.jsonl", pairs(1))
    empty = "train" if sources.held_out(pairs(1)[0]["prompt"]) else "test"
    assert f"found 1 rows in {name}, none in its {empty} part" in error_of(name, empty)


# ---- tokens and batches in detail ----
@pytest.mark.parametrize("template", [None, ZEPHYR_TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("text", ["open it</s></s>", "open it</s>\n"])
def test_eos_written_in_the_text_counts_once(template, text):
    tokenizer = make_tokenizer(chat_template=template)
    row = encode_one({"prompt": "p", "response": text, "rejected": text}, tokenizer)
    plain = tokenizer("open it", add_special_tokens=False)["input_ids"]
    assert row["response_ids"] == row["rejected_ids"] == [*plain, tokenizer.eos_token_id]
    assert row["response_text"] == row["rejected_text"] == "open it"  # what is learned


def test_eos_inside_a_response_is_no_end():
    tokenizer = make_tokenizer()
    ids = encode_one({"prompt": "p", "response": "a</s>b"}, tokenizer)["response_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids) == "a</s>b</s>"


def test_response_is_cut_at_max_length_exactly():
    tokenizer = make_tokenizer()
    whole = encode_one({"prompt": "p", "response": "read the list", "rejected": "x" * 90}, tokenizer)
    length = len(whole["prompt_ids"]) + len(whole["response_ids"])
    for max_length, response in [
        (length, whole["response_ids"]),
        (length - 1, whole["response_ids"][:-1]),
        (length - 2, whole["response_ids"][:-2]),
    ]:
        cut = encode_one({"prompt": "p", "response": "read the list", "rejected": "x" * 90}, tokenizer, max_length)
        assert cut["response_ids"] == response
        assert len(cut["prompt_ids"] + cut["rejected_ids"]) == max_length
        assert tokenizer.eos_token_id not in cut["rejected_ids"]
    assert cut["prompt_ids"] == whole["prompt_ids"]


def test_rows_with_and_without_rejected():
    rows = [{"row": 0, "prompt": "p", "response": "a"}, {"row": 1, "prompt": "p", "response": "a", "rejected": "b"}]
    for order in (rows, rows[::-1]):
        encoded = encode(order, make_tokenizer(), 100, 50)
        assert {r["row"]: "rejected_ids" in r for r in encoded} == {0: False, 1: True}


def tokenizer_with_bos(adds: bool = True, chat_template: str | None = None):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template=chat_template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds:
        processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "count"),
    [
        (tokenizer_with_bos(), 1),
        (tokenizer_with_bos(chat_template=ZEPHYR_TEMPLATE), 1),
        (tokenizer_with_bos(chat_template="{{ bos_token }}" + ZEPHYR_TEMPLATE), 1),
        (tokenizer_with_bos(adds=False), 0),
        (make_tokenizer(), 0),
    ],
    ids=["plain", "chat", "chat with bos", "adds none", "has none"],
)
def test_bos_is_there_once(tokenizer, count):
    row = encode_one({"prompt": "p", "response": "r", "rejected": "s"}, tokenizer)
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == count
    assert row["prompt_ids"][:count] == [tokenizer.bos_token_id] * count
    assert tokenizer.bos_token_id not in row["response_ids"] + row["rejected_ids"]


def test_bos_does_not_depend_on_another_row():
    tokenizer = tokenizer_with_bos()
    rows = [{"row": i, "prompt": p, "response": "r"} for i, p in enumerate(["strike", "q"])]
    assert [r["prompt_ids"][0] for r in encode(rows, tokenizer, 100, 90)] == [tokenizer.bos_token_id] * 2


def test_prompt_leaves_room_for_a_response():
    tokenizer = make_tokenizer()
    length = len(encode_one({"prompt": "p", "response": "r"}, tokenizer)["prompt_ids"])
    assert len(encode_one({"prompt": "p", "response": "r"}, tokenizer, length + 1, length)["response_ids"]) == 1
    with pytest.raises(UserError, match="longer than"):
        encode_one({"prompt": "p", "response": "r"}, tokenizer, length, length)


def test_collate():
    batch = collate([([5, 6, 7], [8, 9]), ([5], [6, 7, 8]), ([4], [3])], pad_token_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [4, 3, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch.response_ids.tolist() == [[8, 9, 9], [6, 7, 8], [3, 9, 9]]
    assert batch.response_mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert batch.response_start.tolist() == [3, 1, 1]
    assert batch.response_mask.dtype == torch.bool
    for name in ("input_ids", "attention_mask", "response_ids", "response_start"):
        assert getattr(batch, name).dtype == torch.long


@pytest.mark.parametrize("pad", [0, 7])
def test_masks_do_not_depend_on_the_pad_token(pad):
    """With pad = eos (7) the EOS that ends a response stays in the mask, and one inside a prompt is attended to."""
    batch = collate([([1, 7, 2], [3, 7]), ([1], [7])], pad_token_id=pad)
    assert batch.attention_mask.sum(1).tolist() == [5, 2]
    assert batch.response_mask.sum(1).tolist() == [2, 1]
    assert batch.response_ids[batch.response_mask].tolist() == [3, 7, 7]


def test_collate_of_empty_responses_and_to():
    batch = collate([([1, 2], []), ([1], [])], pad_token_id=0).to("cpu")
    assert batch.response_ids.shape == (2, 0) and batch.response_ids.dtype == torch.long
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]


def test_pairs_are_stored_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "pairs.parquet"
    rows = [{"row": 0, "prompt": "p", "ids": [1, 2], "x": 0.1}, {"row": 1, "prompt": "é", "ids": [], "x": -1.0}]
    write_pairs(path, rows)
    assert read_pairs(path) == rows

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_pairs(path, rows[:1])
    assert read_pairs(path) == rows


# ---- the harvest in detail ----
def test_pydoc_rows_have_something_to_learn(pydoc):
    rows = pydoc
    assert all(r["response"] == " ".join(r["response"].split()) for r in rows)
    assert len({r["prompt"] for r in rows}) == len(rows)
    assert sum(bool(r["prompt"].partition("\n")[2].strip()) for r in rows) > 0.95 * len(rows)


def test_pydoc_loads_its_two_splits_as_shipped_and_writes_nothing(pydoc, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEANIRL_CACHE", str(tmp_path / "cache"))
    train, test = load_rows("pydoc", "train"), load_rows("pydoc", "test")
    assert sorted(r["row"] for r in train + test) == list(range(len(pydoc)))
    assert [(r["prompt"], r["response"]) for r in test] == [(r["prompt"], r["response"]) for r in pydoc if r["test"]]
    assert not (tmp_path / "cache").exists()


LIBRARY = '''raise SystemExit("imported")
class {m}_Base:
    pass
class {m}_Box({m}_Base):
    """Hold what {m} needs."""
    def get(self, key, default=None):
        """Return the value of {m}.

        Raises KeyError in {m}.
        """
        return self.{m}[key]
def {m}_plain(x):
    """Compute {m} of
    the number."""
    y = x + 1
    return y
def {m}_short():
    """Too."""
def {m}_echo():
    """Print a text."""
    print("Print a text.", "{m}")
def {m}_many():
    """Say the same thing."""
    return "{m}"
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 60 modules and of files that must not be read."""
    for i in range(60):
        (tmp_path / f"mod{i}.py").write_text(LIBRARY.format(m=f"mod{i}"))
    for skipped in ("test/a.py", "pkg/tests/b.py", "site-packages/c.py", "idlelib/idle_test/d.py"):
        (tmp_path / skipped).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / skipped).write_text(LIBRARY.format(m="skipped"))
    (tmp_path / "python2.py").write_text("print 'hello'")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    real = sysconfig.get_paths  # which other modules call too
    monkeypatch.setattr(sysconfig, "get_paths", lambda *given: {**real(*given), "stdlib": str(tmp_path)})
    rows = make.harvest()
    write_pairs(tmp_path / "pydoc.parquet", rows)
    monkeypatch.setattr(tiny, "DATA", tmp_path / "pydoc.parquet")
    return rows


def test_harvest_reads_without_importing(library):
    texts = {row["prompt"]: row["response"] for row in library}
    assert texts["def mod3_Box.get(self, key, default=None)\nRaises KeyError in mod3."] == "Return the value of mod3."
    assert texts["def mod3_plain(x)\ny = x + 1\nreturn y"] == "Compute mod3 of the number."
    assert any(p.startswith("class mod3_Box(mod3_Base)\n") for p in texts)
    assert not [p for p in texts if "skipped" in p or "_short" in p or "_echo" in p]
    assert list(texts.values()).count("Say the same thing.") == 3


def test_harvest_holds_out_whole_modules_deterministically(library):
    sides = {}
    for row in library:
        sides.setdefault(row["prompt"].split()[1].split("_")[0], set()).add(row["test"])
    assert len(sides) == 60 and all(len(side) == 1 for side in sides.values())
    assert 0 < sum(side == {True} for side in sides.values()) < 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library == make.harvest()


def test_make_trains_a_model_that_loads_on_rows_and_source_code(library, tmp_path, monkeypatch):
    """The weights are stored in float16, without the dropout of training."""
    monkeypatch.setattr(make, "DATA", tiny.DATA)
    monkeypatch.setattr(make, "MODEL", tmp_path / "model")
    monkeypatch.setattr(make, "SHAPE", make.SHAPE | {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 32})
    monkeypatch.setattr(make, "TRAINING", make.TRAINING | {"batch_size": 4, "measured_every": 1})
    monkeypatch.setattr(make, "PHASES", [(2, 1e-3, 1e-3, 0.5), (1, 1e-3, 0.0, 0.0)])
    make.train_model()
    tokenizer = models.read_tokenizer(str(tmp_path / "model"), False, "--model")
    blocks = make.source_blocks(tokenizer, library)
    found = re.findall(r"class (mod\d+)_Base:", "".join(tokenizer.decode(ids) for ids in blocks))
    modules = {row["module"] for row in library if not row["test"] and not make.is_development(row["module"])}
    assert sorted(f"{name}.py" for name in found) == sorted(modules) and 30 < len(modules) < 60
    assert all(len(ids) <= 224 for ids in blocks)
    model = models.load_model(sft.Args(model=str(tmp_path / "model"), mixed_precision="no"))
    assert next(model.parameters()).dtype == torch.float32 and model.config.hidden_dropout == 0.0
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


# ---- preferences of the embedded data ----
def preferred(rows: list[dict]) -> dict[int, tuple[str, str, str]]:
    return {r["row"]: (r["prompt"], r["chosen"], r["rejected"]) for r in rows}


def test_pydoc_preferences_are_the_demonstrations_beside_the_next_summary_of_their_module(library):
    """Same row ids, same prompts, same side; chosen is the definition's own summary, rejected the next other one."""
    for split in ("train", "test"):
        shown = {r["row"]: r for r in load_rows("pydoc", split)}
        pairs = preferred(load_rows("pydoc", split, "preferences"))
        assert pairs.keys() == shown.keys() and len(pairs) > 9
        assert all((p, c) == (shown[i]["prompt"], shown[i]["response"]) for i, (p, c, _) in pairs.items())
    texts = {
        p: (c, r)
        for split in ("train", "test")
        for p, c, r in preferred(load_rows("pydoc", split, "preferences")).values()
    }
    for i in range(60):
        module = f"mod{i}"
        own = {p: pair for p, pair in texts.items() if p.split()[1].startswith(f"{module}_")}
        summaries = [c for c, _ in own.values()]  # in the order of the file
        assert [r for _, r in own.values()] == summaries[1:] + summaries[:1] and len(set(summaries)) in (3, 4)


def test_pydoc_pairs_differ_and_a_lone_summary_makes_none(pydoc, tmp_path, monkeypatch):
    lone = [{"test": False, "prompt": "p", "response": "Do it all.", "next_response": None}]
    write_pairs(tmp_path / "pydoc.parquet", lone + pydoc)
    monkeypatch.setattr(tiny, "DATA", tmp_path / "pydoc.parquet")
    rows = load_rows("pydoc", "train", "preferences") + load_rows("pydoc", "test", "preferences")
    assert 0.9 * len(pydoc) < len(rows) and 0 not in {r["row"] for r in rows}
    assert all(r["chosen"] != r["rejected"] and r.keys() == {"row", "prompt", "chosen", "rejected"} for r in rows)
    summaries = {row["response"] for row in pydoc}
    assert {r["rejected"] for r in rows} <= summaries


# ---- the first and the last token of a demonstration ----
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('No system role') }}"
    "{% endif %}{% endfor %}"
)
LLAMA2 = (  # white space around the answer
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
WORDS = "user model assistant system a garden is not the bridge: it return number of items in list open file Answer think it"


def sentencepiece(prepend: str = "normalizer", template: str | None = None, eos: str = "</s>", special: tuple = ()):
    """A tokenizer in the manner of SentencePiece: words carry the space before them, and so does the beginning of a text.

    prepend: how the beginning gets its space, as in Llama's and Mistral's files (normalizer), as in newer ones (first),
    or never, as in Gemma's.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    named = ["<unk>", "<s>", "</s>", *(t for t in (eos, *special) if t != "</s>")]
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    signs = list(".,:;#?!()[]<>/|_-+=*'\"`0123456789") + list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ▁")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*named, *bytes_], initial_alphabet=signs, show_progress=False
    )
    bpe.train_from_iterator([WORDS] * 5, trainer)
    state = json.loads(bpe.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in named]
    bpe = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    if prepend == "first":
        bpe.normalizer, bpe.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bpe.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    elif prepend == "normalizer":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        bpe.pre_tokenizer, bpe.decoder = None, decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = replace, None, decoders.Sequence(steps)
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    names = dict(bos_token="<s>", eos_token=eos, unk_token="<unk>", pad_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **names)


def byte_level(prefix: bool = False, merging: bool = False, template: str | None = None, special: tuple = ()):
    """prefix: a space before the beginning of a text; merging: tokens cross line breaks and spaces, as "\\nAnswer" does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not merging)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["</s>", *special], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(["assistant|>\nAnswer", "Response: Answer", ": Answer\n", WORDS] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", chat_template=template)


TURNS = ("<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>")
TOKENIZERS = {
    "bpe": lambda template: byte_level(template=template, special=TURNS),
    "bpe, space first": lambda template: byte_level(prefix=True, template=template, special=TURNS),
    "bpe, merging": lambda template: byte_level(merging=True, template=template, special=TURNS),
    "llama": lambda template: sentencepiece(template=template, special=TURNS),
    "metaspace": lambda template: sentencepiece("first", template, special=TURNS),
    "gemma": lambda template: sentencepiece("never", template, special=TURNS),
}
TEMPLATES = {"plain": None, "zephyr": ZEPHYR_TEMPLATE, "chatml": CHATML, "phi": PHI, "bare": BARE}
TEXTS = ["Answer", " it", "\nAnswer it", "é 🙂 ", "A</s>B <s>it</s>?", ".", "1 garden"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_a_response_are_those_that_follow_the_prompt(name, template):
    """Whatever the tokenizer does at the beginning of a text and over the border, the ids read as prompt and response."""
    tokenizer = TOKENIZERS[name](TEMPLATES[template])
    rows = [{"row": i, "prompt": "open it", "response": t, "rejected": t[::-1]} for i, t in enumerate(TEXTS)]
    encoded = encode(rows, tokenizer, 400, 200)
    assert [r["row"] for r in encoded] == list(range(len(TEXTS)))
    for row, text in zip(encoded, TEXTS, strict=True):
        prompt = render_prompt(tokenizer, "open it")
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert row["prompt_ids"][-len(alone) :] == alone  # what the sampler sees
        special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(t) for t in TURNS}
        for kind, written in (("response", text), ("rejected", text[::-1])):
            *ids, end = row[f"{kind}_ids"]
            assert end == data.end_of_turn(tokenizer) and special.isdisjoint(ids)
            read = tokenizer.decode(row["prompt_ids"] + ids)
            assert read.removeprefix(tokenizer.decode(row["prompt_ids"])) == written
            if "<" not in written and ">" not in written:
                whole = tokenizer(prompt + written, add_special_tokens=False)["input_ids"]
                assert read.endswith(tokenizer.decode(whole)) or read == tokenizer.decode(whole)
                if whole[: len(alone)] == alone:
                    assert ids == whole[len(alone) :]


@pytest.mark.parametrize("prepend", ["normalizer", "first"])
def test_a_demonstration_begins_as_the_models_own_answers_do(prepend):
    """After "<|assistant|>\\n" the whole text has no space before the answer: neither has the demonstration."""
    tokenizer = sentencepiece(prepend, ZEPHYR_TEMPLATE)
    row = encode_one({"prompt": "q", "response": "Answer it", "rejected": "not"}, tokenizer)
    whole = tokenizer(row["prompt_text"] + "Answer it</s>")["input_ids"]
    assert row["prompt_ids"] + row["response_ids"] == whole
    assert tokenizer.convert_ids_to_tokens(row["response_ids"][0])[0] == "A"
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"][0])[0] == "n"
    assert tokenizer.convert_ids_to_tokens(tokenizer("Answer", add_special_tokens=False)["input_ids"][0])[0] == "▁"


def test_a_token_over_the_border_is_cut_at_it():
    """The sampler sees the prompt's own tokens, so the demonstration follows them and not the token that joins the two."""
    tokenizer = byte_level(merging=True, template=ZEPHYR_TEMPLATE)
    prompt = render_prompt(tokenizer, "q")
    alone, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, prompt + "Answer"))
    assert whole[: len(alone)] != alone and "Ċ" in tokenizer.convert_ids_to_tokens(whole[-1])  # it does merge
    row = encode_one({"prompt": "q", "response": "Answer"}, tokenizer)
    assert row["prompt_ids"] == alone
    assert row["response_ids"] == [*tokenizer("Answer", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_white_space_that_the_template_puts_around_an_answer_is_learned():
    tokenizer = sentencepiece(template=LLAMA2)
    row = encode_one({"prompt": "q", "response": "Answer"}, tokenizer)
    exchange = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Answer"}]
    written = tokenizer.apply_chat_template(exchange, tokenize=False)
    assert written.endswith("[/INST] Answer </s>")
    assert row["prompt_ids"] + row["response_ids"] == tokenizer(written, add_special_tokens=False)["input_ids"]
    assert row["response_text"] == "Answer"


ENDS = {
    "plain": (None, "</s>"),
    "zephyr": (ZEPHYR_TEMPLATE, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "qwen": (CHATML, "<|im_end|>"),
    "phi": (PHI, "<|end|>"),
    "mistral": (MISTRAL, "</s>"),
    "llama2": (LLAMA2, "</s>"),
    "r1": (R1, "</s>"),
    "no end": (BARE, "</s>"),
    "refuses": ("{{ raise_exception('no') }}", "</s>"),
    "answers for itself": ("{{ messages[0]['content'] }}", "</s>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_turn_ends_with_the_templates_token(name):
    template, end = ENDS[name]
    tokenizer = sentencepiece(template=template, special=TURNS)
    assert tokenizer.convert_ids_to_tokens(data.end_of_turn(tokenizer)) == end
    if name != "refuses":
        for text in ("Answer", f"Answer{end}", "Answer</s>\n"):
            row = encode_one({"prompt": "q", "response": text, "rejected": text}, tokenizer)
            assert row["response_ids"] == row["rejected_ids"] and row["response_text"] == "Answer"
            assert tokenizer.convert_ids_to_tokens(row["response_ids"][-1]) == end
            assert row["response_ids"].count(data.end_of_turn(tokenizer)) == 1


def test_the_end_of_a_turn_need_not_be_special():
    from tokenizers import AddedToken

    tokenizer = byte_level(template=CHATML)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert data.end_of_turn(tokenizer) == end != tokenizer.eos_token_id
    with pytest.warns(UserWarning, match="row 1: found a response without tokens of its own .*1 of 2 rows"):
        rows = [{"row": i, "prompt": "q", "response": t} for i, t in enumerate(["it<|im_end|>", "it<|im_end|>is"])]
        (row,) = encode(rows, tokenizer, 100, 90)  # no tokenizer call writes such a token as text
    assert row["response_ids"].count(end) == 1 and row["response_ids"][-1] == end


@pytest.mark.parametrize("known", [True, False])
def test_the_end_of_a_turn_ends_answers_and_is_saved(known):
    """Gemma's generation config names it; that of a base model with a chat template does not, which is said in one line."""
    from types import SimpleNamespace

    from common.generation import stop_tokens

    tokenizer = byte_level(template=CHATML, special=TURNS)
    end, eos = data.end_of_turn(tokenizer), tokenizer.eos_token_id
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[eos, end] if known else eos))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert stop_tokens(model, tokenizer) == {end, eos}
    lines = [str(w.message) for w in caught]
    assert not lines if known else "found <|im_end|> as the end of a turn in the chat template, but </s>" in lines[0]
    data.stop_at_end_of_turn(model, tokenizer)
    assert set(model.generation_config.eos_token_id) == {end, eos}
    tokenizer.chat_template = None
    model.generation_config.eos_token_id = eos
    data.stop_at_end_of_turn(model, tokenizer)
    assert model.generation_config.eos_token_id == eos


# ---- what stands in a text ----
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_control_token_in_an_answer_is_text(name):
    """HTML's strikethrough with a tokenizer of <s> and </s>: what is learned is what response_text says."""
    tokenizer = TOKENIZERS[name](ZEPHYR_TEMPLATE)
    text = "a <s>1</s> garden is <|im_end|> 2"
    row = encode_one({"prompt": "q", "response": text, "rejected": f"{text}</s>"}, tokenizer)
    assert row["response_ids"] == row["rejected_ids"] and row["response_text"] == row["rejected_text"] == text
    *ids, end = row["response_ids"]
    assert end == tokenizer.eos_token_id and not {0, 1, 2, end} & set(ids)
    asked = tokenizer.decode(row["prompt_ids"])
    assert tokenizer.decode(row["prompt_ids"] + ids).removeprefix(asked) == text


@pytest.mark.parametrize(
    "prompt", ["strike <s>1</s>", [{"role": "user", "content": "what is <|im_end|>?"}]], ids=["text", "messages"]
)
def test_a_prompt_with_a_control_token_is_left_out_and_counted(prompt):
    """It would end the user's turn, or begin another, in the midst of the text."""
    tokenizer = sentencepiece(template=ZEPHYR_TEMPLATE, special=TURNS)
    rows = [{"row": i, "prompt": p, "response": "it"} for i, p in enumerate(["q", prompt])]
    with pytest.warns(UserWarning, match=r"--dataset row 1: found the control token .*1 of 2 rows cannot be used"):
        assert [r["row"] for r in encode(rows, tokenizer, 100, 90)] == [0]
    with pytest.raises(UserError, match="row 1: found the control token .*; all 1 rows are like this"):
        encode(rows[1:], tokenizer, 100, 90)


def test_earlier_answers_lose_an_end_that_is_written_out():
    tokenizer = make_tokenizer(chat_template=ZEPHYR_TEMPLATE)
    rows = [{"row": 0, "prompt": turns("p", f"a{end}", "q"), "response": "r"} for end in ("", "</s>", "</s> ")]
    first, *others = (encode([row], tokenizer, 200, 150)[0] for row in rows)
    assert others == [first] * 2


@pytest.mark.parametrize(
    ("template", "text", "learned"),
    [
        (R1, "<think>\nLet it\n</think>\n\nAnswer", "Let it\n</think>\n\nAnswer"),
        (R1, "<think>Let it</think>Answer", "Let it</think>Answer"),
        (R1, "<|assistant|><think>\nLet", "Let"),
        (R1, "Answer <think>", "Answer <think>"),
        (R1, "\nAnswer", "\nAnswer"),
        (ZEPHYR_TEMPLATE, "<|assistant|>\nAnswer", "Answer"),
        (ZEPHYR_TEMPLATE, "<think>\nAnswer", "<think>\nAnswer"),
        (ZEPHYR_TEMPLATE, "|>\nAnswer", "|>\nAnswer"),
        (None, "### Response: Answer", "Answer"),
        (None, ": Answer", ": Answer"),
    ],
)
def test_what_the_prompt_says_is_not_said_again(template, text, learned):
    tokenizer = make_tokenizer(chat_template=template)
    row = encode_one({"prompt": "q", "response": text, "rejected": text}, tokenizer)
    assert row["response_text"] == row["rejected_text"] == learned
    assert row["response_ids"] == row["rejected_ids"]
    assert tokenizer.decode(row["prompt_ids"] + row["response_ids"]) == f"{row['prompt_text']}{learned}</s>"


def test_an_answer_of_the_templates_words_alone_is_left_out():
    tokenizer = make_tokenizer(chat_template=R1)
    rows = [{"row": i, "prompt": "q", "response": t} for i, t in enumerate(["a", "<think>\n", "</s>"])]
    with pytest.warns(UserWarning, match="row 1: found a response that holds nothing but .*2 of 3 rows"):
        assert [r["row"] for r in encode(rows, tokenizer, 100, 90)] == [0]


def test_half_an_emoji_is_replaced(tmp_path):
    """Text cut between the halves of a surrogate pair, wherever it stands; a whole pair stays the emoji it is."""
    half = "a \ud83d b"
    rows = [
        {"prompt": half, "completion": half},
        {"prompt": [{"role": "user", "content": half}], "chosen": half, "rejected": half},
        {"messages": turns(half, half)},
        {"chosen": f"\n\nHuman: {half}\n\nAssistant: {half}", "rejected": f"\n\nHuman: {half}\n\nAssistant: {half}"},
        {"subreddit": half, "title": half, "post": half, "summary": half},
        {"prompt": "\ud83d\ude00", "completion": "\ud83d\ude00"},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))  # as escapes
    *halves, whole = load_rows(str(path), "all")
    assert len({sources.held_out(r["prompt"]) for r in halves}) <= 2  # a hash of its bytes
    assert whole["prompt"] == whole["response"] == "😀"
    for row in halves:
        text = json.dumps(row, ensure_ascii=False)
        assert "a \ufffd b" in row["response"] and text.encode() and "\ud83d" not in text
    assert len(encode([*halves, whole], make_tokenizer(), 400, 300)) == 6


@pytest.mark.parametrize(
    ("template", "bad", "words"),
    [
        (GEMMA, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "Roles must alternate"),
        (MISTRAL, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "No system role"),
        ("{{ messages[0]['content'] + messages[1]['content'] }}", "a", "no element 1"),
        ("{{ messages[0]['content'] / 2 }}", "a", "unsupported operand"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_left_out_and_counted(template, bad, words):
    tokenizer = sentencepiece(template=template, special=TURNS)
    good = [{"row": 3, "prompt": turns("a", "b", "c"), "response": "r"}] if "/ 2" not in template else []
    rows = [{"row": 5, "prompt": bad, "response": "r"}]
    if good:
        with pytest.warns(UserWarning) as caught:
            assert [r["row"] for r in encode(good + rows, tokenizer, 200, 150)] == [3]
        message = str(caught[0].message)
        assert len(caught) == 1 and message.startswith(
            "--dataset row 5: found a prompt that the chat template refuses ("
        )
        assert words in message and "1 of 2 rows cannot be used" in message
    with pytest.raises(UserError) as error:
        encode(rows, tokenizer, 200, 150)
    assert words in str(error.value) and "row 5" in str(error.value) and "all 1 rows" in str(error.value)


# ---- which rows are drawn ----
class Counting:
    """A tokenizer that keeps the texts it was asked for."""

    def __init__(self, tokenizer):
        self.__dict__.update(inner=tokenizer, asked=[])

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, texts, **how):
        self.asked += [texts] if isinstance(texts, str) else texts
        return self.inner(texts, **how)


def drawing(tmp_path, n: int = 200, **given):
    """(args, rows of a set in which every third prompt is too long, the path of its preferences)."""
    rows = [{"prompt": f"{i} " + "word " * 60 * (i % 3 == 0), "completion": f"a{i}"} for i in range(n)]
    args = sft.Args(dataset=write(tmp_path / "d.jsonl", rows), eval_dataset=str(tmp_path / "d.jsonl"))
    for i, row in enumerate(rows):
        row["chosen"], row["rejected"] = row.pop("completion"), f"a{i}" if i % 5 == 1 else "b"
    args.preference_dataset, args.max_preferences = write(tmp_path / "p.jsonl", rows), 30
    given = dict(max_samples=40, eval_samples=20, max_length=96, max_prompt_length=64, max_new_tokens=20) | given
    for name, value in given.items():
        setattr(args, name, value)
    return args


def test_beside_held_out_data_every_row_is_trained_on(tmp_path):
    """A tenth of a source is left out only where it is what is measured on. A test split of its own is never trained on."""
    rows = pairs(60)
    compared = [{"prompt": r["prompt"], "chosen": "yes", "rejected": "no"} for r in rows]
    (tmp_path / "named").mkdir()
    for name, some in (("train", rows[:30]), ("test", rows[30:])):
        write(tmp_path / "named" / f"{name}.jsonl", some)
    names = write(tmp_path / "d.jsonl", rows), str(tmp_path / "named")
    flags = dict(preference_dataset=write(tmp_path / "p.jsonl", compared), max_samples=0, max_length=300)
    held, counts = write(tmp_path / "held.jsonl", pairs(5, "held")), {}
    for eval_dataset in ("auto", held):
        some = [drawing(tmp_path / "other", dataset=n, eval_dataset=eval_dataset, **flags) for n in names]
        found = [demos.load_demonstrations(args, make_tokenizer()) for args in some]
        some[0].max_preferences = 0
        counts[eval_dataset] = *map(len, found), len(preference_data.load_preferences(some[0], make_tokenizer(), []))
    kept = sum(not sources.held_out(row["prompt"]) for row in rows)
    assert counts == {"auto": (kept, 30, kept), held: (60, 30, 60)} and kept < 60


def test_rows_are_drawn_until_enough_are_kept(tmp_path):
    """Long prompts make the rows no fewer; which ones come in the seeded order; what is not needed is not tokenised."""
    args, tokenizer = drawing(tmp_path), Counting(make_tokenizer())
    with pytest.warns(UserWarning) as caught:
        rows = demos.load_demonstrations(args, tokenizer)
    source = load_rows(args.dataset, "all")
    order = [source[i]["row"] for i in data_order(len(source), args.seed)]
    fit = [i for i in order if i % 3]
    assert [r["row"] for r in rows] == sorted(fit[:40]) and len(rows) == 40
    looked_at = order.index(fit[39]) + 1
    (message,) = [str(w.message) for w in caught]
    assert f"found {looked_at - 40} of {looked_at} prompts longer than --max-prompt-length 64" in message
    assert len([t for t in tokenizer.asked if t.startswith("### Instruction") and t.endswith("### Response: ")]) < 130
    args.max_samples = 20
    with pytest.warns(UserWarning, match="longer than"):
        assert {r["row"] for r in demos.load_demonstrations(args, tokenizer)} == set(
            fit[:20]
        )  # the first of the same order
    with pytest.warns(UserWarning, match="longer than"):
        held = demos.load_held_out(args, tokenizer, [])
    assert len(held) == 20 and all(r["row"] % 3 for r in held) and held == sorted(held, key=lambda r: r["row"])


def test_preferences_are_drawn_until_enough_differ(tmp_path):
    args, tokenizer = drawing(tmp_path), make_tokenizer()
    with pytest.warns(UserWarning) as caught:
        pairs = preference_data.load_preferences(args, tokenizer, [])
    assert len(pairs) == 30 and all(p["row"] % 3 and p["row"] % 5 != 1 for p in pairs)
    assert all(p["chosen_ids"] != p["rejected_ids"] for p in pairs)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "longer than" in messages[0] and "pairs with chosen equal to rejected" in messages[1]
    args.eval_preference_dataset = args.preference_dataset
    with pytest.warns(UserWarning, match="longer than"):
        assert len(preference_data.load_eval_preferences(args, tokenizer)) == 20


def test_a_source_that_gives_fewer_rows_than_asked_for_says_so(tmp_path):
    args = drawing(tmp_path, n=30, max_samples=28)
    with pytest.warns(UserWarning, match="found [0-9]+ rows that can be used, fewer than the 28 asked for"):
        rows = demos.load_demonstrations(args, make_tokenizer())
    assert len(rows) == sum(r["row"] % 3 > 0 for r in load_rows(args.dataset, "all"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path / "d.jsonl", pairs(30))
        args.eval_dataset = "auto"
        assert len(demos.load_demonstrations(args, make_tokenizer())) == len(load_rows(args.dataset, "train")) < 30


def test_all_rows_are_encoded_without_a_limit(tmp_path):
    args = drawing(tmp_path, max_samples=0)
    with pytest.warns(UserWarning, match="prompts longer than"):
        rows = demos.load_demonstrations(args, make_tokenizer())
    assert [r["row"] for r in rows] == [r["row"] for r in load_rows(args.dataset, "all") if r["row"] % 3]


@pytest.mark.parametrize("cut", [False, True])
def test_demonstrations_longer_than_answers_are_counted_or_cut(tmp_path, cut):
    """The flag cuts both at --max-new-tokens, and a cut one has no EOS: length and end tell nothing apart."""
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"q{i}", "completion": "x" * (4 + 10 * (i % 2))} for i in range(60)]
    args = drawing(tmp_path, max_new_tokens=8, max_samples=0, eval_samples=60, cut_demonstrations=cut)
    write(tmp_path / "d.jsonl", rows)
    with pytest.warns(UserWarning) as caught:
        found = demos.load_demonstrations(args, tokenizer)
    long = [r for r in found if r["row"] % 2]
    (message,) = [str(w.message) for w in caught]
    first = f"(row {long[0]['row']} has 15 tokens"
    if cut:
        assert f"found {len(long)} of {len(found)} responses longer than their room {first} for 8): cut" in message
    else:
        assert f"found {len(long)} of {len(found)} demonstrations longer than --max-new-tokens 8 {first}" in message
        assert "--cut-demonstrations" in message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = demos.load_held_out(args, tokenizer, [])
    for row in found + held:
        ids, end = row["response_ids"], tokenizer.eos_token_id
        expected = 5 if row["row"] % 2 == 0 else 8 if cut else 15
        assert len(ids) == expected and (ids[-1] == end) == (expected != 8) and end not in ids[:-1]


def test_responses_cut_at_the_window_are_counted():
    tokenizer = make_tokenizer()
    rows = [{"row": i, "prompt": "q", "response": "x" * n, "rejected": "y"} for i, n in ((4, 5), (7, 300_000))]
    with pytest.warns(UserWarning) as caught:
        kept = encode(rows, tokenizer, 96, 64)
    room = 96 - len(kept[0]["prompt_ids"])
    (message,) = [str(w.message) for w in caught]
    assert message == (
        f"--dataset: found 1 of 4 responses longer than their room (row 7 has 300001 tokens for {room}): cut there, without EOS"
    )
    assert len(kept[1]["response_ids"]) == room and kept[0]["response_ids"][-1] == tokenizer.eos_token_id


# ---- which turn of a dialogue is learned ----
DIALOGUE = turns("a", "A", "b", "B", "c", "C")


@pytest.mark.parametrize(
    ("name", "asked", "learned"),
    [
        ("set", "auto", [(5, "C")]),
        ("ultrachat_200k", "auto", [(1, "A")]),
        ("set", "first", [(1, "A")]),
        ("ultrachat_200k", "last", [(5, "C")]),
        ("set", "all", [(1, "A"), (3, "B"), (5, "C")]),
    ],
)
def test_the_turn_of_a_dialogue_that_is_learned(tmp_path, name, asked, learned):
    path = write(tmp_path / name / "train.jsonl", [{"messages": DIALOGUE}, {"messages": turns("d", "D")}])
    rows = load_rows(str(tmp_path / name), "all", turns=asked)
    assert [(r["prompt"], r["response"]) for r in rows if r["row"] != 1] == [(DIALOGUE[:k], y) for k, y in learned]
    assert [r["row"] for r in rows] == [0, 1, 2, 4][: len(learned) + 1] and path
    assert sources.default_turns("HuggingFaceH4/ultrachat_200k") == "first"


def test_all_turns_of_a_dialogue_are_on_one_side(tmp_path):
    """They share their beginning: one of them in training would show the others' prompts."""
    rows = [{"messages": turns(f"a{i}", "A", f"b{i}", "B")} for i in range(100)]
    path = write(tmp_path / "d.jsonl", rows)
    train, test = (load_rows(path, split, turns="all") for split in ("train", "test"))
    assert len(train) + len(test) == 200 and len(test) > 4
    assert not {r["row"] % 100 for r in train} & {r["row"] % 100 for r in test}
    assert len({r["row"] for r in train + test}) == 200


def test_a_turn_without_text_leaves_the_others(tmp_path):
    null = [*turns("a"), {"role": "assistant", "content": None}, *turns("b", "B")]
    blank = turns("a", " ", "b", "B")
    path = write(
        tmp_path / "d.jsonl", [{"messages": null}, {"messages": blank}, {"messages": turns("c", "C", "d", "")}]
    )
    assert [(r["row"], r["response"]) for r in load_rows(path, "all", turns="all")] == [(2, "C"), (4, "B")]


def test_the_flag_reaches_training_and_held_out_rows(tmp_path):
    args = drawing(tmp_path, turns="all", max_samples=0, eval_samples=100, max_length=300, max_prompt_length=250)
    write(tmp_path / "d.jsonl", [{"messages": turns(f"a{i}", "A", f"b{i}", "B")} for i in range(40)])
    found = demos.load_demonstrations(args, make_tokenizer())
    assert {r["response_text"] for r in found} == {"A", "B"} and len(found) % 2 == 0
    with pytest.warns(UserWarning, match="among those trained on"):
        assert len(demos.load_held_out(args, make_tokenizer(), found)) == 80


# ---- what a run stores, given back ----
@pytest.mark.parametrize(
    "template", [None, ZEPHYR_TEMPLATE, GEMMA, MISTRAL], ids=["plain", "zephyr", "gemma", "mistral"]
)
@pytest.mark.parametrize("stored", ["raw", "rendered"])
def test_prompts_are_rendered_once(tmp_path, template, stored):
    """A run's pairs have the raw prompt; older ones have the rendered text there. Given back, both give the same tokens."""
    tokenizer = sentencepiece(template=template, special=TURNS)
    rows = [{"row": 0, "prompt": "q", "response": "a"}, {"row": 1, "prompt": turns("q", "a", "b"), "response": "c"}]
    first = encode(rows, tokenizer, 300, 250)
    pairs_ = [
        {"prompt": r["prompt"] if stored == "raw" else r["prompt_text"], "prompt_text": r["prompt_text"],
         "chosen": r["response_text"], "rejected": "x", "prompt_ids": r["prompt_ids"]}
        for r in first
    ]  # fmt: skip
    write_pairs(tmp_path / "iter_0.parquet", pairs_)
    given = load_rows(str(tmp_path / "iter_0.parquet"), "all")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = encode(given, tokenizer, 300, 250)
    for name in ("prompt_ids", "prompt_text", "response_ids", "response_text"):
        assert [r[name] for r in again] == [r[name] for r in first]
    messages = [str(w.message) for w in caught]
    if stored == "raw":
        assert not messages and again[1]["prompt"] == rows[1]["prompt"] and data.plain_prompt(again[0]["prompt"]) == "q"
    else:
        assert again[0]["prompt"] == "q"  # as other templates need it
        assert ["found 2 of 2 prompts in the form of the template already (row 0)" in m for m in messages] == [True]


def test_a_prompt_that_only_looks_rendered_is_rendered():
    for template in (None, ZEPHYR_TEMPLATE, BARE):
        tokenizer = make_tokenizer(chat_template=template)
        for prompt in ("### Response: ", "q\n\n### Response: ", "<|assistant|>\n", "user: q\n"):
            rendered = encode_one({"prompt": prompt, "response": "r"}, tokenizer)["prompt_text"]
            assert rendered == render_prompt(tokenizer, prompt)


def test_prompts_of_two_types_are_stored_as_one(tmp_path):
    rows = [{"row": 0, "prompt": "q", "chosen": "a"}, {"row": 1, "prompt": turns("p", "a", "b"), "chosen": "c"}]
    write_pairs(tmp_path / "p.parquet", rows)
    stored = read_pairs(tmp_path / "p.parquet")
    assert [r["prompt"] for r in stored] == [turns("q"), turns("p", "a", "b")]
    assert sources.held_out(turns("q")) == sources.held_out("q")


# ---- files that are not what they seem ----
def test_json_lines_named_json(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(3)]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    assert load_rows(str(tmp_path / "a.json"), "all") == load_rows(jsonl(tmp_path / "a.jsonl", rows), "all")
    (tmp_path / "b.json").write_text("\n".join([*map(json.dumps, rows), "{oops"]))
    assert "b.json line 4: found broken JSON" in error_of(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}, indent=1))
    assert len(load_rows(str(tmp_path / "c.json"), "all")) == 3


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_brackets_nested_too_deeply_are_broken_json(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_text("[" * 100_000 + "]" * 100_000)
    assert "found broken JSON (" in error_of(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors"])
def test_a_models_folder_is_no_data_set(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert "found a model or an adapter in" in error_of(tmp_path)


def test_a_run_folder_is_no_data_set(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    write(tmp_path / "generations" / "iter_0.parquet", pairs(2))
    assert "found a run in" in (message := error_of(tmp_path)) and f"{tmp_path}/generations/*.parquet" in message
    assert len(load_rows(str(tmp_path / "generations"), "all")) == 2


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    for load in (models.load_tokenizer, models.load_model):
        with pytest.raises(
            UserError,
            match=r"^--model .*: found a LoRA adapter without its base model, .*merge the adapter .*merge_and_unload",
        ) as error:
            load(sft.Args(model=str(tmp_path)))
        assert "\n" not in str(error.value)


def test_several_chat_templates_need_a_default(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"tool_use": ZEPHYR_TEMPLATE, "rag": CHATML}
    folder = make_model(tmp_path / "m", tokenizer=tokenizer)
    with pytest.raises(
        UserError, match="--model .*: found chat templates rag, tool_use, none of the name default; expected one"
    ):
        models.load_tokenizer(sft.Args(model=str(folder), max_length=96))
    tokenizer.chat_template["default"] = ZEPHYR_TEMPLATE
    tokenizer.save_pretrained(folder)
    found = models.load_tokenizer(sft.Args(model=str(folder), max_length=96))
    assert (
        render_prompt(found, "q") == "<|user|>\nq</s>\n<|assistant|>\n"
        and data.end_of_turn(found) == found.eos_token_id
    )


def test_gold_model_reads_answers_as_its_template_writes_them(tmp_path):
    """Its own tokenizer and template: the first token of an answer, and the token that ends the turn."""
    from types import SimpleNamespace

    from extras import gold

    tokenizer = sentencepiece(template=GEMMA, special=TURNS)
    folder = make_model(tmp_path / "gold", tokenizer=tokenizer)
    args = SimpleNamespace(gold_reward_model=str(folder), trust_remote_code=False)
    exchange = turns("q", "Answer it")
    rows = [{"row": 3, "prompt": "q"}, {"row": 4, "prompt": "q"}]
    answers = ["Answer it", "Answer it</s><end_of_turn>"]
    config = models.load_config(str(folder))
    whole = tokenizer(tokenizer.apply_chat_template(exchange, tokenize=False).rstrip(), add_special_tokens=False)[
        "input_ids"
    ]
    assert [p + y for p, y in gold.gold_sequences(args, rows, answers, [True, True], config)] == [whole] * 2
    rows[1]["prompt"] = turns("a", "b")
    with pytest.raises(UserError, match="--gold-reward-model .*row 4: found a prompt that the chat template refuses"):
        rows[1]["prompt"] = [exchange[0], exchange[0]]
        gold.gold_sequences(args, rows, answers, [True, True], config)
