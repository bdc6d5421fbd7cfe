"""Caches of transformers models: how a forward pass takes them, and how rows are dropped from them."""

import inspect
from typing import Any, cast

import torch

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
    from transformers import DynamicCache
    from transformers.cache_utils import Cache

    if type(cache) is DynamicCache:
        return all(type(layer).__module__ == "transformers.cache_utils" for layer in cache.layers)
    return isinstance(cache, Cache) and type(cache).batch_select_indices is not Cache.batch_select_indices


def keep_rows(cache, index: torch.Tensor) -> None:
    """Keep only the rows `index` (rows,) of a cache for which `drops_rows` is True."""
    from transformers import DynamicCache
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
