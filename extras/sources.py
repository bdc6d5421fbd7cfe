"""Data files, folders and hub data sets, read into rows of one form."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny
from common import UserError
from common.data import UnusableRow
from common.store import BrokenFile, read_pairs
from extras.lazy import Lazy, is_large, joined, pick, read_at, read_dataset, read_lines, size_of
from extras.left_out import warn_left_out

DATASETS = {  # short name -> (hub id, configuration, training split, held-out split); a local path of the name wins
    "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft"),
    "ultrafeedback_binarized": ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs"),
    "hh-rlhf": ("Anthropic/hh-rlhf", None, "train", "test"),
    "tldr-sft": ("vwxyzjn/summarize_from_feedback_tldr_3_filtered", None, "train", "validation"),
    "tldr-preferences": ("vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144", None, "train", "validation"),
    "spin_iter0": ("UCLA-AGI/SPIN_iter0", None, "train", "test"),
}
HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: text cut in the middle of an emoji
HELD_OUT_NAMES = ("test", "validation", "val", "eval")
FORMATS = (
    "prompt/completion, prompt/response, messages, prompt/chosen/rejected, chosen/rejected (HH transcripts),"
    " real/generated (SPIN), title/post/summary (TL;DR), info/summaries/choice (TL;DR comparisons)"
)


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

    def rows(self) -> Sequence[dict]:
        """UserError if all rows are taken."""
        rows = load_rows(self.name, self.split, self.kind, self.flag, self.turns)
        if not self.taken:
            return rows
        left = pick(rows, [i for i, row in enumerate(rows) if row["row"] not in self.taken])
        if not left:
            expected = f"rows left over by the {len(self.taken)} demonstrations of --dataset (lower --max-samples)"
            raise UserError(f"{self.flag}: found none of {self.name}, expected {expected}")
        return left


def load_rows(
    name: str, split: str, kind: str = "demonstrations", flag: str = "--dataset", turns: str = "auto"
) -> Sequence[dict]:
    """Rows of a data set. split: train, test, or all (a source named as held-out data: its test split, else every row).

    name: pydoc, a .json/.jsonl/.parquet file, a folder, a short name or a hub id; a local path wins. Where the source
    has no held-out split, a tenth of it is held out by a hash of the prompt, so that no prompt is on both sides.
    turns: which assistant turns of a dialogue (column messages) are learned: first, last, or all, a row each; auto as in
    default_turns. Turn k (from 0) of row i of n becomes row i + k n, and a dialogue is held out as a whole.
    Rows of a small source are a list; those of a large one are read again whenever they are asked for (extras/lazy.py).
    UserError, in one line with the flag and the row, for anything that cannot be read.
    """
    path = Path(name)
    if name == "pydoc" and not path.exists():
        return [r for test, r in tiny.pydoc_rows(kind) if split == "all" or test == (split == "test")]
    raw: Sequence
    if path.is_dir():
        raw, own_split = read_folder(path, split, flag)
    elif path.is_file():
        raw, own_split = read_file(path, flag, is_large(size_of(path))), False
    elif looks_like_path(name):
        raise UserError(f"{flag}: found no file {name}, expected a .json, .jsonl or .parquet file, a folder, or a name")
    else:
        raw, own_split = read_hub(name, split, flag)
    if not raw:
        raise UserError(f"{flag}: found no rows in {name}, expected at least one")
    turns = default_turns(name) if turns == "auto" else turns
    every, keep = own_split or split == "all", isinstance(raw, list)

    def parse(r, i: int) -> list[dict]:
        rows = parse_row(r, i, kind, f"{flag} {name}", turns)
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
    return Path(name).suffix in (".json", ".jsonl", ".parquet") or name.startswith((".", "/", "~"))


def default_turns(name: str) -> str:
    """The assistant turn of a dialogue to learn: UltraChat's first, as the papers take it after SPIN; else the last."""
    return "first" if Path(name).name == "ultrachat_200k" else "last"


def source_id(name: str) -> str:
    """Return one name for a source, however it is written: relative or absolute path, short name or hub id."""
    return str(Path(name).resolve()) if Path(name).exists() else DATASETS.get(name, (name,))[0]


def held_out(prompt) -> bool:
    """True if a prompt belongs to the held-out tenth of a source without a split of its own. One turn counts as its text."""
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]["content"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def read_file(path: Path, flag: str, large: bool = False) -> Sequence:
    """Raw rows of a .json (a list, or a list under one key), .jsonl or .parquet file; of a large one not all at a time.

    One JSON value is read as a whole however large it is.

    Not by `datasets`, which reads the hub and its own folders below: its JSON builder fills absent columns with null, turns
    texts like 2024-01-01 into dates, and stops at a list among objects or half a surrogate pair without naming the line.
    Parquet would be the same rows, 3 s of import later, with a lock file in the hub's cache.
    """
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise UserError(f"{flag}: found {path}, expected a .json, .jsonl or .parquet file")
    try:
        if path.suffix == ".parquet":
            return read_parquet(path) if large else read_pairs(path, lazy=False)
        if large and (path.suffix == ".jsonl" or holds_lines(first_lines(path))):
            return read_lines(path, flag)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        cause = error.__context__ if isinstance(error, BrokenFile) else error
        kind = "readable Parquet" if path.suffix == ".parquet" else "UTF-8 text"
        raise UserError(f"{flag}: found {path}, expected {kind} ({' '.join(str(cause).split())[:160]})") from None
    if path.suffix == ".jsonl" or holds_lines(text):
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


def first_lines(path: Path) -> str:
    """The first two lines of a text, and a sign of more."""
    with open(path, encoding="utf-8-sig") as f:
        return f.readline() + f.readline() + f.read(1)


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
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl", ".parquet"))
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
    """(sets of `datasets`, whether test rows are held apart) of a hub data set, or one line that says it cannot be had."""
    from datasets import load_dataset

    hub = DATASETS[name][0] if name in DATASETS else name
    try:
        if name not in DATASETS:
            loaded = load_dataset(hub)
            wanted, own_split = pick_splits(list(loaded), split)
            return [loaded[part] for part in wanted], own_split
        _, config, train, test = DATASETS[name]
        return [load_dataset(hub, config, split=train if split == "train" else test)], True
    except Exception as error:  # the hub client raises dozens of types; the user needs one line
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag}: found no local path {name}, and the hub ({hub}) could not provide it; expected pydoc, a local"
            f" file or folder (./{name} would do), or a reachable hub. {reason}"
        ) from None


# ---- formats ----
def parse_row(raw, index: int, kind: str, where: str, turns: str = "last") -> dict[int, dict]:
    """One raw row -> {turn: prompt/response (and rejected, if there is one) or prompt/chosen/rejected}.

    The turn is 0, but for further assistant turns of a dialogue with turns = all. UnusableRow, which names the row, if
    nothing can be learned from it.
    """
    where = f"{where} row {index}"
    rows: dict[int, dict] = {}
    problems: list[UnusableRow] = []
    if not isinstance(raw, dict):
        raise UnusableRow(f"{where}: found a {type(raw).__name__}, expected an object")
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
