"""Direct AIHF and Self-Play AIHF: one policy loss on demonstrations and preferences. With one of them: DPO, IPO or IRFT.

Paper: Learning Reward and Policy Jointly from Demonstration and Preference Improves Alignment, arXiv:2406.06874, Eq. 10 and 11.

The reward is r = beta log pi/pi_ref of the policy itself, so there is no reward model, and the preferences' likelihood is DPO's
loss. The demonstrations' loss is added with weight w1. It is -log pi(y) (--objective direct, Eq. 10), or IRFT's loss on y and
the policy's own answer y~, which the policy gives anew in each of T outer iterations (--objective self_play, Eq. 11).

Not the paper: D1 log-probs are summed over the response tokens with EOS (paper silent). D2 beta stands inside the sigmoid, as in
irft.py. D3 one learning-rate schedule over the whole run (paper silent). D4 an epoch passes once over both sets, a part of each
in every update, with weights such that the updates average to w1 mean_D + mean_P (paper silent). D5 w1 balances both parts by
default: it is beta/2 in Eq. 10, where -log pi is a sum over tokens and at w1 = 1 weighs twenty times as much as DPO. D6 RMSprop
(paper silent) has the bias correction that torch's lacks.

Dims: B pairs, T response tokens (T alone, as a flag, is the number of outer iterations).

Laptop CPU, minutes:   python aihf_direct.py

The paper's run:       accelerate launch --quiet aihf_direct.py --model mistral-7b-sft-beta
"""

from __future__ import annotations

if __name__ == "__main__":
    from extras import command_line

    command_line.begin(__file__, __doc__)  # before torch is imported: --help at once, and one line if Ctrl-C ends it

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, demos, evals, models
from common.args import Auto, RunArgs, main, parse_args, require
from common.data import collate, end_of_turn, pair_rows
from common.engine import evaluating
from common.generation import make_generator
from common.logprobs import masked_sum, response_logprobs
from common.ranges import AT_LEAST_1, NOT_NEGATIVE, POSITIVE
from common.run import Run
from common.streams import data_order, learning_rate_at, make_optimizer
from extras import cost, metrics, preference_data, records, two_cores


# ---- the maths ----
def irft_loss(
    policy_chosen: Tensor,
    policy_generated: Tensor,
    ref_chosen: Tensor,
    ref_generated: Tensor,
    beta: float,
    loss_type: str = "logistic",
) -> Tensor:
    """Per-pair loss whose gradient is a stochastic estimate of the likelihood gradient. RFT paper, Eq. 6 and 7; SPIN's loss.

    policy_chosen, policy_generated: (B,) log pi(y|x) and log pi(y~|x), summed over response tokens, nats; carry gradient.
    ref_chosen, ref_generated:       (B,) the same under pi_ref, no gradient.
    Returns (B,): logistic -log sigmoid(beta d), linear -d, with d = (policy - ref)_chosen - (policy - ref)_generated.
    ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    d = (policy_chosen - ref_chosen) - (policy_generated - ref_generated)  # (B,)
    return -F.logsigmoid(beta * d) if loss_type == "logistic" else -d  # D2


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Per-pair -log likelihood of the preference under r = beta log pi/pi_ref. DPO, arXiv:2305.18290, Eq. 7.

    policy_chosen, policy_rejected: (B,) log pi(y_w|x) and log pi(y_l|x), summed over response tokens, nats; carry gradient.
    ref_chosen, ref_rejected:       (B,) the same under pi_ref, no gradient.
    Returns (B,): -log sigmoid(beta d), with d = (policy - ref)_chosen - (policy - ref)_rejected. ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    d = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # (B,)
    return -F.logsigmoid(beta * d)


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Per-pair squared distance of d from 1 / (2 beta), in nats^2, arguments and d as in dpo_loss. IPO, arXiv:2310.12036, Eq. 17.

    Returns (B,): (d - 1 / (2 beta))^2. ValueError unless beta > 0.
    """
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    d = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # (B,)
    return (d - 1 / (2 * beta)) ** 2


def balance(args: Args) -> float:
    """The w1 that balances both parts at the start: slope of a preference's loss over slope of a demonstration's.

    Slopes are in 1/nat of log pi of the preferred response, at d = 0: -log pi has 1 (--objective direct), irft_loss and dpo_loss
    have beta/2, ipo_loss has 1/beta. So self_play with dpo has 1, direct with dpo beta/2: 0.05 at the paper's beta.
    """
    half = args.beta / 2
    preference = half if args.preference_loss == "dpo" else 1 / args.beta
    return preference / (1.0 if args.objective == "direct" else half)


# ---- the loop: Eq. 10, or Eq. 11 with answers anew in every outer iteration ----
def train(args: Args) -> None:
    tokenizer = models.load_tokenizer(args)
    demonstrations, preferences = preference_data.load_both(args, tokenizer)
    n, m = args.select_top_k or len(demonstrations), len(preferences)
    K = count_updates(n, m, args)
    if args.dry_run:
        return cost.print_plan(
            args, "aihf_direct", plan_work(demonstrations[:n], preferences, args), *plan_lines(n, m, K, args)
        )
    held_rows = demos.load_held_out(
        args, tokenizer, demonstrations + preferences, args.preference_dataset if preferences else ""
    )

    run = Run(args, "aihf_direct", METRICS)
    if run.finished():
        return
    demonstrations = demos.select_demonstrations(run, demonstrations)
    records.record_prompts(run, tokenizer, demonstrations, preferences)
    model = models.prepare_policy(args)
    policy, optimizer = run.prepare(model, make_optimizer(args.optimizer, model.parameters()))
    raw = run.unwrap(policy)
    generator = make_generator(run, raw, tokenizer)
    method, asked = method_name(args), len(demonstrations) if args.objective == "self_play" else 0
    run.print(
        f"aihf_direct, {method}: {len(demonstrations)} demonstrations, {len(preferences)} preferences, T = {args.T}, K = {K},"
        f" {run.world} process(es), {run.dir}"
    )

    run.position["num_tokens"] = 0
    resumed = run.load_checkpoint()
    held = evals.prepare_held_out(run, raw, generator, held_rows, tokenizer)

    def measure(iteration: int) -> None:
        reference = models.reference_policy(run, policy, is_initial=iteration == 0)
        row = evals.evaluate(run, raw, generator, held, tokenizer, args.beta, reference, iteration)
        run.log(row, step=run.position["step"], outer_iteration=iteration, episodes=iteration * asked)

    if not resumed:
        measure(0)
    for t in range(run.position["outer_iteration"], args.T):
        # ---- answers of the current policy (Eq. 11); all pairs scored once under the reference ----
        pairs = demonstration_rows(run, t, K, demonstrations, raw, generator, tokenizer)
        compared = preference_rows(run, t, K, preferences, raw, tokenizer)
        # ---- K updates on both sets ----
        policy.train()
        answers = {}
        if asked:
            answers["completions/mean_length"] = sum(len(p["rejected_ids"]) for p in pairs) / asked
            answers["completions/clipped_ratio"] = 1 - sum(p["finished"] for p in pairs) / asked
        epochs = [mixed_batches(len(pairs), len(compared), args, t, e) for e in range(args.num_train_epochs)]  # D4
        batches = [(parts, i) for parts in epochs for i in range(len(parts))]
        for k, batch in run.updates(f"iteration {t}: training", batches, t, t * K):
            step, rows = t * K + k, weighted_rows(pairs, compared, *batch, args)
            lr = learning_rate_at(step, args.T * K, args.learning_rate, args.warmup_ratio, args.lr_scheduler_type)  # D3
            row = run.step(
                policy, optimizer, rows,
                lambda part: mixed_loss(policy, part, args, run.accelerator.device), longest_sequence, lr,
            )  # fmt: skip
            if k == 0 and (t == 0 or args.ref == "previous"):
                check_first_losses(run, row)
            run.position["num_tokens"] += round(row["num_tokens"] * len(rows))
            row.update(answers, num_tokens=run.position["num_tokens"], epoch=(step + 1) * args.num_train_epochs / K)
            run.log_update(row, step + 1, episodes=(t + 1) * asked)
        measure(t + 1)
        run.position.update(outer_iteration=t + 1)
    equation = "Eq. 10" if args.objective == "direct" else "Eq. 11"
    path = run.save_final(policy, tokenizer, run.model_card(method, f"arXiv:2406.06874, {equation}"))
    evals.print_table(run, "start", method)
    run.print(f"model: {path}")
    run.end()


# ---- what is scored ----
def mixed_loss(policy, rows: list[dict], args: Args, device) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Weighted losses of rows -> ((B,), {metric: (sum, count)}). One forward pass over all their sequences.

    A row has prompt_ids, chosen_ids, rejected_ids and is a demonstration with the policy's answer, or without one
    (rejected_ids None: one sequence), or a preference; `weight` multiplies its loss (weighted_rows).
    """
    pairs = [i for i, r in enumerate(rows) if r["rejected_ids"] is not None]
    sequences = [(r["prompt_ids"], r["chosen_ids"]) for r in rows] + [
        (rows[i]["prompt_ids"], rows[i]["rejected_ids"]) for i in pairs
    ]
    batch = collate(sequences, pad_token_id=0).to(device)
    scores = response_logprobs(policy, batch)
    chosen, answers = masked_sum(scores.logprobs, batch.response_mask).split([len(rows), len(pairs)])  # D1
    rejected = torch.zeros_like(chosen).index_copy(0, torch.tensor(pairs, dtype=torch.long, device=device), answers)
    ref_chosen = chosen.new_tensor([r.get("ref_chosen", 0.0) for r in rows])
    ref_rejected = chosen.new_tensor([r.get("ref_rejected", 0.0) for r in rows])
    is_pair = torch.tensor([r["rejected_ids"] is not None for r in rows], device=device)
    demonstrated = torch.tensor([r["demonstrated"] for r in rows], device=device)
    compare = {"dpo": dpo_loss, "ipo": ipo_loss}[args.preference_loss]
    losses = torch.where(
        demonstrated,
        torch.where(is_pair, irft_loss(chosen, rejected, ref_chosen, ref_rejected, args.beta), -chosen),
        compare(chosen, rejected, ref_chosen, ref_rejected, args.beta),
    )
    with torch.no_grad():
        r_chosen, r_rejected = args.beta * (chosen - ref_chosen), args.beta * (rejected - ref_rejected)
        won = (r_chosen > r_rejected) + 0.5 * (r_chosen == r_rejected)
        answered = demonstrated & is_pair
        columns = {
            "preferences/loss": (losses, ~demonstrated),
            "rewards/chosen": (r_chosen, ~demonstrated),
            "rewards/rejected": (r_rejected, ~demonstrated),
            "rewards/margins": (r_chosen - r_rejected, ~demonstrated),
            "rewards/accuracies": (won, ~demonstrated),
            "logps/chosen": (chosen, ~demonstrated),
            "logps/rejected": (rejected, ~demonstrated),
            "demonstrations/loss": (losses, demonstrated),
            "demonstrations/chosen": (r_chosen, answered),
            "demonstrations/rejected": (r_rejected, answered),
            "demonstrations/margins": (r_chosen - r_rejected, answered),
            "demonstrations/accuracies": (won, answered),
            "demonstrations/logps/chosen": (chosen, demonstrated),
            "demonstrations/logps/rejected": (rejected, answered),
        }
        stats = {name: (values[mask].sum(), mask.sum()) for name, (values, mask) in columns.items()}
        count, tokens = chosen.new_tensor(len(rows)), batch.response_mask.sum()
        stats |= {
            "entropy": (scores.entropy.sum(), tokens),
            "mean_token_accuracy": (scores.correct.sum(), tokens),
            "num_tokens": (batch.attention_mask.sum(), count),
        }
    return losses * losses.new_tensor([r["weight"] for r in rows]), stats


def longest_sequence(row: dict) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"] or []))


# ---- both sets as they are trained on: the policy's answers, and what the reference says of every pair ----
def demonstration_rows(run, t: int, K: int, demonstrations, policy, generator, tokenizer) -> list[dict]:
    """Demonstrations of outer iteration t: alone (direct), or with answers and reference log-probs (self_play).

    The rows with answers are kept in generations/iter_<t>.parquet.
    """
    args = run.args
    if args.objective == "direct" or not demonstrations:
        return [
            {"prompt_ids": d["prompt_ids"], "chosen_ids": d["response_ids"], "rejected_ids": None}
            for d in demonstrations
        ]
    path = run.dir / "generations" / f"iter_{t}.parquet"

    def make() -> list[dict]:
        rows = [demonstrations[i] for i in data_order(len(demonstrations), args.seed)]  # the one chunk of irft.py
        with run.phase(f"iteration {t}: answers", len(rows), outer_iteration=t) as advance:
            rollout = evals.sample_rows(run, generator, rows, args.seed * 10_007 + t, args.temperature, advance)
        return score_reference(run, t, pair_rows(tokenizer, rows, rollout, t), policy, path.stem)

    return run.stored(path, make, t * K)


def preference_rows(run, t: int, K: int, preferences, policy, tokenizer) -> list[dict]:
    """Preferences with the log-probs of the reference, kept in generations/preferences.parquet.

    With --ref previous the file is preferences_<t>.parquet: the reference is another one in every outer iteration.
    """
    if not preferences:
        return []
    moves = run.args.ref == "previous"
    path = run.dir / "generations" / (f"preferences_{t}.parquet" if moves else "preferences.parquet")

    def make() -> list[dict]:
        end = end_of_turn(tokenizer)  # a response that was cut has none
        pairs = [
            {
                "row": p["row"], "prompt": p["prompt"], "prompt_text": p["prompt_text"],
                "chosen": tokenizer.decode(p["chosen_ids"], skip_special_tokens=True),
                "rejected": tokenizer.decode(p["rejected_ids"], skip_special_tokens=True),
                "prompt_ids": p["prompt_ids"], "chosen_ids": p["chosen_ids"], "rejected_ids": p["rejected_ids"],
                "chosen_finished": p["chosen_ids"][-1] == end, "finished": p["rejected_ids"][-1] == end,
            }
            for p in preferences
        ]  # fmt: skip
        return score_reference(run, t, pairs, policy, path.stem)

    return run.stored(path, make, t * K if moves else 0)


def score_reference(run, t: int, pairs: list[dict], policy, name: str) -> list[dict]:
    """Put ref_chosen and ref_rejected, log-probs under the reference of outer iteration t, into the pairs; return the pairs.

    name: of the pairs, for the progress line.
    """
    is_reference = run.args.ref == "previous" or t == 0
    with (
        run.phase(f"iteration {t}: reference, {name}", 2 * len(pairs), outer_iteration=t) as advance,
        models.reference_policy(run, policy, is_reference) as ref_policy,
        evaluating(ref_policy),
    ):
        sequences = [(p["prompt_ids"], p[f"{kind}_ids"]) for p in pairs for kind in ("chosen", "rejected")]
        scored = evals.sequence_logprobs(run, ref_policy, sequences, advance=advance)
        for pair, (chosen, _), (rejected, _) in zip(pairs, scored[::2], scored[1::2], strict=True):
            pair["ref_chosen"], pair["ref_rejected"] = chosen, rejected
    return pairs


def check_first_losses(run, row: dict[str, float]) -> None:
    """UserError unless IRFT and DPO start at log 2 and IPO at 1 / (4 beta^2), to rounding: policy and reference coincide."""
    args = run.args
    exact = run.accelerator.mixed_precision == "no" and args.dtype == "float32"
    ipo = args.preference_loss == "ipo"
    checks = [("preferences/loss", 0.25 / args.beta**2 if ipo else math.log(2), args.beta**-2 if ipo else 1.0)]
    if args.objective == "self_play":
        checks.append(("demonstrations/loss", math.log(2), 1.0))
    for name, expected, scale in checks:
        if name in row and not abs(row[name] - expected) < (1e-4 if exact else 5e-2) * scale:
            raise UserError(
                f"first {name}: found {row[name]:.6f}, expected {expected:.6f}: policy and reference should coincide here but"
                " do not"
            )


# ---- the plan: updates, and the rows and weights of each, known before anything runs ----
def count_updates(n: int, m: int, args: Args) -> int:
    """K, updates of one outer iteration on n demonstrations and m preferences (mixed_batches)."""
    return args.num_train_epochs * math.ceil(max(n, m) / args.batch_size)


def mixed_batches(n: int, m: int, args, *key: int) -> list[tuple[list[int], list[int]]]:
    """(demonstrations, preferences) of each step of one epoch over n and m of them: one pass over both, in equal parts."""
    steps = math.ceil(max(n, m) / args.batch_size)
    first, second = data_order(n, args.seed, *key), data_order(m, args.seed, *key, 1)
    return [
        (first[k * n // steps : (k + 1) * n // steps], second[k * m // steps : (k + 1) * m // steps])
        for k in range(steps)
    ]


def weighted_rows(pairs: list[dict], preferences: list[dict], batches: list, k: int, args: Args) -> list[dict]:
    """Rows of step k of an epoch. Weights are such that the losses of the epoch's steps average to w1 mean_D + mean_P."""
    first, second = batches[k]
    size = len(first) + len(second)  # a step's objective is the mean over its rows
    weights = [
        weight * len(batches) * size / max(n, 1)
        for weight, n in ((args.demo_weight, len(pairs)), (1.0, len(preferences)))
    ]
    rows = [{**pairs[i], "weight": weights[0], "demonstrated": True} for i in first]
    return rows + [{**preferences[i], "weight": weights[1], "demonstrated": False} for i in second]


def plan_work(demonstrations: list[dict], preferences: list[dict], args: Args) -> cost.Work:
    """--dry-run: what passes through the policy and its reference."""
    work = cost.Work(args, demonstrations or preferences)
    rows = cost.written(demonstrations, "response_ids")
    compared = cost.written(preferences, "chosen_ids", "rejected_ids")
    if args.objective == "self_play":
        rows = work.pairs(demonstrations)
        work.add("answers", "generate", work.answered(demonstrations) * args.T, len(demonstrations))
        work.add("reference", "score", rows * args.T, len(demonstrations))
    work.add("reference", "score", compared * (args.T if args.ref == "previous" else 1), len(preferences))
    work.add("training", "train", (rows + compared) * (args.T * args.num_train_epochs), args.batch_size)
    work.evaluations(args.T + 1)
    return work


def plan_lines(n: int, m: int, K: int, args: Args) -> list[str]:
    """--dry-run with n demonstrations and m preferences: the answers and updates of every outer iteration."""
    lines = [
        f"{method_name(args)}, demonstrations {args.dataset}, preferences {args.preference_dataset},"
        f" w1 = {args.demo_weight:g}, T = {args.T}"
    ]
    asked = n if args.objective == "self_play" else 0
    for t in range(args.T):
        lines.append(
            f"iteration {t}: {asked} answers of up to {args.max_new_tokens} tokens ({asked * args.max_new_tokens} at most),"
            f" {K} updates on {n} demonstrations and {m} preferences"
        )
    return [
        *lines, f"in all {args.T * K} updates of up to {args.batch_size} demonstrations and {args.batch_size} preferences"
    ]  # fmt: skip


def method_name(args: Args) -> str:
    """Name of the method: special cases have names of their own."""
    if not args.demo_weight:
        return args.preference_loss.upper()
    if args.preference_dataset == "none":
        return "SFT" if args.objective == "direct" else "SPIN" if args.T == 1 else "IRFT"
    return "Direct AIHF" if args.objective == "direct" else "Self-Play AIHF"


# ---- what flags mean and what is logged ----
@dataclass
class Args(RunArgs):
    sequences_per_row: ClassVar[int] = 2

    objective: Literal["self_play", "direct"] = "self_play"
    """the demonstrations' part: irft_loss against the policy's own answers (Eq. 11), or -log pi (Eq. 10), without answers."""
    preference_loss: Literal["dpo", "ipo"] = "dpo"
    """the preferences' part: -log sigmoid(beta d) (Eq. 10, 11), or (d - 1/(2 beta))^2 of IPO."""
    demo_weight: Annotated[float | Auto, NOT_NEGATIVE] = "auto"
    """w1, >= 0: weight of the demonstrations beside the preferences' 1. 0 is DPO or IPO: no demonstration is trained on.
    auto (ours): the balance, at which a nat of log pi weighs as much in both parts at first; beta/2 for Eq. 10, 1 for Eq. 11."""
    preference_dataset: str = "auto"
    """preferences: pydoc, a file or folder, a short name or a hub id; if it is --dataset, rows not used as demonstrations.
    none: no preferences, which makes self_play IRFT and direct SFT."""
    max_preferences: Annotated[int | Auto, NOT_NEGATIVE] = "auto"
    """preferences to use, the first N in a seeded order; 0 means all. Paper: the rest of HH; all 61.1k of UltraFeedback."""
    T: Annotated[int, AT_LEAST_1] = 2
    """outer iterations, >= 1: how often the policy answers anew. With direct another factor of --num-train-epochs."""
    num_train_epochs: Annotated[int, AT_LEAST_1] = 1
    """passes over demonstrations and preferences in one outer iteration, >= 1. Paper: answers anew at each epoch (A.1.4)."""
    beta: Annotated[float, POSITIVE] = 0.1
    """weight of KL(pi || pi_ref), reward units per nat, > 0."""
    ref: Literal["initial", "previous"] = "initial"
    """reference policy: the model the run starts from (the equations), or that of the last iteration (SPIN)."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """of sampled answers, > 0. At 1 they come from the distribution whose log-probs enter the loss."""
    lr_scheduler_type: Literal["auto", "linear", "cosine"] = "auto"
    """how the learning rate falls to 0 after its warm-up. Paper: cosine (A.1.4)."""

    def check(self) -> None:
        if self.demo_weight == "auto":
            compares = self.preference_dataset != "none" and 0 < self.beta < math.inf  # another beta is refused below
            self.demo_weight = balance(self) if compares else 1.0
        super().check()
        require(
            self.demo_weight > 0 or self.preference_dataset != "none", "demo_weight", self.demo_weight,
            "a number above 0 beside --preference-dataset none: nothing is left to learn from",
        )  # fmt: skip
        require(
            self.demo_weight > 0 or not self.select_top_k, "select_top_k", self.select_top_k,
            "0 beside --demo-weight 0, which trains on no demonstration",
        )  # fmt: skip

    def needs_demonstrations(self) -> bool:
        return self.demo_weight != 0


SETTINGS = {  # what auto means: the row that args.settings_row finds by the model's name; a flag that is given wins
    "tiny": dict(
        dataset="pydoc", max_samples=800, preference_dataset="pydoc", max_preferences=800, eval_samples=200, max_length=256,
        max_new_tokens=48, learning_rate=1e-4, lr_scheduler_type="linear", batch_size=32, per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
    ),
    "smollm2": two_cores.row(Args),
    "pythia": dict(  # AIHF paper, Sec. 5: data; rate, batch, lengths and schedule are ours, the paper gives none
        dataset="hh-rlhf", max_samples=10_000, preference_dataset="hh-rlhf", max_preferences=0, eval_samples=500, max_length=1024,
        max_new_tokens=256, learning_rate=5e-7, lr_scheduler_type="cosine", batch_size=64, per_device_train_batch_size=4,
        per_device_eval_batch_size=32,
    ),
    "other": dict(  # AIHF paper, Sec. 5 and App. A.1.4: data, rate, schedule, length, batch 8 (eight devices with 1)
        dataset="ultrachat_200k", max_samples=50_000, preference_dataset="ultrafeedback_binarized", max_preferences=0,
        eval_samples=500, max_length=512, max_new_tokens=256, learning_rate=5e-7, lr_scheduler_type="cosine", batch_size=8,
        per_device_train_batch_size=1, per_device_eval_batch_size=16,
    ),
}  # fmt: skip


METRICS = {  # name -> meaning, unit, range
    "loss": "w1 demonstrations/loss + preferences/loss, over an epoch; (1 + w1) log 2 at the start (self_play, dpo; w1 = 1)",
    "preferences/loss": "dpo_loss or ipo_loss, mean over pairs; log 2 = 0.693 (dpo), 1 / (4 beta^2) (ipo) at the start, falls",
    "rewards/chosen": "beta (log pi - log pi_ref) of chosen responses; 0 at the start, should not fall far",
    "rewards/rejected": "the same of rejected responses; 0 at the start, falls",
    "rewards/margins": "rewards/chosen - rewards/rejected; 0 at the start, rises",
    "rewards/accuracies": "share of pairs with a margin above 0, ties half; near 0.5 at the start",
    "logps/chosen": "log pi of chosen responses, nats per response",
    "logps/rejected": "log pi of rejected responses, nats per response",
    "demonstrations/loss": "irft_loss, mean over pairs; log 2 at the start (self_play); -log pi, nats per response (direct)",
    "demonstrations/chosen": "beta (log pi - log pi_ref) of demonstrations; 0 at the start, should not fall (self_play)",
    "demonstrations/rejected": "the same of the policy's own answers; 0 at the start, falls (self_play)",
    "demonstrations/margins": "demonstrations/chosen - demonstrations/rejected; 0 at the start, rises (self_play)",
    "demonstrations/accuracies": "share of demonstrations with a margin above 0, ties half; near 0.5 at the start (self_play)",
    "demonstrations/logps/chosen": "log pi of demonstrations, nats per response",
    "demonstrations/logps/rejected": "log pi of the policy's own answers, nats per response (self_play)",
    "entropy": "of the next-token distribution, exact, nats per response token",
    "mean_token_accuracy": "share of response tokens that are the model's most likely one",
    "num_tokens": "prompt and response tokens trained on so far",
    "grad_norm": "before clipping",
    "learning_rate": "of this update",
    "epoch": "passes over demonstrations and preferences so far",
    "completions/mean_length": "tokens of the answers of this outer iteration, EOS included",
    "completions/clipped_ratio": "share of answers cut at --max-new-tokens",
    **metrics.EVAL_METRICS,
}


if __name__ == "__main__":
    main(lambda: train(parse_args(Args, __doc__, SETTINGS)))
