"""Samplers: they turn prompts into responses. Token ids in, token ids out: text is never tokenised twice.

Dims: B prompts of a batch, P prompt tokens, V vocabulary.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from common.data import end_of_turn
from common.engine import evaluating
from extras import screen


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

    It answers batch_size prompts at a time, from the longest to the shortest. As answers end, others start in their places.
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

        with evaluating(self.model):
            with one_line_error(self.model, self.check is not None):
                rollout = self._answer(prompts, row_ids, seed, temperature, advance)
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
    def _answer(self, prompts, row_ids, seed, temperature, advance) -> Rollout:
        from extras.decoding import Decoder, choose_tokens

        decoder = Decoder(self.model, prompts, self.batch_size, self.max_new_tokens)
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        streams: dict[int, list[float]] = {}  # of the prompts that are being answered
        while decoder.unfinished:
            rows, logits = decoder.next_logits(responses)  # (B, V)
            streams |= {i: self._stream(seed, row_ids[i]).tolist() for i in rows if not responses[i]}
            uniforms = torch.tensor(
                [streams[i][len(responses[i])] if i in streams else 0.0 for i in rows], dtype=torch.float64
            )
            # Only the copy to the list below waits for the device.
            chosen = choose_tokens(logits, uniforms.to(logits.device, non_blocking=True), temperature)
            screen.saw_ranks(len(streams))
            ended = []
            for i, (token, logprob) in zip(rows, torch.stack(chosen, -1).tolist(), strict=True):
                if i in streams:  # else it has ended, in a cache that cannot drop it
                    responses[i].append(int(token))
                    logprobs[i].append(logprob)
                    if token in self.eos_ids or len(responses[i]) == self.max_new_tokens:
                        ended.append(i)
                        del streams[i]
            if ended:
                decoder.drop(ended)
                advance(len(ended))
        return Rollout(prompts, responses, [y[-1] in self.eos_ids for y in responses], logprobs)


def inverse_cdf(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) with the distribution softmax(logits) (B, V), from one uniform (B,) in [0, 1) each."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
