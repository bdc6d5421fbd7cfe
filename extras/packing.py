"""Where a batch's tokens stand in a forward pass: padded rows, one row without padding, or rows that share a prompt.

Dims: B sequences, L prompt + response tokens, T response tokens; R packed rows of W tokens each.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data import Batch

WORTH = 0.95  # packed rows must take less than this part of the work: making their mask takes time that is not counted


class Limits(NamedTuple):
    """What packed rows of a model that shares prompts depend on (extras/shared_prompts.py)."""

    width: int  # hidden size
    tokens: float  # largest W; inf where there is no limit


class Inputs(NamedTuple):
    """The inputs of a forward pass over a batch, and what to read from its output.

    The two indices count positions of the flattened output. Outside the response mask `before` holds 0.
    """

    inputs: dict[str, Any]
    before: Tensor  # (B, T) the position that predicts response token t
    last: Tensor  # (B,) the position of the last response token


def model_inputs(model, batch: Batch) -> Inputs:
    """Return the inputs of a forward pass of `model`, which is a transformers model without wrappers.

    They are one row without padding where the model's attention supports that. They are rows of [prompt; answer; answer; ...]
    where the model shares prompts, the batch has equal ones, and this is less work. Otherwise they are right-padded rows.
    """
    if padding_free(model.config):
        inputs, begin = packed_inputs(batch)
        return separate(batch, inputs, begin)
    limits = getattr(model, "shared_prompts", None)
    if limits and batch.prompt_of is not None and (rows := cheapest_rows(batch, limits)):
        return shared_inputs(model, batch, rows)
    return padded_inputs(batch)


def padded_inputs(batch: Batch) -> Inputs:
    """Return the inputs of a forward pass over right-padded rows."""
    rows, length = batch.input_ids.shape
    begin = torch.arange(rows, device=batch.input_ids.device) * length
    return separate(batch, {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, begin)


def separate(batch: Batch, inputs: dict[str, Any], begin: Tensor) -> Inputs:
    """Say what to read of rows that each hold one sequence. begin: (B,) its first position in the flattened output."""
    first = begin + batch.response_start
    return Inputs(inputs, before_tokens(batch, first - 1, first), first + batch.response_mask.sum(-1) - 1)


def before_tokens(batch: Batch, prompt_end: Tensor, first: Tensor) -> Tensor:
    """Return Inputs.before from the positions (B,) of each prompt's last token and of each first response token."""
    t = torch.arange(batch.response_mask.shape[1], device=first.device)
    before = torch.where(t == 0, prompt_end[:, None], first[:, None] - 1 + t)  # (B, T)
    return torch.where(batch.response_mask, before, 0)


# ---- one row without padding ----
def padding_free(config) -> bool:
    """Return True if the model's attention can keep the sequences of one row apart by their positions.

    It must be flash attention, since others would need a mask of L x L. A model with other kinds of layers (convolution,
    linear attention) is excluded: these would carry the state of one sequence into the next.
    """
    if not (getattr(config, "_attn_implementation", None) or "").startswith("flash_attention"):
        return False
    return not has_state_layers(config)


def has_state_layers(config) -> bool:
    """Return True if some layers carry a state from token to token, as convolution and linear attention do."""
    from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def packed_inputs(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """Return the inputs of a forward pass over one row of all tokens, and the index (B,) where each sequence begins in it.

    Positions are counted anew in each sequence. Flash attention also gets the bounds of the sequences, in the form that
    DataCollatorWithFlattening of transformers gives them.
    """
    ids, kept, lengths = batch.input_ids, batch.attention_mask.bool(), batch.attention_mask.sum(-1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begin = lengths.cumsum(0) - lengths
    bounds = torch.cat([begin, lengths.sum()[None]]).to(torch.int32)  # (B + 1,)
    limits = {
        f"{name}_{part}": x for part in "qk" for name, x in (("cu_seq_lens", bounds), ("max_length", ids.shape[1]))
    }
    return {"input_ids": ids[kept][None], "position_ids": positions[kept][None], **limits}, begin


# ---- rows that share a prompt ----
class Rows(NamedTuple):
    """Packed rows [prompt; answer; answer; ...] for the sequences of a batch."""

    row: list[int]  # (B,) the row that holds the answer
    first: list[int]  # (B,) where the answer begins in its row
    leaders: list[int]  # (R,) a sequence with the prompt of the row
    tokens: int  # W

    @classmethod
    def of(cls, rows: list[list[int]], starts: list[int], lengths: list[int]) -> "Rows":
        """Place the answers. rows: the sequences of each row; starts and lengths (B,): tokens of prompts and answers."""
        row, first, tokens = [0] * len(starts), [0] * len(starts), 0
        for r, members in enumerate(rows):
            end = starts[members[0]]
            for i in members:
                row[i], first[i] = r, end
                end += lengths[i]
            tokens = max(tokens, end)
        return cls(row, first, [members[0] for members in rows], tokens)


def cheapest_rows(batch: Batch, limits: Limits) -> Rows | None:
    """Return the packed rows with the least work, or None if padded rows are better.

    A row holds at most k answers to one prompt, and k is chosen. The work is that of a layer in units of 4 width operations:
    24 width^2 for the matrices, which hold 12 width^2 numbers, and 4 width for each pair of tokens in attention. Attention of
    padded rows is not counted, since packed rows also need memory for their mask.
    """
    assert batch.prompt_of is not None
    groups: dict[int, list[int]] = {}
    prompts, starts, lengths = torch.stack(
        [batch.prompt_of, batch.response_start, batch.response_mask.sum(-1)]
    ).tolist()
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    most = max(map(len, groups.values()))
    best, least = None, WORTH * batch.input_ids.numel() * 6 * limits.width
    for k in {*(2**e for e in range(1, most.bit_length())), most}:
        rows = Rows.of([row for group in groups.values() for row in split(group, k)], starts, lengths)
        work = len(rows.leaders) * rows.tokens * (6 * limits.width + rows.tokens)
        if rows.tokens <= limits.tokens and work < least:
            best, least = rows, work
    return best


def split(group: list[int], most: int) -> Iterator[list[int]]:
    """Split a list into parts of at most `most` items, with sizes as even as possible."""
    parts = math.ceil(len(group) / most)
    return (group[len(group) * p // parts : len(group) * (p + 1) // parts] for p in range(parts))


def shared_inputs(model, batch: Batch, rows: Rows) -> Inputs:
    """Return the inputs of a forward pass over rows of [prompt; answer; answer; ...], with a mask (R, 1, W, W).

    Positions of an answer go on from the end of the prompt. Padding has position 0, which every model has.
    """
    device, mask, start = batch.input_ids.device, batch.response_mask, batch.response_start
    row, first = torch.tensor([rows.row, rows.first], device=device)  # (B,), (B,)
    leaders = torch.tensor(rows.leaders, device=device)
    place = torch.arange(rows.tokens, device=device)
    t = torch.arange(mask.shape[1], device=device)
    is_prompt = place < start[leaders, None]  # (R, W)
    answers = row[:, None].expand_as(mask)[mask], (first[:, None] + t)[mask]  # (N,), (N,) of each answer token

    def filled(prompt: Tensor, answer: Tensor) -> Tensor:  # (R, W) and (B, T) -> (R, W), 0 elsewhere
        return torch.where(is_prompt, prompt, 0).index_put(answers, answer.expand_as(mask)[mask])

    prompts = pad_or_cut(batch.input_ids[leaders], rows.tokens)
    owner = filled(torch.ones_like(prompts), torch.arange(2, len(row) + 2, device=device)[:, None])
    inputs = {
        "input_ids": filled(prompts, batch.response_ids),
        "position_ids": filled(place.expand_as(prompts), start[:, None] + t),
        "attention_mask": attention_mask(model, owner),
    }
    first = row * rows.tokens + first
    before = before_tokens(batch, row * rows.tokens + start - 1, first)
    return Inputs(inputs, before, first + mask.sum(-1) - 1)


def pad_or_cut(ids: Tensor, width: int) -> Tensor:
    """Give rows of ids (R, L) this width."""
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]))


def attention_mask(model, owner: Tensor):
    """Return the mask of packed rows, in the form that transformers makes for the model's attention.

    owner: (R, W) whose token it is: 0 padding, 1 the prompt's, from 2 on an answer's. A token sees those before it, and itself,
    that are the prompt's or its own answer's.
    """
    if model.config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(row, head, query, key):
            known = owner[row, key]
            return (query >= key) & ((known == 1) | (known == owner[row, query]))

        rows, tokens = owner.shape
        return create_block_mask(sees, rows, None, tokens, tokens, device=owner.device)
    mine = (owner[:, None] == 1) | (owner[:, None] == owner[..., None])  # (R, W, W): query, key
    mask = mine.tril()[:, None]
    if model.config._attn_implementation == "sdpa":
        return mask
    least = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, least)
