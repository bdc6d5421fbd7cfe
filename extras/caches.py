"""Caches of transformers models: how a forward pass takes them, and how rows leave and join them.

Dims: B rows, H heads, P columns, one for each token, D size of a head, U prompts that differ, V vocabulary.
"""

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from common import UserError
from common.logprobs import language_model


def accepted(model, *names: str) -> list[str]:
    """Return those of the names that are parameters of the model's forward. The wrappers around the model are not asked."""
    parameters = inspect.signature(type(language_model(model)).forward).parameters
    other = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return [name for name in names if name in parameters or other]


def cache_of(model, out) -> dict[str, Any]:
    """Return the cache in a model's output, under the name by which its forward takes it. UserError if there is none."""
    for name in ("past_key_values", "cache_params"):
        if getattr(out, name, None) is not None:
            return {name: getattr(out, name)}
    raise UserError(
        f"--model: found {type(language_model(model)).__name__}, which keeps no KV cache, expected a model with one"
    )


def drops_rows(cache) -> bool:
    """Return True if rows can be dropped from a cache: its layers are transformers' own, or its class has a method for it."""
    from transformers.cache_utils import Cache

    if type(cache) is DynamicCache:
        return all(type(layer).__module__ == "transformers.cache_utils" for layer in cache.layers)
    return isinstance(cache, Cache) and type(cache).batch_select_indices is not Cache.batch_select_indices


def keep_rows(cache, index: torch.Tensor) -> None:
    """Keep only the rows `index` (B,) of a cache for which `drops_rows` is True. An index may repeat."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    if type(cache) is not DynamicCache:
        cache.batch_select_indices(index)
        return
    layers: list[Any] = cache.layers  # of either kind below
    for layer in layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):  # convolution or linear attention, also beside attention
            layer.reorder_cache(cast(torch.LongTensor, index))
        else:
            layer.batch_select_indices(index)


# ---- rows that are replaced one by one ----
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "local_attention_window", "attention_chunk_size")


def replaceable(model, cache: dict[str, Any], limit: int) -> bool:
    """Return True if Slots can hold the cache of this model, for rows of at most `limit` tokens.

    Each layer must be full attention, or have a window that no row outgrows. The model must take the positions of tokens from
    position_ids: it may neither count columns between tokens nor let the longest row of a batch change how it rotates others.
    """
    inner: Any = language_model(model)
    config, found = inner.config.get_text_config(), cache.get("past_key_values")
    if type(found) is not DynamicCache or "position_ids" not in inspect.signature(type(inner).forward).parameters:
        return False
    if any(kind in str(getattr(config, "rope_parameters", "")) for kind in ("dynamic", "longrope")):
        return False
    windows = [getattr(config, name, None) for name in WINDOWS]
    layers: list[Any] = found.layers
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None or layer.keys.dim() != 4:
            return False
        windows.append(getattr(layer, "sliding_window", None))
    return all(limit < w for w in windows if isinstance(w, int))


class Prefilled(NamedTuple):
    """Prompts after their forward pass, left-padded."""

    prompts: list[tuple]  # U
    logits: Tensor  # (U, V) of the first tokens of their answers
    layers: list[tuple[Tensor, Tensor]]  # keys and values (U, H, P, D) of each layer

    def row(self, u: int) -> "Prefilled":
        """Return a copy of one of the prompts, without padding."""
        n = len(self.prompts[u])
        layers = [(keys[u : u + 1, :, -n:].clone(), values[u : u + 1, :, -n:].clone()) for keys, values in self.layers]
        return Prefilled([self.prompts[u]], self.logits[u : u + 1].clone(), layers)


class Slots:
    """A cache in which any row can be replaced by another, and whose columns are not copied at every token.

    The tokens of a row are in the row's first columns, so that a column is a position. The columns after them are masked.
    """

    def __init__(self, rows: int, limit: int):
        """rows: the most at a time. limit: the most tokens in one of them."""
        self.rows, self.limit = rows, limit
        self.cache = DynamicCache()
        self.filled = 0  # rows in use, the first ones
        self.width = 0  # columns in use, with those that the present forward pass fills
        self.index = self.at = torch.empty(0)  # where that pass writes: row and column of each token

    def add(self, prefilled: Prefilled, index: list[int]) -> None:
        """Put the prompts `index` into the next rows. An index may repeat. Empties prefilled.layers, to save memory."""
        lengths = [len(prefilled.prompts[u]) for u in index]
        width, longest = prefilled.layers[0][0].shape[2], max(lengths)
        device = prefilled.logits.device
        padding = width - torch.tensor(lengths, device=device)[:, None]
        columns = (torch.arange(longest, device=device) + padding).clamp(max=width - 1)  # the last ones are masked
        rows, last = torch.tensor(index, device=device)[:, None], self.filled + len(index)
        for i in range(len(prefilled.layers)):
            read = prefilled.layers.pop(0)
            if i == len(self.cache.layers):
                self.cache.layers.append(SlotLayer(self, *read))
            layer: Any = self.cache.layers[i]
            for held, states in zip(layer.held, read, strict=True):
                held[self.filled : last, :, :longest] = states[rows, :, columns].transpose(1, 2)
        self.filled, self.width = last, max(self.width, longest)

    def keep(self, keep: list[int]) -> list[int]:
        """Drop the other rows. The last rows take the places of those that are dropped. Returns the rows in their new order."""
        self.filled = len(keep)
        order, moved = list(range(self.filled)), [j for j in keep if j >= self.filled]
        places = sorted(set(order) - set(keep))
        for place, row in zip(places, moved, strict=True):
            order[place] = row
        for layer in self.cache.layers if moved else ():
            for held in cast(SlotLayer, layer).held:
                held[places, :, : self.width] = held[moved, :, : self.width]
        return order

    def begin(self, lengths: list[int], at: Tensor) -> None:
        """Say where the next forward pass writes. lengths: tokens of each row with the new one. at: (B,) its columns."""
        self.width, self.at, self.index = max(lengths), at, torch.arange(self.filled, device=at.device)
        for layer in self.cache.layers:
            cast(SlotLayer, layer).columns = self.width - 1


class SlotLayer(DynamicLayer):
    """Keys and values of one layer of Slots, with columns to spare."""

    def __init__(self, slots: Slots, keys: Tensor, values: Tensor):
        super().__init__()
        self.slots, self.is_initialized, self.columns = slots, True, 0
        self.held = [
            self.enlarged(x.new_empty(slots.rows, x.shape[1], 0, x.shape[3]), x.shape[2]) for x in (keys, values)
        ]

    def enlarged(self, held: Tensor, columns: int) -> Tensor:
        """Return `held` (B, H, P, D) with room for so many columns, and some to spare if a row can fill them."""
        columns = max(columns, min(self.slots.limit, columns + max(32, columns // 4)))
        out = held.new_zeros(
            *held.shape[:2], columns, held.shape[3]
        )  # masked values count 0 times, so they may not be NaN
        out[:, :, : held.shape[2]] = held
        return out

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, H, 1, D) of one token per row -> those of all tokens, (B, H, columns, D), as views."""
        slots = self.slots
        self.columns = slots.width
        for i, states in enumerate((key_states, value_states)):
            if self.columns > self.held[i].shape[2]:
                self.held[i] = self.enlarged(self.held[i], self.columns)
            self.held[i][slots.index, :, slots.at] = states[:, :, 0].to(self.held[i].dtype)
        self.keys, self.values = (x[: slots.filled, :, : self.columns] for x in self.held)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the columns that are in use."""
        return self.columns
