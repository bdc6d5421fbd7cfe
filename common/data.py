"""Data: sources and formats in, rows of prompt and response out; templates, tokens, batches.

A demonstration is a dict with row, prompt, response (and rejected, where the source has one); prompt is a text or a
list of messages {role, content}; row is its index in the source. A preference has row, prompt, chosen, rejected.

A row that cannot be used is left out and counted, whatever the reason: one bad row never stops a run, unless all are bad.

Dims: B sequences, L prompt + response tokens, T response tokens.
"""

import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

import tiny
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
HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: text cut in the middle of an emoji


class UnusableRow(UserError):
    """A row that cannot be used: it is left out and counted, since real data sets have some."""


def warn_left_out(unusable: list[str], total: int, kept: int) -> None:
    """Say in one line how many of `total` rows were left out, with the first one's reason; UserError if none is `kept`."""
    if unusable and not kept:
        rest = f"all {total} rows are like this" if len(unusable) == total else f"none of {total} rows can be used"
        raise UserError(f"{unusable[0]}; {rest}")
    if unusable:
        found = f"{unusable[0]}; {len(unusable)} of {total} rows cannot be used and were left out"
        warnings.warn(found, stacklevel=3)


# ---- sources ----
def load_rows(
    name: str, split: str, kind: str = "demonstrations", flag: str = "--dataset", turns: str = "auto"
) -> list[dict]:
    """Rows of a data set. split: train, test, or all (a source named as held-out data: its test split, else every row).

    name: pydoc, a .json/.jsonl/.parquet file, a folder, a short name or a hub id; a local path wins. Where the source
    has no held-out split, a tenth of it is held out by a hash of the prompt, so that no prompt is on both sides.
    turns: which assistant turns of a dialogue (column messages) are learned: first, last, or all, a row each; auto as in
    default_turns. Turn k (from 0) of row i of n becomes row i + k n, and a dialogue is held out as a whole.
    UserError, in one line with the flag and the row, for anything that cannot be read.
    """
    path = Path(name)
    if name == "pydoc" and not path.exists():
        return [r for test, r in tiny.pydoc_rows(kind) if split == "all" or test == (split == "test")]
    if path.is_dir():
        raw, own_split = read_folder(path, split, flag)
    elif path.is_file():
        raw, own_split = read_file(path, flag), False
    elif path.suffix in (".json", ".jsonl", ".parquet") or name.startswith((".", "/", "~")):
        raise UserError(f"{flag}: found no file {name}, expected a .json, .jsonl or .parquet file, a folder, or a name")
    else:
        raw, own_split = read_hub(name, split, flag)
    if not raw:
        raise UserError(f"{flag}: found no rows in {name}, expected at least one")
    turns = default_turns(name) if turns == "auto" else turns
    sources, unusable = [], []  # of every row of the source the rows it gives
    for i, r in enumerate(raw):
        try:
            own = parse_row(r, i, kind, f"{flag} {name}", turns)
            sources.append([{"row": i + k * len(raw), **row, **unfinished(r)} for k, row in own.items()])
        except UnusableRow as error:
            unusable.append(str(error))
    warn_left_out(unusable, len(raw), len(sources))
    every = own_split or split == "all"
    rows = [row for own in sources if every or held_out(own[0]["prompt"]) == (split == "test") for row in own]
    if not rows:
        prompts = len({json.dumps(own[0]["prompt"]) for own in sources})
        raise UserError(
            f"{flag}: found {len(sources)} rows in {name}, none in its {split} part; expected more rows with other prompts"
            f" (here are {prompts}): a tenth of the prompts is held out, by a hash, each with all its rows; or held-out data of"
            " its own in --eval-dataset"
        )
    return sorted(rows, key=lambda row: row["row"])


def default_turns(name: str) -> str:
    """The assistant turn of a dialogue to learn: UltraChat's first, as the papers take it after SPIN; else the last."""
    return "first" if Path(name).name == "ultrachat_200k" else "last"


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


def read_folder(path: Path, split: str, flag: str) -> tuple[list, bool]:
    """(raw rows, whether test rows are held apart) of a datasets folder (save_to_disk), or of files named by split."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        loaded = load_from_disk(str(path))
        return read_splits(loaded, split) if isinstance(loaded, DatasetDict) else (loaded.to_list(), False)
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
def parse_row(raw, index: int, kind: str, where: str, turns: str = "last") -> dict[int, dict]:
    """One raw row -> {turn: prompt/response (and rejected, if there is one) or prompt/chosen/rejected}.

    The turn is 0, but for further assistant turns of a dialogue with turns = all. UnusableRow, which names the row, if
    nothing can be learned from it.
    """
    where, rows, problem = f"{where} row {index}", {}, None
    if not isinstance(raw, dict):
        raise UnusableRow(f"{where}: found a {type(raw).__name__}, expected an object")
    for turn, columns in enumerate(split_columns(raw, where, turns)):
        try:
            rows[turn] = check_row(*columns, kind, where)
        except UnusableRow as error:
            problem = problem or error
    if not rows:
        raise problem
    if kind == "preferences" and "rejected" not in rows[0]:
        if "rejected" in raw:
            check_text(None, "rejected", where)
        raise UnusableRow(f"{where}: found columns {', '.join(raw)}, expected a preference: prompt/chosen/rejected")
    return rows


def check_row(prompt, response, rejected, kind: str, where: str) -> dict:
    """Prompt, response and rejected response (or None) -> a row. UnusableRow if one of them is not text."""
    prompt = check_prompt(prompt, where)
    response = check_response(response, "response", where)
    if rejected is None:
        return {"prompt": prompt, "response": response}
    rejected = check_response(rejected, "rejected", where)
    return {"prompt": prompt, "chosen" if kind == "preferences" else "response": response, "rejected": rejected}


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
    label = raw.get("label")  # of an unpaired preference (KTO)
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


def is_messages(value) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)


def check_prompt(prompt, where: str):
    if isinstance(prompt, list):
        if not prompt or not is_messages(prompt) or not all(isinstance(m["content"], str) for m in prompt):
            raise UnusableRow(f"{where}: found an empty or non-text prompt, expected messages with text")
        return [{**m, "content": HALF.sub("\ufffd", m["content"])} for m in prompt]
    return check_text(prompt, "prompt", where)


def check_response(response, name: str, where: str) -> str:
    if isinstance(response, list):
        ((_, response),) = split_messages(response, where)
    return check_text(response, name, where)


def check_text(value, name: str, where: str) -> str:
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


# ---- the cache ----
def cache_folder() -> Path:
    """$CLEANIRL_CACHE, else cleanirl/ in the user's cache folder."""
    base = os.environ.get("CLEANIRL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanirl"


# ---- templates ----
def render_prompt(tokenizer, prompt) -> str:
    """The text before the response: the tokenizer's chat template if it has one, else PLAIN_TEMPLATE.

    The same text is used for generation and for training. UnusableRow, without a row number, if the template refuses it.
    """
    if tokenizer.chat_template:
        try:
            return tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UnusableRow(
                f"found a prompt that the chat template refuses ({reason}), expected one it accepts"
            ) from None
    return PLAIN_TEMPLATE.format(prompt=plain_prompt(prompt))


def as_messages(prompt) -> list[dict]:
    """A prompt as messages: a text is one user turn."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def plain_prompt(prompt) -> str:
    """The prompt's text alone; several turns are written one below the other with Human: and Assistant: before them."""
    if not isinstance(prompt, list):
        return prompt
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [m["content"] if len(prompt) == 1 else f"{names.get(m['role'], m['role'])}: {m['content']}" for m in prompt]
    return "\n\n".join(turns)


@dataclass(frozen=True)
class Frame:
    """The text that a template writes around one exchange."""

    before: str = ""  # the prompt
    after: str = ""  # the prompt, up to the place where the response begins
    opening: str = ""  # the end of `after` that is written for the response alone, such as "<|assistant|>\n"
    lead: str = ""  # white space between `opening` and the response, and between the response and its end
    trail: str = ""
    end: int = -1  # id of the token that ends an assistant's turn


def read_frame(tokenizer) -> Frame:
    """The Frame of the tokenizer's template, from what it writes for an exchange of two known texts.

    The turn ends with the token that the template puts after the response. Where it puts none, or refuses such an
    exchange, the turn ends with the tokenizer's EOS.
    """
    eos = tokenizer.eos_token_id
    prompt, response = "PROMPT", "RESPONSE"
    if not getattr(tokenizer, "chat_template", None):  # stand-ins of tests and benchmarks know EOS alone
        before, _, after = PLAIN_TEMPLATE.partition("{prompt}")
        return Frame(before, after, after.lstrip(), end=eos)
    question, answer = as_messages(prompt), [{"role": "assistant", "content": response}]
    try:
        asked = render_prompt(tokenizer, prompt)
        bare = tokenizer.apply_chat_template(question, tokenize=False)
        whole = tokenizer.apply_chat_template(question + answer, tokenize=False)
    except Exception:  # what the template refuses is said of the rows
        return Frame(end=eos)
    before, _, after = asked.partition(prompt)
    bare = bare.partition(prompt)[2]
    head, _, tail = whole.rpartition(response)
    lead, trail = head.removeprefix(asked), tail[: len(tail) - len(tail.lstrip())]
    added = {str(t) for t in tokenizer.added_tokens_decoder.values()}
    ends = [t for t in added | {tokenizer.eos_token} if head and tail.lstrip().startswith(t)]
    return Frame(
        before,
        after,
        opening=after.removeprefix(bare) if after.startswith(bare) else "",
        lead=lead if head.startswith(asked) and not lead.strip() else "",
        trail=trail if ends else "",
        end=tokenizer.convert_tokens_to_ids(max(ends, key=len)) if ends else eos,
    )


def end_of_turn(tokenizer) -> int:
    """Id of the token that ends every response, trained and sampled: that of the template, else the tokenizer's EOS."""
    return read_frame(tokenizer).end


def stop_at_end_of_turn(model, tokenizer) -> None:
    """Add the end of a turn to the generation config of a model to be saved: generate() then stops where the run did."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if (end := end_of_turn(tokenizer)) not in known:
        config.eos_token_id = [end, *(t for t in known if t is not None)]


def check_template(tokenizer, where: str) -> None:
    """UserError for chat templates that cannot be used: several without a default one, or one that is no valid Jinja."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates))
        raise UserError(
            f"{where}: found chat templates {names}, none of the name default; expected one: in Python,"
            f" tokenizer.chat_template = tokenizer.chat_template[{sorted(templates)[0]!r}], then save_pretrained"
        )
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else []:
        try:
            _compile_jinja_template(template)
        except TemplateSyntaxError as error:
            raise UserError(
                f"{where}: found a chat template with an error in line {error.lineno} ({error.message}), expected a valid"
                " Jinja template (chat_template.jinja, or chat_template in tokenizer_config.json)"
            ) from error


# ---- tokens ----
def encode(
    rows: list[dict],
    tokenizer,
    max_length: int,
    max_prompt_length: int,
    flag: str = "--dataset",
    *,
    limit: int = 0,
    longest_response: int = 0,
    distinct: bool = False,
    render: Callable | None = None,
    frame: Frame | None = None,
) -> list[dict]:
    """Rows -> dicts with row, prompt, prompt_ids, response_ids, prompt_text, response_text (and rejected_ids, rejected_text).

    The ids of a prompt are those of its rendered text, which the sampler sees; the ids of a response are those that
    follow in the text of both (see `follow`). The token that ends a turn ends every response once; one cut at max_length,
    at longest_response (0: no such limit), or by the sampler it is of (see `unfinished`) has none. response_text is what is
    learned: without an end written out, and without what the prompt already says.

    Left out, with one warning of each kind: prompts longer than max_prompt_length; rows that the template refuses, whose
    prompt holds a control token, or whose response has no tokens of its own; with `distinct`, pairs whose responses have the
    same tokens. limit: stop when so many rows are kept (0: take all); later rows are not looked at. UserError if no row
    is left. render(tokenizer, prompt) -> text, in place of render_prompt, and `frame`, what it writes around a response.
    """
    longest = min(max_prompt_length, max_length - 1)  # room for one token of response
    coder = Coder(tokenizer, flag, render or render_prompt, frame or read_frame(tokenizer))
    kept, seen = [], 0
    long, cut, same, count = [], [], [], 0  # (row, tokens) of long prompts and cut responses; rows of equal pairs
    while seen < len(rows) and (not limit or len(kept) < limit):
        part = rows[seen : seen + limit - len(kept)] if limit else rows
        seen += len(part)
        items = coder.prompts(part)
        long += [(item["row"], len(item["prompt_ids"])) for item in items if len(item["prompt_ids"]) > longest]
        items = coder.responses([item for item in items if len(item["prompt_ids"]) <= longest])
        for item in items:
            room = max_length - len(item["prompt_ids"])
            room = min(room, longest_response or room)
            for name in ("response_ids", "rejected_ids"):
                if name in item:
                    count += 1
                    if len(item[name]) > room:
                        cut.append((item["row"], len(item[name]), room))
                        item[name] = item[name][:room]
            if distinct and item["response_ids"] == item["rejected_ids"]:
                same.append(item["row"])
            else:
                kept.append(item)
    coder.say_rendered(seen)
    if long:
        found = f"{flag}: found {len(long)} of {seen} prompts longer than --max-prompt-length {longest}"
        detail = f"(row {long[0][0]} has {long[0][1]} tokens)"
        if not kept and not coder.unusable and not same:
            raise UserError(f"{found} {detail}: no row is left; expected shorter prompts or a larger window")
        warnings.warn(f"{found} {detail}: left out", stacklevel=2)
    warn_left_out(coder.unusable, seen, len(kept) or len(same))
    if same:
        found = (
            f"{flag}: found {len(same)} of {len(same) + len(kept)} pairs with chosen equal to rejected (row {same[0]})"
        )
        if not kept:
            raise UserError(f"{found}, expected responses that differ")
        warnings.warn(f"{found}: left out", stacklevel=2)
    if cut:
        row, length, room = cut[0]
        found = f"{flag}: found {len(cut)} of {count} responses longer than their room"
        warnings.warn(f"{found} (row {row} has {length} tokens for {room}): cut there, without EOS", stacklevel=2)
    if len(kept) < limit and seen > len(kept):
        warnings.warn(
            f"{flag}: found {len(kept)} rows that can be used, fewer than the {limit} asked for", stacklevel=2
        )
    return kept


class Coder:
    """Rows -> tokens, for `encode`. Keeps the reasons for which rows were left out."""

    def __init__(self, tokenizer, flag: str, render: Callable, frame: Frame):
        self.tokenizer, self.flag, self.render, self.frame = tokenizer, flag, render, frame
        self.ends = end_texts(tokenizer)
        self.controls = control_tokens(tokenizer)
        self.unusable: list[str] = []
        self.rendered: list[int] = []

    def leave_out(self, row: dict, reason: str) -> None:
        self.unusable.append(f"{self.flag} row {row['row']}: {reason}")

    def prompts(self, rows: list[dict]) -> list[dict]:
        """The rows that can be asked, with prompt_text and prompt_ids."""
        kept = []
        for row in rows:
            try:
                kept.append({**row, **self.render_row(row["prompt"], row["row"])})
            except UserError as error:
                self.leave_out(row, str(error))
        ids = tokenise_prompts(self.tokenizer, [row["prompt_text"] for row in kept])
        return [{**row, "prompt_ids": own} for row, own in zip(kept, ids, strict=True)]

    def render_row(self, prompt, number: int) -> dict:
        """{prompt, prompt_text} of a prompt; one that is rendered already stays as it is."""
        if isinstance(prompt, str) and self.is_rendered(prompt):
            self.rendered.append(number)
            inner = prompt.removeprefix(self.frame.before).removesuffix(self.frame.after)
            if not self.controls.search(inner) and self.render(self.tokenizer, inner) == prompt:
                return {"prompt": inner, "prompt_text": prompt}
            return {"prompt": prompt, "prompt_text": prompt}
        if isinstance(prompt, list):  # earlier answers may have their end written out too
            prompt = [
                {**m, "content": without_end(m["content"], self.ends)} if m["role"] == "assistant" else m
                for m in prompt
            ]
        written = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        if found := self.controls.search(written):
            raise UnusableRow(f"found the control token {found[0]} in the prompt's text, expected text alone")
        return {"prompt": prompt, "prompt_text": self.render(self.tokenizer, prompt)}

    def is_rendered(self, prompt: str) -> bool:
        """True where the template's own words end the prompt, and begin it too unless those at the end are its control tokens."""
        before, after = self.frame.before, self.frame.after
        if not after.strip() or not prompt.endswith(after):
            return False
        return bool(self.controls.search(after)) or prompt.startswith(before)

    def say_rendered(self, seen: int) -> None:
        if n := len(self.rendered):
            found = (
                f"{self.flag}: found {n} of {seen} prompts in the form of the template already (row {self.rendered[0]})"
            )
            warnings.warn(f"{found}: they are not rendered again", stacklevel=3)

    def responses(self, rows: list[dict]) -> list[dict]:
        """Rows of `prompts` -> items of `encode`, not yet cut; the rows without a usable response are left out."""
        items = [{k: row[k] for k in ("row", "prompt", "prompt_ids", "prompt_text")} for row in rows]
        for name, columns in (("response", ("response", "chosen")), ("rejected", ("rejected",))):
            texts = [next((row[c] for c in columns if row.get(c) is not None), None) for row in rows]
            chosen = [i for i, text in enumerate(texts) if text is not None]
            clean = [self.own_words(texts[i], rows[i]["prompt_text"]) for i in chosen]
            ended = [rows[i].get(f"{name}_finished", True) for i in chosen]
            ids = respond(self.tokenizer, [rows[i]["prompt_text"] for i in chosen], clean, ended, self.frame)
            for i, text, own, whole in zip(chosen, clean, ids, ended, strict=True):
                items[i] |= {f"{name}_text": text, f"{name}_ids": own}
                items[i] |= {} if whole else {f"{name}_finished": False}
        kept = []
        for item in items:
            if not all(text.strip() for name, text in item.items() if name in ("response_text", "rejected_text")):
                self.leave_out(item, "found a response that holds nothing but the template's words, expected text")
            elif None in item.values():
                self.leave_out(item, "found a response without tokens of its own after the prompt, expected some")
            else:
                kept.append(item)
        return kept

    def own_words(self, text: str, prompt: str) -> str:
        """A response without an end that is written out, and without the part of the template's opening that it repeats.

        DeepSeek-R1's prompt ends in "<think>\n", with which its published answers begin: it is there once.
        """
        text = without_end(text, self.ends)
        opening = self.frame.opening
        if not opening.strip() or not prompt.endswith(opening):
            return text
        starts = [i for i, c in enumerate(opening) if i == 0 or opening[i - 1] == "\n" or c in "<["]
        for i in starts:
            tag = opening[i:].strip()
            if tag and text.lstrip().startswith(tag):
                space = opening[len(opening.rstrip()) :]
                return text.lstrip().removeprefix(tag).removeprefix(space)
        return text


def respond(
    tokenizer, prompts: list[str], texts: list[str], finished: list[bool], frame: Frame
) -> list[list[int] | None]:
    """Token ids of responses to rendered prompts: `follow`, with what `frame` writes around a response.

    Finished responses end with the token that ends a turn. One that its sampler was cut in has nothing after its text.
    """
    lead, trail = frame.lead, frame.trail
    written = [
        (t if t.startswith(lead) else lead + t) + trail * done if t else t
        for t, done in zip(texts, finished, strict=True)
    ]
    ids = follow(tokenizer, prompts, written)
    return [None if own is None else own + [frame.end] * done for own, done in zip(ids, finished, strict=True)]


def follow(tokenizer, prompts: list[str], texts: list[str]) -> list[list[int] | None]:
    """Token ids of each text as it follows its prompt: those in tokenise(prompt + text) from the text on.

    A tokenizer may write the beginning of a text in another way than its middle: SentencePiece puts a space before it.
    Where the whole does not begin with the prompt's own ids, since a token crosses the border, the sampler still sees the
    prompt's. The ids then are the text's own, or those it has after a short other text: the first that read the same as
    the whole. Control tokens written in a text are text. None where no ids read so.
    """
    bare = tokenise(tokenizer, prompts)
    whole = tokenise(tokenizer, [p + t for p, t in zip(prompts, texts, strict=True)])
    controls = control_tokens(tokenizer)
    out: list[list[int] | None] = [None] * len(texts)
    left, written = [], []
    for i, (mine, both) in enumerate(zip(bare, whole, strict=True)):
        if controls.search(texts[i]) or (tokenizer.unk_token and tokenizer.unk_token in texts[i]):
            written.append(i)
        elif both[: len(mine)] == mine and len(both) > len(mine):
            out[i] = both[len(mine) :]
        else:
            left.append(i)

    def common(i: int) -> int:
        """Return the position from which to read: one token before the first that differs."""
        same = next((k for k, (a, b) in enumerate(zip(bare[i], whole[i], strict=False)) if a != b), len(bare[i]))
        return max(same - 1, 0)

    def reads_as_whole(parts: dict[int, list[int]]) -> list[bool]:
        start = {i: common(i) for i in parts}
        mine = read(tokenizer, [(bare[i] + own)[start[i] :] for i, own in parts.items()])
        return [a == b for a, b in zip(mine, read(tokenizer, [whole[i][start[i] :] for i in parts]), strict=True)]

    def reads_as_text(parts: dict[int, list[int]]) -> list[bool]:
        heads = read(tokenizer, [bare[i] for i in parts])
        mine = read(tokenizer, [bare[i] + own for i, own in parts.items()])
        special = {tokenizer.convert_tokens_to_ids(t) for t in control_texts(tokenizer)}
        forms = [{texts[i], *(unicodedata.normalize(form, texts[i]) for form in ("NFC", "NFKC"))} for i in parts]
        return [
            special.isdisjoint(own) and m.removeprefix(h) in allowed
            for h, m, own, allowed in zip(heads, mine, parts.values(), forms, strict=True)
        ]

    for waiting, reads, split in ((left, reads_as_whole, False), (written, reads_as_text, True)):
        for context in ("", "\n", ".", "a", "("):
            if not waiting:
                break
            head = tokenise(tokenizer, [context], split)[0]
            found = zip(waiting, tokenise(tokenizer, [context + texts[i] for i in waiting], split), strict=True)
            parts = {i: ids[len(head) :] for i, ids in found if ids[: len(head)] == head and len(ids) > len(head)}
            for (i, own), right in zip(parts.items(), reads(parts), strict=True):
                if right:
                    out[i] = own
            waiting = [i for i in waiting if out[i] is None]
    return out


def read(tokenizer, ids: list[list[int]]) -> list[str]:
    """Texts of token ids, to the letter."""
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else []


def control_texts(tokenizer) -> list[str]:
    """The tokens that stand for no text: what begins and ends turns, padding, and the like; the unknown token is none."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    special -= {tokenizer.unk_token}
    return sorted(special | set(end_texts(tokenizer)), key=lambda t: (-len(t), t))


def control_tokens(tokenizer) -> re.Pattern:
    """Finds a control token that is written out in a text."""
    return re.compile("|".join(map(re.escape, control_texts(tokenizer))) or r"(?!)")


def tokenise(tokenizer, texts: list[str], split_special: bool = False) -> list[list[int]]:
    """Token ids of texts, nothing added; split_special: a control token that is written out is taken as text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special)["input_ids"] if texts else []


def tokenise_prompts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Rendered prompts -> ids, with BOS before them where the tokenizer itself begins texts so and the template did not."""
    bos, ids = tokenizer.bos_token_id, tokenise(tokenizer, texts)
    if bos is None or tokenizer("a")["input_ids"][0] != bos:
        return ids
    return [p if t.startswith(tokenizer.bos_token) else [bos, *p] for p, t in zip(ids, texts, strict=True)]


def end_texts(tokenizer) -> list[str]:
    """How the end of a response is written out in some data sets: the template's token and the tokenizer's EOS."""
    return [tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)), tokenizer.eos_token]


def without_end(text: str, ends: list[str]) -> str:
    """The text without an end written out after it: the end is added once, as a token. Within the text it is text."""
    bare = text.rstrip()
    while any(bare.endswith(end) for end in ends):
        text = bare = next(bare.removesuffix(end) for end in ends if bare.endswith(end)).rstrip()
    return text


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
    """Parquet, atomically: temporary name, fsync, rename. Where some prompts are messages, all are: a column has one type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if any(isinstance(row.get("prompt"), list) for row in rows):
        rows = [{**row, "prompt": as_messages(row["prompt"])} for row in rows]
    partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
    with open(partial, "wb") as f:
        pq.write_table(pa.Table.from_pylist(rows), f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


class BrokenFile(UserError, ValueError):
    """A Parquet file that cannot be read."""


def read_pairs(path: Path) -> list[dict]:
    """Rows of a Parquet file. BrokenFile, in one line, if it is not whole."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        reason = " ".join(str(error).split())[:160]
        raise BrokenFile(
            f"{path}: found no readable Parquet ({reason}); if a run wrote it, delete it and --resume the run: it makes the file"
            " again, or says that it cannot"
        ) from None


def pair_rows(tokenizer, rows: list[dict], rollout, iteration: int) -> list[dict]:
    """(demonstration, answer) of every row, as generations/iter_<t>.parquet keeps them: texts, token ids, whether each ended.

    rollout: the policy's answers to the rows' prompts in an outer iteration.
    """
    return [
        {
            "row": r["row"], "iteration": iteration, "prompt": r["prompt"],
            "prompt_text": r["prompt_text"], "chosen": r["response_text"],
            "rejected": tokenizer.decode(y, skip_special_tokens=True), "prompt_ids": r["prompt_ids"],
            "chosen_ids": r["response_ids"], "rejected_ids": y, "finished": done,
            "chosen_finished": r.get("response_finished", True),
        }
        for r, y, done in zip(rows, rollout.response_ids, rollout.finished, strict=True)
    ]  # fmt: skip


def row_length(row: dict) -> int:
    """Tokens of a demonstration."""
    return len(row["prompt_ids"]) + len(row["response_ids"])


def pair_length(pair: dict) -> int:
    """Tokens of the longer sequence of a pair."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
