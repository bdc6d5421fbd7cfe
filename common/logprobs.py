"""Log-probabilities of responses, and masked reductions. The next-token shift happens here and nowhere else.

Dims: B sequences, L prompt + response tokens, T response tokens, V vocabulary, N response tokens in the batch, H hidden size.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common import UserError
from common.data import Batch

CHUNK = 2**26  # logits made at a time; 256 MiB in float32
PROBED = 8  # positions on which a model is seen to change its head's logits
LIMITS = {  # backend -> mean |log pi (scorer) - log pi (sampler)| per token, nats at temperature 1, that rounding can explain
    "hf": {"float32": 1e-4, "bfloat16": 0.05},  # the same kernels: 1e-6 was seen; bf16 numbers near 32 are 0.125 apart
    "vllm": {"float32": 1e-3, "bfloat16": 0.05},  # kernels of its own, which may multiply in TF32
}
CHECKED = (8, 64)  # answers, and tokens of each, of which the sampler's log-probs are compared with the scorer's


class ResponseScores(NamedTuple):
    """What one forward pass says about the responses. Zero outside the response mask."""

    logprobs: Tensor  # (B, T) log pi(y_t | x, y_<t), nats, carries gradient
    entropy: Tensor  # (B, T) of the next-token distribution, nats, no gradient
    correct: Tensor  # (B, T) 1.0 where y_t was the most likely token, no gradient


class Head(NamedTuple):
    """A language-model head as it was seen to work: how many logits it makes, and how its model changes them afterwards."""

    vocabulary: int
    change: Callable[[Tensor], Tensor] | None  # (..., V) -> (..., V); None where it is no known function


HEADS: weakref.WeakKeyDictionary[torch.nn.Module, Head] = weakref.WeakKeyDictionary()


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (B, T) over True positions of mask (B, T) -> (B,). Whatever stands elsewhere, NaN too, has no effect."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over all True positions of mask, both (B, T) -> (). NaN if there is none."""
    return masked_sum(x, mask).sum() / mask.sum()


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32 (float64 stays) divided by the sampling temperature: what sampling and scoring share."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def score_tokens(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob, entropy and correctness of each token -> (3, N); gradient through the first row.

    logits: (N, V), the i-th predicts targets[i]. targets: (N,).
    """
    logp = temper(logits, temperature).log_softmax(-1)
    chosen = -F.nll_loss(logp, targets, reduction="none")
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
        correct = logits.argmax(-1) == targets
    return torch.stack([chosen, entropy, correct.to(logp.dtype)])


def score_hidden(head: Callable, hidden: Tensor, targets: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """score_tokens of head(hidden) -> (3, N), CHUNK logits at a time.

    hidden: (N, H). Where there is more than one chunk, the backward pass makes each chunk's logits again.
    """
    size = max(1, CHUNK // vocabulary)

    def score(part: Tensor, ids: Tensor) -> Tensor:
        return score_tokens(head(part), ids, temperature)

    if len(targets) <= size:
        return score(hidden, targets)
    again = torch.is_grad_enabled()
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat(
        [checkpoint(score, *p, use_reentrant=False, preserve_rng_state=False) if again else score(*p) for p in parts],
        -1,
    )


def language_model(model) -> torch.nn.Module:
    """The transformers model inside the wrappers of accelerate, its engines, and peft."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """The module with another forward; its hooks, which may gather its weights, run as ever."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def padding_free(config) -> bool:
    """True where attention keeps sequences of one row apart by their positions, without a mask of L x L.

    A layer of another kind (convolution, linear attention) would carry the state of one sequence into the next.
    """
    if not (getattr(config, "_attn_implementation", None) or "").startswith("flash_attention"):
        return False
    from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers)


def model_inputs(config, batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """(inputs of a forward pass, (B,) where each sequence begins in its flattened output).

    Right-padded rows; or, where attention supports it, one row of all sequences without padding, positions counted anew in
    each, with what flash attention is to know of them, as DataCollatorWithFlattening of transformers makes it.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    if not padding_free(config):
        return {"input_ids": ids, "attention_mask": mask}, torch.arange(len(ids), device=ids.device) * ids.shape[1]
    kept, lengths = mask.bool(), mask.sum(-1)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begin = lengths.cumsum(0) - lengths
    bounds = torch.cat([begin, lengths.sum()[None]]).to(torch.int32)  # (B + 1,)
    limits = {
        f"{name}_{part}": x for part in "qk" for name, x in (("cu_seq_lens", bounds), ("max_length", ids.shape[1]))
    }
    return {"input_ids": ids[kept][None], "position_ids": positions[kept][None], **limits}, begin


def unchanged(logits: Tensor) -> Tensor:
    return logits


def soft_cap(cap: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: torch.tanh(logits / cap) * cap


def times(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits * scale


def over(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits / scale


def known_changes(config) -> list[Callable[[Tensor], Tensor]]:
    """The changes that models make to their head's logits by a number in their configuration: none, soft-capping, or scaling."""

    def number(name: str) -> float | None:
        return getattr(config, name, None) or getattr(getattr(config, "text_config", None), name, None)

    found: list[Callable[[Tensor], Tensor]] = [unchanged]
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if cap := number(name):
            found.append(soft_cap(cap))
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if scale := number(name):
            found += [times(scale), over(scale)]
    return found


def first_scores(model, inner, head, inputs: dict, where: Tensor, targets: Tensor, temperature: float) -> Tensor | None:
    """The first pass through a head: score_positions' scores if the model returns its head's logits as they are, else None.

    What the model makes of them is kept in HEADS. To see it, the head returns the logits of a few positions, and below them
    the scores in rows of the same length. UserError on a model whose logits are not made from its head's, row by row.
    """
    make_logits, made, n = head.forward, [], len(where)

    def probe(hidden: Tensor) -> Tensor:
        kept = hidden.flatten(0, 1).index_select(0, where)
        few = make_logits(kept[:PROBED].detach()).detach()  # (few, V)
        scores = score_hidden(make_logits, kept, targets, few.shape[-1], temperature).flatten()
        rows = F.pad(scores, (0, -len(scores) % few.shape[-1])).view(-1, few.shape[-1])
        made.append((few.to(rows.dtype), torch.cat([few.to(rows.dtype), rows])[None]))
        return made[0][1]

    with replaced_forward(head, probe):
        found = model(**inputs, use_cache=False).logits
    if len(made) != 1 or found.shape[:-1] != made[0][1].shape[:-1]:
        raise UserError(
            f"--model: found {type(inner).__name__}, whose logits are not made by its language-model head position by position;"
            " expected a causal model that makes them so"
        )
    few, given = made[0]
    seen = found[0, : len(few)].detach().nan_to_num()
    same_shape = found.shape == given.shape and found.dtype == given.dtype
    changes = [c for c in known_changes(inner.config) if same_shape and torch.equal(c(few).nan_to_num(), seen)]
    change, plain = changes[0] if changes else None, False
    if change is unchanged:
        plain = torch.equal(found.nan_to_num(), given.nan_to_num())
        change = unchanged if plain else None
    HEADS[head] = Head(few.shape[-1], change)
    return found[0, len(few) :].flatten()[: 3 * n].view(3, n) if plain else None


def score_positions(model, inputs: dict, where: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """score_tokens of one forward pass -> (3, N), for the tokens that follow the positions `where` of its flattened output.

    The model is called, wrapped as it is, with a language-model head that scores these hidden states where it stands, so that
    logits of other tokens, or of the whole batch, are never made. Soft-capped and scaled logits are scored as the model
    returns them. Where a model changes its head's logits in a way that is not known, the head returns the logits of these
    positions and what the model makes of them is scored: the same numbers, all N at once. UserError on a model without a head.
    """
    inner: Any = language_model(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise UserError(f"--model: found {type(inner).__name__} without a language-model head, expected a causal model")
    if head not in HEADS:
        scores = first_scores(model, inner, head, inputs, where, targets, temperature)
        if scores is not None:
            return scores
    make_logits, (vocabulary, change), made = head.forward, HEADS[head], []

    def score(hidden: Tensor) -> Tensor:  # (B, L, H), or (1, sum of lengths, H)
        kept = hidden.flatten(0, 1).index_select(0, where)
        if change is None:
            return make_logits(kept)[None]
        made.append(score_hidden(lambda part: change(make_logits(part)), kept, targets, vocabulary, temperature))
        return made[0]

    with replaced_forward(head, score):
        out = model(**inputs, use_cache=False).logits
    if change is None:
        return score_tokens(out[0], targets, temperature)
    # a model that caps or scales did so to the scores: they are taken before it, and tied to its output, where engines
    # wait for the backward pass
    return out if change is unchanged else made[0] + 0.0 * out.sum()


def response_logprobs(model, batch: Batch, temperature: float = 1.0) -> ResponseScores:
    """Score the responses of a batch under a causal language model. Gradient flows through `logprobs`."""
    mask = batch.response_mask
    inputs, begin = model_inputs(language_model(model).config, batch)
    row, t = mask.nonzero(as_tuple=True)  # (N,), (N,)
    where = (begin + batch.response_start - 1)[row] + t  # what predicts token t stands one before it
    scores = score_positions(model, inputs, where, batch.response_ids[mask], temperature)

    def scatter(values: Tensor) -> Tensor:  # (N,) -> (B, T)
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    return ResponseScores(scatter(scores[0]), *map(scatter, scores[1:].detach()))
