"""The phases of a run in their order, known before it begins, and how long those to come will take."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

GENERATED = 10.0  # time to sample a token over time to score one: a first guess, until the run has sampled some


@dataclass(frozen=True)
class Planned:
    name: str  # as Run.phase is given it
    items: int
    cost: float  # of all items, in tokens that pass through a model once


def kind(name: str) -> str:
    """The name without its numbers: phases of one kind take about as long per item."""
    return re.sub(r"\d+", "#", name)


class Schedule:
    """Phases planned, those that have ended, and their times. Phases inside others are no part of it."""

    def __init__(self, planned: list[Planned]):
        self.planned, self.position = planned, -1
        self.per_item: dict[str, float] = {}  # kind -> seconds per item, of the last phase of that kind
        self.seconds = self.cost = 0.0  # of the phases that have ended

    def place(self, name: str) -> str:
        """Go to the next phase of this name. Returns "k/n"; empty, with the position unchanged, if there is none."""
        names = [p.name for p in self.planned]
        if name not in names[self.position + 1 :]:
            return ""
        self.position = names.index(name, self.position + 1)
        return f"{self.position + 1}/{len(names)}"

    def finished(self, name: str, items: int, seconds: float) -> None:
        """Learn from a phase that has ended how long its kind takes."""
        if items:
            self.per_item[kind(name)] = seconds / items
        if 0 <= self.position < len(self.planned) and self.planned[self.position].name == name:
            self.seconds += seconds
            self.cost += self.planned[self.position].cost

    def expected(self, phase: Planned, rate: float | None) -> float | None:
        """Seconds of a whole phase that has not begun. rate: seconds per token; None while nothing is known."""
        if kind(phase.name) in self.per_item:
            return self.per_item[kind(phase.name)] * phase.items
        return None if rate is None else rate * phase.cost

    def left(self, name: str, done: int, total: int, seconds: float) -> tuple[float | None, float | None]:
        """Seconds left of the phase that has done so many of its items in so many seconds, and of the run.

        None for what nothing is known about yet. Of a phase inside another the second one is None.
        """
        current = self.planned[self.position] if 0 <= self.position < len(self.planned) else None
        if current is None or current.name != name:
            return (seconds * (total - done) / done if done else None), None
        share = done / total if total else 1.0
        cost = self.cost + current.cost * share
        rate = (self.seconds + seconds) / cost if cost else None
        if done:
            own: float | None = seconds * (total - done) / done
        else:
            own = self.expected(current, rate)
            own = None if own is None else max(own - seconds, 0.0)
        later = [self.expected(phase, rate) for phase in self.planned[self.position + 1 :]]
        if own is None or None in later:
            return own, None
        return own, own + sum(filter(None, later))


# ---- the phases of each script ----
class Lengths:
    """Costs of work on rows of mean length, in tokens that pass through a model once."""

    def __init__(self, args, rows: list[dict]):
        self.args = args
        some = [rows[i] for i in range(0, len(rows), max(len(rows) // 256, 1))]  # a lazy source is read row by row
        count = max(len(some), 1)
        self.prompt = sum(len(r["prompt_ids"]) for r in some) / count
        self.response = sum(len(r.get("response_ids") or r["chosen_ids"]) for r in some) / count
        self.whole = self.prompt + self.response

    def sample(self, n: float) -> float:
        return n * (self.prompt + GENERATED * min(self.response, self.args.max_new_tokens))

    def score(self, n: float) -> float:
        return n * self.whole

    def train(self, n: float) -> float:
        return 3 * n * self.whole


def answers(t: int, n: int, of: Lengths) -> Planned:
    return Planned(f"iteration {t}: answers", n, of.sample(n))


def evaluation(i: int, of: Lengths) -> list[Planned]:
    args, n = of.args, of.args.eval_samples
    with_kl = getattr(args, "eval_temperature", 1.0) == 1.0
    found = [Planned(f"evaluation {i}", n * (4 + with_kl), of.sample(n) + of.score(n * (3 + 2 * with_kl)))]
    if args.judge_model:
        found.append(Planned(f"judge {i}", 2 * n, of.score(2 * n)))
    return found


def held_out(of: Lengths) -> Planned:
    n = of.args.eval_samples
    return Planned("reference on held-out rows", 4 * n, of.sample(n) + of.score(3 * n))


def batches(args, n: int) -> int:
    return math.ceil(n / args.batch_size)


def sft(args, n: int, m: int, of: Lengths) -> list[Planned]:
    found = [held_out(of), *evaluation(0, of)]
    for e in range(args.num_train_epochs):
        found += [Planned(f"epoch {e}", batches(args, n), of.train(n)), *evaluation(e + 1, of)]
    return found


def irft(args, n: int, m: int, of: Lengths) -> list[Planned]:
    found = [held_out(of), *evaluation(0, of)]
    sizes = [(c + 1) * n // args.num_chunks - c * n // args.num_chunks for c in range(args.num_chunks)]
    own = [sizes[t % args.num_chunks] for t in range(args.T)]
    for t in range(args.T):
        first = {"none": t, "previous": max(t - 1, 0), "all": 0}[args.replay]
        pairs = sum(own[first : t + 1])
        found += [answers(t, own[t], of), Planned(f"iteration {t}: reference", 2 * pairs, of.score(2 * pairs))]
        updates = args.num_train_epochs * batches(args, pairs)
        found.append(Planned(f"iteration {t}: training", updates, of.train(2 * pairs * args.num_train_epochs)))
        found += evaluation(t + 1, of)
    return found


def aihf_direct(args, n: int, m: int, of: Lengths) -> list[Planned]:
    found = [held_out(of), *evaluation(0, of)]
    for t in range(args.T):
        if args.objective == "self_play" and n:
            found += [answers(t, n, of), Planned(f"iteration {t}: reference, iter_{t}", 2 * n, of.score(2 * n))]
        moves = args.ref == "previous"
        if m and (moves or t == 0):
            name = f"iteration {t}: reference, preferences" + f"_{t}" * moves
            found.append(Planned(name, 2 * m, of.score(2 * m)))
        updates = args.num_train_epochs * batches(args, max(n, m))
        trained = of.train(2 * (n + m) * args.num_train_epochs)
        found += [Planned(f"iteration {t}: training", updates, trained), *evaluation(t + 1, of)]
    return found


def with_reward(args, n: int, m: int, of: Lengths) -> list[Planned]:
    """Scripts that learn a reward model, and then a policy by PPO or from the candidates of each prompt."""
    demonstrated = n if getattr(args, "demo_weight", 1.0) else 0
    compared = m if hasattr(args, "demo_weight") else 0  # else the second rows are prompts
    found = (
        [Planned("SFT", args.sft_epochs * batches(args, n), of.train(n * args.sft_epochs))] if args.sft_epochs else []
    )
    found.append(held_out(of))
    for t in range(args.T):
        if demonstrated:
            found.append(answers(t, n, of))
        times = t + 1 if getattr(args, "pairs", "current") == "accumulated" else 1
        steps = batches(args, max(demonstrated * times, compared)) * args.num_train_epochs
        trained = of.train(2 * (demonstrated * times + compared) * args.num_train_epochs)
        found.append(Planned(f"iteration {t}: reward", steps, trained))
        if hasattr(args, "reward_normalisation"):
            found.append(Planned(f"reward {t} on demonstrations", n, of.score(n)))
        held = args.eval_samples
        found.append(Planned(f"reward {t} on held-out rows", 3 * held, of.score(3 * held)))
        if getattr(args, "eval_preference_dataset", "none") != "none":
            found.append(Planned(f"reward {t} on preferences", 2 * held, of.score(2 * held)))
        found.append(policy_step(args, t, n, m, of))
    return found


def policy_step(args, t: int, n: int, m: int, of: Lengths) -> Planned:
    """The policy step of an outer iteration, with the evaluations inside it."""
    if args.scalar_models == 2:
        name, asked = "PPO", math.ceil(args.total_episodes / args.rollout_batch_size) * args.rollout_batch_size
        cost = of.sample(asked) + of.score(3 * asked) + of.train(2 * asked * args.num_ppo_epochs)
    else:
        best = getattr(args, "policy_objective", "dpo") == "best_of_n"
        name = "best of N" if best else "online DPO"
        asked = args.total_prompts or (m if getattr(args, "prompts", "") == "preferences" else n)
        cost = of.sample(asked * args.num_generations) + of.score(asked * (args.num_generations + 2 * (not best)))
        cost += of.train((2 - best) * asked * args.num_policy_epochs)
    updates = math.ceil(asked / args.rollout_batch_size)
    times = math.ceil(updates / args.eval_updates) + (t == 0)
    cost += times * sum(p.cost for p in evaluation(0, of))
    return Planned(f"iteration {t}: {name}", updates, cost)


SCRIPTS: dict[str, Callable[..., list[Planned]]] = {
    "sft": sft,
    "irft": irft,
    "aihf_direct": aihf_direct,
    "rft": with_reward,
    "aihf": with_reward,
    "aihf_ppo": with_reward,
    "irl_ppo_tldr": with_reward,
    "irl_dpo_ultrachat": with_reward,
}


def of_run(script: str, args, *trained: list[dict]) -> Schedule:
    """The schedule of a run of one of SCRIPTS on these rows: demonstrations, then preferences or prompts."""
    n, m = map(len, itertools.islice(itertools.chain(trained, [[]]), 2))
    rows = next((rows for rows in trained if len(rows)), [])
    return Schedule(SCRIPTS[script](args, n, m, Lengths(args, rows)))
