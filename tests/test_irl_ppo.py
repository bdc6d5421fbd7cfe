"""irl_ppo_tldr.py against sums, formulas and the recipe of the N+ study in its own, padded form."""

import contextlib
import copy
import dataclasses
import math
import signal
from types import SimpleNamespace

import exact
import numpy as np
import pytest
import torch
from helpers import jsonl, make_model, make_tokenizer
from test_rft import (
    Table,
    all_logprobs,
    close,
    flat_gradient,
    head_outputs,
    letter_rewards,
    noise,
    scalar_model,
    stale,
    token_logprobs,
)

import irl_ppo_tldr as irl
from common import UserError, rewards
from common.args import resolve_auto
from common.data import encode, tokenise
from common.generation import Generator
from common.run import Run
from common.streams import learning_rate_at
from extras.sources import load_rows

BETA, EOS = 0.3, exact.EOS


def arguments(**given):
    """The script's flags, whole batches in one pass and nothing clipped, unless given."""
    sizes = dict(per_device_train_batch_size=1024, per_device_eval_batch_size=1024, max_new_tokens=exact.LENGTH)
    args = irl.Args(**{**sizes, "max_length": 16, "mixed_precision": "no", "temperature": 1.0, **given})
    resolve_auto(args, irl.SETTINGS)
    return args


@pytest.fixture
def make_run(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda **given: Run(arguments(output_dir=str(tmp_path / "run"), **given), "irl_ppo_tldr", irl.METRICS)
    signal.signal(signal.SIGTERM, handler)


# ---- the text of TL;DR (N+ 1) ----
POST = {"subreddit": "cats", "title": "A cat", "post": "It sat.\nOn the mat.\nFor long", "summary": "cat sat"}
QUERY = "SUBREDDIT: r/cats\n\nTITLE: A cat\n\nPOST: It sat.\nOn the mat.\nFor long\n\nTL;DR:"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def test_query_is_subreddit_title_post_and_question(tmp_path, tokenizer):
    rows = load_rows(jsonl(tmp_path / "tldr.jsonl", [POST]), "all")
    assert rows == [{"row": 0, "prompt": QUERY, "response": "cat sat"}]
    assert irl.fit_query(QUERY, tokenizer, 1000) == QUERY


def check_cuts(fit, tokenizer) -> bool:
    """Whatever fits whole stays; else the post loses its last line, then the one before it, then its characters."""
    head, lines = QUERY.partition("It sat.")[0], ["It sat.", "On the mat.", "For long"]
    for n in (3, 2, 1):
        kept = head + "\n".join(lines[:n]) + "\n\nTL;DR:"
        longer = head + "\n".join(lines[: n + 1]) + "\n\nTL;DR:"
        room = count(tokenizer, kept)
        if fit(QUERY, tokenizer, room) != kept or (
            n < 3 and fit(QUERY, tokenizer, count(tokenizer, longer) - 1) != kept
        ):
            return False
    one = head + "It sa\n\nTL;DR:"  # two characters of the last line that is left
    return fit(QUERY, tokenizer, count(tokenizer, one)) == one


def at_first_break(prompt, tokenizer, longest):
    head, post, tail = irl.split_query(prompt, "dataset")
    while len(tokenise(tokenizer, [head + post + tail])[0]) > longest:
        post = post.partition("\n")[0] if "\n" in post else post[:-1]
    return head + post + tail


def by_characters(prompt, tokenizer, longest):
    head, post, tail = irl.split_query(prompt, "dataset")
    while len(tokenise(tokenizer, [head + post + tail])[0]) > longest:
        post = post[:-1]
    return head + post + tail


def tokens_from_the_left(prompt, tokenizer, longest):
    return tokenizer.decode(tokenizer(prompt)["input_ids"][:longest])


def test_a_long_post_is_cut_at_its_last_line_break_or_by_one_character(tokenizer):
    assert check_cuts(irl.fit_query, tokenizer)


@pytest.mark.parametrize("mutant", [at_first_break, by_characters, tokens_from_the_left])
def test_another_cut_is_told_apart(mutant, tokenizer):
    assert not check_cuts(mutant, tokenizer)


def test_any_other_prompt_is_itself_the_post(tokenizer):
    assert irl.fit_query("Some text", tokenizer, 99) == "POST: Some text\n\nTL;DR:"
    assert irl.fit_query([{"role": "user", "content": "Some text"}], tokenizer, 99) == "POST: Some text\n\nTL;DR:"
    with pytest.raises(UserError, match="--dataset: found a prompt of 3 turns, expected one text to summarise"):
        irl.fit_query([{"role": "user", "content": "a"}] * 3, tokenizer, 99)


def test_summaries_begin_with_a_space_end_in_eos_and_are_cut(tokenizer):
    """Query and summary together have the tokens of the two apart; rows keep their ids, prompts and texts."""
    rows = [
        {"row": 7, "prompt": QUERY, "response": " cat sat ", "rejected": "no"},
        {"row": 9, "prompt": "Some text", "response": "open the file and read it", "rejected": "return the items"},
    ]
    longest = 60
    first, second = irl.encode_tldr(rows, tokenizer, longest + 6, longest)
    together = tokenizer(first["prompt_text"] + " cat sat")["input_ids"] + [tokenizer.eos_token_id]
    assert first["prompt_ids"] + first["response_ids"][:-1] == together[:-1][: len(first["prompt_ids"]) + 5] or (
        first["prompt_ids"] + first["response_ids"] == together
    )
    assert len(first["prompt_ids"]) <= longest and first["prompt_text"].endswith("TL;DR:")
    whole = tokenizer(" open the file and read it")["input_ids"] + [tokenizer.eos_token_id]
    assert len(whole) > 6 and second["response_ids"] == whole[:6]  # cut, and no EOS is invented
    assert second["rejected_ids"] == (tokenizer(" return the items")["input_ids"] + [tokenizer.eos_token_id])[:6]
    assert [first["row"], second["row"]] == [7, 9] and [first["prompt"], second["prompt"]] == [QUERY, "Some text"]
    assert (first["response_text"], first["rejected_text"]) == ("cat sat", "no")
    short = irl.encode_tldr(rows[:1], tokenizer, 300, 250)[0]
    assert short["response_ids"][-1] == tokenizer.eos_token_id
    assert short["prompt_ids"] + short["response_ids"] == tokenizer(QUERY + " cat sat</s>")["input_ids"]
    unspaced = encode([{"row": 0, "prompt": QUERY, "response": "cat sat"}], tokenizer, 300, 250, render=lambda _, q: q)
    assert unspaced[0]["response_ids"] != short["response_ids"]


def test_saved_tokenizers_ask_other_scripts_in_the_form_of_tldr(tokenizer):
    from common.data import render_prompt

    asking = copy.deepcopy(tokenizer)
    asking.chat_template = irl.TLDR_TEMPLATE
    for prompt in (QUERY, "Some text", [{"role": "user", "content": "Some text"}]):
        assert render_prompt(asking, prompt) == irl.fit_query(prompt, tokenizer, 1000)


def test_comparisons_of_people_are_read(tmp_path):
    info = {k: POST[k] for k in ("subreddit", "title", "post")}
    row = {"info": info, "summaries": [{"text": " one"}, {"text": " two"}], "choice": 1}
    path = jsonl(tmp_path / "pairs.jsonl", [row])
    assert load_rows(path, "all", "preferences") == [{"row": 0, "prompt": QUERY, "chosen": " two", "rejected": " one"}]
    for bad, found in (({"choice": 2}, "found choice 2 of"), ({"summaries": [{"text": "a"}]}, "expected 0 or 1 of two"), ({"info": {}}, "found no post in info")):  # fmt: skip
        with pytest.raises(UserError, match=f"row 0: .*{found}"):
            load_rows(jsonl(tmp_path / "bad.jsonl", [{**row, **bad}]), "all", "preferences")


# ---- SFT on query and response (N+ 5) ----
ROWS = [{"prompt_ids": x, "response_ids": y} for x, y in (([0, 2], [1, 2, EOS]), ([1, 2, 0, 1], [EOS]), ([2], [0, 1]))]


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_supervised_steps_learn_the_tokens_they_should(make_run, tokens):
    """Every token after the first, or those of the response, EOS among them, each once; the mean over all of them."""
    args = arguments(sft_tokens=tokens)
    actor_critic = irl.ActorCritic(exact.make_model(), scalar_model())
    losses, _ = irl.sft_batch_loss(actor_critic, ROWS, args, "cpu")

    def by_hand(row):
        x, y = row["prompt_ids"], row["response_ids"]
        first = 1 if tokens == "all" else len(x)
        return -token_logprobs(actor_critic.policy, (x + y)[:first], (x + y)[first:]).sum()

    expected = torch.stack([by_hand(r) for r in ROWS])
    assert close(losses, expected)
    assert close(flat_gradient(losses.sum(), actor_critic.policy), flat_gradient(expected.sum(), actor_critic.policy))
    assert not flat_gradient(losses.sum(), actor_critic.value).any()
    assert [len(irl.learned_tokens(r, args)[1]) for r in ROWS] == ([4, 4, 2] if tokens == "all" else [3, 1, 2])


# ---- the reward after its training (N+ 9) ----
@pytest.mark.parametrize("kind", ["mean", "mean_std", "none"])
@pytest.mark.parametrize("times", [1, 2])
def test_demonstrations_get_mean_0_and_where_asked_deviation_1(make_run, kind, times):
    """Twice, as with a reward that is carried over; order and differences, up to the scale, stay."""
    run, scalar = make_run(reward_normalisation=kind), scalar_model(center=0.25)
    script = SimpleNamespace(run=run, args=run.args, raw_reward=scalar, reward_model=scalar, demonstrations=ROWS)
    before = torch.stack([head_outputs(scalar, r["prompt_ids"], r["response_ids"])[-1] for r in ROWS]).detach()
    for t in range(times):
        row = irl.IRL.normalise(script, t)
    after = torch.stack([head_outputs(scalar, r["prompt_ids"], r["response_ids"])[-1] for r in ROWS]).detach()
    deviation = before.std(correction=0)
    expected = {"none": before, "mean": before - before.mean(), "mean_std": (before - before.mean()) / deviation}[kind]
    assert close(after, expected, 1e-6) and before.mean().abs() > 1e-2
    assert row["eval/reward/scale"] == pytest.approx(after.std(correction=0).item(), abs=1e-6)
    assert row["eval/reward/center"] == pytest.approx(scalar.center.item())


@pytest.mark.parametrize("init", ["sft", "previous"])
def test_a_reward_is_made_anew_or_carried(make_run, tmp_path, init):
    """In iteration 0 both start from the SFT policy with the head of the seed; later one does again, the other goes on."""
    run = make_run(model=str(make_model(tmp_path / "model")), reward_init=init, max_length=96)
    args = run.args
    make_model(tmp_path / "sft", hidden_size=32, initializer_range=0.1)
    fresh = rewards.prepare_scalar(args, str(tmp_path / "sft"), "--model").state_dict()
    reward = rewards.prepare_scalar(args, args.model, "--model")
    optimizer = torch.optim.AdamW(reward.parameters(), lr=0.1)
    script = SimpleNamespace(
        run=run, args=args, reward_model=reward, reward_optimizer=optimizer, sft_policy=str(tmp_path / "sft")
    )
    for t in range(3):
        before = copy.deepcopy(reward.state_dict())
        irl.IRL.start_reward(script, t)
        after, expected = reward.state_dict(), fresh if init == "sft" or t == 0 else before
        assert all(torch.equal(after[k], expected[k]) for k in expected)
        assert bool(optimizer.state) == (init == "previous" and t > 0)
        sum(p.sum() for p in reward.parameters()).backward()
        optimizer.step()
        reward.normalise(0.5)
    assert not torch.equal(reward.state_dict()["center"], fresh["center"])


# ---- PPO: the recipe of N+ in its own form ----
def collect(run, n: int = 12, reward=None, reference=None, seed: int = 1, actor_critic=None):
    """(actor and critic, n rollouts) of the script's own collect, over the prompts in turn."""
    actor_critic = actor_critic or irl.ActorCritic(exact.make_model(), scalar_model())
    generator = Generator(actor_critic.policy, SimpleNamespace(eos_token_id=EOS), 1024, exact.LENGTH)
    rows, reference = [{"prompt_ids": exact.PROMPTS[i % 3]} for i in range(n)], reference or exact.make_model(seed=1)
    here = contextlib.nullcontext(reference)
    reward = reward or scalar_model("mistral")
    return actor_critic, irl.collect(run, actor_critic, reward, generator, lambda: here, rows, seed)


def padded_recipe(models_, rollouts, args, old=None) -> dict[str, torch.Tensor]:
    """N+ 15 to 28 on one batch: every answer as long as can be, whatever stands after EOS, and masks by comparison.

    models_: policy, value, reference, reward. old: {logprobs, values} in place of those of these models.
    """
    policy, value, reference, reward = models_
    n, width = len(rollouts), args.max_new_tokens
    stray = torch.Generator().manual_seed(3)  # the tokens that sampling would have gone on with
    logp, ref_logp, values, new_values = (torch.zeros(n, width, dtype=torch.float64) for _ in range(4))
    length, scores = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.float64)
    new_logp = []
    for i, r in enumerate(rollouts):
        x, y = r["prompt_ids"], r["response_ids"]
        ended = EOS in y
        length[i] = y.index(EOS) if ended else width - 1
        scores[i] = head_outputs(reward, x, y)[-1].detach() if ended else -1.0
        whole = y + torch.randint(0, 4, (width - len(y),), generator=stray).tolist()
        outputs = head_outputs(value, x, whole)[len(x) - 1 : -1]
        values[i], new_values[i] = outputs.detach(), outputs
        new_logp.append(token_logprobs(policy, x, whole, args.temperature))
        logp[i] = new_logp[-1].detach()
        ref_logp[i] = token_logprobs(reference, x, whole, args.temperature).detach()
    new_logp = torch.stack(new_logp)
    index = torch.arange(width).expand(n, width)
    beyond, beyond_1 = index > length[:, None], index > length[:, None] + 1
    if old:
        for i, r in enumerate(rollouts):
            logp[i, : len(r["logprobs"])] = torch.tensor(r["logprobs"], dtype=torch.float64)
            values[i, : len(r["values"])] = torch.tensor(r["values"][:width], dtype=torch.float64)
    logp_, ref_, new_ = (v.masked_fill(beyond, 1.0) for v in (logp, ref_logp, new_logp))
    values_ = values.masked_fill(beyond_1, 0.0)
    rewards_ = -args.beta * (logp_ - ref_)
    place = torch.where(length + 1 < width, length + 1, length)
    rewards_[torch.arange(n), place] += scores
    if args.whiten_rewards:
        kept = rewards_[~beyond_1]
        rewards_ = (rewards_ - kept.mean()) * torch.rsqrt(kept.var(correction=0) + 1e-8) + kept.mean()
        rewards_ = rewards_.masked_fill(beyond_1, 0.0)
    last, reversed_ = 0.0, []
    for t in reversed(range(width)):
        following = values_[:, t + 1] if t < width - 1 else 0.0
        last = rewards_[:, t] + args.gamma * following - values_[:, t] + args.gamma * args.lam * last
        reversed_.append(last)
    advantages = torch.stack(reversed_[::-1], 1)
    returns = advantages + values_
    kept = advantages[~beyond]
    advantages = ((advantages - kept.mean()) * torch.rsqrt(kept.var(correction=0) + 1e-8)).masked_fill(beyond, 0.0)
    ratio = (new_ - logp_).exp()
    pg = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - args.cliprange, 1 + args.cliprange))
    new_values = torch.where(beyond_1, 0.0, new_values)
    clipped = values_ + (new_values - values_).clamp(-args.cliprange_value, args.cliprange_value)
    vf = torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2)
    loss = pg[~beyond].mean() + args.vf_coef * 0.5 * vf[~beyond_1].mean()
    return {"advantages": advantages, "returns": returns, "loss": loss, "tokens": ~beyond, "steps": ~beyond_1}


def as_table(rollouts, name: str, width: int) -> torch.Tensor:
    return torch.tensor([(r[name] + [0.0] * width)[:width] for r in rollouts], dtype=torch.float64)


def check_recipe(run, script=irl) -> bool:
    """Advantages, returns and the gradient of one update, from the script's own path and from the padded recipe."""
    args = run.args
    actor_critic, reference, reward = irl.ActorCritic(exact.make_model(), scalar_model()), exact.make_model(seed=1), scalar_model("mistral")  # fmt: skip
    _, rollouts = collect(run, 12, reward, reference, 1, actor_critic)
    lengths = {len(r["response_ids"]) for r in rollouts}
    assert any(r["finished"] for r in rollouts) and not all(r["finished"] for r in rollouts)
    assert len(lengths) > 2 and any(r["finished"] and len(r["response_ids"]) == exact.LENGTH for r in rollouts)
    four = (actor_critic.policy, actor_critic.value, reference, reward)
    script.add_advantages(rollouts, args)
    truth = padded_recipe(four, rollouts, args)
    good = close(as_table(rollouts, "advantages", exact.LENGTH), truth["advantages"], 1e-7)
    good &= close(as_table(rollouts, "returns", exact.LENGTH), torch.where(truth["steps"], truth["returns"], 0.0), 1e-7)
    _, moved = copy.deepcopy(actor_critic), stale(rollouts)
    again = padded_recipe(four, moved, args, old=True)
    expected = flat_gradient(again["loss"], actor_critic)
    script_args = dataclasses.replace(args, num_ppo_epochs=1)
    run.args = script_args
    model = copy.deepcopy(actor_critic)
    for r, a, g in zip(moved, again["advantages"].tolist(), again["returns"].tolist(), strict=True):
        r["advantages"], r["returns"] = a[: len(r["response_ids"])], g[: len(r["values"])]
    script.ppo_update(run, model, torch.optim.SGD(model.parameters(), lr=0.0), moved, 1.0, 0)
    found = torch.cat([(a - b).detach().flatten() for a, b in zip(actor_critic.parameters(), model.parameters(), strict=True)])  # fmt: skip
    assert expected.norm() > 1e-3
    return good and close(found, expected, 1e-8)


SETTINGS = [{}, {"temperature": 0.7}, {"whiten_rewards": True}, {"gamma": 0.9, "lam": 0.8}, {"cliprange": 0.02, "cliprange_value": 0.02}]  # fmt: skip


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_an_update_is_that_of_the_padded_recipe(make_run, given):
    assert check_recipe(make_run(beta=BETA, vf_coef=0.5, **given))


def eos_step_lost(monkeypatch):
    monkeypatch.setattr(irl, "with_last_step", lambda query, response, args: (query, response))


def step_after_a_cut(monkeypatch):
    monkeypatch.setattr(irl, "with_last_step", lambda query, response, args: (query, response + [0]))


def reward_where_eos_is_missing(monkeypatch):
    real = irl.collect

    def wrong(run, actor_critic, reward_model, *rest):
        rollouts = real(run, actor_critic, reward_model, *rest)
        for r in rollouts:
            r["score"] = head_outputs(reward_model, r["prompt_ids"], r["response_ids"])[-1].item()
        return rollouts

    monkeypatch.setattr(irl, "collect", wrong)


def swapped(name, mutant):
    def apply(monkeypatch):
        real = getattr(irl, name)
        monkeypatch.setattr(irl, name, lambda *args: mutant(real, *args))

    return apply


MUTANTS = {
    "no step after EOS": eos_step_lost,
    "a step after an answer that was cut": step_after_a_cut,
    "score kept without EOS": reward_where_eos_is_missing,
    "sign of the KL": swapped("token_rewards", lambda f, s, p, r, m, b: f(s, r, p, m, b)),
    "no beta": swapped("token_rewards", lambda f, s, p, r, m, b: f(s, p, r, m, 1.0)),
    "score at every step": swapped("token_rewards", lambda f, s, p, r, m, b: f(s, p, r, m, b) + s[:, None] * m),
    "advantages not whitened": swapped("whiten", lambda f, x, m: torch.where(m, x, 0.0)),
    "whitened over padding": swapped("whiten", lambda f, x, m: f(x, torch.ones_like(m))),
    "no bootstrap": swapped("gae", lambda f, r, v, m, g, k: f(r, torch.zeros_like(v), m, g, k)),
    "policy not clipped": swapped("policy_loss", lambda f, p, o, a, m, c: f(p, o, a, m, 1e9)),
    "value not clipped": swapped("value_loss", lambda f, v, o, r, m, c: f(v, o, r, m, 1e9)),
    "value not learned after EOS": swapped(
        "value_loss", lambda f, v, o, r, m, c: f(v, o, r, m & (m.long().cumsum(1) < m.sum(1, keepdim=True)), c)
    ),
    "half of the value loss lost": swapped("value_loss", lambda f, *rest: 2 * f(*rest)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_update_is_told_apart(make_run, monkeypatch, name):
    MUTANTS[name](monkeypatch)
    assert not check_recipe(make_run(beta=BETA, vf_coef=0.5, cliprange=0.02, cliprange_value=0.02))


def test_reward_whitening_off_is_told_from_on(make_run, monkeypatch):
    monkeypatch.setattr(irl, "rescale", lambda x, m: irl.whiten(x, m))  # which would shift the mean to 0
    assert not check_recipe(make_run(beta=BETA, vf_coef=0.5, whiten_rewards=True))


def test_rescaling_keeps_the_mean_and_makes_the_variance_1():
    mask = torch.arange(5) < torch.tensor([3, 1, 5])[:, None]
    x = 3 + 2 * noise(3, 5)
    found = irl.rescale(x.masked_fill(~mask, math.nan), mask)
    assert close(found[mask].mean(), x[mask].mean()) and found[mask].var(correction=0) == pytest.approx(1, abs=1e-7)
    assert not found[~mask].any()


def test_rollouts_hold_what_each_model_says(make_run):
    """Log-probs at the temperature; values at every step, the one after EOS too; the reward at EOS; -1 without EOS (N+ 16, 18, 19)."""
    run = make_run(temperature=0.6)
    reward, reference = scalar_model("mistral"), exact.make_model(seed=1)
    actor_critic, rollouts = collect(run, 12, reward, reference)
    for i, r in enumerate(rollouts):
        x, y = r["prompt_ids"], r["response_ids"]
        assert x == exact.PROMPTS[i % 3] and r["finished"] == (y[-1] == EOS)
        assert r["logprobs"] == pytest.approx(token_logprobs(actor_critic.policy, x, y, 0.6).tolist(), abs=1e-10)
        assert r["ref_logprobs"] == pytest.approx(token_logprobs(reference, x, y, 0.6).tolist(), abs=1e-10)
        states = head_outputs(actor_critic.value, x, y)[len(x) - 1 :]
        assert r["values"] == pytest.approx(states[: min(len(y) + 1, exact.LENGTH)].tolist(), abs=1e-10)
        assert r["score"] == (pytest.approx(head_outputs(reward, x, y)[-1].item(), abs=1e-10) if r["finished"] else -1.0)  # fmt: skip
    run.args.missing_eos_score = 2.5
    assert {r["score"] for r in collect(run, 12, reward, reference)[1] if not r["finished"]} == {2.5}


def test_at_the_start_the_value_after_eos_is_the_score(make_run):
    """N+ 12: the value model is the reward model, and reads the same state at EOS."""
    run, reward = make_run(), scalar_model(center=0.25)
    _, rollouts = collect(run, 24, reward, actor_critic=irl.ActorCritic(exact.make_model(), copy.deepcopy(reward)))
    ended = [r for r in rollouts if len(r["values"]) > len(r["response_ids"])]
    assert len(ended) > 3 and all(r["values"][-1] == pytest.approx(r["score"], abs=1e-12) for r in ended)


def test_neither_micro_batches_nor_order_change_an_update(make_run):
    """N+ 33: forwards of any size; the means are over the whole minibatch (D1)."""
    run = make_run(num_ppo_epochs=1, vf_coef=0.5)
    actor_critic, rollouts = collect(run)
    irl.add_advantages(rollouts, run.args)
    found = []
    for micro, rows in ((12, stale(rollouts)), (1, rollouts), (5, rollouts[::-1])):
        run.args.per_device_train_batch_size = micro
        model = copy.deepcopy(actor_critic)
        irl.ppo_update(run, model, torch.optim.SGD(model.parameters(), lr=0.0), rows, 1.0, 0)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in actor_critic.parameters()])
    assert (found[0] - start).norm() > 1e-3 and all(close(f, found[0], 1e-10) for f in found[1:])


def test_first_step_of_an_update_has_ratio_1(make_run):
    """N+ 31: approxkl 0 at first, above it after more epochs."""
    run = make_run(num_ppo_epochs=1)
    actor_critic, rollouts = collect(run)
    irl.add_advantages(rollouts, run.args)
    row = irl.ppo_update(run, copy.deepcopy(actor_critic), torch.optim.SGD(actor_critic.parameters(), lr=0.0), rollouts, 0.0, 0)  # fmt: skip
    assert row["val/ratio"] == pytest.approx(1, abs=1e-10) and row["policy/approxkl_avg"] == pytest.approx(0, abs=1e-10)


def test_metrics_of_a_batch(make_run):
    """The identities that the names promise, and what gamma = lambda = 1 makes of the first return."""
    run = make_run(beta=0.7, lam=1.0)
    _, rollouts = collect(run, 9)
    kl = [sum(r["logprobs"]) - sum(r["ref_logprobs"]) for r in rollouts]
    row = {k.split("/")[1]: v for k, v in irl.add_advantages(rollouts, run.args).items()}
    assert row["scores"] == pytest.approx(np.mean([r["score"] for r in rollouts]))
    assert row["kl"] == pytest.approx(np.mean(kl)) and abs(row["kl"]) > 1e-2
    assert row["rlhf_reward"] == pytest.approx(row["scores"] - 0.7 * row["kl"])
    first = [r["score"] - 0.7 * k for r, k in zip(rollouts, kl, strict=True)]
    assert [r["returns"][0] for r in rollouts] == pytest.approx(first)
    flat = np.concatenate([r["advantages"] for r in rollouts])
    assert flat.mean() == pytest.approx(0, abs=1e-12) and flat.var() == pytest.approx(1, abs=1e-6)
    returns, values = (np.concatenate([r[k] for r in rollouts]) for k in ("returns", "values"))
    assert row["explained_variance"] == pytest.approx(1 - np.var(returns - values) / np.var(returns))
    lengths = [len(r["response_ids"]) for r in rollouts]
    assert row["mean_length"] == pytest.approx(np.mean(lengths)) and [len(r["advantages"]) for r in rollouts] == lengths
    assert row["num_eos_tokens"] == sum(r["finished"] for r in rollouts)


# ---- the plan and the paper's settings ----
def test_count_steps():
    """An epoch of the reward passes over all pairs there are; its last batch may be smaller, those before are not."""
    given = dict(batch_size=64, num_train_epochs=2, sft_epochs=3, total_episodes=1000, rollout_batch_size=256, T=3)
    steps = irl.count_steps(129, arguments(**given))
    assert steps == irl.Steps(sft=9, K=[6, 6, 6], updates=4, per_update=4)
    assert [steps.before(t) for t in range(3)] == [9, 31, 53]
    more = irl.count_steps(129, arguments(**given, pairs="accumulated"))
    assert more.K == [6, 10, 14] and [more.before(t) for t in range(3)] == [9, 31, 57]  # 258 / 64 and 387 / 64


def test_flags_default_to_the_papers_values():
    """App. 8.1 and N+ 10, 14, 28 to 30, 32; the optimizer gets them."""
    args = irl.Args(model="pythia-1b-deduped")
    resolve_auto(args, irl.SETTINGS)
    args.check()
    expected = dict(
        max_prompt_length=512, max_new_tokens=53, beta=0.05, gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1,
        num_ppo_epochs=4, num_mini_batches=1, rollout_batch_size=512, total_episodes=1_000_000, temperature=0.7, batch_size=64,
        num_train_epochs=1, learning_rate=3e-6, reward_learning_rate=3e-6, optimizer="adamw", adam_epsilon=1e-5, warmup_ratio=0.0,
        missing_eos_score=-1.0, whiten_rewards=False, greedy_temperature=0.01, eval_temperature=0.01, max_samples=10_000, max_grad_norm=math.inf,
        value_warmup_ratio=0.0, dataset="tldr-sft", prompts="all",
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert math.ceil(args.total_episodes / args.rollout_batch_size) == 1954  # N+ rounds down: 1953
    assert [learning_rate_at(u, 4, 1.0, 0.0) for u in range(4)] == [1.0, 0.75, 0.5, 0.25]  # N+ 30


# ---- where it ends up ----
@pytest.mark.slow
def test_ppo_goes_to_the_optimal_policy(make_run):
    """With a fixed reward: KL(pi || pi_ref exp(r / beta) / Z), mean over prompts, from 0.19 to below 0.02.

    Answers without EOS are all worth 0, as N+ 19 has it. The model hardly represents the optimum of such a reward: fitted to it
    directly for 100 steps it comes within 0.007.
    """
    updates, beta = 80, 0.5
    run, reference = make_run(beta=beta, max_grad_norm=1.0, missing_eos_score=0.0), exact.make_model()
    ended = torch.tensor([y[-1] == EOS for y in exact.RESPONSES])
    reward = torch.where(ended, letter_rewards(), 0.0)
    actor_critic, ref = irl.ActorCritic(exact.make_model(), scalar_model()), all_logprobs(reference)
    optimizer = torch.optim.AdamW(actor_critic.parameters(), lr=0.0, weight_decay=0.0)

    def distance(b: float) -> float:
        found = all_logprobs(actor_critic.policy)
        pairs = zip(found, ref, reward, strict=True)
        return sum(exact.kl(p, exact.optimal_policy(q, r, b)).item() for p, q, r in pairs) / 3

    start = distance(beta)
    for u in range(updates):
        _, rollouts = collect(run, 160, Table(reward), reference, u, actor_critic)
        irl.add_advantages(rollouts, run.args)
        irl.ppo_update(run, actor_critic, optimizer, rollouts, learning_rate_at(u, updates, 0.01, 0.02), 0, 3, u)
    assert start > 0.15
    assert distance(beta) < 0.02
    assert min(distance(beta / 2), distance(2 * beta)) > 0.03
