"""Data files, folders and hub data sets, read into rows of one form."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import tiny
from common import UserError
from common.data import UnusableRow
from common.store import BrokenFile, read_pairs
from common.streams import data_order
from extras import packed
from extras.columns import read_columns, rename_columns
from extras.hub_names import COMMIT, HubName, cached_commit, hub_name
from extras.lazy import Lazy, is_large, joined, pick, read_at, read_dataset, read_lines, size_of
from extras.left_out import warn_left_out
from extras.stream import Stream

HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: text cut in the middle of an emoji
SUFFIXES = (".json", ".jsonl", ".parquet")  # of data files; JSON may be packed (extras/packed.py)
HELD_OUT_NAMES = ("test", "validation", "val", "eval")
FORMATS = (
    "prompt/completion, prompt/response, messages, prompt/chosen/rejected, chosen/rejected (HH transcripts),"
    " real/generated (SPIN), title/post/summary (TL;DR), info/summaries/choice (TL;DR comparisons),"
    " instruction/input/output (Alpaca), conversations (ShareGPT)"
)
SPEAKERS = {  # of ShareGPT rows -> roles
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing"), "assistant"),
    "system": "system",
}


# ---- sources ----
@dataclass(frozen=True)
class Source:
    """Rows of a data set by the arguments of load_rows, without those whose ids are `taken` by another use."""

    name: str
    split: str
    kind: str = "demonstrations"
    flag: str = "--dataset"
    turns: str = "auto"
    taken: frozenset[int] = frozenset()
    columns: str = ""
    whole: bool = False

    def draw(self, n: int, key: tuple) -> Sequence[dict]:
        """All rows, in the order of the key if n of them are wanted; those of a stream always come in its own order.

        UserError for a stream of which all rows are wanted.
        """
        rows = self.rows()
        if not isinstance(rows, Stream):
            return pick(rows, data_order(len(rows), *key)) if n else rows
        if not n:
            raise UserError(
                f"{self.flag}: found {self.name} beside 0 rows, which means all; expected a number of rows to read"
            )
        return rows

    def rows(self) -> Sequence[dict]:
        """UserError if all rows are taken."""
        rows = load_rows(self.name, self.split, self.kind, self.flag, self.turns, self.columns, self.whole)
        if not self.taken:
            return rows
        if isinstance(rows, Stream):
            empty = f"{self.flag}: found no row of {self.name} that --dataset has left over"
            return Stream(rows, lambda row, _: None if row["row"] in self.taken else row, empty)
        left = pick(rows, [i for i, row in enumerate(rows) if row["row"] not in self.taken])
        if not left:
            expected = f"rows left over by the {len(self.taken)} demonstrations of --dataset (lower --max-samples)"
            raise UserError(f"{self.flag}: found none of {self.name}, expected {expected}")
        return left


def load_rows(
    name: str, split: str, kind: str = "demonstrations", flag: str = "--dataset", turns: str = "auto", columns: str = "",
    whole: bool = False,
) -> Sequence[dict]:  # fmt: skip
    """Rows of a data set. split: train, test, or all (a source named as held-out data: its test split, else every row).

    name: pydoc, a .json/.jsonl/.parquet file, a folder, a short name or a hub id; a local path wins. Where the source
    has no held-out split, a tenth of it is held out by a hash of the prompt, so that no prompt is on both sides. whole:
    nothing is held out of such a source, since held-out data are named beside it.
    turns: which assistant turns of a dialogue (column messages) are learned: first, last, or all, a row each; auto as in
    default_turns. Turn k (from 0) of row i of n becomes row i + k n, and a dialogue is held out as a whole.
    columns: the value of --columns (extras/columns.py).
    Rows of a small source are a list; those of a large one are read again whenever they are asked for (extras/lazy.py);
    those of a stream are read as far as they are asked for (extras/stream.py).
    UserError, in one line with the flag and the row, for anything that cannot be read.
    """
    path = Path(name)
    read_columns(columns)
    if name == "pydoc" and not path.exists():
        return [r for test, r in tiny.pydoc_rows(kind) if split == "all" or test == (split == "test")]
    raw: Sequence
    if path.is_dir():
        raw, own_split = read_folder(path, split, flag)
    elif path.is_file():
        raw, own_split = read_file(path, flag, is_large(size_of(path))), False
    elif looks_like_path(name):
        raise UserError(f"{flag}: found no file {name}, expected a .json, .jsonl or .parquet file, a folder, or a name")
    elif hub_name(name).streamed:
        return read_stream(name, split, kind, flag, turns, columns, whole)
    else:
        raw, own_split = read_hub(name, split, flag)
    if not raw:
        raise UserError(f"{flag}: found no rows in {name}, expected at least one")
    turns = default_turns(name) if turns == "auto" else turns
    every, keep = own_split or whole or split == "all", isinstance(raw, list)

    def parse(r, i: int) -> list[dict]:
        rows = parse_row(r, i, kind, f"{flag} {name}", turns, columns)
        return [{"row": i + k * len(raw), **row, **unfinished(r)} for k, row in rows.items()]

    def usable(reasons: list[str]) -> Iterator[list[dict]]:
        for i, r in enumerate(raw):
            try:
                yield parse(r, i)
            except UnusableRow as error:
                reasons.append(str(error))

    unusable: list[str] = []
    ids, kept = array("q"), []  # of the rows in this split
    for own in usable(unusable):
        if every or held_out(own[0]["prompt"]) == (split == "test"):
            ids.extend(row["row"] for row in own)
            kept += own if keep else []
    count = len(raw) - len(unusable)
    warn_left_out(unusable, len(raw), count)
    if not ids:
        prompts = len({json.dumps(own[0]["prompt"]) for own in usable([])})
        raise UserError(
            f"{flag}: found {count} rows in {name}, none in its {split} part; expected more rows with other prompts"
            f" (here are {prompts}): a tenth of the prompts is held out, by a hash, each with all its rows; or held-out data of"
            " its own in --eval-dataset"
        )
    if keep:
        return sorted(kept, key=lambda row: row["row"])
    order = array("q", sorted(ids))

    def read(places: Sequence[int]) -> list[dict]:
        numbers = [order[j] for j in places]
        again = read_at(raw, [number % len(raw) for number in numbers])
        rows = zip(numbers, again, strict=True)
        return [next(row for row in parse(r, n % len(raw)) if row["row"] == n) for n, r in rows]

    return Lazy(len(order), read)


def looks_like_path(name: str) -> bool:
    """True for a name that no hub set has."""
    return packed.kind_of(Path(name)) in SUFFIXES or name.startswith((".", "/", "~"))


def default_turns(name: str) -> str:
    """The assistant turn of a dialogue to learn: UltraChat's first, as the papers take it after SPIN; else the last."""
    return "first" if Path(name if Path(name).exists() else hub_name(name).id).name == "ultrachat_200k" else "last"


def source_id(name: str) -> str:
    """Return one name for a source, however it is written: relative or absolute path, short name or hub id."""
    if Path(name).exists():
        return str(Path(name).resolve())
    hub = hub_name(name)
    return f"{hub.id}@{hub.revision}" if hub.revision else hub.id


def held_out(prompt) -> bool:
    """True if a prompt belongs to the held-out tenth of a source without a split of its own. One turn counts as its text."""
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]["content"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def read_file(path: Path, flag: str, large: bool = False) -> Sequence:
    """Raw rows of a .json (a list, or a list under one key), .jsonl or .parquet file; of a large one not all at a time.

    One JSON value is read as a whole however large it is. JSON may be packed, .gz or .zst.

    Not by `datasets`, which reads the hub and its own folders below: its JSON builder fills absent columns with null, turns
    texts like 2024-01-01 into dates, and stops at a list among objects or half a surrogate pair without naming the line.
    Parquet would be the same rows, 3 s of import later, with a lock file in the hub's cache.
    """
    kind = packed.kind_of(path)
    if kind not in SUFFIXES:
        raise UserError(f"{flag}: found {path}, expected a .json, .jsonl or .parquet file, or JSON in .gz or .zst")
    try:
        if kind == ".parquet":
            return read_parquet(path) if large else read_pairs(path, lazy=False)
        if large:
            with packed.open_plain(path) as file:
                if kind == ".jsonl" or holds_lines(first_lines(file)):
                    return read_lines(file, path, flag)
        text = packed.read_text(path)
    except (*packed.BROKEN, ValueError) as error:  # pyarrow's errors are of these types
        cause = error.__context__ if isinstance(error, BrokenFile) else error
        expected = "readable Parquet" if kind == ".parquet" else "UTF-8 text"
        whole = f"a whole {path.suffix} file of " if packed.is_packed(path) else ""
        reason = " ".join(str(cause).split())[:160]
        raise UserError(f"{flag}: found {path}, expected {whole}{expected} ({reason})") from None
    if kind == ".jsonl" or holds_lines(text):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{flag}: {path} line {number}: found broken JSON ({error}), expected an object"
                    ) from None
        return rows
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {path}: found broken JSON ({error}), expected a list of objects") from None
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, list):
        raise UserError(f"{flag}: {path}: found a JSON {type(value).__name__}, expected a list of objects")
    return value


def holds_lines(text: str) -> bool:
    """True where a .json file holds JSON Lines: its first two lines are two objects."""
    lines = text.split("\n", 2)
    if not lines[0].lstrip().startswith("{") or len(lines) < 2:
        return False
    try:
        first, second = (json.loads(line) for line in lines[:2])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(second, dict)


def read_parquet(path: Path) -> Lazy:
    """Rows of a Parquet file, whose columns are copied to a mapped file: single rows cannot be read from Parquet."""
    from extras.arrow_rows import spool_parquet

    rows = spool_parquet(path)
    return Lazy(len(rows), lambda places: [dict(rows[i]) for i in places])


def first_lines(file: IO[bytes]) -> str:
    """The first two lines of a text, and a line's end if there are more; the file is at its beginning again."""
    lines = file.readline() + file.readline()
    file.seek(0)
    return lines.decode("utf-8-sig")


def read_folder(path: Path, split: str, flag: str) -> tuple[Sequence, bool]:
    """(raw rows, whether test rows are held apart) of a datasets folder (save_to_disk), or of files named by split."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        loaded = load_from_disk(str(path))
        return read_splits(loaded, split) if isinstance(loaded, DatasetDict) else (read_dataset(loaded), False)
    if (path / "adapter_config.json").exists() or list(path.glob("*.safetensors")):
        raise UserError(f"{flag}: found a model or an adapter in {path}, expected a data set folder")
    if (path / "args.json").exists() and (path / "generations").exists():
        raise UserError(
            f"{flag}: found a run in {path}, expected a data set; its pairs are {path}/generations/*.parquet"
        )
    files = sorted(p for p in path.rglob("*") if packed.kind_of(p) in SUFFIXES)
    if not files:
        raise UserError(f"{flag}: found no .json, .jsonl or .parquet file in {path}, expected a data set folder")
    names = {}
    for p in files:
        places = (p.stem, p.relative_to(path).parent.name)
        names[p] = next((s.split("-")[0] for s in places if s.startswith(("train", *HELD_OUT_NAMES))), p.stem)
    wanted, own_split = pick_splits(sorted(set(names.values())), split)
    chosen = [p for p in files if names[p] in wanted]
    large = is_large(size_of(*chosen))
    return joined([read_file(p, flag, large) for p in chosen]), own_split


def read_splits(loaded, split: str) -> tuple[Sequence, bool]:
    """(raw rows, whether test rows are held apart) of a DatasetDict."""
    wanted, own_split = pick_splits(list(loaded), split)
    return joined([read_dataset(loaded[name]) for name in wanted]), own_split


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


def read_hub(name: str, split: str, flag: str) -> tuple[Sequence, bool]:
    """(raw rows, whether test rows are held apart) of a hub data set."""
    sets, own_split = open_hub(name, split, flag)
    return joined([read_dataset(own) for own in sets]), own_split


def open_hub(name: str, split: str, flag: str) -> tuple[list, bool]:
    """(sets of `datasets`, whether test rows are held apart) of a hub data set, or one line that says it cannot be had.

    Those of a stream are iterable alone.
    """
    from datasets import load_dataset

    hub = hub_name(name)
    how = {**({"revision": hub.revision} if hub.revision else {}), **({"streaming": True} if hub.streamed else {})}
    try:
        if hub.train is None:
            loaded = load_dataset(hub.id, **how)
            wanted, own_split = pick_splits(list(loaded), split)
            sets = [loaded[part] for part in wanted]
        else:
            own_split = True
            sets = [load_dataset(hub.id, hub.config, split=hub.train if split == "train" else hub.test, **how)]
    except Exception as error:  # the hub client raises dozens of types; the user needs one line
        raise UserError(not_provided(name, flag, error)) from None
    refuse_other_revision(sets, hub, f"{flag} {name}")
    return sets, own_split


def refuse_other_revision(sets: list, hub: HubName, owner: str) -> None:
    """UserError for a set of another commit: where the hub is out of reach, `datasets` takes whatever it loaded last."""
    if not hub.revision or hub.streamed:
        return
    expected = cached_commit("datasets", hub.id, hub.revision)
    for own in sets:
        found = Path(own.cache_files[0]["filename"]).parent.name if own.cache_files else ""
        if COMMIT.fullmatch(found) and found != expected:
            wanted = f"{expected[:12] or 'that of ' + hub.revision}, which is not in the cache on this machine"
            raise UserError(f"{owner}: found the commit {found[:12]} in place of the hub, expected {wanted}")


def not_provided(name: str, flag: str, error: Exception) -> str:
    """The line about a hub set that could not be had."""
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"{flag}: found no local path {name}, and the hub ({hub_name(name).id}) could not provide it; expected pydoc, a local"
        f" file or folder (./{name} would do), or a reachable hub. {reason}"
    )


def read_stream(name: str, split: str, kind: str, flag: str, turns: str, columns: str, whole: bool) -> Sequence[dict]:
    """Rows of a hub set as load_rows gives them, read as far as they are asked for, in the set's own order."""
    if turns == "all":
        raise UserError(
            f"--turns: found all beside {name}, expected first or last: the rows of a stream are not counted"
        )
    sets, own_split = open_hub(name, split, flag)
    turns = default_turns(name) if turns == "auto" else turns

    def raw() -> Iterator:
        try:
            for own in sets:
                yield from own
        except Exception as error:  # of the hub client, in the middle of the set
            raise UserError(not_provided(name, flag, error)) from None

    def parse(r, i: int) -> dict | None:
        row = parse_row(r, i, kind, f"{flag} {name}", turns, columns)[0]
        wanted = own_split or whole or split == "all" or held_out(row["prompt"]) == (split == "test")
        return {"row": i, **row, **unfinished(r)} if wanted else None

    return Stream(raw(), parse, f"{flag}: found no row in the {split} part of {name}, expected at least one")


# ---- formats ----
def parse_row(raw, index: int, kind: str, where: str, turns: str = "last", columns: str = "") -> dict[int, dict]:
    """One raw row -> {turn: prompt/response (and rejected, if there is one) or prompt/chosen/rejected}.

    The turn is 0, but for further assistant turns of a dialogue with turns = all. columns: the value of --columns.
    UnusableRow, which names the row, if nothing can be learned from it.
    """
    where = f"{where} row {index}"
    rows: dict[int, dict] = {}
    problems: list[UnusableRow] = []
    if not isinstance(raw, dict):
        raise UnusableRow(f"{where}: found a {type(raw).__name__}, expected an object")
    raw = rename_columns(raw, columns) if columns else raw
    for turn, (prompt, response, rejected) in enumerate(split_columns(raw, where, turns)):
        try:
            row = {"prompt": check_text(prompt, "prompt", where)}
            row["chosen" if rejected is not None and kind == "preferences" else "response"] = check_text(
                response, "response", where
            )
            if rejected is not None:
                row["rejected"] = check_text(rejected, "rejected", where)
            rows[turn] = row
        except UnusableRow as error:
            problems.append(error)
    if not rows:
        raise problems[0]
    if kind == "preferences" and "rejected" not in rows[0]:
        if "rejected" in raw:
            check_text(None, "rejected", where)
        raise UnusableRow(f"{where}: found columns {', '.join(raw)}, expected a preference: prompt/chosen/rejected")
    return rows


def split_columns(raw: dict, where: str, turns: str) -> list[tuple]:
    """[(prompt, response, rejected or None)] by the columns that are there: one, or one for each assistant turn."""
    columns = raw.keys()
    if {"chosen", "rejected"} <= columns:
        chosen, rejected = raw["chosen"], raw["rejected"]
        if isinstance(chosen, list):  # messages, with the prompt as their common beginning or in a column of its own
            ((prompt, chosen),) = split_messages(chosen, where)
            ((other, rejected),) = split_messages(rejected, where)
            check_same(prompt, other, where)
            return [(prompt or raw.get("prompt"), chosen, rejected)]
        if "prompt" in columns:
            return [(raw["prompt"], chosen, rejected)]
        prompt, response = split_transcript(chosen, where)
        other, worse = split_transcript(rejected, where)
        check_same(prompt, other, where)
        return [(prompt, response, worse)]
    label = raw.get("label")  # unpaired preferences have it (KTO)
    if isinstance(label, bool | int) and label == 0 and {"prompt", "messages"} & columns:
        raise UnusableRow(f"{where}: found label {label}, an answer that people rejected; expected a demonstration")
    if {"real", "generated"} <= columns:
        ((prompt, real),) = split_messages(raw["real"], where)
        ((other, generated),) = split_messages(raw["generated"], where)
        check_same(prompt, other, where)
        return [(prompt, real, generated)]
    if "messages" in columns:
        return [(*split, None) for split in split_messages(raw["messages"], where, turns)]
    for answer in ("completion", "response"):
        if {"prompt", answer} <= columns:
            return [(raw["prompt"], raw[answer], None)]
    if {"post", "summary"} <= columns:
        return [(tldr_query(raw, where), raw["summary"], None)]
    if {"info", "summaries", "choice"} <= columns:
        return [split_comparison(raw, where)]
    if "conversations" in columns:
        return [(*split, None) for split in split_messages(as_roles(raw["conversations"], where), where, turns)]
    if {"instruction", "output"} <= columns and not {"prompt", "messages"} & columns:
        return [(alpaca_prompt(raw, where), raw["output"], None)]
    raise UnusableRow(f"{where}: found columns {', '.join(columns) or 'none'}, expected one of {FORMATS}")


def tldr_query(fields: dict, where: str) -> str:
    """Subreddit, title and post -> the query of TL;DR, as in Stiennon et al., arXiv:2009.01325, App. A."""
    check_text(fields["post"], "post", where)
    subreddit = fields.get("subreddit") or fields.get("section") or ""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {fields.get('title') or ''}\n\nPOST: {fields['post']}\n\nTL;DR:"


def split_comparison(raw: dict, where: str) -> tuple[str, str, str]:
    """A row of summarize_from_feedback's comparisons -> (query, the summary people chose, the other one)."""
    info, summaries, choice = raw["info"], raw["summaries"], raw["choice"]
    if not isinstance(info, dict) or not isinstance(info.get("post"), str):
        raise UnusableRow(f"{where}: found no post in info, expected subreddit, title and post")
    if not isinstance(summaries, list) or len(summaries) != 2 or choice not in (0, 1):
        raise UnusableRow(f"{where}: found choice {choice!r} of {summaries!r:.80}, expected 0 or 1 of two summaries")
    texts = [s.get("text") if isinstance(s, dict) else None for s in summaries]
    return tldr_query(info, where), texts[choice], texts[1 - choice]


def alpaca_prompt(raw: dict, where: str) -> str | list[dict]:
    """Instruction and input of an Alpaca row, with an empty line between them; messages where the row has system or history."""
    text = check_text(raw["instruction"], "instruction", where)
    if raw.get("input"):
        text = f"{text}\n\n{check_text(raw['input'], 'input', where)}"
    system, history = raw.get("system"), raw.get("history") or []
    if not system and not history:
        return text
    before = [{"role": "system", "content": system}] if system else []
    try:
        for question, answer in history:
            before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    except (TypeError, ValueError):
        raise UnusableRow(f"{where}: found {history!r:.80} as history, expected [question, answer] pairs") from None
    return [*before, {"role": "user", "content": text}]


def as_roles(turns, where: str) -> list:
    """ShareGPT's turns {from, value} -> messages {role, content}; messages stay as they are."""
    if is_messages(turns) or not isinstance(turns, list):
        return turns
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            found = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
            raise UnusableRow(
                f"{where}: found {found or 'nothing'} in conversations, expected from and value in each turn"
            )
        if turn["from"] not in SPEAKERS:
            raise UnusableRow(f"{where}: found a turn from {turn['from']!r:.40}, expected one of {', '.join(SPEAKERS)}")
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return messages


def check_same(prompt: list[dict], other: list[dict], where: str) -> None:
    """UnusableRow where two responses do not answer the same prompt: a few HH pairs part before the last turn."""
    if prompt != other:
        raise UnusableRow(f"{where}: found two responses to different prompts, expected the same prompt")


def is_messages(value) -> bool:
    """True for a list of messages {role, content}."""
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)


def split_messages(messages, where: str, turns: str = "last") -> list[tuple[list[dict], str]]:
    """Messages -> [(those before an assistant turn, its text)] of the first assistant turn, the last one, or all."""
    if not is_messages(messages):
        raise UnusableRow(
            f"{where}: found {type(messages).__name__}, expected a list of messages with role and content"
        )
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        raise UnusableRow(f"{where}: found messages without an assistant turn, expected one to learn from")
    answers = {"first": answers[:1], "last": answers[-1:], "all": answers}[turns]
    bare = [{"role": m["role"], "content": m["content"]} for m in messages]
    return [(bare[:i], bare[i]["content"]) for i in answers]


def split_transcript(text, where: str) -> tuple[list[dict], str]:
    """Anthropic HH transcript, its turns begun by "\\n\\nHuman:" or "\\n\\nAssistant:" -> (messages, last answer)."""
    if not isinstance(text, str) or "\n\nAssistant:" not in text:
        raise UnusableRow(
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


def check_text(value, name: str, where: str):
    """A text, or a prompt's messages, without halves of surrogate pairs; of a response's messages the last answer.

    name: prompt, response, rejected or another column. UnusableRow for what is empty or no text.
    """
    if isinstance(value, list) and name == "prompt":
        if not value or not is_messages(value) or not all(isinstance(m["content"], str) for m in value):
            raise UnusableRow(f"{where}: found an empty or non-text prompt, expected messages with text")
        return [{**m, "content": HALF.sub("\ufffd", m["content"])} for m in value]
    if isinstance(value, list) and name in ("response", "rejected"):
        ((_, value),) = split_messages(value, where)
    if not isinstance(value, str):
        raise UnusableRow(f"{where}: found {type(value).__name__} as {name}, expected text")
    if not value.strip():
        raise UnusableRow(f"{where}: found an empty {name}, expected text")
    return HALF.sub("\ufffd", value)


def unfinished(raw: dict) -> dict[str, bool]:
    """{response_finished or rejected_finished: False} for a response that a sampler was cut in, as its columns say.

    Columns chosen_finished (or completion_, response_) and rejected_finished; `finished` is that of the rejected response,
    or of the only one. Our own generations/*.parquet have them. A response that is cut gets no end when it is read again.
    """
    only = "rejected" if "rejected" in raw else "response"
    columns = {f"{name}_finished": "response" for name in ("chosen", "completion", "response")}
    columns |= {"rejected_finished": "rejected", "finished": only}
    return {f"{name}_finished": False for column, name in columns.items() if raw.get(column) is False}
