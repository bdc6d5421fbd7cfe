"""PPO on language models written plainly after "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031).

It is what rivals.py compares rft.py with: TRL has no PPOTrainer any more. Queries are padded on the left and responses on the
right to one length. transformers' `generate` samples. Log-probs and entropy come from the logits of all positions of the batch.
Means are taken over a micro-batch. The mathematics is that of rft.py with its defaults, so that both do the same work.

Dims: B sequences, P query tokens, T response tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Settings:
    pad: int
    eos: int
    response_length: int
    micro_batch: int  # sequences per forward pass
    learning_rate: float
    epochs: int = 4
    temperature: float = 1.0
    beta: float = 0.1  # weight of the KL penalty
    cliprange: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    missing_eos_penalty: float = 1.0


class Scalar(torch.nn.Module):
    """A backbone with a scalar head, read at every position."""

    def __init__(self, classifier):
        super().__init__()
        self.backbone = getattr(classifier, classifier.base_model_prefix)
        self.score = classifier.score

    def forward(self, **inputs) -> Tensor:
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            return self.score(hidden.float())[..., 0]  # (B, P + T)


def inputs_of(ids: Tensor, pad: int) -> dict[str, Tensor]:
    """Attention mask and positions of ids (B, P + T) that are padded on either side."""
    mask = ids != pad
    positions = (mask.long().cumsum(1) - mask.long()).clamp(min=0)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "position_ids": positions}


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def logits_of(policy, ids: Tensor, start: int, s: Settings) -> Tensor:
    """The tempered logits that predict the responses, which begin at column `start`: (B, T, V), of all (B, P + T, V)."""
    logits = policy(**inputs_of(ids, s.pad), use_cache=False).logits
    return logits[:, start - 1 : -1].float() / s.temperature


def logprobs_of(logits: Tensor, responses: Tensor) -> Tensor:
    return torch.gather(F.log_softmax(logits, dim=-1), 2, responses.unsqueeze(-1)).squeeze(-1)


def left_padded(queries: list[list[int]], pad: int) -> Tensor:
    width = max(map(len, queries))
    return torch.tensor([[pad] * (width - len(q)) + q for q in queries])


@torch.no_grad()
def generate(policy, queries: Tensor, s: Settings) -> Tensor:
    """Sample T tokens for every query -> (B, P + T)."""
    out = policy.generate(
        input_ids=queries, attention_mask=queries != s.pad, max_new_tokens=s.response_length, do_sample=True,
        min_new_tokens=s.response_length, temperature=s.temperature, top_k=0, top_p=1.0, eos_token_id=None,
        pad_token_id=s.pad,
    )  # fmt: skip
    return torch.cat([queries, out[:, queries.shape[1] :]], 1)


def cut_at_eos(responses: Tensor, s: Settings) -> Tensor:
    """Responses with padding after their first end of text."""
    after = (responses == s.eos).long().cumsum(1) - (responses == s.eos).long() > 0
    return responses.masked_fill(after, s.pad)


@torch.no_grad()
def rollout(policy, reference, value, reward, queries: list[list[int]], s: Settings) -> dict[str, Tensor]:
    """Sample responses, and score them with all four models -> ids, mask, log-probs, values, advantages and returns."""
    padded = left_padded(queries, s.pad)
    start = padded.shape[1]
    ids = torch.cat([generate(policy, part, s) for part in padded.split(s.micro_batch)])
    ids[:, start:] = cut_at_eos(ids[:, start:], s)
    logprobs, ref_logprobs, values, scores = [], [], [], []
    for part in ids.split(s.micro_batch):
        responses = part[:, start:].masked_fill(part[:, start:] == s.pad, 0)
        logprobs.append(logprobs_of(logits_of(policy, part, start, s), responses))
        ref_logprobs.append(logprobs_of(logits_of(reference, part, start, s), responses))
        values.append(value(**inputs_of(part, s.pad))[:, start - 1 : -1])
        every, last = reward(**inputs_of(part, s.pad)), (part[:, start:] != s.pad).sum(1) + start - 1
        scores.append(every.gather(1, last[:, None])[:, 0])
    logp, ref_logp, v, score = (torch.cat(x) for x in (logprobs, ref_logprobs, values, scores))
    mask = ids[:, start:] != s.pad
    score = torch.where((ids[:, start:] == s.eos).any(1), score, score - s.missing_eos_penalty)
    rewards = -s.beta * (logp - ref_logp) * mask
    rewards[torch.arange(len(ids)), mask.sum(1) - 1] += score
    v = v * mask
    advantages, following = torch.zeros_like(v), torch.zeros(len(ids))
    for t in reversed(range(v.shape[1])):
        after = v[:, t + 1] if t + 1 < v.shape[1] else 0.0
        following = rewards[:, t] + s.gamma * after - v[:, t] + s.gamma * s.lam * following
        advantages[:, t] = following
    returns = advantages + v
    mean = masked_mean(advantages, mask)
    advantages = (advantages - mean) * torch.rsqrt(masked_mean((advantages - mean) ** 2, mask) + 1e-8) * mask
    return dict(
        ids=ids, start=torch.tensor(start), mask=mask, logprobs=logp, values=v, advantages=advantages, returns=returns
    )


def losses(policy, value, batch: dict[str, Tensor], s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Policy loss, value loss and entropy of stored responses, means over their tokens. Gradient through the first two."""
    ids, start, mask = batch["ids"], int(batch["start"]), batch["mask"]
    logits = logits_of(policy, ids, start, s)
    new = logprobs_of(logits, ids[:, start:].masked_fill(~mask, 0))
    v = value(**inputs_of(ids, s.pad))[:, start - 1 : -1]
    ratio = torch.exp((new - batch["logprobs"]).masked_fill(~mask, 0))
    advantages, returns = batch["advantages"], batch["returns"]
    pg = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - s.cliprange, 1 + s.cliprange))
    clipped = batch["values"] + (v - batch["values"]).clamp(-s.cliprange, s.cliprange)
    vf = 0.5 * torch.max((v - returns) ** 2, (clipped - returns) ** 2)
    with torch.no_grad():
        probabilities = F.softmax(logits, dim=-1)
        entropy = torch.logsumexp(logits, dim=-1) - (probabilities * logits).sum(-1)
    return masked_mean(pg, mask), masked_mean(vf, mask), masked_mean(entropy, mask)


def learn(policy, value, optimizer, rollouts: dict[str, Tensor], s: Settings) -> list[tuple[float, float, float]]:
    """Train on the rollouts for `epochs` passes, an optimizer step each -> what `losses` gave, for every micro-batch."""
    seen = []
    for _ in range(s.epochs):
        parts = torch.randperm(len(rollouts["ids"])).split(s.micro_batch)
        for index in parts:
            batch = {k: x if k == "start" else x[index] for k, x in rollouts.items()}
            pg, vf, entropy = losses(policy, value, batch, s)
            ((pg + s.vf_coef * vf) / len(parts)).backward()
            seen.append((pg.item(), vf.item(), entropy.item()))
        parameters = [*policy.parameters(), *value.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return seen
