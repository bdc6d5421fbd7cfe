"""Steps of the sampler `hf`: which prompts are being answered, the forward passes over them, and how a token is chosen.

Dims: B rows of a forward pass, P prompt tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from common.logprobs import temper
from extras import caches

BLOCK = 256  # words whose probabilities are summed at once
CHUNK = 2**18  # probabilities that a CPU handles at once, so that they stay in its own cache


def joining(batch_size: int) -> int:
    """Return how many prompts join a batch at a time: a compromise between passes over few prompts and empty places."""
    return max(1, batch_size // 8)


class Decoder:
    """Forward passes over prompts and their answers, for at most `batch_size` answers at a time, the longest prompts first.

    A row that has ended leaves the batch. Where the cache allows it (caches.replaceable), waiting prompts take the free places
    as soon as an eighth of the batch is free. Elsewhere the next prompts start when the whole batch has ended. Prompts that are
    equal are read once.
    """

    def __init__(self, model, prompts: list[list[int]], batch_size: int, max_new_tokens: int):
        self.model, self.prompts, self.batch_size, self.max_new_tokens = model, prompts, batch_size, max_new_tokens
        first: dict[tuple, int] = {}
        names = [first.setdefault(tuple(x), i) for i, x in enumerate(prompts)]  # equal prompts become neighbours
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), names[i], i), reverse=True)
        self.rows: list[int] = []  # the prompts that are being answered, in the order of the cache
        self.ended: set[int] = set()  # rows of a cache that cannot drop them stay there
        self.slots: caches.Slots | None = None
        self.cache: dict[str, Any] = {}  # under the name by which the model takes it
        self.width = 0  # columns of the cache
        self.last: caches.Prefilled | None = None  # the prompt that started last, if it waits for more answers
        self.accepted = caches.accepted(model, "position_ids", "logits_to_keep")

    @property
    def unfinished(self) -> bool:
        return bool(self.rows or self.waiting)

    def next_logits(self, responses: list[list[int]]) -> tuple[list[int], Tensor]:
        """Return (rows, logits (B, V)) of next tokens, for the prompts that start now or else for all rows being answered.

        responses: the tokens of every answer so far.
        """
        free = self.batch_size - len(self.rows)
        wanted = self.batch_size if not self.rows else joining(self.batch_size) if self.slots else 0
        count = min(len(self.waiting), wanted)
        if not 0 < count <= free:
            return self.rows, self._step(responses)
        started = [self.waiting.pop() for _ in range(count)]
        logits = self._start([tuple(self.prompts[i]) for i in started])
        self.rows = self.rows + started
        return started, logits

    def drop(self, ended: list[int]) -> None:
        """Take the rows `ended` out of the batch, and out of the cache where that is possible."""
        self.ended.update(ended)
        keep = [j for j, i in enumerate(self.rows) if i not in self.ended]
        if not keep:
            self.rows, self.cache, self.slots = [], {}, None
        elif len(keep) < len(self.rows):
            if self.slots:
                keep = self.slots.keep(keep)
            elif not self._select(keep):
                return
            self.rows = [self.rows[j] for j in keep]

    def _select(self, index: list[int]) -> bool:
        """Keep only the rows `index` of the cache, some of them several times. Return False if the cache cannot do it."""
        able = all(caches.drops_rows(c) for c in self.cache.values())
        for c in self.cache.values() if able else ():
            caches.keep_rows(c, torch.tensor(index, device=self.model.device))
        return able

    def _start(self, asked: list[tuple]) -> Tensor:
        """Read prompts that join the rows -> logits (B, V) of their first tokens."""
        limit = len(asked[0]) + self.max_new_tokens - 1  # tokens that a row can hold: the longest prompts come first
        again = asked.count(asked[0]) if self.last and self.last.prompts == asked[:1] else 0
        parts = [(self.last._replace(layers=[*self.last.layers]), [0] * again)] if self.last and again else []
        if fresh := list(dict.fromkeys(asked[again:])):
            index = [fresh.index(x) for x in asked[again:]]
            logits, cache = self._read(fresh)
            if not (again or self.slots or caches.replaceable(self.model, cache, limit)):
                self.cache = cache
                if len(fresh) == len(asked) or self._select(index):
                    return logits[index]
                logits, self.cache = self._read(asked)  # a cache that cannot drop rows cannot repeat them either
                return logits
            layers = [(layer.keys, layer.values) for layer in cache.pop("past_key_values").layers]
            parts.append((caches.Prefilled(fresh, logits, layers), index))
        if not self.slots:
            self.slots = caches.Slots(min(self.batch_size, len(asked) + len(self.waiting)), limit)
            self.cache = {"past_key_values": self.slots.cache}
        first = torch.cat([prefilled.logits[index] for prefilled, index in parts])
        more = self.waiting and tuple(self.prompts[self.waiting[-1]]) == asked[-1]
        self.last = parts[-1][0].row(parts[-1][1][-1]) if more else None
        for prefilled, index in parts:
            self.slots.add(prefilled, index)
        return first

    def _read(self, prompts: list[tuple]) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits (B, V) after each prompt, and the cache of the prompts, left-padded."""
        self.width = max(map(len, prompts))
        ids = torch.tensor([[0] * (self.width - len(x)) + list(x) for x in prompts], device=self.model.device)
        lengths = torch.tensor([[len(x)] for x in prompts], device=self.model.device)
        positions = torch.arange(self.width, device=ids.device) - (self.width - lengths)  # (B, P)
        return self._forward(ids, positions.clamp(min=0), positions >= 0, {})

    def _step(self, responses: list[list[int]]) -> Tensor:
        """Feed the last token of every row -> logits (B, V) of the next ones."""
        lengths = [len(self.prompts[i]) + len(responses[i]) for i in self.rows]
        fed = [[responses[i][-1] for i in self.rows], lengths]
        ids, held = torch.tensor(fed, device=self.model.device)[..., None]  # (B, 1) each
        if self.slots:
            self.slots.begin(lengths, held[:, 0] - 1)
            self.width = self.slots.width
            mask = None if min(lengths) == self.width else torch.arange(self.width, device=ids.device) < held
        else:
            self.width += 1
            mask = torch.arange(self.width, device=ids.device) >= self.width - held
        if "cache_params" in self.cache:
            mask = None  # a state-space model's state has no padding in it
        logits, self.cache = self._forward(ids, held - 1, mask, self.cache)
        return logits

    def _forward(self, ids, positions, mask: Tensor | None, cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        given = {"position_ids": positions, "logits_to_keep": 1}
        given = {name: given[name] for name in self.accepted} | cache
        mask = None if mask is None else mask.long()
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **given)
        return out.logits[:, -1], caches.cache_of(self.model, out)


def choose_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return tokens (B,) and their log-probs (B,), float64 nats, from logits (B, V) and one uniform (B,) in [0, 1) for each.

    The tokens are those of common.generation.inverse_cdf at this temperature, or the most likely ones if it is 0.
    """
    # A CPU takes a few rows at a time: to write and read whole (B, V) arrays in float64 takes it longer than the rest.
    rows = len(logits) if logits.is_cuda else max(1, CHUNK // logits.shape[-1])
    parts = [_choose(*part, temperature) for part in zip(logits.split(rows), uniforms.split(rows), strict=True)]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _choose(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scored = temper(logits, temperature or 1.0)
    top = scored.amax(-1, keepdim=True)
    n, words = -(-scored.shape[-1] // BLOCK), scored.shape[-1]
    weights = torch.empty(len(scored), n * BLOCK, dtype=torch.float64, device=scored.device)
    weights[:, :words].copy_(scored).sub_(top).exp_()
    weights[:, words:] = 0
    blocks = weights.view(-1, n, BLOCK)
    upto = blocks.sum(-1).cumsum(-1)  # (B, n)
    total = upto[:, -1:]
    if temperature:
        # First the block, then the word inside it. Both are the first whose sum exceeds a target that is below all of it, so a
        # word of probability 0 is never taken. The clamps keep NaN within the vocabulary.
        target = _below(uniforms.double()[:, None] * total, total)
        block = torch.searchsorted(upto, target, right=True).clamp(max=n - 1)  # (B, 1)
        before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)), 0.0)
        inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)  # (B, BLOCK)
        word = torch.searchsorted(inside, _below(target - before, inside[:, -1:]), right=True)
        token = (block * BLOCK + word).clamp(max=words - 1)
    else:
        token = logits.argmax(-1, keepdim=True)
    logprobs = scored.gather(1, token).double() - top - total.log()
    return token[:, 0], logprobs[:, 0]


def _below(x: Tensor, bound: Tensor) -> Tensor:
    """The smaller of x and the largest number below `bound`."""
    return torch.minimum(x, torch.nextafter(bound, torch.zeros_like(bound)))
