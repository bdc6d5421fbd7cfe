"""Score response tokens where the language-model head stands, so that logits of other tokens are never made.

It computes what common/logprobs.py::plain_logprobs does, with less memory: the logits of a whole batch are B x L x V numbers.

Dims: B sequences, L prompt + response tokens, V vocabulary, N response tokens in the batch, H hidden size.
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
from common.logprobs import language_model
from extras import token_scores

CHUNK = 2**26  # logits made at a time; 256 MiB in float32
PROBED = 8  # positions at which the first forward pass compares a model's logits with its head's


class Head(NamedTuple):
    """Two facts about a language-model head, seen in its first forward pass: how many logits it makes, and how the model
    changes them afterwards."""

    vocabulary: int
    change: Callable[[Tensor], Tensor] | None  # (..., V) -> (..., V); None where it is no known function


HEADS: weakref.WeakKeyDictionary[torch.nn.Module, Head] = weakref.WeakKeyDictionary()


def score_positions(model, inputs: dict, where: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Score the tokens that follow the positions `where` (N,) of the flattened output -> (3, N), as score_tokens does.

    The model is called with all its wrappers, so that the hooks of engines run. For this one call its head is replaced by one
    that returns scores (3, N) in the place of logits. Soft-capped and scaled logits are scored as the model returns them. If a
    model changes its head's logits in an unknown way, the head returns the logits of these N positions, and the output of the
    model is scored. The numbers are the same, but all N x V logits exist at once.

    targets: (N,) token ids. UserError on a model without a language-model head.
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
        return token_scores.score(out[0], targets, temperature)
    # A model that caps or scales has done so to the scores, so they are taken from before it. The zero term keeps its output
    # in the graph, because engines start the backward pass there.
    return out if change is unchanged else made[0] + 0.0 * out.sum()


def score_hidden(head: Callable, hidden: Tensor, targets: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """Return score_tokens of head(hidden) -> (3, N), with CHUNK logits at a time.

    hidden: (N, H). With more than one chunk, the backward pass computes the logits of each chunk again.
    """
    size = max(1, CHUNK // vocabulary)

    def score(part: Tensor, ids: Tensor) -> Tensor:
        return token_scores.score(head(part), ids, temperature)

    if len(targets) <= size:
        return score(hidden, targets)
    again = torch.is_grad_enabled()
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat(
        [checkpoint(score, *p, use_reentrant=False, preserve_rng_state=False) if again else score(*p) for p in parts],
        -1,
    )


@contextlib.contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Give the module another forward inside the context. Its hooks still run; an engine's hooks may gather its weights."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def first_scores(model, inner, head, inputs: dict, where: Tensor, targets: Tensor, temperature: float) -> Tensor | None:
    """Run the first pass through a head, and store in HEADS how the model changes its logits.

    Returns the scores (3, N) if the model returns its head's logits unchanged, else None. To see the change, the head returns
    the logits of a few positions, and below them the scores in rows of the same length. UserError on a model whose logits do
    not come from its head position by position.
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


def unchanged(logits: Tensor) -> Tensor:
    """The change that most models make: none."""
    return logits


def soft_cap(cap: float) -> Callable[[Tensor], Tensor]:
    """Return the change of models with soft-capped logits."""
    return lambda logits: torch.tanh(logits / cap) * cap


def times(scale: float) -> Callable[[Tensor], Tensor]:
    """Return the change of models that multiply their logits."""
    return lambda logits: logits * scale


def over(scale: float) -> Callable[[Tensor], Tensor]:
    """Return the change of models that divide their logits."""
    return lambda logits: logits / scale


def known_changes(config) -> list[Callable[[Tensor], Tensor]]:
    """List the changes that models make to their head's logits: none, and soft-capping or scaling by a number in `config`."""

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
