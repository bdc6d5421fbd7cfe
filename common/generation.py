"""One generator of responses. Token ids in, token ids out: text is never tokenised twice.

Every response has a random stream of its own, keyed by (seed, row): what is sampled for a prompt does not depend on
the batch it travels in, nor on how many processes share the work.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.data import end_of_turn
from common.engines import evaluating
from common.logprobs import temper


@dataclass
class Rollout:
    """Responses to N prompts, in the order the prompts came."""

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]  # EOS included where one was sampled
    finished: list[bool]  # False: cut at max_new_tokens, no EOS
    logprobs: list[list[float]]  # of each response token under the sampling distribution, nats


def make_generator(run, model, tokenizer):
    """The sampler of `model` that --generation names. Every process calls its `sample` equally often, with its own prompts."""
    if run.args.generation == "vllm":
        from common.vllm_engine import VllmGenerator

        return VllmGenerator(run, model, tokenizer)
    return Generator(model, tokenizer, run.args.per_device_eval_batch_size, run.args.max_new_tokens)


def stop_tokens(model, tokenizer) -> set[int]:
    """Token ids that end a response: the end of a turn, the tokenizer's EOS and those of the model's generation config.

    Says so in one line where the template ends a turn with a token that neither of the others names, as for a base model.
    """
    eos = model.generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    end = end_of_turn(tokenizer)
    if end not in known | {None}:
        words = [tokenizer.convert_ids_to_tokens(i) for i in (end, *sorted(known))]
        found = (
            f"found {words[0]} as the end of a turn in the chat template, but {', '.join(words[1:])} as the model's EOS"
        )
        warnings.warn(f"--model: {found}: {words[0]} ends every demonstration, and either ends an answer", stacklevel=2)
    return (known | {end}) - {None}


class Generator:
    """Backend `hf`: plain transformers forward passes with a KV cache; runs anywhere, CPU included.

    Prompts are sorted by length and left-padded in batches; a row leaves the batch, and its cache is dropped, as soon as
    it has ended. Another backend (common/vllm_engine.py) implements `sample` with the same arguments.
    """

    def __init__(self, model, tokenizer, batch_size: int, max_new_tokens: int):
        self.model, self.batch_size, self.max_new_tokens = model, batch_size, max_new_tokens
        self.eos_ids = stop_tokens(model, tokenizer)

    def sample(
        self,
        prompts: list[list[int]],
        rows: list[int],
        seed: int,
        temperature: float = 1.0,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Rollout:
        """One response per prompt. temperature 0 is greedy; `rows` name the random streams; `advance(n)` reports progress."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        done: dict[int, tuple[list[int], bool, list[float]]] = {}
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                uniforms = torch.stack([self._stream(seed, rows[i]) for i in part])
                responses = self._batch([prompts[i] for i in part], uniforms, temperature)
                done |= dict(zip(part, responses, strict=True))
                advance(len(part))
        ids, finished, logprobs = zip(*(done[i] for i in range(len(prompts))), strict=True) if prompts else ((), (), ())
        return Rollout(prompts, list(ids), list(finished), list(logprobs))

    def _stream(self, seed: int, row: int) -> torch.Tensor:
        """(max_new_tokens,) uniforms in [0, 1), a function of (seed, row) alone."""
        stream = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
        return torch.rand(self.max_new_tokens, generator=stream, dtype=torch.float64)

    @torch.no_grad()
    def _batch(self, prompts, uniforms, temperature):
        from transformers import DynamicCache

        device = self.model.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, P) left-padded
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        responses = [[] for _ in prompts]
        logprobs = [[] for _ in prompts]
        finished = [False] * len(prompts)
        alive = list(range(len(prompts)))
        cache = DynamicCache(config=self.model.config)
        for step in range(self.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            ).logits[:, -1]  # (alive, V)
            if temperature == 0:
                token = logits.argmax(-1)
                scored = temper(logits, 1.0)
            else:
                scored = temper(logits, temperature)
                token = inverse_cdf(scored, uniforms[alive, step].to(device))
            chosen = scored.log_softmax(-1).gather(-1, token[:, None])[:, 0].tolist()
            keep = []
            for j, (i, t) in enumerate(zip(alive, token.tolist(), strict=True)):
                responses[i].append(t)
                logprobs[i].append(chosen[j])
                finished[i] = t in self.eos_ids
                if not finished[i]:
                    keep.append(j)
            if not keep:
                break
            ids = token[:, None]
            if len(keep) < len(alive):
                index = torch.tensor(keep, device=device)
                cache.batch_select_indices(index)
                ids, mask, alive = ids[index], mask[index], [alive[j] for j in keep]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], -1)
        return list(zip(responses, finished, logprobs, strict=True))


def inverse_cdf(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) with the distribution softmax(logits) (B, V), from one uniform (B,) in [0, 1) each."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
