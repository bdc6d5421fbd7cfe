"""Data: sources and formats in, rows of prompt and response out; templates, tokens, batches.

A demonstration is a dict with row, prompt, response (and rejected, where the source has one); prompt is a text or a
list of messages {role, content}; row is its index in the source. A preference has row, prompt, chosen, rejected.

Dims: B sequences, L prompt + response tokens, T response tokens.
"""

import ast
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from common import UserError

DATASETS = {  # short name -> (hub id, configuration, training split, held-out split); a local path of the name wins
    "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft"),
    "ultrafeedback_binarized": ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs"),
    "hh-rlhf": ("Anthropic/hh-rlhf", None, "train", "test"),
    "tldr-sft": ("vwxyzjn/summarize_from_feedback_tldr_3_filtered", None, "train", "validation"),
    "tldr-preferences": ("vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144", None, "train", "validation"),
    "spin_iter0": ("UCLA-AGI/SPIN_iter0", None, "train", "test"),
}
HELD_OUT_NAMES = ("test", "validation", "val", "eval")
FORMATS = (
    "prompt/completion, prompt/response, messages, prompt/chosen/rejected, chosen/rejected (HH transcripts),"
    " real/generated (SPIN), title/post/summary (TL;DR), info/summaries/choice (TL;DR comparisons)"
)
PLAIN_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # RFT paper, App. C


class UnusableRow(UserError):
    """A row of a known format with nothing to learn from: left out and counted, since real data sets have some."""


# ---- sources ----
def load_rows(name: str, split: str, kind: str = "demonstrations", flag: str = "--dataset") -> list[dict]:
    """Rows of a data set. split: train, test, or all (a source named as held-out data: its test split, else every row).

    name: pydoc, a .json/.jsonl/.parquet file, a folder, a short name or a hub id; a local path wins. Where the source
    has no held-out split, a tenth of it is held out by a hash of the prompt, so that no prompt is on both sides.
    UserError, in one line with the flag and the row, for anything that cannot be read.
    """
    path = Path(name)
    if name == "pydoc" and not path.exists():
        return [r for test, r in pydoc_rows(kind) if split == "all" or test == (split == "test")]
    if path.is_dir():
        raw, own_split = read_folder(path, split, flag)
    elif path.is_file():
        raw, own_split = read_file(path, flag), False
    elif path.suffix in (".json", ".jsonl", ".parquet") or name.startswith((".", "/")):
        raise UserError(f"{flag}: found no file {name}, expected a .json, .jsonl or .parquet file, a folder, or a name")
    else:
        raw, own_split = read_hub(name, split, flag)
    if not raw:
        raise UserError(f"{flag}: found no rows in {name}, expected at least one")
    rows, unusable = [], []
    for i, r in enumerate(raw):
        try:
            rows.append({"row": i, **parse_row(r, i, kind, f"{flag} {name}"), **unfinished(r)})
        except UnusableRow as error:
            unusable.append(str(error))
    if not rows:
        raise UserError(f"{unusable[0]}; all {len(raw)} rows are like this")
    if unusable:
        warnings.warn(
            f"{unusable[0]}; {len(unusable)} of {len(raw)} rows are like this and were left out", stacklevel=2
        )
    if own_split or split == "all":
        return rows
    kept = [row for row in rows if held_out(row["prompt"]) == (split == "test")]
    if not kept:
        raise UserError(f"{flag}: found {len(rows)} rows in {name}, none in its {split} part; expected more rows")
    return kept


def source_id(name: str) -> str:
    """The same for every way to write one source: relative or absolute path, short name or hub id."""
    return str(Path(name).resolve()) if Path(name).exists() else DATASETS.get(name, (name,))[0]


def held_out(prompt) -> bool:
    """Whether a prompt belongs to the held-out tenth of a source without a split of its own; one turn counts as its text."""
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]["content"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def read_file(path: Path, flag: str) -> list:
    """Raw rows of a .json (a list, or a list under one key), .jsonl or .parquet file."""
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{flag}: found {path}, expected a .json, .jsonl or .parquet file")
    try:
        if path.suffix == ".parquet":
            return read_pairs(path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        kind = "readable Parquet" if path.suffix == ".parquet" else "UTF-8 text"
        raise UserError(f"{flag}: found {path}, expected {kind} ({' '.join(str(error).split())[:160]})") from None
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(
                        f"{flag}: {path} line {number}: found broken JSON ({error}), expected an object"
                    ) from None
        return rows
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{flag}: {path}: found broken JSON ({error}), expected a list of objects") from None
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, list):
        raise UserError(f"{flag}: {path}: found a JSON {type(value).__name__}, expected a list of objects")
    return value


def read_folder(path: Path, split: str, flag: str) -> tuple[list, bool]:
    """(raw rows, whether test rows are held apart) of a datasets folder (save_to_disk), or of files named by split."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        loaded = load_from_disk(str(path))
        return read_splits(loaded, split) if isinstance(loaded, DatasetDict) else (loaded.to_list(), False)
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl", ".parquet"))
    if not files:
        raise UserError(f"{flag}: found no .json, .jsonl or .parquet file in {path}, expected a data set folder")
    names = {}
    for p in files:
        places = (p.stem, p.relative_to(path).parent.name)
        names[p] = next((s.split("-")[0] for s in places if s.startswith(("train", *HELD_OUT_NAMES))), p.stem)
    wanted, own_split = pick_splits(sorted(set(names.values())), split)
    return [row for p in files if names[p] in wanted for row in read_file(p, flag)], own_split


def read_splits(loaded, split: str) -> tuple[list, bool]:
    """(raw rows, whether test rows are held apart) of a DatasetDict."""
    wanted, own_split = pick_splits(list(loaded), split)
    return [row for name in wanted for row in loaded[name].to_list()], own_split


def pick_splits(names: list[str], split: str) -> tuple[list[str], bool]:
    """(the splits that serve as train, or else as test; whether the source has both).

    train_prefs goes before train_sft before others, as in DATASETS: a local copy of a hub set gives the same rows.
    """

    def begin_with(*words: str) -> list[str]:
        for word in words:
            for exact in (word, f"{word}_prefs", f"{word}_sft"):
                if exact in names:
                    return [exact]
            if found := [n for n in names if n.startswith(word)]:
                return found
        return []

    train, test = begin_with("train"), begin_with(*HELD_OUT_NAMES)
    if train and test:
        return (train if split == "train" else test), True
    return train or test or names, False


def read_hub(name: str, split: str, flag: str) -> tuple[list, bool]:
    """(raw rows, whether test rows are held apart) of a hub data set, or one line that says it cannot be had."""
    from datasets import load_dataset

    hub = DATASETS[name][0] if name in DATASETS else name
    try:
        if name not in DATASETS:
            return read_splits(load_dataset(hub), split)
        _, config, train, test = DATASETS[name]
        return load_dataset(hub, config, split=train if split == "train" else test).to_list(), True
    except Exception as error:  # the hub client raises dozens of types; the user needs one line
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag}: found no local path {name}, and the hub ({hub}) could not provide it; expected pydoc, a local"
            f" file or folder (./{name} would do), or a reachable hub. {reason}"
        ) from None


# ---- formats ----
def parse_row(raw, index: int, kind: str, where: str) -> dict:
    """One raw row -> prompt/response (and rejected, if there is one) or prompt/chosen/rejected. Errors name the row."""
    where = f"{where} row {index}"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: found a {type(raw).__name__}, expected an object")
    prompt, response, rejected = split_columns(raw, where)
    prompt = check_prompt(prompt, where)
    response = check_response(response, "response", where)
    if rejected is not None:
        rejected = check_response(rejected, "rejected", where)
    if kind == "preferences":
        if rejected is None:
            raise UserError(f"{where}: found columns {', '.join(raw)}, expected a preference: prompt/chosen/rejected")
        return {"prompt": prompt, "chosen": response, "rejected": rejected}
    return {"prompt": prompt, "response": response} | ({} if rejected is None else {"rejected": rejected})


def split_columns(raw: dict, where: str) -> tuple:
    """(prompt, response, rejected or None) by the columns that are there."""
    columns = raw.keys()
    if {"chosen", "rejected"} <= columns:
        chosen, rejected = raw["chosen"], raw["rejected"]
        if isinstance(chosen, list):  # messages, with the prompt as their common beginning or in a column of its own
            prompt, chosen = split_messages(chosen, where)
            other, rejected = split_messages(rejected, where)
            check_same(prompt, other, where)
            return prompt or raw.get("prompt"), chosen, rejected
        if "prompt" in columns:
            return raw["prompt"], chosen, rejected
        prompt, response = split_transcript(chosen, where)
        other, worse = split_transcript(rejected, where)
        check_same(prompt, other, where)
        return prompt, response, worse
    if {"real", "generated"} <= columns:
        prompt, real = split_messages(raw["real"], where)
        other, generated = split_messages(raw["generated"], where)
        check_same(prompt, other, where)
        return prompt, real, generated
    if "messages" in columns:
        return *split_messages(raw["messages"], where), None
    for answer in ("completion", "response"):
        if {"prompt", answer} <= columns:
            return raw["prompt"], raw[answer], None
    if {"post", "summary"} <= columns:
        return tldr_query(raw), raw["summary"], None
    if {"info", "summaries", "choice"} <= columns:
        return split_comparison(raw, where)
    raise UserError(f"{where}: found columns {', '.join(columns) or 'none'}, expected one of {FORMATS}")


def tldr_query(fields: dict) -> str:
    """Subreddit, title and post -> the query of TL;DR, as in Stiennon et al., arXiv:2009.01325, App. A."""
    subreddit = fields.get("subreddit") or fields.get("section") or ""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {fields.get('title') or ''}\n\nPOST: {fields['post']}\n\nTL;DR:"


def split_comparison(raw: dict, where: str) -> tuple[str, str, str]:
    """A row of summarize_from_feedback's comparisons -> (query, the summary people chose, the other one)."""
    info, summaries, choice = raw["info"], raw["summaries"], raw["choice"]
    if not isinstance(info, dict) or not isinstance(info.get("post"), str):
        raise UserError(f"{where}: found no post in info, expected subreddit, title and post")
    if not isinstance(summaries, list) or len(summaries) != 2 or choice not in (0, 1):
        raise UserError(f"{where}: found choice {choice!r} of {summaries!r:.80}, expected 0 or 1 of two summaries")
    texts = [s.get("text") if isinstance(s, dict) else None for s in summaries]
    return tldr_query(info), texts[choice], texts[1 - choice]


def check_same(prompt: list[dict], other: list[dict], where: str) -> None:
    """UnusableRow where two responses do not answer the same prompt: a few HH pairs part before the last turn."""
    if prompt != other:
        raise UnusableRow(f"{where}: found two responses to different prompts, expected the same prompt")


def split_messages(messages, where: str) -> tuple[list[dict], str]:
    """Messages -> (those before the last assistant turn, its text)."""
    if not is_messages(messages):
        raise UserError(f"{where}: found {type(messages).__name__}, expected a list of messages with role and content")
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise UserError(f"{where}: found messages without an assistant turn, expected one to learn from")
    prompt = [{"role": m["role"], "content": m["content"]} for m in messages[:last]]
    return prompt, messages[last]["content"]


def split_transcript(text, where: str) -> tuple[list[dict], str]:
    """Anthropic HH transcript, its turns begun by "\\n\\nHuman:" or "\\n\\nAssistant:" -> (messages, last answer)."""
    if not isinstance(text, str) or "\n\nAssistant:" not in text:
        raise UserError(
            f"{where}: found no prompt column and no transcript with Human: and Assistant: turns, expected one of these"
        )
    head, _, response = text.rpartition("\n\nAssistant:")
    response = response.partition("\n\nHuman:")[0]
    messages = []
    for turn in head.split("\n\nHuman:")[1:]:
        human, *answers = turn.split("\n\nAssistant:")
        messages.append({"role": "user", "content": human.strip()})
        messages += [{"role": "assistant", "content": a.strip()} for a in answers]
    return messages, response.strip()


def is_messages(value) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)


def check_prompt(prompt, where: str):
    if isinstance(prompt, list):
        if not prompt or not is_messages(prompt) or not all(isinstance(m["content"], str) for m in prompt):
            raise UserError(f"{where}: found an empty or non-text prompt, expected messages with text")
        return prompt
    return check_text(prompt, "prompt", where)


def check_response(response, name: str, where: str) -> str:
    if isinstance(response, list):
        response = split_messages(response, where)[1]
    return check_text(response, name, where)


def check_text(value, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: found {type(value).__name__} as {name}, expected text")
    if not value.strip():
        raise UnusableRow(f"{where}: found an empty {name}, expected text")
    return value


def unfinished(raw: dict) -> dict[str, bool]:
    """{response_finished or rejected_finished: False} for a response that a sampler was cut in, as its columns say.

    Columns chosen_finished (or completion_, response_) and rejected_finished; `finished` is that of the rejected response,
    or of the only one. Our own generations/*.parquet have them. A response that is cut gets no end when it is read again.
    """
    only = "rejected" if "rejected" in raw else "response"
    columns = {f"{name}_finished": "response" for name in ("chosen", "completion", "response")}
    columns |= {"rejected_finished": "rejected", "finished": only}
    return {f"{name}_finished": False for column, name in columns.items() if raw.get(column) is False}


# ---- the embedded data set ----
def cache_folder() -> Path:
    """$CLEANIRL_CACHE, else cleanirl/ in the user's cache folder."""
    base = os.environ.get("CLEANIRL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanirl"


def pydoc_key() -> str:
    """Names what the harvest would give: the interpreter, and the code that harvests."""
    code = [inspect.getsource(f) for f in (harvest_pydoc, documented, cut_lines, held_out)]
    return hashlib.sha256(repr((sys.version, sys.prefix, code)).encode()).hexdigest()[:12]


def pydoc_rows(kind: str) -> list[tuple[bool, dict]]:
    """[(held out?, row)] of harvest_pydoc, from the user's cache folder after the first time.

    kind preferences: the definition's own summary is chosen over that of the next documented one of the same module,
    which is of the same author and subject; modules with one summary have no row.
    """
    path = cache_folder() / f"pydoc-{pydoc_key()}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pairs(path, [{"test": test, **row} for test, row in harvest_pydoc()])
    rows = list(enumerate(read_pairs(path)))
    if kind == "preferences":
        columns = {"prompt": "prompt", "chosen": "response", "rejected": "next_response"}
        rows = [(i, r) for i, r in rows if r["next_response"]]
    else:
        columns = {"prompt": "prompt", "response": "response"}
    return [(r["test"], {"row": i} | {name: r[column] for name, column in columns.items()}) for i, r in rows]


def harvest_pydoc() -> list[tuple[bool, dict]]:
    """[(held out?, {prompt, response, next_response})]: documented functions and classes of the standard library.

    prompt: the definition and the docstring after its summary, or, where there is no more, the first lines of the code.
    response: the summary line. next_response: the next other summary in the module, if there is one.
    Modules are held out as a whole. Files are parsed, never imported.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    rows, seen_prompts, seen_responses = [], set(), {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if "site-packages" in parts or any(p.startswith(("test", "idle_test", "_test")) or p == "tests" for p in parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        test = held_out("/".join(parts))
        lines, own = source.splitlines(), []
        for row in documented(tree, lines):
            prompt, response = row["prompt"], row["response"]
            count = seen_responses.get(response, 0)
            if prompt in seen_prompts or count >= 3 or response in prompt:
                continue
            seen_prompts.add(prompt)
            seen_responses[response] = count + 1
            own.append(row)
        for i, row in enumerate(own):
            others = (r["response"] for r in own[i + 1 :] + own[:i] if r["response"] != row["response"])
            rows.append((test, {**row, "next_response": next(others, None)}))
    return rows


def documented(tree: ast.AST, lines: list[str], limit: int = 240):
    """{prompt, response} of every documented definition below a tree, methods under their class's name."""
    stack = [(tree, "")]
    while stack:
        node, owner = stack.pop()
        children = [
            c
            for c in ast.iter_child_nodes(node)
            if isinstance(c, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        ]
        inner = f"{owner}{node.name}." if isinstance(node, ast.ClassDef) else owner
        stack += [(child, inner) for child in reversed(children)]
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        summary, _, body = text.strip().partition("\n\n")
        summary = " ".join(summary.split())
        if not 8 <= len(summary) <= 160:
            continue
        if isinstance(node, ast.ClassDef):
            head = f"class {owner}{node.name}({', '.join(ast.unparse(b) for b in node.bases)})"
        else:
            head = f"def {owner}{node.name}({ast.unparse(node.args)})"
        if not body.strip():
            first = node.body[0].end_lineno
            body = "\n".join(line.strip() for line in lines[first : min(node.end_lineno, first + 8)] if line.strip())
        yield {"prompt": f"{head}\n{cut_lines(body.strip(), limit)}", "response": summary}


def cut_lines(text: str, limit: int) -> str:
    """The whole lines of text that fit in limit characters; the beginning of the first line if it alone does not."""
    if len(text) <= limit:
        return text
    return text[:limit].rpartition("\n")[0] or text[:limit]


# ---- templates and tokens ----
def render_prompt(tokenizer, prompt) -> str:
    """The text before the response: the tokenizer's chat template if it has one, else PLAIN_TEMPLATE.

    The same text is used for generation and for training.
    """
    if tokenizer.chat_template:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return PLAIN_TEMPLATE.format(prompt=plain_prompt(prompt))


def plain_prompt(prompt) -> str:
    """The prompt's text alone; several turns are written one below the other with Human: and Assistant: before them."""
    if not isinstance(prompt, list):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [m["content"] if len(prompt) == 1 else f"{names.get(m['role'], m['role'])}: {m['content']}" for m in prompt]
    return "\n\n".join(turns)


def encode(
    rows: list[dict], tokenizer, max_length: int, max_prompt_length: int, flag: str = "--dataset", render=render_prompt
) -> list[dict]:
    """Rows -> dicts with row, prompt, prompt_ids, response_ids, prompt_text, response_text (and rejected_ids, rejected_text).

    Prompt and response are tokenised apart, so that a sampled response meets the context it was sampled in. EOS ends
    every response once; one cut at max_length, or by the sampler it is of (see `unfinished`), has none. Rows whose prompt
    exceeds max_prompt_length are left out with one warning; UserError if none is left.
    """
    longest = min(max_prompt_length, max_length - 1)  # room for one token of response
    texts = [render(tokenizer, row["prompt"]) for row in rows]
    responses = {"response": [row.get("response", row.get("chosen")) for row in rows]}
    responses["rejected"] = [row.get("rejected") for row in rows]
    prompts = tokenise_prompts(tokenizer, texts)
    ids = {k: tokenise(tokenizer, [without_eos(t or "", tokenizer) for t in ts]) for k, ts in responses.items()}
    encoded, long = [], []
    for i, (row, prompt_ids) in enumerate(zip(rows, prompts, strict=True)):
        if len(prompt_ids) > longest:
            long.append((row["row"], len(prompt_ids)))
            continue
        item = {"row": row["row"], "prompt": row["prompt"], "prompt_ids": prompt_ids, "prompt_text": texts[i]}
        for name in responses:
            if responses[name][i] is not None:
                finished = row.get(f"{name}_finished", True)
                whole = [*ids[name][i], *([tokenizer.eos_token_id] if finished else [])]
                item |= {f"{name}_ids": whole[: max_length - len(prompt_ids)], f"{name}_text": responses[name][i]}
                item |= {} if finished else {f"{name}_finished": False}
        encoded.append(item)
    if long:
        found = f"{flag}: found {len(long)} of {len(rows)} prompts longer than --max-prompt-length {longest}"
        detail = f"(row {long[0][0]} has {long[0][1]} tokens)"
        if not encoded:
            raise UserError(f"{found} {detail}: no row is left; expected shorter prompts or a larger window")
        warnings.warn(f"{found} {detail}: left out", stacklevel=2)
    return encoded


def tokenise(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def tokenise_prompts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Rendered prompts -> ids, with BOS before them where the tokenizer itself begins texts so and the template did not."""
    bos, ids = tokenizer.bos_token_id, tokenise(tokenizer, texts)
    if bos is None or tokenizer("a")["input_ids"][0] != bos:
        return ids
    return [p if t.startswith(tokenizer.bos_token) else [bos, *p] for p, t in zip(ids, texts, strict=True)]


def without_eos(text: str, tokenizer) -> str:
    """The text without EOS written out, as some data sets have it: EOS is added once, as a token, at the end."""
    return text.replace(tokenizer.eos_token, "").rstrip() if tokenizer.eos_token in text else text


def ends(ids: list[int], tokenizer) -> bool:
    """Whether a response has its end: one that was cut, by the window or where it was sampled, has none."""
    return ids[-1:] == [tokenizer.eos_token_id]


# ---- batches ----
@dataclass
class Batch:
    """Right-padded [prompt; response; padding]. Masks come from lengths, never from token ids: pad = eos is safe."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L) 1 on prompt and response
    response_ids: Tensor  # (B, T) right-padded
    response_mask: Tensor  # (B, T) bool, True through EOS
    response_start: Tensor  # (B,) index of the first response token in input_ids

    def to(self, device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def collate(sequences: list[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """[(prompt_ids, response_ids)] -> Batch."""
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])
    lengths = torch.tensor([len(response) for _, response in sequences])
    return Batch(
        pad_right([[*prompt, *response] for prompt, response in sequences], pad_token_id),
        (torch.arange(int((starts + lengths).max())) < (starts + lengths)[:, None]).long(),
        pad_right([response for _, response in sequences], pad_token_id),
        torch.arange(int(lengths.max())) < lengths[:, None],
        starts,
    )


def pad_right(rows: list[list], value: float, dtype: torch.dtype = torch.long) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows], dtype=dtype)


# ---- stored rows ----
def write_pairs(path: Path, rows: list[dict]) -> None:
    """Parquet, atomically: temporary name, fsync, rename."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    with open(partial, "wb") as f:
        pq.write_table(pa.Table.from_pylist(rows), f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def read_pairs(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
