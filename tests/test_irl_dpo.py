"""irl_dpo_ultrachat.py against sums and formulas: candidates and their keys, pair choices, both policy objectives, the outer loop.

The losses of DPO and of the reward step are aihf.py's and rft.py's to the letter (test_repo.py), and are proved in
test_aihf.py and test_rft.py.
"""

import contextlib
import copy
import inspect
import itertools
import math
from types import SimpleNamespace

import exact
import numpy as np
import pytest
import test_rft
import torch
from helpers import metrics
from test_aihf import language, make_run  # noqa: F401 (fixtures)
from test_rft import (
    BETA,
    EOS,
    SEQUENCES,
    Table,
    all_logprobs,
    close,
    flat_gradient,
    head_outputs,
    letter_rewards,
    noise,
    scalar_model,
    token_logprobs,
)  # fmt: skip

import irl_dpo_ultrachat as irl
from common import UserError, models
from common.generation import Generator
from common.run import Run
from common.store import read_pairs
from common.streams import data_order
from extras.cache import weights_digest


def arguments(**given):
    return test_rft.arguments(irl, **given)


def mutate(name: str, old: str, new: str):
    """The script's function of that name with one piece of its source replaced."""
    source = inspect.getsource(getattr(irl, name))
    assert source.count(old) == 1, (name, old, source.count(old))
    space = dict(vars(irl))
    exec(compile(source.replace(old, new), "mutant", "exec"), space)
    return space[name]


# ---- the reward step ----
@pytest.mark.parametrize("wrong", [False, True])
def test_linear_reward_step_is_the_exact_gradient_of_the_likelihood(wrong):
    """Averaged over demonstrations and the optimal policy's answers: minus the gradient of E_D log pi_r, IRL Eq. 10.

    One side: the script's own path. The other: autograd through log Z over all 121 responses. `wrong` changes the sides.
    """
    scalar, prompt, y = scalar_model(center=0.25), exact.PROMPTS[1], exact.RESPONSES
    ref = exact.response_logprobs(exact.make_model(seed=1), prompt).detach()
    reward = torch.stack([head_outputs(scalar, prompt, r)[-1] for r in y])
    policy = exact.optimal_policy(ref, reward, BETA).exp().detach()
    expert = torch.zeros_like(policy)
    expert[3::17] = torch.arange(1, 8, dtype=torch.float64) / 28
    truth = flat_gradient(exact.likelihood(expert, ref, reward, BETA), scalar)
    index = [(i, j) for i in expert.nonzero()[:, 0].tolist() for j in range(len(y))]
    sides = ("rejected_ids", "chosen_ids") if wrong else ("chosen_ids", "rejected_ids")
    pairs = [{"prompt_ids": prompt, **dict(zip(sides, (y[i], y[j]), strict=True))} for i, j in index]
    losses, _ = irl.reward_batch_loss(scalar, pairs, arguments(beta=BETA, reward_loss="linear"), "cpu")
    weights = torch.stack([expert[i] * policy[j] for i, j in index])
    assert truth.norm() > 1e-2 and close(flat_gradient((weights * losses).sum(), scalar), -truth, 1e-10) == (not wrong)


def test_the_reward_loss_is_equation_11_unless_asked():
    pairs = [{"prompt_ids": x, "chosen_ids": y, "rejected_ids": [1]} for x, y in SEQUENCES]
    scalar = scalar_model()
    d = torch.stack([head_outputs(scalar, x, y)[-1] - head_outputs(scalar, x, [1])[-1] for x, y in SEQUENCES])
    losses, _ = irl.reward_batch_loss(scalar, pairs, arguments(), "cpu")
    assert close(losses, torch.log1p(torch.exp(-d))) and (losses - math.log(2)).abs().max() > 1e-2


# ---- the pair of a prompt ----
def picks(row: list, choice: str) -> tuple[int, int]:
    best = row.index(max(row))
    others = [i for i in range(len(row)) if i != best]
    if choice == "max_min":
        return best, row.index(min(row))
    if choice == "max_max":
        return best, max(others, key=lambda i: row[i])
    if choice == "max_random":
        return best, others[0]
    return (1, 0) if row[1] > row[0] else (0, 1)


def check_choose_pair(function) -> bool:
    """Every choice against a loop, on integers with many ties: the first of equals."""
    stream, ok = np.random.default_rng(0), True
    for n in (2, 3, 5):
        table = stream.integers(0, 3, (200, n)).astype(float)
        for choice in ("max_min", "max_max", "max_random", "random"):
            best, other = function(torch.from_numpy(table), choice)
            ok &= best.shape == other.shape == (200,)
            found = zip(best.tolist(), other.tolist(), strict=True)
            ok &= all(pair == picks(row, choice) for row, pair in zip(table.tolist(), found, strict=True))
        ok &= all(torch.equal(a, b) for a, b in zip(function(torch.from_numpy(table)), function(torch.from_numpy(table), "max_min"), strict=True))  # fmt: skip
    return ok


def test_the_pair_of_a_prompt_is_the_one_chosen_by_hand():
    assert check_choose_pair(irl.choose_pair)


PAIR_MUTANTS = {
    "last_of_equals": ("torch.where(chosen, index, n).amin(-1)", "torch.where(chosen, index, -1).amax(-1)"),
    "over_prompts": ("best = first(scores == scores.amax(-1, keepdim=True))", "best = first(scores == scores.amax(0, keepdim=True))"),
    "worst_is_second": ("scores == scores.amin(-1, keepdim=True)", "scores == scores.kthvalue(2, -1, keepdim=True).values"),
    "second_is_best": ("scores.masked_fill(index == best[:, None], -math.inf)", "scores"),
    "equals_of_the_best_left_out": ("index == best[:, None]", "scores == scores.amax(-1, keepdim=True)"),
    "second_is_worst": ("first(others == others.amax(-1, keepdim=True))", "first(others == scores.amin(-1, keepdim=True))"),
    "any_is_the_best": ("(best == 0).long()\n", "torch.zeros_like(best)\n"),
    "any_is_the_worst": ("return best, (best == 0).long()", "return best, first(scores == scores.amin(-1, keepdim=True))"),
    "random_by_place": ("return higher, 1 - higher", "return 0 * higher, 1 + 0 * higher"),
    "random_turned": ("return higher, 1 - higher", "return 1 - higher, higher"),
    "names": ('if choice == "max_max"', 'if choice == "max_random"'),
    "default": ('choice: str = "max_min"', 'choice: str = "max_max"'),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIR_MUTANTS)
def test_a_wrong_choice_is_told_apart(name):
    assert not check_choose_pair(mutate("choose_pair", *PAIR_MUTANTS[name]))


def test_max_random_prefers_the_best_to_each_other_rank_alike():
    """Over all orders in which candidates can come."""
    orders = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float64)
    best, other = irl.choose_pair(orders, "max_random")
    assert (orders.gather(1, best[:, None]) == 3).all()
    assert torch.bincount(orders.gather(1, other[:, None])[:, 0].long(), minlength=4).tolist() == [8, 8, 8, 0]


# ---- candidates ----
ONLINE = dict(num_generations=3, temperature=0.6, beta=BETA, batch_size=64)
EVERY = dict(policy_objective="dpo", sft_epochs=0)


def prompts(n: int) -> list[dict]:
    return [{"row": i, "prompt": "", "prompt_ids": exact.PROMPTS[i % 3]} for i in range(n)]


def generator_of(policy) -> Generator:
    return Generator(policy, SimpleNamespace(eos_token_id=EOS), 1024, exact.LENGTH)


def candidates_of(run, n: int = 7, reward=None, policy=None, first: int = 4, seed: int = 5, function=None):
    policy, reward = policy or exact.make_model(), reward or Table(noise(3, 121, seed=3))
    return (function or irl.score_candidates)(run, reward, generator_of(policy), prompts(n), first, seed)


def check_candidates(function, run) -> bool:
    """Each from its own stream, with its raw score and the log-probs it was sampled with."""
    values, policy, ok, streams = noise(3, 121, seed=3), exact.make_model(), True, []
    found = candidates_of(run, 7, Table(values), policy, function=function)
    for i, candidate in enumerate(found):
        x, own = exact.PROMPTS[i % 3], [(4 + i) * 3 + j for j in range(3)]
        streams += own
        answers = Generator(policy, SimpleNamespace(eos_token_id=EOS), 2, exact.LENGTH).sample([x] * 3, own, 5, 0.6)
        ok &= candidate.keys() == {"response_ids", "finished", "logprobs", "scores"}
        ok &= candidate["response_ids"] == answers.response_ids and candidate["finished"] == answers.finished
        scores = [values[i % 3, exact.RESPONSES.index(y)].item() for y in answers.response_ids]
        ok &= np.allclose(candidate["scores"], scores, atol=1e-12, rtol=0)
        for y, logp in zip(candidate["response_ids"], candidate["logprobs"], strict=True):
            ok &= len(logp) == len(y) and np.allclose(
                logp, token_logprobs(policy, x, y, 0.6).tolist(), atol=1e-10, rtol=0
            )
    return ok and len(found) == 7 and len(set(streams)) == 21


def test_candidates_come_from_streams_of_their_own_with_raw_scores(make_run):  # noqa: F811
    assert check_candidates(irl.score_candidates, make_run(irl, **ONLINE, **EVERY, missing_eos_penalty=2.5))


@pytest.mark.parametrize(
    "old, new",
    [
        ("(first + i) * n + j", "(first + i) * n"),
        ("(first + i) * n + j", "first + i + j"),
        ("(first + i) * n + j", "i * n + j"),
        ("seed, args.temperature", "seed, 1.0"),
        ("v[i * n : (i + 1) * n]", "v[:n]"),
        ('names["scores"] = scores', 'names["scores"] = scores[::-1]'),
    ],
    ids=["one_stream", "streams_shared", "place_lost", "temperature", "first_prompt", "order_of_scores"],
)
def test_wrong_candidates_are_told_apart(make_run, old, new):  # noqa: F811
    run = make_run(irl, **ONLINE, **EVERY)
    assert not check_candidates(mutate("score_candidates", old, new), run)


def check_pairs(function, run) -> bool:
    """Scores less the penalty, the two that --pair-choice names, and what policy and reference say about them."""
    args, reference, ok = run.args, exact.make_model(seed=1), True
    candidates, rows = candidates_of(run, 9), prompts(9)
    found = function(run, rows, copy.deepcopy(candidates), lambda: contextlib.nullcontext(reference))
    dpo = args.policy_objective == "dpo"
    for row, candidate, pair in zip(rows, candidates, found, strict=True):
        scores = [
            s - args.missing_eos_penalty * (not end)
            for s, end in zip(candidate["scores"], candidate["finished"], strict=True)
        ]
        chosen, rejected = picks(scores, args.pair_choice if dpo else "max_min")
        ok &= pair["prompt_ids"] == row["prompt_ids"] and pair["finished"] == candidate["finished"]
        ok &= np.allclose(pair["scores"], scores, atol=1e-12, rtol=0)
        ok &= pair["lengths"] == list(map(len, candidate["response_ids"]))
        ok &= any(f"ref_{k}" in pair for k in ("chosen", "rejected")) == dpo
        for kind, k in (("chosen", chosen), ("rejected", rejected)):
            y = candidate["response_ids"][k]
            ok &= pair[f"{kind}_ids"] == y and pair[f"sampled_{kind}"] == candidate["logprobs"][k]
            ok &= abs(pair[f"score_{kind}"] - scores[k]) < 1e-12
            if dpo:
                expected = token_logprobs(reference, row["prompt_ids"], y, args.temperature).sum().item()
                ok &= abs(pair[f"ref_{kind}"] - expected) < 1e-10
    return ok and len({end for c in candidates for end in c["finished"]}) == 2


CHOICES = ["max_min", "max_max", "max_random", "random"]


@pytest.mark.parametrize("penalty", [0.0, 2.5])
@pytest.mark.parametrize("choice", CHOICES)
def test_pairs_hold_what_each_model_says_at_the_sampling_temperature(make_run, choice, penalty):  # noqa: F811
    given = dict(pair_choice=choice, missing_eos_penalty=penalty)
    assert check_pairs(irl.choose_pairs, make_run(irl, **ONLINE, **EVERY, **given))


def test_best_of_n_is_the_best_whatever_the_pair_choice_and_needs_no_reference(make_run):  # noqa: F811
    run = make_run(irl, **ONLINE, policy_objective="best_of_n", pair_choice="random", sft_epochs=0)
    assert check_pairs(irl.choose_pairs, run)
    irl.choose_pairs(run, prompts(2), candidates_of(run, 2), None)  # a reference would be called


PAIRS_MUTANTS = {
    "penalty_sign": ("scores -= args", "scores += args"),
    "penalty_on_ended": ("* ~torch.tensor", "* torch.tensor"),
    "choice_lost": ("args.pair_choice if dpo", '"max_min" if dpo'),
    "best_of_n_by_choice": ('args.pair_choice if dpo else "max_min"', "args.pair_choice"),
    "temperature_of_the_reference": ("evals.batch_logprobs(ref_policy, batch, args.temperature)", "evals.batch_logprobs(ref_policy, batch)"),
    "sampled": ('candidate["logprobs"][w]', 'candidate["logprobs"][b]'),
    "reference_order": ("zip(pairs, ref[: len(rows)], ref[len(rows) :], strict=True)", "zip(pairs, ref[len(rows) :], ref[: len(rows)], strict=True)"),
    "score": ('"score_rejected": own[w]', '"score_rejected": own[b]'),
    "raw_score": ('"score_chosen": own[b]', '"score_chosen": candidate["scores"][b]'),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS_MUTANTS)
def test_wrong_pairs_are_told_apart(make_run, name):  # noqa: F811
    given = dict(pair_choice="max_max", missing_eos_penalty=2.5, sft_epochs=0)
    objective = "best_of_n" if name == "best_of_n_by_choice" else "dpo"
    run = make_run(irl, **ONLINE, **given, policy_objective=objective)
    mutant = mutate("choose_pairs", *PAIRS_MUTANTS[name])
    assert not check_pairs(mutant, run)


def test_a_tie_makes_no_pair():
    pair = {"score_chosen": 1.0, "score_rejected": 0.5, "chosen_ids": [1, EOS], "rejected_ids": [2, EOS]}
    assert irl.makes_pair(pair)
    assert not irl.makes_pair({**pair, "score_rejected": 1.0})  # with max_max even where the worst is far below
    assert not irl.makes_pair({**pair, "rejected_ids": [1, EOS]})


def test_metrics_of_the_candidates():
    pairs = [
        {"scores": [1.0, 4.0, -2.0], "score_chosen": 4.0, "score_rejected": -2.0, "lengths": [1, 2, 3], "finished": [True, True, False], "chosen_ids": [1, 2], "rejected_ids": [3]},
        {"scores": [0.5, 0.5, 0.0], "score_chosen": 0.5, "score_rejected": 0.5, "lengths": [4, 4, 1], "finished": [True, False, False], "chosen_ids": [1], "rejected_ids": [2]},
    ]  # fmt: skip
    row = {k.split("/")[1]: v for k, v in irl.measure_candidates(pairs).items()}
    expected = {
        "scores": 4 / 6,
        "scores_best": 2.25,
        "scores_margin": 3.25,
        "pairs": 0.5,
        "mean_length": 2.5,
        "clipped_ratio": 0.5,
    }
    assert row == pytest.approx(expected)  # fmt: skip


@pytest.mark.parametrize("objective, references", [("dpo", 14), ("best_of_n", 0)])
def test_no_model_sees_a_sequence_twice_and_batches_are_sorted_by_length(make_run, objective, references):  # noqa: F811
    """Of 3 candidates of 7 prompts the reward sees 21, the reference the 14 that are kept; best_of_n needs no reference."""
    sizes = {
        "sft_epochs": 0,
        "per_device_eval_batch_size": 4,
        "share_prompts": False,
    }  # which puts equal prompts together
    run = make_run(irl, **ONLINE, policy_objective=objective, **sizes)
    seen, reward, reference = {"reward": [], "reference": []}, scalar_model(), exact.make_model(seed=1)
    for name, model in (("reward", reward.model.gpt_neox), ("reference", reference)):
        note = lambda m, args, kwargs, name=name: seen[name].append(kwargs["attention_mask"].sum(1).tolist())  # noqa: E731
        model.register_forward_pre_hook(note, with_kwargs=True)
    candidates = candidates_of(run, 7, reward)
    irl.choose_pairs(run, prompts(7), candidates, lambda: contextlib.nullcontext(reference))
    lengths = sum(seen["reward"], [])
    assert len(lengths) == 21 and len(sum(seen["reference"], [])) == references
    assert lengths == sorted(lengths, reverse=True) and [len(b) for b in seen["reward"]] == [4] * 5 + [1]


# ---- the key of candidates, and where they are kept ----
def test_the_digest_of_weights_changes_with_every_weight_buffer_type_and_name(make_run):  # noqa: F811
    run, scalar = make_run(irl, **ONLINE, **EVERY), scalar_model()
    known = {weights_digest(run, scalar)}
    assert weights_digest(run, copy.deepcopy(scalar)) in known
    count = 1
    for name, tensor in scalar.state_dict().items():  # the centre of the reward is among them
        changed = copy.deepcopy(scalar)
        value = changed.state_dict()[name].view(-1)
        value[len(value) // 2] += 1e-6 if tensor.is_floating_point() else 1
        known.add(weights_digest(run, changed))
        count += 1
    known |= {weights_digest(run, copy.deepcopy(scalar).float()), weights_digest(run, scalar.model)}
    assert len(known) == count + 2 and "center" in scalar.state_dict()


def test_the_key_of_candidates_changes_with_each_ingredient_and_nothing_else(make_run):  # noqa: F811
    base = dict(num_generations=3, temperature=0.6, max_new_tokens=4, **EVERY)
    run, generator = make_run(irl, **base), generator_of(exact.make_model())

    def key(weights=("p", "r"), rows=None, first=0, seed=5, eos=None, precision=None, **flags):
        changed = SimpleNamespace(
            args=arguments(**{**base, **flags}), accelerator=SimpleNamespace(mixed_precision=precision or "no")
        )
        of = SimpleNamespace(eos_ids=eos or generator.eos_ids)
        return irl.candidate_key(changed, list(weights), of, rows or prompts(3), first, seed)  # fmt: skip

    assert key() == irl.candidate_key(run, ["p", "r"], generator, prompts(3), 0, 5)
    other_prompt = [*prompts(2), {"row": 2, "prompt": "", "prompt_ids": [0]}]
    changed = [
        key(weights=("q", "r")), key(weights=("p", "s")), key(weights=("r", "p")), key(rows=other_prompt),
        key(rows=prompts(3)[::-1]), key(rows=prompts(2)), key(first=3), key(seed=6), key(eos={EOS, 1}),
        key(precision="bf16"), key(num_generations=4), key(temperature=0.7), key(max_new_tokens=5),
    ]  # fmt: skip
    assert len({key(), *changed}) == len(changed) + 1
    same = dict(pair_choice="max_max", beta=0.7, missing_eos_penalty=3.0, learning_rate=1e-2, batch_size=7)
    assert key(**same) == key()


def test_candidates_are_read_back_as_they_were_made_and_never_under_another_name(make_run):  # noqa: F811
    first = make_run(irl, "first", **ONLINE, **EVERY)
    made, calls = candidates_of(first, 5), []

    def make():
        calls.append(1)
        return made

    assert irl.kept_candidates(first, "a.parquet", make) == (made, "") and len(calls) == 1
    own = first.dir / "candidates"
    assert [p.name for p in own.iterdir()] == ["a.parquet"] and read_pairs(own / "a.parquet") == made
    assert irl.kept_candidates(first, "a.parquet", make) == (made, str(own)) and len(calls) == 1
    second = make_run(irl, "second", **ONLINE, **EVERY, candidates_from=str(first.dir))
    assert irl.kept_candidates(second, "a.parquet", make) == (made, str(own)) and len(calls) == 1
    assert irl.kept_candidates(second, "b.parquet", make) == (made, "") and len(calls) == 2
    assert [p.name for p in (second.dir / "candidates").iterdir()] == ["b.parquet"]


# ---- the policy step ----
def check_best_of_n_batch_loss(function) -> bool:
    """-log pi of the best candidate, summed over its tokens, at the sampling temperature; and the metrics."""
    args, policy, ok = arguments(temperature=0.6), exact.make_model(seed=2), True
    pairs = [
        {
            "prompt_ids": x,
            "chosen_ids": y,
            "rejected_ids": [(k + 1) % 4 for k in y],
            "sampled_chosen": noise(len(y), seed=i).tolist(),
        }
        for i, (x, y) in enumerate(SEQUENCES)
    ]
    losses, stats = function(policy, pairs, args, "cpu")
    logps = [token_logprobs(policy, p["prompt_ids"], p["chosen_ids"], 0.6) for p in pairs]
    expected, tokens = -torch.stack([logp.sum() for logp in logps]), sum(map(len, logps))
    ok &= close(losses, expected) and close(
        flat_gradient(losses.sum(), policy), flat_gradient(expected.sum(), policy), 1e-10
    )
    off = sum(
        abs(a - b)
        for p, logp in zip(pairs, logps, strict=True)
        for a, b in zip(logp.tolist(), p["sampled_chosen"], strict=True)
    )
    entropy = 0.0
    for p in pairs:
        logits = policy(input_ids=torch.tensor([p["prompt_ids"] + p["chosen_ids"]])).logits[0] / 0.6
        entropy += torch.distributions.Categorical(logits=logits).entropy()[len(p["prompt_ids"]) - 1 : -1].sum().item()
    sums = {
        "logps/chosen": (-expected.sum().item(), len(pairs)),
        "entropy": (entropy, tokens),
        "sampling/logp_difference": (off, tokens),
    }
    ok &= stats.keys() == sums.keys()
    for name, (total, count) in sums.items():
        ok &= abs(stats[name][0].item() - total) < 1e-10 and stats[name][1].item() == count
    return ok  # fmt: skip


def test_best_of_n_of_a_batch_by_hand():
    assert check_best_of_n_batch_loss(irl.best_of_n_batch_loss)


@pytest.mark.parametrize(
    "old, new",
    [
        ("response_logprobs(policy, batch, args.temperature)", "response_logprobs(policy, batch)"),
        ('(p["prompt_ids"], p["chosen_ids"])', '(p["prompt_ids"], p["rejected_ids"])'),
        ("losses = nll_loss(scores.logprobs, batch.response_mask)", "losses = -nll_loss(scores.logprobs, batch.response_mask)"),
        ("losses = nll_loss(scores.logprobs, batch.response_mask)", "losses = nll_loss(scores.logprobs, batch.response_mask) / batch.response_mask.sum(-1)"),
        ("losses = nll_loss(scores.logprobs, batch.response_mask)", "losses = nll_loss(scores.logprobs, batch.response_mask) + (~batch.response_mask).sum(-1)"),
        ("-losses.sum(), losses", "losses.sum(), losses"),
    ],
    ids=["temperature", "worst", "sign", "mean_for_sum", "no_mask", "metric"],
)  # fmt: skip
def test_a_wrong_best_of_n_batch_is_told_apart(old, new):
    assert not check_best_of_n_batch_loss(mutate("best_of_n_batch_loss", old, new))


def made_pairs(run, n: int = 8, values=None):
    policy, reference = exact.make_model(), exact.make_model(seed=1)
    candidates = candidates_of(run, n, Table(noise(3, 121, seed=3).round() if values is None else values), policy)
    return policy, irl.choose_pairs(run, prompts(n), candidates, lambda: contextlib.nullcontext(reference))


def one_step(run, policy, pairs, micro: int = 1024, function=None):
    """(gradient, logged row) of policy_update on a copy: plain descent at rate 1 moves the weights by minus the gradient."""
    model = copy.deepcopy(policy)
    run.args.per_device_train_batch_size = micro
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    row = (function or irl.policy_update)(run, model, optimizer, pairs, [1.0] * 9, 0)
    moved = zip(policy.parameters(), model.parameters(), strict=True)
    return torch.cat([(a - b).detach().flatten() for a, b in moved]), row


def check_policy_update(function, run) -> bool:
    """One step, whatever the micro-batches and the order: DPO's mean over the pairs without a tie; best-of-N's over tokens."""
    policy, pairs = made_pairs(run)
    tied = [p for p in pairs if p["score_chosen"] == p["score_rejected"]]
    assert 0 < len(tied) < 6 and len({len(p["chosen_ids"]) for p in pairs}) > 1
    if run.args.policy_objective == "dpo":
        terms = []
        for p in (p for p in pairs if p not in tied):
            c, r = (token_logprobs(policy, p["prompt_ids"], p[f"{k}_ids"], 0.6).sum() for k in ("chosen", "rejected"))
            terms.append(-torch.nn.functional.logsigmoid(BETA * ((c - p["ref_chosen"]) - (r - p["ref_rejected"]))))
        loss = torch.stack(terms).mean()
    else:
        loss = -torch.cat([token_logprobs(policy, p["prompt_ids"], p["chosen_ids"], 0.6) for p in pairs]).mean()
    expected, ok = flat_gradient(loss, policy), True
    assert expected.norm() > 1e-2
    for micro, rows in ((1024, pairs), (1, pairs), (3, pairs[::-1])):
        found, row = one_step(run, policy, rows, micro, function)
        ok &= close(found, expected, 1e-10) and abs(row["policy/loss"] - loss.item()) < 1e-10
        ok &= row["sampling/logp_difference"] < 1e-10 and row["learning_rate"] == 1.0
    return ok


@pytest.mark.parametrize("objective", ["dpo", "best_of_n"])
def test_a_policy_step_is_the_mean_computed_by_hand(make_run, objective):  # noqa: F811
    assert check_policy_update(irl.policy_update, make_run(irl, **ONLINE, policy_objective=objective, sft_epochs=0))


@pytest.mark.parametrize(
    "objective, old, new",
    [
        ("dpo", "if makes_pair(p)", "if True"),
        ("best_of_n", 'if args.policy_objective == "dpo":\n        pairs', "if True:\n        pairs"),
        ("best_of_n", "losses * scale", "losses"),
        ("best_of_n", "losses * scale", 'losses / losses.new_tensor([len(p["chosen_ids"]) for p in part])'),
        ("best_of_n", 'len(p["chosen_ids"]) for p in rows', 'len(p["rejected_ids"]) for p in rows'),
        ("dpo", "optimizer, rows, loss_fn", "optimizer, rows[:-1], loss_fn"),
        ("dpo", "rates[len(steps)]", "rates[len(steps)] / 2"),
        ("dpo", 'if args.policy_objective == "dpo":\n                    return', 'if args.policy_objective != "dpo":\n                    return'),
    ],
    ids=["ties_count", "ties_left_out", "sum", "mean_of_means", "other_tokens", "one_lost", "rate", "objectives"],
)  # fmt: skip
def test_a_wrong_policy_update_is_told_apart(make_run, objective, old, new):  # noqa: F811
    mutant = mutate("policy_update", old, new)
    run = make_run(irl, **ONLINE, policy_objective=objective, sft_epochs=0)
    with contextlib.suppress(KeyError, ZeroDivisionError):
        assert not check_policy_update(mutant, run)


def test_one_score_for_all_candidates_makes_no_step_of_dpo(make_run):  # noqa: F811
    run = make_run(irl, **ONLINE, **EVERY)
    policy, pairs = made_pairs(run, 6, torch.zeros(3, 121))
    moved, row = one_step(run, policy, pairs)
    assert not moved.any() and row == {}
    assert irl.measure_candidates(pairs)["objective/pairs"] == 0


def test_epochs_and_batches_of_an_update(make_run, monkeypatch):  # noqa: F811
    """3 epochs of 7 pairs in batches of 3: nine steps, every pair once an epoch, in a new order each time."""
    run, seen = make_run(irl, **{**ONLINE, "batch_size": 3}, **EVERY, num_policy_epochs=3), []
    policy, pairs = made_pairs(run, 7, noise(3, 121, seed=3))
    assert all(map(irl.makes_pair, pairs))
    step = Run.step
    note = lambda self, m, o, rows, *rest: (seen.append([id(r) for r in rows]), step(self, m, o, rows, *rest))[1]  # noqa: E731
    monkeypatch.setattr(Run, "step", note)
    one_step(run, policy, pairs)
    assert [len(s) for s in seen] == [3, 3, 1] * 3
    epochs = [sum(seen[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(e) == sorted(map(id, pairs)) for e in epochs) and len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize("objective", ["dpo", "best_of_n"])
def test_log_probs_that_are_not_those_of_sampling_end_the_run(make_run, objective):  # noqa: F811
    run = make_run(irl, **ONLINE, policy_objective=objective, sft_epochs=0)
    policy, pairs = made_pairs(run, 7, noise(3, 121, seed=3))
    one_step(run, policy, pairs)
    run.args.temperature = 1.0
    with pytest.raises(UserError, match="the policy that is trained is not the one that answered"):
        one_step(run, policy, pairs)


# ---- numbers of steps ----
def test_count_steps():
    given = dict(batch_size=64, num_train_epochs=2, sft_epochs=3, rollout_batch_size=256, num_policy_epochs=2)
    count = lambda n, **more: irl.count_steps(n, arguments(**{**given, **more}))  # noqa: E731
    steps = count(10_000, total_prompts=0)
    assert (steps.sft, steps.K[0], steps.K[1], steps.updates, steps.per_update) == (3 * 157, 2 * 157, 2 * 157, 40, 8)
    assert count(10_000, total_prompts=300).updates == 2
    assert count(10_000, total_prompts=20_000, rollout_batch_size=20_000).updates == 1  # the paper's: all at once
    assert count(100, total_prompts=0).per_update == 4  # 100 prompts at most, in 2 batches, twice
    grown = count(650, total_prompts=256, pairs="accumulated", T=3)
    assert grown.K == [22, 42, 62]  # of 650, 1300 and 1950 pairs, not of so many batches each
    assert [grown.before(t) for t in range(4)] == [33, 33 + 30, 33 + 30 + 50, 33 + 30 + 50 + 70]
    assert [grown.before_policy(t) - grown.before(t) for t in range(3)] == grown.K


def test_settings_of_the_models():
    """The paper's model does DPO, the draft's best-of-N; both have 32 candidates, and answer all prompts before a step."""
    paper, draft, tiny = (arguments(model=m) for m in ("mistral-7b-sft-beta", "zephyr-7b-sft-full", "tiny"))
    assert (paper.policy_objective, draft.policy_objective, tiny.policy_objective) == ("dpo", "best_of_n", "dpo")
    for args in (paper, draft):
        assert (args.dataset, args.T, args.num_generations, args.batch_size) == ("ultrachat_200k", 2, 32, 64)
        assert (args.beta, args.learning_rate, args.optimizer, args.lr_scheduler_type) == (0.1, 5e-7, "adamw", "cosine")
        assert args.rollout_batch_size == args.total_prompts and args.pair_choice == "max_min" and args.sft_epochs == 0
    assert arguments(model="zephyr-7b-sft-full", policy_objective="dpo").policy_objective == "dpo"


# ---- the outer loop ----
LOOP = dict(
    T=3, batch_size=4, rollout_batch_size=3, total_prompts=6, num_generations=3, max_length=16, max_new_tokens=exact.LENGTH,
    sft_epochs=0, eval_updates=100, learning_rate=3e-3, reward_learning_rate=1e-2, save_steps=1000, policy_objective="dpo",
)  # fmt: skip


@pytest.fixture
def loop(make_run, language):  # noqa: F811
    """Maker of (IRL, run) on the enumerable language: 9 demonstrations, 4 held-out rows."""
    model, tokenizer, row = language

    def make(folder="run", **given):
        run = make_run(irl, folder, model=model, **{**LOOP, **given})
        rows = [row(i, exact.PROMPTS[i % 3], response_ids=exact.RESPONSES[3 + 9 * i]) for i in range(13)]
        return irl.IRL(run, tokenizer, rows[:9], rows[9:], []), run

    return make


def watch_reward_steps(monkeypatch) -> list[dict]:
    """For every reward step: the rows of its batch, and the reward's weights before it."""
    seen, step = [], Run.step

    def note(self, model, optimizer, rows, *rest):
        if rest[-1] == "reward_learning_rate":
            seen.append({"rows": rows, "weights": copy.deepcopy(self.accelerator.unwrap_model(model).state_dict())})
        return step(self, model, optimizer, rows, *rest)

    monkeypatch.setattr(Run, "step", note)
    return seen


@pytest.mark.parametrize("pairs", ["current", "accumulated"])
def test_a_reward_learns_from_this_iterations_pairs_or_the_earlier_ones_too(loop, monkeypatch, pairs):
    """Each pair of the iterations in question exactly once an epoch; demonstrations are the same ones in all of them."""
    seen = watch_reward_steps(monkeypatch)
    learner, run = loop(pairs=pairs, num_train_epochs=2)
    learner.learn()
    begin = 0
    stored = [read_pairs(run.dir / "generations" / f"iter_{t}.parquet") for t in range(3)]
    assert stored[0] != stored[1] != stored[2] and all(p["iteration"] == t for t in range(3) for p in stored[t])
    for t in range(3):
        K = learner.steps.K[t]
        used = [p for s in seen[begin : begin + K] for p in s["rows"]]
        expected = sum(stored[: t + 1], []) if pairs == "accumulated" else stored[t]
        for epoch in (used[: len(expected)], used[len(expected) :]):
            key = lambda p: (p["iteration"], p["row"])  # noqa: E731
            assert sorted(epoch, key=key) == expected
        begin += K
    assert begin == len(seen) == (3 * 6 if pairs == "current" else 6 + 10 + 14)


@pytest.mark.parametrize("start", ["sft", "previous"])
def test_the_reward_is_made_anew_or_carried_over(loop, monkeypatch, start):
    """Weights before each iteration's first step: those of a fresh one, centre 0, or those the last iteration left."""
    seen, left = watch_reward_steps(monkeypatch), []
    learner, _ = loop(reward_init=start)
    policy_step = learner.policy_step
    note = lambda t: (left.append(copy.deepcopy(learner.raw_reward.state_dict())), policy_step(t))  # noqa: E731
    monkeypatch.setattr(learner, "policy_step", note)
    learner.learn()
    fresh = irl.rewards.prepare_scalar(learner.args, learner.args.model, "--model").state_dict()
    same = lambda a, b: all(torch.equal(a[k].double(), b[k].double()) for k in a)  # noqa: E731
    K = learner.steps.K[0]
    assert same(seen[0]["weights"], fresh) and left[0]["center"] != 0
    for t in (1, 2):
        begun = seen[t * K]["weights"]
        assert same(begun, fresh) == (start == "sft") and same(begun, left[t - 1]) == (start == "previous")


@pytest.mark.parametrize("ref", ["initial", "previous"])
def test_the_reference_is_the_sft_policy_or_that_of_the_last_iteration(loop, monkeypatch, ref):
    """At an iteration's first step the loss is log 2 where the policy is its reference."""
    learner, run = loop(ref=ref, rollout_batch_size=6)
    learner.learn()
    firsts = [r["rewards/margins"] for r in metrics(run.dir) if "rewards/margins" in r]
    sources, opened = [], models.open_reference
    monkeypatch.setattr(
        models, "open_reference", lambda run, policy, source: (sources.append(source), opened(run, policy, source))[1]
    )
    assert [learner.start_policy(t) for t in range(3)] == (
        [learner.args.model] * 3 if ref == "initial" else [learner.args.model, *(str(run.dir / f"policy_{t}") for t in (1, 2))]
    )  # fmt: skip
    assert len(firsts) == 3


def test_negatives_are_sampled_or_nearly_greedy(loop):
    found = {}
    for kind in ("sampled", "greedy"):
        learner, _ = loop(kind, negatives=kind)
        found[kind] = [p["rejected_ids"] for p in learner.sample_pairs(0)]
    greedy = learner.generator.sample([d["prompt_ids"] for d in learner.demonstrations], list(range(9)), 0, 0)
    assert found["greedy"] == greedy.response_ids != found["sampled"]
    by_prompt = [found["sampled"][i::3] for i in range(3)]
    assert any(len(set(map(tuple, answers))) > 1 for answers in by_prompt)


class Stop(Exception):
    pass


def count_scored(monkeypatch) -> list[tuple]:
    """(stream of the first candidate, rows) of every call that samples and scores candidates, and forward passes in it."""
    calls, real = [], irl.score_candidates

    def counted(run, reward_model, generator, rows, first, seed):
        seen = []
        hook = reward_model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0].input_ids)))
        found = real(run, reward_model, generator, rows, first, seed)
        hook.remove()
        calls.append((seed, first, len(rows), sum(seen)))
        return found

    monkeypatch.setattr(irl, "score_candidates", counted)
    return calls


def test_a_resumed_run_scores_nothing_twice(loop, monkeypatch, capsys):
    """Stopped inside the second policy update, after its candidates were kept: they are found again. 18 candidates a time."""
    calls = count_scored(monkeypatch)
    whole, run = loop("whole", T=2)
    whole.learn()
    expected = list(calls)
    assert [c[1:] for c in expected] == [(0, 3, 9), (3, 3, 9)] * 2 and len({c[0] for c in expected}) == 2
    calls.clear()
    real, updates = irl.policy_update, []

    def stopping(*args):
        updates.append(1)
        if len(updates) == 2:
            raise Stop
        return real(*args)

    stopped, cut = loop("stopped", T=2)
    monkeypatch.setattr(irl, "policy_update", stopping)
    with pytest.raises(Stop):
        stopped.learn()
    cut.lock.close()  # as the end of its process does
    resumed, _ = loop("never", T=2, resume=str(cut.dir))
    capsys.readouterr()
    resumed.learn()
    assert calls == expected  # in both runs together
    assert f"iteration 0: candidates of 6 prompts taken from {cut.dir / 'candidates'}" in capsys.readouterr().out
    for a, b in zip(whole.raw.parameters(), resumed.raw.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (run.dir / "metrics.jsonl").read_bytes() == (cut.dir / "metrics.jsonl").read_bytes()


def test_another_pair_choice_scores_nothing_twice_and_a_mismatch_is_made_anew(loop, monkeypatch, capsys):
    """The first update's candidates come from the same weights; with max_max the policy goes elsewhere, so later ones do not."""
    loop("first", T=1)[0].learn()
    calls = count_scored(monkeypatch)
    given = dict(T=1, pair_choice="max_max")
    alone, _ = loop("alone", **given)
    alone.learn()
    first = alone.run.dir.parent / "first"
    assert len(calls) == 2
    calls.clear()
    capsys.readouterr()
    other, run = loop("other", **given, candidates_from=str(first))
    other.learn()
    printed = capsys.readouterr().out
    assert [c[1:] for c in calls] == [(3, 3, 9)]
    assert f"iteration 0: candidates of 3 prompts taken from {first / 'candidates'}" in printed
    assert f"candidates of 3 prompts made anew, none in {first} match: those come from other weights" in printed
    assert len(list((run.dir / "candidates").iterdir())) == 1
    for a, b in zip(alone.raw.parameters(), other.raw.parameters(), strict=True):
        assert torch.equal(a, b)  # as if it had made them itself
    calls.clear()
    changed, _ = loop("changed", **given, candidates_from=str(first), reward_learning_rate=2e-2)  # another reward
    changed.learn()
    printed = capsys.readouterr().out
    assert len(calls) == 2 and "taken from" not in printed and "candidates of 6 prompts made anew" in printed


def test_blocks_change_no_candidate(loop, monkeypatch):
    """Prompts are answered in blocks of BLOCK; the streams are those of their places in the iteration."""
    answers = []
    for size in (256, 2):
        monkeypatch.setattr(irl, "BLOCK", size)
        learner, run = loop(f"block_{size}", T=1, rollout_batch_size=6)
        learner.learn()
        files = sorted((run.dir / "candidates").iterdir())
        assert len(files) == (1 if size == 256 else 3)
        answers.append([y for f in files for c in read_pairs(f) for y in c["response_ids"]])
    assert answers[0] == answers[1] and len(answers[0]) == 18


ENDS = {
    "dpo": dict(policy_objective="dpo", learning_rate=1.5e-3),
    "best_of_n": dict(policy_objective="best_of_n", learning_rate=2e-3),
}


@pytest.mark.parametrize("name", ENDS)
def test_two_outer_iterations_learn_from_demonstrations_alone(make_run, language, monkeypatch, name):  # noqa: F811
    """Demonstrations are drawn from the optimum of a reward that the script never sees: exact likelihood and reward rise."""
    model, tokenizer, row = language
    start, truth, y = all_logprobs(exact.make_model()), letter_rewards(), exact.RESPONSES
    generator = torch.Generator().manual_seed(0)
    expert = torch.stack([exact.optimal_policy(q, r, 0.25) for q, r in zip(start, truth, strict=True)])
    shown, held = (torch.multinomial(expert.exp(), n, True, generator=generator) for n in (128, 16))

    def answered_by(picked: torch.Tensor, first: int) -> list[dict]:
        texts = [(x, y[j]) for x, js in zip(exact.PROMPTS, picked.tolist(), strict=True) for j in js]
        return [row(first + i, x, response_ids=answer) for i, (x, answer) in enumerate(texts)]

    run = make_run(
        irl, model=model, T=2, beta=0.5, reward_learning_rate=1e-3, num_train_epochs=2, batch_size=64, rollout_batch_size=128,
        total_prompts=512, num_generations=4, max_length=16, max_new_tokens=exact.LENGTH, sft_epochs=0, eval_updates=1000,
        save_steps=100_000, max_grad_norm=1.0, **ENDS[name],
    )  # fmt: skip
    learner = irl.IRL(run, tokenizer, answered_by(shown, 0), answered_by(held, 1000), [])

    def measure() -> tuple[float, float]:
        found = all_logprobs(learner.raw)
        return found.gather(1, shown).mean().item(), (found.exp() * truth).sum(1).mean().item()

    path, policy_step = [measure()], learner.policy_step
    monkeypatch.setattr(learner, "policy_step", lambda t: (policy_step(t), path.append(measure())))
    learner.learn()
    likelihood, reward = zip(*path, strict=True)
    assert likelihood[2] > likelihood[1] + 0.03 > likelihood[0] + 0.3 and reward[2] > reward[1] > reward[0] + 0.15
    order = [i for e in range(2) for i in data_order(384, run.args.seed, 0, irl.PROMPTS, e)][:512]
    assert len(set(order[:384])) == 384
