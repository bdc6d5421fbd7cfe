"""One generator of responses. Token ids in, token ids out: text is never tokenised twice.

Every response has a random stream of its own, keyed by (seed, row): what is sampled for a prompt does not depend on
the batch it travels in, nor on how many processes share the work.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from common import UserError
from common.args import uses_bf16
from common.data import collate, end_of_turn
from common.logprobs import CHECKED, LIMITS, language_model, response_logprobs, temper
from extras.sharding import evaluating, ran_out_of_memory


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
        from extras.vllm_engine import VllmGenerator

        return VllmGenerator(run, model, tokenizer)
    generator = Generator(model, tokenizer, run.args.per_device_eval_batch_size, run.args.max_new_tokens)
    generator.check = lambda rollout, temperature: check_agreement(run, model, rollout, temperature)
    return generator


def check_agreement(run, model, rollout: Rollout, temperature: float) -> None:
    """UserError unless the scorer sees in answers just sampled what the sampler saw, to rounding; all weights are there.

    The scorer reads them in training mode, as a loss does. A difference means that one of the two is wrong for this
    architecture: it sees later tokens or padding, counts positions otherwise, loses its cache, or has noise when it trains.
    Answers to the longest and to the shortest prompts are compared, since padding differs most there.
    """
    order = sorted(range(len(rollout.prompt_ids)), key=lambda i: len(rollout.prompt_ids[i]))
    half = CHECKED[0] // 2
    picked = sorted({*order[:half], *order[-half:]})
    sequences = [(rollout.prompt_ids[i], rollout.response_ids[i][: CHECKED[1]]) for i in picked]
    if not sequences:
        return
    batch = collate(sequences, pad_token_id=0).to(model.device)
    with torch.no_grad():
        scored = response_logprobs(model.train(), batch, temperature or 1.0).logprobs
        again = response_logprobs(model.eval(), batch, temperature or 1.0).logprobs
    sampled = torch.zeros_like(scored)
    for row, i in zip(sampled, picked, strict=True):
        row[: len(rollout.logprobs[i][: CHECKED[1]])] = row.new_tensor(rollout.logprobs[i][: CHECKED[1]])
    gaps = (scored - sampled).abs()[batch.response_mask]
    found, noise = gaps.mean().item(), (scored - again).abs()[batch.response_mask].mean().item()
    kind = "bfloat16" if uses_bf16(run.args) else "float32"
    limit = LIMITS["hf"][kind] / (temperature or 1.0)  # by which the rounding of the logits is divided too
    if not (found <= limit and noise <= limit):
        name, architecture = language_model(model).name_or_path, type(language_model(model)).__name__
        cause = f"its log-probs in training mode differ from those in evaluation mode by {noise:.2g}"
        raise UserError(
            f"--model: found sampled and scored log-probs of {architecture} ({name}) {found:.2g} nats per token apart on the"
            f" first answers (largest difference {gaps.max().item():.2g}), expected at most {limit:g} ({kind}):"
            f" {cause if not noise <= limit else 'what would be trained is not the policy that answers'}; see docs/models.md"
        )
    run.say(
        f"sampled and scored log-probs agree on the first answers: largest difference {gaps.max().item():.1e} nats per token,"
        f" mean {found:.1e}"
    )


def check_first_step(kind: str, row: dict[str, float], temperature: float) -> None:
    """UserError if the policy's log-probs in its first step on its answers are not those that it gave them when it sampled.

    row: metrics of the step, of a kind such as PPO, with sampling/logp_difference, nats per token.
    """
    difference = row["sampling/logp_difference"]
    if not difference * temperature < 0.05:  # rounding of the logits is divided by the temperature
        raise UserError(
            f"first {kind} step: found log-probs that differ by {difference:.4f} nats per token from those at sampling,"
            " expected rounding: the policy that is trained is not the one that answered"
        )


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
    it has ended. Another backend (extras/vllm_engine.py) implements `sample` with the same arguments.
    """

    def __init__(self, model, tokenizer, batch_size: int, max_new_tokens: int):
        self.model, self.batch_size, self.max_new_tokens = model, batch_size, max_new_tokens
        self.check: Callable[[Rollout, float], None] | None = None  # of the first answers
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
                responses = self._first_or_next_batch([prompts[i] for i in part], uniforms, temperature)
                done |= dict(zip(part, responses, strict=True))
                advance(len(part))
            columns = zip(*(done[i] for i in range(len(prompts))), strict=True) if prompts else ((), (), ())
            rollout = Rollout(prompts, *map(list, columns))
            if self.check and prompts:
                check, self.check = self.check, None
                check(rollout, temperature)
        return rollout

    def _first_or_next_batch(self, prompts, uniforms, temperature):
        """_batch; in the first one that a run asks for, an error of the model's own code becomes one line."""
        try:
            return self._batch(prompts, uniforms, temperature)
        except Exception as error:
            if self.check is None or isinstance(error, UserError) or ran_out_of_memory(error):
                raise
            inner = language_model(self.model)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"--model: found {type(inner).__name__} ({inner.name_or_path}), which the sampler cannot run"
                f" ({type(error).__name__}: {reason}), expected an architecture that passes in docs/models.md"
            ) from error

    def _stream(self, seed: int, row: int) -> torch.Tensor:
        """(max_new_tokens,) uniforms in [0, 1), a function of (seed, row) alone."""
        stream = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
        return torch.rand(self.max_new_tokens, generator=stream, dtype=torch.float64)

    @torch.no_grad()
    def _batch(self, prompts, uniforms, temperature):
        device = self.model.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, P) left-padded
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        rows = list(range(len(prompts)))  # of the batch, in the order of its cache
        cache: dict[str, Any] = {}
        extra = accepted(self.model, "position_ids", "logits_to_keep")
        for step in range(self.max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options = {"position_ids": positions, "logits_to_keep": 1}
            seen = None if "cache_params" in cache else mask  # a state-space model's state left padding out already
            out = self.model(
                input_ids=ids, attention_mask=seen, use_cache=True, **cache, **{name: options[name] for name in extra}
            )
            logits = out.logits[:, -1]  # (rows, V)
            if temperature == 0:
                token = logits.argmax(-1)
                scored = temper(logits, 1.0)
            else:
                scored = temper(logits, temperature)
                token = inverse_cdf(scored, uniforms[rows, step].to(device))
            chosen = scored.log_softmax(-1).gather(-1, token[:, None])[:, 0].tolist()
            for j, (i, t) in enumerate(zip(rows, token.tolist(), strict=True)):
                if not finished[i]:
                    responses[i].append(t)
                    logprobs[i].append(chosen[j])
                    finished[i] = t in self.eos_ids
            keep = [j for j, i in enumerate(rows) if not finished[i]]
            if not keep or step + 1 == self.max_new_tokens:
                break
            cache = self._cache(out)
            ids = token[:, None]
            if len(keep) < len(rows) and all(drops_rows(c) for c in cache.values()):
                index = torch.tensor(keep, device=device)
                for c in cache.values():
                    keep_rows(c, index)
                ids, mask, rows = ids[index], mask[index], [rows[j] for j in keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
        return list(zip(responses, finished, logprobs, strict=True))

    def _cache(self, out) -> dict:
        """Return the model's cache of the tokens so far, under the name by which its forward takes it."""
        for name in ("past_key_values", "cache_params"):
            if getattr(out, name, None) is not None:
                return {name: getattr(out, name)}
        raise UserError(
            f"--model: found {type(language_model(self.model)).__name__}, which keeps no KV cache, expected a model with one"
        )


def accepted(model, *names: str) -> list[str]:
    """Those of the names that the forward pass of the model inside its wrappers takes."""
    parameters = inspect.signature(type(language_model(model)).forward).parameters
    other = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return [name for name in names if name in parameters or other]


def drops_rows(cache) -> bool:
    """True if rows can be dropped from a cache: it has transformers' own kinds of layers, or says how."""
    from transformers import DynamicCache
    from transformers.cache_utils import Cache

    if type(cache) is DynamicCache:
        return all(type(layer).__module__ == "transformers.cache_utils" for layer in cache.layers)
    return isinstance(cache, Cache) and type(cache).batch_select_indices is not Cache.batch_select_indices


def keep_rows(cache, index: torch.Tensor) -> None:
    """Drop all but these rows of a cache that drops rows."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    if type(cache) is not DynamicCache:
        cache.batch_select_indices(index)
        return
    layers: list[Any] = cache.layers  # of either kind below
    for layer in layers:
        if isinstance(
            layer, LinearAttentionCacheLayerMixin
        ):  # convolution and linear attention, alone or beside attention
            layer.reorder_cache(cast(torch.LongTensor, index))
        else:
            layer.batch_select_indices(index)


def inverse_cdf(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens (B,) with the distribution softmax(logits) (B, V), from one uniform (B,) in [0, 1) each."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
