"""Every format, every kind of bad input, templates, EOS and masks."""

import json
import warnings

import pytest
import torch
from helpers import ZEPHYR_TEMPLATE, make_tokenizer

from common import UserError
from common.data import collate, encode, harvest_pydoc, load_rows, read_pairs, render_prompt, write_pairs

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


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


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
    "not_object": ('{"prompt": "a", "completion": "b"}\n[1]\n', "row 1: found a list, expected an object"),
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
    return harvest_pydoc()


def test_pydoc_is_real_and_large(pydoc):
    assert len(pydoc) > 4000
    assert pydoc == harvest_pydoc()
    for _, row in pydoc:
        assert 8 <= len(row["response"]) <= 160 and row["response"] not in row["prompt"]
        assert row["prompt"].startswith(("def ", "class "))
    held = [row for test, row in pydoc if test]
    assert 0.04 < len(held) / len(pydoc) < 0.2
    assert any(row["response"].startswith("Return a list") for _, row in pydoc)


def test_pydoc_prompts_are_not_shared_between_splits(pydoc):
    assert not {r["prompt"] for t, r in pydoc if t} & {r["prompt"] for t, r in pydoc if not t}


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
