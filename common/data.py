"""Data: sources and formats in, rows of prompt and response out; templates, tokens, batches.

A demonstration is a dict with row, prompt, response (and rejected, where the source has one); prompt is a text or a
list of messages {role, content}; row is its index in the source. A preference has row, prompt, chosen, rejected.

A row that cannot be used is left out and counted, whatever the reason: one bad row never stops a run, unless all are bad.

Dims: B sequences, L prompt + response tokens, T response tokens.
"""

import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common import UserError
from common.store import as_messages

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


def is_messages(value) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)


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
    kept: list[dict] = []
    seen = 0
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
            clean = [
                self.own_words(text, row["prompt_text"])
                for text, row in zip(texts, rows, strict=True)
                if text is not None
            ]
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
