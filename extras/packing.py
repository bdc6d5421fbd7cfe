"""Batches without padding: one row of all sequences, which flash attention keeps apart by their positions.

Dims: B sequences, L prompt + response tokens.
"""

from typing import Any

import torch
from torch import Tensor

from common.data import Batch


def padding_free(config) -> bool:
    """Return True if the model's attention can keep the sequences of one row apart by their positions.

    It must be flash attention, since others would need a mask of L x L. A model with other kinds of layers (convolution,
    linear attention) is excluded: these would carry the state of one sequence into the next.
    """
    if not (getattr(config, "_attn_implementation", None) or "").startswith("flash_attention"):
        return False
    from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


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
