"""aihf_direct.py against sums and formulas, TRL's values, and the scripts whose special case it is; its runs, killed and not."""

import contextlib
import copy
import functools
import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import bandit
import exact
import numpy as np
import pytest
import torch
from helpers import (
    LookUp,
    assert_phases_as_planned,
    assert_same_metrics,
    chosen,
    command,
    drive,
    make_classifier,
    make_data,
    make_model,
    metrics,
    run,
    slow_unless,
    weights,
)
from test_logprobs import widen

import aihf_direct
import irft
import sft
from aihf_direct import dpo_loss, ipo_loss, mixed_batches, mixed_loss, weighted_rows
from common import UserError
from common.args import resolve_auto
from common.data import collate
from common.engine import Engine
from common.run import Run
from common.store import read_pairs
from common.streams import data_order, learning_rate_at
from extras.metrics import JUDGE_METRICS

BETA, EOS = 0.3, exact.EOS
LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}


def arguments(**given) -> aihf_direct.Args:
    usual = {"mixed_precision": "no", "max_grad_norm": 1e9, "beta": BETA, "demo_weight": 1.0}
    args = aihf_direct.Args(**{**usual, **given})
    resolve_auto(args, aihf_direct.SETTINGS)
    return args


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the two preference losses ----
def by_hand(kind: str, chosen, rejected, ref_chosen, ref_rejected, beta):
    """In plain numpy: log(1 + e^(-beta d)), and (d - 1 / (2 beta))^2."""
    d = (chosen - ref_chosen) - (rejected - ref_rejected)
    return np.log1p(np.exp(-beta * d)) if kind == "dpo" else (d - 0.5 / beta) ** 2


def check_preference_loss(kind: str, loss) -> bool:
    """Value by hand and gradient by finite differences."""
    rng = np.random.default_rng(0)
    values = [rng.normal(-5, 2, 8) for _ in range(4)]
    tensors = [torch.tensor(v, requires_grad=True) for v in values[:2]] + [torch.tensor(v) for v in values[2:]]
    found = loss(*tensors, BETA)
    if found.shape != (8,) or not np.allclose(found.detach().numpy(), by_hand(kind, *values, BETA), atol=1e-12, rtol=0):
        return False
    for k, gradient in enumerate(torch.autograd.grad(found.sum(), tensors[:2])):
        up, down = ([v + h * (i == k) for i, v in enumerate(values)] for h in (1e-6, -1e-6))
        slope = (by_hand(kind, *up, BETA) - by_hand(kind, *down, BETA)) / 2e-6
        if not np.allclose(gradient.numpy(), slope, atol=1e-6, rtol=0):
            return False
    return True


MUTANTS = {
    "sign": lambda f: lambda c, r, rc, rr, b: f(r, c, rr, rc, b),
    "no_beta": lambda f: lambda c, r, rc, rr, b: f(c, r, rc, rr, 1.0),
    "beta_upside_down": lambda f: lambda c, r, rc, rr, b: f(c, r, rc, rr, 1 / b),
    "half_beta": lambda f: lambda c, r, rc, rr, b: f(c, r, rc, rr, b / 2),
    "mean_for_sum": lambda f: lambda c, r, rc, rr, b: f(c / 3, r / 3, rc / 3, rr / 3, b),
    "no_reference": lambda f: lambda c, r, rc, rr, b: f(c, r, 0 * rc, 0 * rr, b),
    "references_swapped": lambda f: lambda c, r, rc, rr, b: f(c, r, rr, rc, b),
    "reference_added": lambda f: lambda c, r, rc, rr, b: f(c, r, -rc, -rr, b),
    "chosen_without_gradient": lambda f: lambda c, r, rc, rr, b: f(c.detach(), r, rc, rr, b) + 0 * c,
    "rejected_without_gradient": lambda f: lambda c, r, rc, rr, b: f(c, r.detach(), rc, rr, b) + 0 * r,
    "mean_over_pairs": lambda f: lambda c, r, rc, rr, b: f(c, r, rc, rr, b).mean().expand(8),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_preference_losses_equal_their_definitions(kind):
    assert check_preference_loss(kind, LOSSES[kind])
    assert not check_preference_loss(kind, LOSSES["ipo" if kind == "dpo" else "dpo"])


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_wrong_preference_loss_is_told_apart(kind, mutant):
    assert not check_preference_loss(kind, MUTANTS[mutant](LOSSES[kind]))


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck_and_where_policy_is_reference(kind):
    values = [noise(5, seed=i).requires_grad_() for i in range(4)]
    assert torch.autograd.gradcheck(lambda *v: LOSSES[kind](*v, BETA), values)
    x, y = values[:2]
    start = LOSSES[kind](x, y, x.detach(), y.detach(), BETA)
    expected = math.log(2) if kind == "dpo" else 1 / (4 * BETA**2)
    torch.testing.assert_close(start, torch.full_like(start, expected), rtol=1e-14, atol=0)
    gradients = torch.autograd.grad(start.sum(), (x, y))
    slope = BETA / 2 if kind == "dpo" else 1 / BETA
    torch.testing.assert_close(
        torch.stack(gradients)[:, 0], torch.tensor([-slope, slope], dtype=torch.float64), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("beta", [0.0, -0.1])
@pytest.mark.parametrize("kind", LOSSES)
def test_beta_must_be_positive(kind, beta):
    with pytest.raises(ValueError, match="beta must be > 0"):
        LOSSES[kind](*[torch.zeros(2)] * 4, beta)


# DPOTrainer._compute_loss of TRL 1.16.0 (torch 2.13.0), called on these log-probs in float64, one pair at a time:
# (policy chosen, policy rejected, reference chosen, reference rejected).
TRL_PAIRS = [
    (-3.2, -4.1, -3.5, -3.9),
    (-10.0, -8.5, -9.0, -9.5),
    (-0.7, -0.7, -0.7, -0.7),
    (-25.5, -41.25, -28.0, -30.5),
]
TRL_VALUES = {  # (loss_type, beta, tokens of each response) -> (losses, their derivatives by log pi(chosen))
    ("sigmoid", 0.1, 1): (
        [0.6684596480132863, 0.7981388693815918, 0.6931471805599453, 0.23570667107866644],
        [-0.04875026035157897, -0.0549833997312478, -0.05, -0.02099876265736025],
    ),
    ("sigmoid", 0.5, 3): (
        [0.5759394198788437, 1.3132616875182228, 0.6931471805599453, 0.001325901035628043],
        [-0.218911749557101, -0.36552928931500245, -0.25, -0.0006625112086065804],
    ),
    ("ipo", 0.1, 1): ([20.25, 49.0, 25.0, 68.0625], [-9.0, -14.0, -10.0, 16.5]),
    ("ipo", 0.5, 1): ([0.25, 9.0, 1.0, 150.0625], [-1.0, -6.0, -2.0, 24.5]),
    ("ipo", 0.1, 4): ([23.765625, 30.25, 25.0, 2.84765625], [-2.4375, -2.75, -2.5, -0.84375]),
}
TRL_METRICS = {  # of the first pair, sigmoid, beta 0.1
    "rewards/chosen": 0.03, "rewards/rejected": -0.02, "rewards/margins": 0.05, "rewards/accuracies": 1.0,
    "logps/chosen": -3.2, "logps/rejected": -4.1,
}  # fmt: skip


@pytest.mark.parametrize("case", TRL_VALUES, ids=lambda c: "-".join(map(str, c)))
def test_preference_losses_equal_those_of_trl(case):
    """TRL's IPO averages log-probs over tokens, ours sums them as the paper does: equal for one token; for n tokens TRL's is
    ours at beta / n over n^2."""
    kind, beta, tokens = case
    values = torch.tensor(TRL_PAIRS, dtype=torch.float64).T.clone()
    chosen = values[0].clone().requires_grad_()
    if kind == "sigmoid":
        losses = dpo_loss(chosen, *values[1:], beta)
    else:
        losses = ipo_loss(chosen, *values[1:], beta / tokens) / tokens**2
    (slopes,) = torch.autograd.grad(losses.sum(), chosen)
    for found, expected in zip((losses, slopes), TRL_VALUES[case], strict=True):
        torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# ---- rows of both kinds ----
WORDS = [([0], [1, 2, EOS], [0, EOS]), ([1, 2], [EOS], [2, 2, 2, 2]), ([2, 0, 1], [0, EOS], [1, EOS]), ([1], [1, 1, EOS], [EOS]),
         ([0, 2], [2, EOS], [0, 1, EOS]), ([2], [0, 0, EOS], [2, 1, 0, EOS]), ([1, 1], [EOS], [0, EOS])]  # fmt: skip


def pairs(n: int = 7, shift: int = 0) -> list[dict]:
    rows = [WORDS[(i + shift) % 7] for i in range(n)]
    return [
        {
            "prompt_ids": x,
            "chosen_ids": y,
            "rejected_ids": z,
            "ref_chosen": -3.0 - i,
            "ref_rejected": -4.0 + i / 2 + shift,
        }
        for i, (x, y, z) in enumerate(rows)
    ]


def demonstrated(objective: str, n: int = 7) -> list[dict]:
    if objective == "self_play":
        return pairs(n)
    return [{"prompt_ids": p["prompt_ids"], "chosen_ids": p["chosen_ids"], "rejected_ids": None} for p in pairs(n)]


def all_rows(args, n: int = 7, m: int = 5) -> list[dict]:
    """One update on everything: n demonstrations and m preferences, weighted."""
    indices = [(list(range(n)), list(range(m)))]
    return weighted_rows(demonstrated(args.objective, n) if n else [], pairs(m, shift=3), indices, 0, args)


def log_pi(model, row: dict, name: str) -> torch.Tensor:
    return exact.response_logprobs(model, row["prompt_ids"], [row[name]])[0]


def objective_by_hand(model, args, demonstrations: list[dict], preferences: list[dict]) -> torch.Tensor:
    """w1 mean_D + mean_P from unpadded forward passes and the definitions."""

    def margin(row):
        chosen, rejected = log_pi(model, row, "chosen_ids"), log_pi(model, row, "rejected_ids")
        return (chosen - row["ref_chosen"]) - (rejected - row["ref_rejected"])

    total = torch.zeros((), dtype=torch.float64)
    for row in demonstrations:
        if args.objective == "direct":
            loss = -log_pi(model, row, "chosen_ids")
        else:
            loss = torch.log1p(torch.exp(-args.beta * margin(row)))
        total = total + args.demo_weight * loss / len(demonstrations)
    for row in preferences:
        d = margin(row)
        loss = torch.log1p(torch.exp(-args.beta * d)) if args.preference_loss == "dpo" else (d - 0.5 / args.beta) ** 2
        total = total + loss / len(preferences)
    return total


def flat_gradient(value, model) -> torch.Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, model.parameters(), strict=True)]
    )


def one_step(rows: list[dict], args, micro: int = 64, model=None) -> tuple[torch.Tensor, dict]:
    """(gradient, logged row) of one update: plain descent at rate 1 moves the weights by minus the gradient."""
    from accelerate import Accelerator

    model = model or exact.make_model("gpt_neox", 0)
    run = Run.__new__(Run)
    run.args, run.engine, run.rank, run.world = args, Engine(Accelerator(cpu=True)), 0, 1
    run.accelerator = run.engine.accelerator
    args.per_device_train_batch_size = micro
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = lambda part: mixed_loss(model, part, args, "cpu")  # noqa: E731
    row = run.step(model, optimizer, rows, loss, aihf_direct.longest_sequence, lr=1.0)
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)]), row


OBJECTIVES = [("self_play", "dpo"), ("self_play", "ipo"), ("direct", "dpo"), ("direct", "ipo")]


def check_epoch(objective: str, kind: str, batches=mixed_batches, weighted=weighted_rows) -> bool:
    """The gradients, and the losses, of an epoch's updates average to those of w1 mean_D + mean_P. 7 and 4 rows in 3 updates."""
    args = arguments(objective=objective, preference_loss=kind, demo_weight=0.7, batch_size=3)
    demonstrations, preferences = demonstrated(objective), pairs(4, shift=3)
    places = batches(7, 4, args, 2, 1)
    steps = [one_step(weighted(demonstrations, preferences, places, k, args), args) for k in range(len(places))]
    model = exact.make_model("gpt_neox", 0)
    expected = objective_by_hand(model, args, demonstrations, preferences)
    truth = flat_gradient(expected, model)
    assert truth.norm() > 1e-2 and len(places) == 3
    found = torch.stack([gradient for gradient, _ in steps]).mean(0)
    loss = sum(row["loss"] for _, row in steps) / len(steps)
    return torch.allclose(found, truth, rtol=0, atol=1e-10) and abs(loss - expected.item()) < 1e-10


@pytest.mark.parametrize(("objective", "kind"), OBJECTIVES)
def test_updates_of_an_epoch_average_to_the_objective(objective, kind):
    assert check_epoch(objective, kind)


def reweighted(change):
    """weighted_rows with other weights: change(row, part sizes, updates) -> weight."""

    def weighted(pairs, preferences, batches, k, args):
        rows = weighted_rows(pairs, preferences, batches, k, args)
        sizes = [len(part) for part in batches[k]]
        return [{**r, "weight": change(r, sizes, len(batches))} for r in rows]

    return weighted


WRONG_EPOCHS = {
    "no_weights": dict(weighted=reweighted(lambda r, s, n: 1.0)),
    "no_demo_weight": dict(weighted=reweighted(lambda r, s, n: r["weight"] / (0.7 if r["demonstrated"] else 1))),
    "demo_weight_on_both": dict(weighted=reweighted(lambda r, s, n: r["weight"] * (1 if r["demonstrated"] else 0.7))),
    "sum_over_updates": dict(weighted=reweighted(lambda r, s, n: r["weight"] / n)),
    "mean_of_parts": dict(
        weighted=reweighted(lambda r, s, n: sum(s) / s[0] * 0.7 if r["demonstrated"] else sum(s) / s[1])
    ),
    "kinds_swapped": dict(
        weighted=lambda d, p, b, k, a: [
            {**r, "demonstrated": not r["demonstrated"]} for r in weighted_rows(d, p, b, k, a)
        ]
    ),
    "parts_of_a_batch": dict(
        batches=lambda n, m, a, *key: [
            (data_order(n, a.seed, *key)[k * 3 : k * 3 + 3], data_order(m, a.seed, *key, 1)[k * 3 : k * 3 + 2])
            for k in range(3)
        ]
    ),
}


@pytest.mark.parametrize("mutant", WRONG_EPOCHS)
def test_wrong_weights_are_told_apart(mutant):
    assert not check_epoch("self_play", "ipo", **WRONG_EPOCHS[mutant])


@pytest.mark.parametrize(
    ("n", "m", "size"), [(7, 4, 3), (12, 12, 4), (3, 20, 4), (20, 3, 4), (9, 0, 4), (0, 9, 4), (1, 1, 8)]
)
def test_an_epoch_passes_once_over_both_sets_in_equal_parts(n, m, size):
    args = arguments(batch_size=size, demo_weight=0.7, num_train_epochs=2)
    batches = mixed_batches(n, m, args, 1, 0)
    assert aihf_direct.count_updates(n, m, args) == 2 * len(batches)
    for which, count in ((0, n), (1, m)):
        parts = [b[which] for b in batches]
        assert sorted(i for part in parts for i in part) == list(range(count))
        assert max(map(len, parts)) <= size and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert batches == mixed_batches(n, m, args, 1, 0)
    assert max(n, m) < 3 or batches != mixed_batches(n, m, args, 1, 1) != mixed_batches(n, m, args, 2, 0)
    totals = dict.fromkeys([("demonstrated", i) for i in range(n)] + [("preferred", i) for i in range(m)], 0.0)
    sets = [{"i": i} for i in range(n)], [{"i": i} for i in range(m)]
    for k in range(len(batches)):
        rows = weighted_rows(*sets, batches, k, args)
        for r in rows:
            totals["demonstrated" if r["demonstrated"] else "preferred", r["i"]] += (
                r["weight"] / len(rows) / len(batches)
            )
    for (kind, _), total in totals.items():
        assert total == pytest.approx(0.7 / n if kind == "demonstrated" else 1 / m, rel=1e-12)


@pytest.mark.parametrize("objective", ["self_play", "direct"])
def test_neither_micro_batches_nor_order_change_an_update(objective):
    args = arguments(objective=objective, demo_weight=0.7)
    whole, row = one_step(all_rows(args), args)
    assert whole.norm() > 1e-2
    for micro, turned in ((1, False), (2, True), (5, False)):
        rows = all_rows(args)
        part, other = one_step(rows[::-1] if turned else rows, args, micro)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)
        assert other == pytest.approx(row, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("objective", ["self_play", "direct"])
def test_padding_of_any_kind_changes_nothing(objective, monkeypatch):
    """More columns of any token, and NaN at masked positions of the log-probs."""
    args = arguments(objective=objective)
    clean, row = one_step(all_rows(args), args)
    for value in (0, 1, EOS):
        monkeypatch.setattr(aihf_direct, "collate", lambda s, pad_token_id, v=value: widen(collate(s, 0), 5, v))
        found, other = one_step(all_rows(args), args)
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-12)
        assert other == pytest.approx(row, rel=1e-10, abs=1e-12)
    honest = aihf_direct.response_logprobs

    def poisoned(model, batch):
        scores = honest(model, batch)
        return scores._replace(logprobs=torch.where(batch.response_mask, scores.logprobs, torch.nan))

    monkeypatch.setattr(aihf_direct, "response_logprobs", poisoned)
    found, _ = one_step(all_rows(args), args)
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", ["self_play", "direct"])
def test_rows_are_not_edited_and_metrics_are_what_they_say(objective):
    args = arguments(objective=objective, demo_weight=0.7, preference_loss="ipo")
    rows = all_rows(args)
    before = copy.deepcopy(rows)
    _, found = one_step(rows, args, micro=2)
    assert rows == before
    model = exact.make_model("gpt_neox", 0)
    compared, shown = [r for r in rows if not r["demonstrated"]], [r for r in rows if r["demonstrated"]]
    expected = {}
    for prefix, reward, part in (("", "rewards/", compared), ("demonstrations/", "demonstrations/", shown)):
        c = torch.stack([log_pi(model, r, "chosen_ids") for r in part]).detach()
        expected[f"{prefix}logps/chosen"] = c.mean()
        if part[0]["rejected_ids"] is None:
            continue
        r = torch.stack([log_pi(model, r, "rejected_ids") for r in part]).detach()
        ref_c, ref_r = (
            torch.tensor([row[f"ref_{k}"] for row in part], dtype=torch.float64) for k in ("chosen", "rejected")
        )
        margin = BETA * ((c - ref_c) - (r - ref_r))
        assert 0 < (margin > 0).double().mean() < 1
        expected |= {
            f"{prefix}logps/rejected": r.mean(), f"{reward}chosen": BETA * (c - ref_c).mean(),
            f"{reward}rejected": BETA * (r - ref_r).mean(), f"{reward}margins": margin.mean(),
            f"{reward}accuracies": (margin > 0).double().mean(),
        }  # fmt: skip
    zero = arguments(objective=objective, demo_weight=1.0)
    expected["demonstrations/loss"] = objective_by_hand(model, zero, shown, [])
    expected["preferences/loss"] = objective_by_hand(model, args, [], compared)
    expected["loss"] = objective_by_hand(model, args, shown, compared)
    sequences = [r["prompt_ids"] + r[k] for r in rows for k in ("chosen_ids", "rejected_ids") if r[k] is not None]
    assert len(sequences) == (24 if objective == "self_play" else 17)
    expected["num_tokens"] = sum(map(len, sequences)) / len(rows)
    for name, value in expected.items():
        assert found[name] == pytest.approx(
            float(value.detach() if isinstance(value, torch.Tensor) else value), rel=1e-10
        ), name
    others = {"entropy", "mean_token_accuracy", "grad_norm", "learning_rate"}
    assert found.keys() == expected.keys() | others


def test_metrics_of_preferences_equal_those_of_trl():
    """TRL's DPOTrainer on the same log-probs, through a model that is looked up. A tie counts half here, nothing there."""
    for pair, metrics_of_trl in ((TRL_PAIRS[0], TRL_METRICS), (TRL_PAIRS[2], {"rewards/accuracies": 0.5})):
        logits = torch.tensor([pair[:2]], dtype=torch.float64)
        logits = torch.cat([logits, torch.log1p(-logits.exp().sum(-1, keepdim=True))], -1)  # three tokens, normalised
        model = LookUp(logits, torch.nn.Identity())
        row = {
            "prompt_ids": [2],
            "chosen_ids": [0],
            "rejected_ids": [1],
            "ref_chosen": pair[2],
            "ref_rejected": pair[3],
        }
        row |= {"demonstrated": False, "weight": 1.0}
        losses, stats = mixed_loss(model, [row], arguments(beta=0.1), "cpu")
        expected = TRL_VALUES["sigmoid", 0.1, 1][0][TRL_PAIRS.index(pair)]
        assert losses.item() == pytest.approx(expected, rel=1e-12)
        for name, value in metrics_of_trl.items():
            assert (stats[name][0] / stats[name][1]).item() == pytest.approx(value, rel=1e-12), name


# ---- special cases, in loss and gradient ----
def same(ours, theirs, model, expected_model) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(
        flat_gradient(ours.sum(), model), flat_gradient(theirs.sum(), expected_model), rtol=0, atol=0
    )


def test_self_play_without_preferences_is_irft():
    args = arguments(objective="self_play")
    rows, models = all_rows(args, m=0), [exact.make_model("gpt_neox", 0) for _ in range(2)]
    assert [r["weight"] for r in rows] == [1.0] * 7
    ours, stats = mixed_loss(models[0], rows, args, "cpu")
    theirs, expected = irft.pair_loss(models[1], pairs(), irft.Args(beta=BETA), "cpu")
    same(ours, theirs, *models)
    for name in ("margins", "accuracies", "chosen", "rejected"):
        assert torch.equal(stats[f"demonstrations/{name}"][0], expected[f"rewards/{name}"][0])


def test_direct_without_preferences_is_supervised_fine_tuning():
    args = arguments(objective="direct")
    rows, models = all_rows(args, m=0), [exact.make_model("gpt_neox", 0) for _ in range(2)]
    plain = [{"prompt_ids": r["prompt_ids"], "response_ids": r["chosen_ids"]} for r in rows]
    same(mixed_loss(models[0], rows, args, "cpu")[0], sft.demonstration_loss(models[1], plain, "cpu")[0], *models)


@pytest.mark.parametrize(("objective", "kind"), OBJECTIVES)
def test_without_demonstrations_it_is_dpo_or_ipo(objective, kind):
    args = arguments(objective=objective, preference_loss=kind, demo_weight=0.0)
    gradient, row = one_step(all_rows(args, n=0), args)
    model = exact.make_model("gpt_neox", 0)
    expected = objective_by_hand(model, args, [], pairs(5, shift=3))
    torch.testing.assert_close(gradient, flat_gradient(expected, model), rtol=0, atol=1e-10)
    assert row["loss"] == pytest.approx(expected.item(), abs=1e-12)
    assert not any(name.startswith("demonstrations/") for name in row)


def table(rewards) -> LookUp:
    """A policy over n actions, each a response of one token, whatever the prompt."""
    return LookUp(torch.nn.Parameter(torch.tensor(rewards)), torch.nn.Identity())


def test_direct_aihf_of_a_table_is_stationary_at_the_papers_closed_form():
    """At beta = 1 and a uniform reference Eq. 10 is the likelihood of Sec. 3.4: its optimum is Eq. 15, not RLHF's policy."""
    shown = np.array([5.0, 2.0, 1.0, 4.0])
    beats = np.array([[0, 3, 2, 1], [2, 0, 4, 1], [1, 1, 0, 2], [3, 2, 1, 0]], dtype=float)
    ref = dict(ref_chosen=-math.log(4), ref_rejected=-math.log(4))
    demonstrations = [
        {"prompt_ids": [0], "chosen_ids": [i], "rejected_ids": None} for i in range(4) for _ in range(int(shown[i]))
    ]
    preferences = [
        {"prompt_ids": [0], "chosen_ids": [i], "rejected_ids": [j], **ref}
        for i in range(4) for j in range(4) for _ in range(int(beats[i, j]))
    ]  # fmt: skip
    w1 = len(demonstrations) / len(preferences)  # w1 mean_D + mean_P is then the whole likelihood over |P|
    args = arguments(objective="direct", beta=1.0, demo_weight=w1)
    rows = weighted_rows(
        demonstrations, preferences, [(list(range(len(demonstrations))), list(range(len(preferences))))], 0, args
    )
    gradient, _ = one_step(rows, args, model=table(np.log(bandit.aihf_policy(shown, beats))))
    assert gradient.abs().max() < 1e-10
    gradient, _ = one_step(rows, args, model=table(np.log(bandit.rlhf_policy(shown, beats))))
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("beta", [0.1, 0.4])
@pytest.mark.parametrize("objective, kind", OBJECTIVES)
def test_w1_is_by_default_the_balance_of_both_parts(objective, kind, beta):
    """At policy = reference a nat of log pi weighs as much in one demonstration as in one preference: read off the gradient.

    Four actions, a policy and reference without preference among them; 0 is preferred to 1, 2 is demonstrated, 3 the answer.
    """
    args = arguments(objective=objective, preference_loss=kind, beta=beta, demo_weight="auto")
    args.check()
    expected = {("direct", "dpo"): beta / 2, ("direct", "ipo"): 1 / beta, ("self_play", "dpo"): 1.0}
    assert args.demo_weight == pytest.approx(expected.get((objective, kind), 2 / beta**2), rel=1e-12)
    ref = dict(ref_chosen=-math.log(4), ref_rejected=-math.log(4))
    answered = objective == "self_play"
    shown = [
        {"prompt_ids": [0], "chosen_ids": [2], "rejected_ids": [3] if answered else None, **(ref if answered else {})}
    ]
    preferred = [{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [1], **ref}]

    def slopes() -> tuple[float, float]:
        """(of the demonstration, of the preference) per nat of log pi of the response that is raised."""
        rows = weighted_rows(shown, preferred, [([0], [0])], 0, args)
        found = -one_step(rows, args, model=table(np.zeros(4)))[0]
        return (found[2] - found[3]).item() / (2 if answered else 1), (found[0] - found[1]).item() / 2

    demonstration, preference = slopes()
    assert preference == pytest.approx(beta / 2 if kind == "dpo" else 1 / beta, rel=1e-6)
    assert demonstration == pytest.approx(preference, rel=1e-6)
    args.demo_weight *= 3
    assert slopes() == pytest.approx((3 * preference, preference), rel=1e-6)
    alone = arguments(
        objective=objective, preference_loss=kind, preference_dataset="none", dataset="pydoc", demo_weight="auto"
    )
    alone.check()
    assert alone.demo_weight == 1.0  # nothing to be balanced with: IRFT's and SFT's own loss


# ---- runs ----
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("direct")
    make_model(folder / "model")
    make_model(folder / "unbiased", "mistral")
    make_data(folder / "data.jsonl", 20)
    make_data(folder / "preferences.jsonl", 14, preference=True)
    make_data(folder / "both.jsonl", 28, preference=True)
    same = '{"prompt": "say the same", "chosen": "yes yes", "rejected": "yes yes"}\n'
    with open(folder / "preferences.jsonl", "a") as f:
        f.write(same)
    (folder / "identical.jsonl").write_text(same * 12)
    make_classifier(folder / "gold", folder / "model")
    return folder


def argv(place, name: str, *flags: str, script: str = "aihf_direct.py", data: str = "data.jsonl") -> list[str]:
    own = ["--preference-dataset", str(place / "preferences.jsonl"), "--max-preferences", "0"]
    given = [f for f in own if script == "aihf_direct.py"] if "--preference-dataset" not in flags else []
    return command(script, place / "model", place / data, place / name, *given, *flags)[1:]


ALONE = ["--max-samples", "16", "--T", "1"]  # 16 is a multiple of the batch size: irft.py's batches are then the same
RUNS = {  # name -> flags
    "whole": [],
    "previous": ["--ref", "previous"],
    "direct": ["--objective", "direct"],
    "direct_ipo": ["--objective", "direct", "--preference-loss", "ipo", "--optimizer", "adamw", "--ref", "previous"],
    "linear": ["--lr-scheduler-type", "linear", "--demo-weight", "0.5", "--temperature", "0.8"],
    "lora": ["--lora-r", "4", "--gradient-checkpointing", "--T", "1"],
    "bf16": ["--mixed-precision", "bf16", "--dtype", "bfloat16", "--T", "1"],
    "dpo": ["--demo-weight", "0"],
    "ipo": ["--demo-weight", "0", "--preference-loss", "ipo"],
    "dpo_direct": ["--demo-weight", "0", "--objective", "direct"],
    "self_play_alone": [*ALONE, "--num-train-epochs", "2", "--preference-dataset", "none", "--lr-scheduler-type", "linear"],
    "direct_alone": [*ALONE, "--num-train-epochs", "2", "--preference-dataset", "none", "--lr-scheduler-type", "linear"]
    + ["--objective", "direct"],
}  # fmt: skip
KILLS = [  # (run, function, n-th call): one or more in every phase
    ("whole", "common.evals.sequence_logprobs", 10),  # reference on the demonstrations' pairs
    ("whole", "common.run.write_pairs", 3),  # preferences scored, not yet on disk; the demonstrations' pairs are
    ("whole", "common.run.Run.step", 4),  # between checkpoints
    ("whole", "common.models.reference_policy", 5),  # iteration 1, the reference is another model now
    ("whole", "common.run.Run.step", 9),  # iteration 1
    ("whole", "common.run.Run.save_final", 1),
    ("previous", "common.run.write_pairs", 5),  # iteration 1, preferences of the new reference
    ("direct", "common.evals.evaluate", 2),
]
QUICK = [("whole", "common.run.Run.step", 9)]


def bad_inputs(place) -> dict[str, tuple[list[str], str]]:
    """{name: (argv, what its one line must say)}"""
    flags = lambda *extra, **kind: argv(place, "never_made", *extra, **kind)  # noqa: E731
    other = lambda name: ["--preference-dataset", str(place / name)]  # noqa: E731
    return {
        "negative weight": (flags("--demo-weight", "-0.5"), "--demo-weight: found -0.5, expected 0 or more"),
        "weight not a number": (flags("--demo-weight", "nan"), "--demo-weight: found nan, expected a finite number"),
        "zero beta": (flags("--beta", "0"), "--beta: found 0.0, expected a number above 0"),
        "negative beta": (flags("--beta", "-1", "--preference-loss", "ipo"), "--beta: found -1.0, expected a number above 0"),
        "T zero": (flags("--T", "0"), "--T: found 0, expected 1 or more"),
        "no epoch": (flags("--num-train-epochs", "0"), "--num-train-epochs: found 0, expected 1 or more"),
        "temperature": (flags("--temperature", "0"), "--temperature: found 0.0, expected a number above 0"),
        "negative count": (flags("--max-preferences", "-1"), "--max-preferences: found -1, expected 0 or more"),
        "nothing to learn from": (flags("--demo-weight", "0", "--preference-dataset", "none"), "--demo-weight: found 0.0, expected a number above 0 beside --preference-dataset none"),
        "selection without demonstrations": (flags("--demo-weight", "0", "--select-top-k", "3", "--gold-reward-model", str(place / "gold")), "--select-top-k: found 3, expected 0 beside --demo-weight 0"),
        "no rejected column": (flags(*other("data.jsonl")), "row 0: found columns prompt, completion, expected a preference"),
        "no such preferences": (flags(*other("no.jsonl")), "--preference-dataset: found no file"),
        "all identical": (flags(*other("identical.jsonl")), "chosen equal to rejected (row 0), expected responses that differ"),
        "none left": (flags(*other("both.jsonl"), data="both.jsonl"), "--preference-dataset: found none of"),
        "no such demonstrations": (flags("--dataset", str(place / "no.jsonl")), "--dataset: found no file"),
        "diverged": (argv(place, "diverged", "--learning-rate", "1e30"), "training diverged: found loss"),
    }  # fmt: skip


BAD = [
    "negative weight", "weight not a number", "zero beta", "negative beta", "T zero", "no epoch", "temperature", "negative count",
    "nothing to learn from", "selection without demonstrations", "no rejected column", "no such preferences", "all identical",
    "none left", "no such demonstrations", "diverged",
]  # fmt: skip


@pytest.fixture(scope="module")
def done(place, request):
    """{name: (exit status, what was printed)} of all runs of this file, in one process that imports once."""
    both = ["--preference-dataset", str(place / "both.jsonl"), "--max-samples", "12"]
    judged = ["--gold-reward-model", str(place / "gold"), "--baseline", str(place / "model"), "--select-top-k", "10"]
    rare = ["--save-steps", "100"]
    # written out in torch below: RMSprop makes full steps of the rounding that is the gradient of a key's bias
    unbiased = {name: ["--model", str(place / "unbiased")] for name in ("dpo", "ipo", "dpo_direct")}
    cases = {name: argv(place, name, *flags, *rare, *unbiased.get(name, [])) for name, flags in RUNS.items()}
    cases["irft"] = argv(place, "irft", *ALONE, "--num-chunks", "1", "--num-train-epochs", "2", script="irft.py")
    cases["sft"] = argv(
        place, "sft", "--max-samples", "16", "--num-train-epochs", "2", "--loss-reduction", "sequence", script="sft.py"
    )
    cases["judged"] = argv(place, "judged", *judged, "--report-to", "tensorboard")
    cases["both"] = argv(place, "both", *both, data="both.jsonl")
    cases["both_dpo"] = argv(place, "both_dpo", *both, "--demo-weight", "0", data="both.jsonl")
    cases["dry"] = argv(place, "dry", "--T", "3", "--num-train-epochs", "2", "--dry-run")
    one = ["--batch-size", "5", "--learning-rate", "2e-4", "--lr-scheduler-type", "linear"]
    cases["one"] = argv(place, "one", *one)
    scenarios = [{"argv": words, "mark": name} for name, words in cases.items()]
    for i in chosen(request, "i"):
        name, at, n = KILLS[i]
        scenarios.append({"argv": argv(place, f"killed_{i}", *RUNS[name]), "at": at, "n": n, "mark": f"killed_{i}"})
        scenarios.append({"argv": ["aihf_direct.py", "--resume", str(place / f"killed_{i}")], "mark": f"resumed_{i}"})
    stop = {"at": "common.run.Run.step", "n": 8, "signal": signal.SIGTERM}
    scenarios.append({"argv": argv(place, "stopped", *RUNS["whole"]), **stop, "mark": "stopped"})
    scenarios.append({"argv": ["aihf_direct.py", "--resume", str(place / "stopped")], "mark": "went_on"})
    words = ["aihf_direct.py", "--resume", str(place / "whole"), "--demo-weight", "2"]
    scenarios.append({"argv": words, "mark": "other_settings"})
    scenarios += [{"argv": words, "mark": name} for name, (words, _) in bad_inputs(place).items()]
    statuses, printed = drive(scenarios, CLEANIRL_CACHE=str(place / "cache"))
    parts = printed.split("=== ")[1:]
    return {s["mark"]: (status, part) for s, status, part in zip(scenarios, statuses, parts, strict=True)}


def load(folder, part: str = "final") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / part / "model.safetensors")


def bytewise(one, other) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def moved(out) -> float:
    """Largest change of a weight by a run."""
    a, b = load(Path(json.loads((out / "args.json").read_text())["args"]["model"]), ""), weights(out)
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("name", RUNS)
def test_every_variant_starts_where_policy_and_reference_coincide(done, place, name):
    status, printed = done[name]
    assert status == 0, printed
    flags = RUNS[name]
    rows = [r for r in metrics(place / name) if "loss" in r]
    firsts = [next(r for r in rows if r["outer_iteration"] == t) for t in sorted({r["outer_iteration"] for r in rows})]
    within = 0.05 if "bf16" in name else 2e-4
    for row in firsts if "previous" in flags else firsts[:1]:
        assert ("preferences/loss" in row) == ("alone" not in name)
        assert ("demonstrations/loss" in row) == (not name.startswith(("dpo", "ipo")))
        assert ("demonstrations/margins" in row) == ("demonstrations/loss" in row and "direct" not in flags)
        if "preferences/loss" in row:
            ipo = "ipo" in flags
            assert row["preferences/loss"] == pytest.approx(
                25.0 if ipo else math.log(2), abs=within * (100 if ipo else 1)
            )
        if "demonstrations/margins" in row:
            assert row["demonstrations/loss"] == pytest.approx(math.log(2), abs=within)
    assert (place / name / "final" / "model.safetensors").is_file() and moved(place / name) > 1e-4
    generated = sorted(p.name for p in (place / name / "generations").iterdir())
    asked = "demonstrations/margins" in rows[0]
    T = 1 if "--T" in flags else 2
    kept = [] if "alone" in name else ["preferences.parquet"]
    if "previous" in flags:
        kept = [f"preferences_{t}.parquet" for t in range(T)]
    assert generated == ([f"iter_{t}.parquet" for t in range(T)] if asked else []) + kept


def test_learning_rates_follow_the_scheduler(done, place):
    """By default, with a model that is no tiny, one cosine over both outer iterations."""
    for name, kind in (("whole", "cosine"), ("linear", "linear")):
        rates = [r["learning_rate"] for r in metrics(place / name) if "loss" in r]
        assert rates == [learning_rate_at(k, len(rates), 1e-3, 0.1, kind) for k in range(len(rates))]
        assert len(rates) == 10 and len(set(rates)) == 10


def test_self_play_without_preferences_ends_with_the_weights_of_irft(done, place):
    assert done["irft"][0] == 0 and moved(place / "irft") > 1e-3
    assert bytewise(place / "self_play_alone", place / "irft")
    ours, theirs = metrics(place / "self_play_alone"), metrics(place / "irft")
    for a, b in zip(ours, theirs, strict=True):
        assert a.pop("demonstrations/loss", None) == b.get("loss")
        renamed = {
            k.replace("logps/", "rewards/logps/").replace("rewards/", "demonstrations/"): v for k, v in b.items()
        }
        assert a == (renamed if "loss" in b else b)


def test_direct_without_preferences_ends_with_the_weights_of_supervised_fine_tuning(done, place):
    assert done["sft"][0] == 0 and moved(place / "sft") > 1e-3
    assert bytewise(place / "direct_alone", place / "sft")


def logprob(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response].sum()


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_without_demonstrations_a_run_is_dpo_or_ipo_written_out(done, place, kind):
    """Plain torch on the same batches: pair by pair, unpadded, RMSprop, a cosine with one warm-up update."""
    from transformers import AutoModelForCausalLM

    rows = read_pairs(place / kind / "generations" / "preferences.parquet")
    model = AutoModelForCausalLM.from_pretrained(place / "unbiased")
    with torch.no_grad():
        ref = [
            logprob(model, r["prompt_ids"], r["chosen_ids"]) - logprob(model, r["prompt_ids"], r["rejected_ids"])
            for r in rows
        ]
    assert max(abs(a - (r["ref_chosen"] - r["ref_rejected"])) for a, r in zip(ref, rows, strict=True)) < 1e-4
    optimizer, n, K, step = torch.optim.RMSprop(model.parameters(), lr=0.0), len(rows), -(-len(rows) // 4), 0
    logged = [r for r in metrics(place / kind) if "loss" in r]
    assert len(logged) == 2 * K == 8
    for t in range(2):
        order = data_order(n, 1, t, 0, 1)
        for k in range(K):
            total = torch.zeros(())
            for i in order[k * n // K : (k + 1) * n // K]:
                r = rows[i]
                d = (
                    logprob(model, r["prompt_ids"], r["chosen_ids"])
                    - logprob(model, r["prompt_ids"], r["rejected_ids"])
                    - ref[i]
                )
                total = total + (torch.log1p(torch.exp(-0.1 * d)) if kind == "dpo" else (d - 5.0) ** 2)
            loss = total * K / n
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = 5e-4 if step == 0 else 1e-3 * (1 + math.cos(math.pi * (step - 1) / 7)) / 2
            optimizer.param_groups[0]["lr"] = rate * math.sqrt(1 - 0.99 ** (step + 1))  # torch's has no bias correction
            optimizer.step()
            assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
            step += 1
    ours = AutoModelForCausalLM.from_pretrained(place / kind / "final")
    for r in rows:
        for name in ("chosen_ids", "rejected_ids"):
            a, b = (logprob(m, r["prompt_ids"], r[name]).item() for m in (model, ours))
            assert a == pytest.approx(b, abs=2e-3)
    found = ours.state_dict()
    for name, value in model.state_dict().items():
        assert (value - found[name]).abs().max() < 1e-5, name


def test_without_demonstrations_the_objective_is_the_same_and_nothing_is_generated(done, place):
    assert bytewise(place / "dpo", place / "dpo_direct") and not bytewise(place / "dpo", place / "ipo")
    assert all(r["episodes"] == 0 for r in metrics(place / "dpo"))
    assert "DPO: 0 demonstrations" in done["dpo"][1] and "IPO: 0 demonstrations" in done["ipo"][1]


def test_a_run_leaves_what_it_promises(done, place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, (status, printed) = place / "judged", done["judged"]
    assert status == 0, printed
    rows = metrics(out)
    assert set().union(*rows) - {"step", "outer_iteration", "episodes"} == set(aihf_direct.METRICS) - set(JUDGE_METRICS)
    measured = [r for r in rows if "eval/nll" in r]
    assert [(r["outer_iteration"], r["episodes"]) for r in measured] == [(0, 0), (1, 10), (2, 20)]
    assert measured[0]["eval/kl_k1"] == pytest.approx(0, abs=1e-5) and measured[0]["eval/rewards/accuracies"] == 0.5
    training = [r for r in rows if "loss" in r]
    assert_phases_as_planned(out, 10, len(read_pairs(out / "generations" / "preferences.parquet")))
    n = len(read_pairs(out / "generations" / "preferences.parquet"))
    assert len(training) == 2 * -(-n // 4) and [r["epoch"] for r in training][-1] == 2.0
    assert training[-1]["rewards/margins"] > 0.1 and training[-1]["demonstrations/margins"] > 0.01
    sequences = [len(p["prompt_ids"]) + len(p[k]) for t in range(2) for p in read_pairs(out / "generations" / f"iter_{t}.parquet")
                 for k in ("chosen_ids", "rejected_ids")]  # fmt: skip
    pairs = read_pairs(out / "generations" / "preferences.parquet")
    sequences += 2 * [len(p["prompt_ids"]) + len(p[k]) for p in pairs for k in ("chosen_ids", "rejected_ids")]
    assert training[-1]["num_tokens"] == sum(sequences)
    assert AutoModelForCausalLM.from_pretrained(out / "final").config.model_type == "gpt_neox"
    assert AutoTokenizer.from_pretrained(out / "final").eos_token == "</s>"
    card = (out / "final" / "README.md").read_text()
    assert "Self-Play AIHF" in card and "preferences.jsonl" in card and "eval/gold/win_rate_base" in card
    asked = read_pairs(out / "generations" / "iter_1.parquet")
    assert {"prompt", "chosen", "rejected", "ref_chosen", "ref_rejected", "row"} <= asked[0].keys() & pairs[0].keys()
    assert {p["row"] for p in asked} == {r["row"] for r in read_pairs(out / "generations" / "selected.parquet")}
    assert len(list((out / "samples").glob("*.md"))) == 3 and list(out.rglob("events.out.tfevents*"))


def test_each_iteration_asks_anew_and_the_reference_is_the_one_asked_for(done, place):
    """Answers differ between iterations; the reference log-probs of the same demonstrations only with --ref previous."""
    for name, fixed in (("whole", True), ("previous", False)):
        first, second = (read_pairs(place / name / "generations" / f"iter_{t}.parquet") for t in range(2))
        assert [p["row"] for p in first] == [p["row"] for p in second]
        assert [p["rejected_ids"] for p in first] != [p["rejected_ids"] for p in second]
        change = max(abs(a["ref_chosen"] - b["ref_chosen"]) for a, b in zip(first, second, strict=True))
        assert change < 1e-4 if fixed else change > 0.1
    first, second = (read_pairs(place / "previous" / "generations" / f"preferences_{t}.parquet") for t in range(2))
    assert [p["chosen_ids"] for p in first] == [p["chosen_ids"] for p in second]
    assert max(abs(a["ref_chosen"] - b["ref_chosen"]) for a, b in zip(first, second, strict=True)) > 0.1


def test_answers_have_a_random_stream_of_their_own_in_every_iteration(monkeypatch, tmp_path):
    """The seeds are irft.py's, and the temperature is the flag's; the rows are asked in the order of irft.py's one chunk."""
    asked = []

    def sample(run, generator, rows, seed, temperature, advance):
        asked.append((seed, temperature, [r["row"] for r in rows]))
        raise InterruptedError

    monkeypatch.setattr(aihf_direct.evals, "sample_rows", sample)
    fake = SimpleNamespace(dir=tmp_path, args=arguments(seed=3, temperature=0.8))
    fake.phase = lambda *_, **__: contextlib.nullcontext(lambda n: None)
    fake.stored = functools.partial(Run.stored, fake)
    for t in range(2):
        fake.position = {"step": 5 * t}
        with pytest.raises(InterruptedError):
            aihf_direct.demonstration_rows(fake, t, 5, [{"row": i} for i in range(9)], None, None, None)
    assert asked == [(3 * 10_007 + t, 0.8, data_order(9, 3)) for t in range(2)]


def test_one_source_for_both_is_shared_out_and_overlap_is_counted(done, place):
    asked = read_pairs(place / "both" / "generations" / "iter_0.parquet")
    compared, alone = (
        read_pairs(place / name / "generations" / "preferences.parquet") for name in ("both", "both_dpo")
    )
    assert len(asked) == 12 and not {p["row"] for p in asked} & {p["row"] for p in compared}
    assert [p["row"] for p in alone] == [p["row"] for p in compared]  # the same preferences with w1 = 0
    assert "among the demonstrations' too" not in done["both"][1]
    assert (
        "DPO: 0 demonstrations" in done["both_dpo"][1] and not (place / "both_dpo/generations/iter_0.parquet").exists()
    )
    assert "--preference-dataset: found 14 of 14 prompts among the demonstrations' too" in done["whole"][1]
    assert "found 1 of 15 pairs with chosen equal to rejected (row 14): left out" in done["whole"][1]


def test_dry_run_counts_what_a_run_would_do(done, place):
    status, printed = done["dry"]
    assert status == 0 and not (place / "dry").exists()
    assert "20 answers of up to 8 tokens (160 at most), 10 updates on 20 demonstrations and 14 preferences" in printed
    assert "iteration 2" in printed and "in all 30 updates" in printed and "memory per device, train" in printed


@pytest.mark.parametrize(
    "i", slow_unless(lambda i: KILLS[i] in QUICK, range(len(KILLS))), ids=lambda i: "-".join(map(str, KILLS[i]))
)
def test_killed_and_resumed_equals_left_alone(done, place, i):
    assert (done[f"killed_{i}"][0], done[f"resumed_{i}"][0]) == (-signal.SIGKILL, 0), done[f"resumed_{i}"][1]
    same_run(place / KILLS[i][0], place / f"killed_{i}")


def same_run(whole, resumed) -> None:
    assert bytewise(whole, resumed)
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    for name in ("samples", "evals", "generations"):
        files = sorted(p.name for p in (whole / name).iterdir())
        assert files == sorted(p.name for p in (resumed / name).iterdir()) and (files or name == "generations")
        assert all((whole / name / f).read_bytes() == (resumed / name / f).read_bytes() for f in files)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(done, place):
    assert (done["stopped"][0], done["went_on"][0]) == (143, 0)
    assert f"continue with --resume {place / 'stopped'}" in done["stopped"][1]
    assert f"resumed from {place / 'stopped'}/checkpoint/0001_00000008" in done["went_on"][1]
    same_run(place / "whole", place / "stopped")


def test_resume_refuses_other_settings_and_a_run_without_its_pairs(done, place):
    status, printed = done["other_settings"]
    assert status == 2 and "--demo-weight: found 2.0, but the run in" in printed
    run = SimpleNamespace(dir=place, args=arguments(ref="initial"))
    run.stored = functools.partial(Run.stored, run)
    for t, step in ((0, 1), (1, 6)):
        run.position = {"step": step}
        with pytest.raises(UserError, match="--resume: found no .*iter_"):
            aihf_direct.demonstration_rows(run, t, 5, [{}], None, None, None)
        with pytest.raises(UserError, match="--resume: found no .*preferences.parquet"):
            aihf_direct.preference_rows(run, t, 5, [{}], None, None)
    run.args.ref = "previous"
    with pytest.raises(UserError, match="--resume: found no .*preferences_1.parquet"):
        aihf_direct.preference_rows(run, 1, 5, [{}], None, None)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_clear_line(done, place, name):
    cases = bad_inputs(place)
    assert list(cases) == BAD
    status, printed = done[name]
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and cases[name][1] in errors[0], printed
    assert "Traceback" not in printed and not (place / "never_made").exists()


@pytest.mark.parametrize(
    ("given", "row"),
    [
        ({}, {"demonstrations/loss": 0.70, "preferences/loss": 0.6931}),
        ({}, {"demonstrations/loss": 0.6931, "preferences/loss": 0.68}),
        ({"preference_loss": "ipo", "beta": 0.1}, {"demonstrations/loss": 0.6931, "preferences/loss": 25.1}),
        ({"objective": "direct"}, {"demonstrations/loss": 87.0, "preferences/loss": 0.70}),
    ],
)
def test_first_losses_that_are_not_those_of_a_coinciding_reference_end_the_run(given, row):
    fake = SimpleNamespace(args=arguments(**given), accelerator=SimpleNamespace(mixed_precision="no"))
    with pytest.raises(UserError, match="first .*/loss: found .*, expected .*: policy and reference should coincide"):
        aihf_direct.check_first_losses(fake, row)
    right = {"demonstrations/loss": 87.0 if given.get("objective") == "direct" else math.log(2)}
    right["preferences/loss"] = 25.0 if "beta" in given else math.log(2)
    aihf_direct.check_first_losses(fake, right)
    aihf_direct.check_first_losses(fake, {name: right[name] for name in list(right)[:1]})


def test_two_processes_give_the_weights_of_one(done, place):
    """Uneven shares of batches in which the two sets are uneven too."""
    assert done["one"][0] == 0 and moved(place / "one") > 1e-3
    flags = ["--batch-size", "5", "--learning-rate", "2e-4", "--lr-scheduler-type", "linear"]
    run([sys.executable, *argv(place, "two", *flags)], ranks=2)
    a, b = weights(place / "one"), weights(place / "two")
    assert max((a[k] - b[k]).abs().max() for k in a) < 2e-6
    assert_same_metrics(place / "one", place / "two", rel=2e-3, abs_=2e-4)
    for name in ("iter_0", "iter_1"):
        ids = [
            [p["rejected_ids"] for p in read_pairs(place / out / "generations" / f"{name}.parquet")]
            for out in ("one", "two")
        ]
        assert ids[0] == ids[1]


def test_methods_are_called_by_their_names():
    named = lambda **given: aihf_direct.method_name(arguments(**given))  # noqa: E731
    assert named() == "Self-Play AIHF" and named(objective="direct") == "Direct AIHF"
    assert (
        named(demo_weight=0.0) == "DPO" and named(demo_weight=0.0, preference_loss="ipo", objective="direct") == "IPO"
    )
    alone = dict(preference_dataset="none")
    assert (named(**alone), named(T=1, **alone), named(objective="direct", **alone)) == ("IRFT", "SPIN", "SFT")


def test_settings_of_the_paper():
    large, small = arguments(model="mistral-7b-sft-beta"), arguments(model="pythia-1b")
    assert (large.dataset, large.max_samples, large.preference_dataset) == (
        "ultrachat_200k",
        50_000,
        "ultrafeedback_binarized",
    )
    assert (large.learning_rate, large.lr_scheduler_type, large.max_length, large.max_preferences) == (
        5e-7,
        "cosine",
        512,
        0,
    )
    assert (small.dataset, small.preference_dataset, small.max_samples, small.max_preferences) == (
        "hh-rlhf",
        "hh-rlhf",
        10_000,
        0,
    )
    assert (
        arguments().lr_scheduler_type == "linear" and arguments().preference_dataset == arguments().dataset == "pydoc"
    )
