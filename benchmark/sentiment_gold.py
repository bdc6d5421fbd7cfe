"""PPO on a known reward: the policies whose answers benchmark/sentiment_data.py sorts into demonstrations and preferences.

AIHF paper, arXiv:2406.06874, App. A.1.2: a language model is trained with PPO on the true reward of film reviews, and its
checkpoints are kept. The PPO is that of rft.py. The gold reward of benchmark/film.py, which reads the text of an answer, stands
in the place of the reward model, so nothing is learned about the reward.

    python benchmark/sentiment_gold.py --model runs/film/base/final --gold runs/film/world
        --dataset runs/sentiment/split/ppo.jsonl
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import rft  # noqa: E402
from benchmark.film import Gold  # noqa: E402
from common import demos, evals, models
from common.args import Auto, main, parse_args
from common.data import Batch, end_of_turn
from common.generation import Rollout
from common.ranges import NOT_NEGATIVE
from common.run import Run
from extras import records

SETTINGS = {
    "other": dict(
        max_samples=0, eval_samples=200, max_length=72, max_new_tokens=56, learning_rate=5e-4, reward_model="",
        reward_learning_rate=5e-4, sft_epochs=0, sft_learning_rate=5e-4, batch_size=32, total_episodes=1920,
        rollout_batch_size=64, value_warmup_ratio=0.1, eval_updates=6, per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
    ),
}  # fmt: skip


@dataclass
class Args(rft.Args):
    gold: str = ""
    """folder of the gold reward, made by benchmark/film.py."""
    dataset: str = "auto"
    """prompts to answer, in rows with a completion that is not used."""
    sft_epochs: Annotated[int | Auto, NOT_NEGATIVE] = 0
    """0: PPO starts from --model."""


class GoldScore(torch.nn.Module):
    """A known reward of texts in the place of a reward model, which scores tokens."""

    def __init__(self, tokenizer, score: Callable[[list[str]], np.ndarray]):
        super().__init__()
        self.tokenizer, self.score, self.end = tokenizer, score, end_of_turn(tokenizer)

    def forward(self, batch: Batch) -> Tensor:
        """Score of the text of each response, without its prompt. (B,)"""
        ids = [own[mask].tolist() for own, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
        ended = [y[-1] == self.end for y in ids]
        texts = evals.sampled_texts(self.tokenizer, Rollout([], ids, ended, []))
        return torch.tensor(self.score(texts), dtype=torch.float32, device=batch.input_ids.device)


class GoldPPO(rft.RFT):
    """The policy step of rft.py on a known reward. Every evaluation keeps the policy in checkpoint_<updates>/."""

    def __init__(self, run, tokenizer, prompts: list[dict], held_rows: list[dict], score):
        super().__init__(run, tokenizer, prompts, held_rows)
        self.method, self.paper = "PPO on a known reward", "arXiv:2406.06874, App. A.1.2"
        self.steps.sft = self.steps.K = 0
        self.raw_reward = GoldScore(tokenizer, score)

    def reward_step(self, t: int) -> None:
        """Nothing: the reward is known."""

    def start_policy(self, t: int) -> str:
        """Return the reference, the model that PPO starts from. The value model keeps its own first weights."""
        return self.sft_policy

    def measure(self, t: int, updates: int, reference=None) -> None:
        super().measure(t, updates, reference)
        card = self.run.model_card(self.method, self.paper)
        self.run.save_final(self.actor_critic, self.tokenizer, card, f"checkpoint_{updates}", "policy")


def train(args: Args) -> None:
    score = Gold(args.gold).score
    tokenizer = models.load_tokenizer(args)
    prompts = demos.load_demonstrations(args, tokenizer)
    held_rows = demos.load_held_out(args, tokenizer, prompts)
    run = Run(args, "sentiment_gold", rft.METRICS)
    records.record_prompts(run, tokenizer, prompts)
    ppo = GoldPPO(run, tokenizer, prompts, held_rows, score)
    run.print(f"PPO on the gold reward: {len(prompts)} prompts, {ppo.steps.updates} updates, {run.dir}")
    ppo.learn()
    run.save_final(ppo.actor_critic, tokenizer, run.model_card(ppo.method, ppo.paper), part="policy")
    evals.print_table(run, "start", ppo.method)
    run.end()


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
