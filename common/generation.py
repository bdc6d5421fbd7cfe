"""Samplers: they turn prompts into responses. Token ids in, token ids out: text is never tokenised twice.

Dims: B prompts of a batch, P prompt tokens, V vocabulary.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from common.data import end_of_turn
from common.engine import evaluating
from common.logprobs import temper


@dataclass
class Rollout:
    """Responses to N prompts, in the order the prompts came."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # EOS included where one was sampled
    finished: list[bool]  # False: cut at max_new_tokens, no EOS
    logprobs: list[list[float]]  # of each response token under the sampling distribution, nats


class Sampler(Protocol):
    """A sampler has the model whose answers it samples, and this one method."""

    def sample(
        self,
        prompts: list[list[int]],
        row_ids: list[int],
        seed: int,
        temperature: float = 1.0,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Rollout:
        """Sample one response to each prompt from the whole distribution, without top-k or top-p.

        row_ids: a number for each prompt; its response is a function of (seed, row id) and the model. temperature: 0 is greedy.
        advance(n): called whenever n more responses are done. All processes call `sample` equally often, with their own prompts.
        """
        ...


def make_generator(run, model, tokenizer) -> Sampler:
    """Return the sampler of `model` that --generation names: `hf` or `vllm`."""
    if run.args.generation == "vllm":
        from extras.vllm_engine import VllmGenerator

        return VllmGenerator(run, model, tokenizer)
    from extras.agreement import check_agreement

    generator = Generator(model, tokenizer, run.args.per_device_eval_batch_size, run.args.max_new_tokens)
    generator.check = lambda rollout, temperature: check_agreement(run, model, rollout, temperature)
    return generator


def stop_tokens(model, tokenizer) -> set[int]:
    """Return the token ids that end a response: the end of a turn, the tokenizer's EOS and those of the generation config.

    Warns if the template ends a turn with a token that is neither of the other two, as happens with base models.
    """
    eos = model.generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    end = end_of_turn(tokenizer)
    if end not in known | {None}:
        turn, *others = tokenizer.convert_ids_to_tokens([end, *sorted(known)])
        found = f"found {turn} as the end of a turn in the chat template, but {', '.join(others)} as the model's EOS"
        warnings.warn(f"--model: {found}: {turn} ends every demonstration, and either ends an answer", stacklevel=2)
    return (known | {end}) - {None}


class Generator:
    """Sampler `hf`: forward passes of transformers with a KV cache. It runs anywhere, also on a CPU.

    Prompts are sorted by length and left-padded in batches. A row that has ended leaves the batch and the cache.
    """

    def __init__(self, model, tokenizer, batch_size: int, max_new_tokens: int):
        self.model, self.batch_size, self.max_new_tokens = model, batch_size, max_new_tokens
        self.check: Callable[[Rollout, float], None] | None = None  # called once, with the first answers
        self.eos_ids = stop_tokens(model, tokenizer)

    def sample(
        self,
        prompts: list[list[int]],
        row_ids: list[int],
        seed: int,
        temperature: float = 1.0,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Rollout:
        """Sample one response to each prompt, as Sampler.sample says. UserError if the model cannot be sampled from."""
        from extras.agreement import one_line_error

        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        done: dict[int, tuple[list[int], bool, list[float]]] = {}
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                uniforms = torch.stack([self._stream(seed, row_ids[i]) for i in part])
                with one_line_error(self.model, self.check is not None):
                    responses = self._batch([prompts[i] for i in part], uniforms, temperature)
                done |= dict(zip(part, responses, strict=True))
                advance(len(part))
            columns = zip(*(done[i] for i in range(len(prompts))), strict=True) if prompts else ((), (), ())
            rollout = Rollout(prompts, *map(list, columns))
            if self.check and prompts:
                check, self.check = self.check, None
                check(rollout, temperature)
        return rollout

    def _stream(self, seed: int, row_id: int) -> torch.Tensor:
        """(max_new_tokens,) uniforms in [0, 1), a function of (seed, row id) alone."""
        # A library's sampler draws for a whole batch from one stream, so an answer would change with the batch size, the number
        # of processes, or a resumed run. A stream for each row keeps every answer the same.
        stream = torch.Generator().manual_seed((seed * 1_000_003 + row_id) % 2**63)
        return torch.rand(self.max_new_tokens, generator=stream, dtype=torch.float64)

    @torch.no_grad()
    def _batch(self, prompts, uniforms, temperature):
        """Return [(response ids, finished, log-probs)] of one batch of prompts. uniforms: (B, max_new_tokens)."""
        from extras import caches

        device = self.model.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, P) left-padded
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        rows = list(range(len(prompts)))  # of the batch, in the order of its cache
        cache: dict[str, Any] = {}
        extra = caches.accepted(self.model, "position_ids", "logits_to_keep")
        for step in range(self.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given = {"position_ids": positions, "logits_to_keep": 1}
            seen = None if "cache_params" in cache else mask  # a state-space model's state has no padding in it
            out = self.model(
                input_ids=ids, attention_mask=seen, use_cache=True, **cache, **{n: given[n] for n in extra}
            )
            logits = out.logits[:, -1]  # (rows, V)
            scored = temper(logits, temperature or 1.0)
            token = inverse_cdf(scored, uniforms[rows, step].to(device)) if temperature else logits.argmax(-1)
            chosen = scored.log_softmax(-1).gather(-1, token[:, None])[:, 0].tolist()
            for j, (i, t) in enumerate(zip(rows, token.tolist(), strict=True)):
                if not finished[i]:
                    responses[i].append(t)
                    logprobs[i].append(chosen[j])
                    finished[i] = t in self.eos_ids
            keep = [j for j, i in enumerate(rows) if not finished[i]]
            if not keep or step + 1 == self.max_new_tokens:
                break
            cache, ids = caches.cache_of(self.model, out), token[:, None]
            if len(keep) < len(rows) and all(caches.drops_rows(c) for c in cache.values()):
                index = torch.tensor(keep, device=device)
                for c in cache.values():
                    caches.keep_rows(c, index)
                ids, mask, rows = ids[index], mask[index], [rows[j] for j in keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
        return list(zip(responses, finished, logprobs, strict=True))


def inverse_cdf(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) with the distribution softmax(logits) (B, V), from one uniform (B,) in [0, 1) each."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
