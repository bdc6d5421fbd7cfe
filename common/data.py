"""One row on its way to a batch: the prompt rendered by its template, the tokens of prompt and response, the padding.

A demonstration is a dict with row, prompt, response (and rejected, where the source has one); prompt is a text or a
list of messages {role, content}; row is its index in the source. A preference has row, prompt, chosen, rejected.

A row that cannot be used is left out and counted, whatever the reason: one bad row never stops a run, unless all are bad.

Dims: B sequences, L prompt + response tokens, T response tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common import UserError
from common.store import as_messages

PLAIN_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "  # RFT paper, App. C
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # of roles in a plain prompt of several turns


class UnusableRow(UserError):
    """A row that cannot be used: it is left out and counted, since real data sets have some."""


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
    turns = [m["content"] if len(prompt) == 1 else f"{NAMES.get(m['role'], m['role'])}: {m['content']}" for m in prompt]
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


def end_of_turn(tokenizer) -> int:
    """Id of the token that ends every response, trained and sampled: that of the template, else the tokenizer's EOS."""
    from extras.templates import read_frame

    return read_frame(tokenizer).end


def stop_at_end_of_turn(model, tokenizer) -> None:
    """Add the end of a turn to the generation config of a model to be saved: generate() then stops where the run did."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if (end := end_of_turn(tokenizer)) not in known:
        config.eos_token_id = [end, *(t for t in known if t is not None)]


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
    into=None,
) -> list[dict]:
    """Rows -> dicts with row, prompt, prompt_ids, response_ids, prompt_text, response_text (and rejected_ids, rejected_text).

    The ids of a prompt are those of its rendered text, which the sampler sees; the ids of a response are those of
    `respond`. The token that ends a turn ends every response once. A response has no end if it is cut at max_length, at
    longest_response (0: no such limit), or was cut by its sampler (columns `*_finished`). response_text is what is learned:
    without an end written out, and without what the prompt already says.

    Left out, with one warning of each kind: prompts longer than max_prompt_length; rows that the template refuses, whose
    prompt holds a control token, or whose response has no tokens of its own; with `distinct`, pairs whose responses have the
    same tokens. limit: stop when so many rows are kept (0: take all); later rows are not looked at. UserError if no row
    is left. render(tokenizer, prompt) -> text replaces render_prompt; `frame` is what it writes around a response.
    into: takes the rows, 1,024 at a time, in place of a list (extras/encoded.py).
    """
    from extras.left_out import LeftOut
    from extras.templates import Wording

    longest = min(max_prompt_length, max_length - 1)  # room for one token of response
    wording, left_out = Wording(tokenizer, frame), LeftOut(flag)
    kept, seen, most = [] if into is None else into, 0, len(rows) if into is None else 1024
    while seen < len(rows) and (not limit or len(kept) < limit):
        part = rows[seen : seen + min(limit - len(kept) if limit else len(rows), most)]
        seen += len(part)
        items = encode_prompts(part, tokenizer, render or render_prompt, wording, left_out)
        left_out.long += [(i["row"], len(i["prompt_ids"])) for i in items if len(i["prompt_ids"]) > longest]
        items = [item for item in items if len(item["prompt_ids"]) <= longest]
        for item in encode_responses(items, tokenizer, wording, left_out):
            room = max_length - len(item["prompt_ids"])
            room = min(room, longest_response or room)
            for name in [name for name in ("response_ids", "rejected_ids") if name in item]:
                left_out.responses += 1
                if len(item[name]) > room:
                    left_out.cut.append((item["row"], len(item[name]), room))
                    item[name] = item[name][:room]
            if distinct and item["response_ids"] == item["rejected_ids"]:
                left_out.same.append(item["row"])
            else:
                kept.append(item)
    left_out.warn(seen, len(kept), longest, limit)
    return kept


def encode_prompts(rows: list[dict], tokenizer, render: Callable, wording, left_out) -> list[dict]:
    """The rows that can be asked, with prompt_text and prompt_ids. A prompt that is rendered already stays as it is."""
    kept = []
    for row in rows:
        try:
            prompt, rendered = wording.prompt(row["prompt"], render)
            kept.append({**row, "prompt": prompt, "prompt_text": rendered or render(tokenizer, prompt)})
            left_out.rendered += [row["row"]] if rendered else []
        except UserError as error:
            left_out.leave_out(row, str(error))
    ids = tokenise_prompts(tokenizer, [row["prompt_text"] for row in kept])
    return [{**row, "prompt_ids": own} for row, own in zip(kept, ids, strict=True)]


def encode_responses(rows: list[dict], tokenizer, wording, left_out) -> list[dict]:
    """Rows of encode_prompts -> items of `encode`, not yet cut; rows without a usable response are left out."""
    items = [{k: row[k] for k in ("row", "prompt", "prompt_ids", "prompt_text")} for row in rows]
    for name, columns in (("response", ("response", "chosen")), ("rejected", ("rejected",))):
        texts = [next((row[c] for c in columns if row.get(c) is not None), None) for row in rows]
        given = [i for i, text in enumerate(texts) if text is not None]
        clean = [wording.response(texts[i], rows[i]["prompt_text"]) for i in given]
        finished = [rows[i].get(f"{name}_finished", True) for i in given]
        ids = respond(tokenizer, [rows[i]["prompt_text"] for i in given], clean, finished, wording.frame)
        for i, text, own, done in zip(given, clean, ids, finished, strict=True):
            items[i] |= {f"{name}_text": text, f"{name}_ids": own, **({} if done else {f"{name}_finished": False})}
    kept = []
    for item in items:
        if not all(text.strip() for name, text in item.items() if name in ("response_text", "rejected_text")):
            left_out.leave_out(item, "found a response that holds nothing but the template's words, expected text")
        elif None in item.values():
            left_out.leave_out(item, "found a response without tokens of its own after the prompt, expected some")
        else:
            kept.append(item)
    return kept


def respond(
    tokenizer, prompts: list[str], texts: list[str], finished: list[bool], frame: Frame | None = None
) -> list[list[int] | None]:
    """Token ids of responses to rendered prompts: those in tokenise(prompt + response) from the response on.

    A tokenizer may write the beginning of a text in another way than its middle: SentencePiece puts a space before it. None
    where no ids read as the response (extras/retokenise.py).
    finished: whether a response ends with the token that ends a turn; one that its sampler was cut in has nothing after its
    text. frame: what the template writes around a response, by default that of the tokenizer.
    """
    from extras.retokenise import mend_borders
    from extras.templates import read_frame

    frame = frame or read_frame(tokenizer)
    written = [
        (t if t.startswith(frame.lead) else frame.lead + t) + frame.trail * done if t else t
        for t, done in zip(texts, finished, strict=True)
    ]
    before = tokenise(tokenizer, prompts)
    whole = tokenise(tokenizer, [p + t for p, t in zip(prompts, written, strict=True)])
    ids = mend_borders(tokenizer, before, whole, written)
    return [None if own is None else own + [frame.end] * done for own, done in zip(ids, finished, strict=True)]


def tokenise(tokenizer, texts: list[str], split_special: bool = False) -> list[list[int]]:
    """Token ids of texts, nothing added; split_special: a control token that is written out is taken as text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=split_special)["input_ids"] if texts else []


def tokenise_prompts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Rendered prompts -> ids, with BOS before them where the tokenizer itself begins texts so and the template did not."""
    bos, ids = tokenizer.bos_token_id, tokenise(tokenizer, texts)
    if bos is None or tokenizer("a")["input_ids"][0] != bos:
        return ids
    return [p if t.startswith(tokenizer.bos_token) else [bos, *p] for p, t in zip(ids, texts, strict=True)]


# ---- batches ----
@dataclass
class Batch:
    """Right-padded [prompt; response; padding]. Masks come from lengths, never from token ids: pad = eos is safe."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L) 1 on prompt and response
    response_ids: Tensor  # (B, T) right-padded
    response_mask: Tensor  # (B, T) bool, True through EOS
    response_start: Tensor  # (B,) index of the first response token in input_ids
    prompt_of: Tensor | None = None  # (B,) equal numbers for equal prompts; None if all prompts differ

    def to(self, device) -> "Batch":
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: x.to(device) for name, x in given.items() if x is not None})


def collate(sequences: list[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """[(prompt_ids, response_ids)] -> Batch."""
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])
    lengths = torch.tensor([len(response) for _, response in sequences])
    seen: dict[tuple, int] = {}
    prompt_of = [seen.setdefault(tuple(prompt), len(seen)) for prompt, _ in sequences]
    return Batch(
        pad_right([[*prompt, *response] for prompt, response in sequences], pad_token_id),
        (torch.arange(int((starts + lengths).max())) < (starts + lengths)[:, None]).long(),
        pad_right([response for _, response in sequences], pad_token_id),
        torch.arange(int(lengths.max())) < lengths[:, None],
        starts,
        torch.tensor(prompt_of) if len(seen) < len(sequences) else None,
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
