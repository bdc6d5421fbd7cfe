"""Log-probs and the optimizer step: padding never matters, micro-batches never matter, EOS is trained."""

import copy
import dataclasses
from types import SimpleNamespace

import exact
import pytest
import torch

import irft
import sft
from common import evals
from common.data import Batch, collate
from common.logprobs import masked_mean, masked_sum, response_logprobs, score_tokens
from common.run import Run

SEQUENCES = [([0], [1, 2, 3]), ([1, 2, 0, 1], [3]), ([2, 0], [0, 1, 2, 0]), ([1], [2, 3])]


@pytest.fixture(scope="module")
def model():
    return exact.make_model("gpt_neox", 0)


def widen(batch: Batch, extra: int, value: int) -> Batch:
    """The same sequences with `extra` more padding columns, all padding set to `value`."""
    pad = lambda x: torch.cat([x, x.new_zeros(len(x), extra)], -1)  # noqa: E731
    attention, mask = pad(batch.attention_mask), pad(batch.response_mask)
    ids = torch.where(attention.bool(), pad(batch.input_ids), value)
    return Batch(ids, attention, torch.where(mask, pad(batch.response_ids), value), mask, batch.response_start)


@pytest.mark.parametrize("poison", [1.0, 1e9, float("nan")])
def test_poisoned_padding_reaches_no_score_and_no_gradient(poison):
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1], [4]])
    logits, ids = torch.randn(4, 5, 7, dtype=torch.float64), torch.randint(0, 7, (4, 5))
    clean = logits.clone().requires_grad_()
    dirty = torch.where(mask[..., None], logits, poison).requires_grad_()
    before = dirty.detach().clone()
    a, b = score_tokens(clean, ids, mask), score_tokens(dirty, ids, mask)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
        assert (x[~mask] == 0).all()
    masked_sum(a.logprobs, mask).sum().backward()
    masked_sum(b.logprobs, mask).sum().backward()
    torch.testing.assert_close(clean.grad, dirty.grad, rtol=0, atol=0)
    assert torch.equal(before.nan_to_num(7), dirty.detach().nan_to_num(7))
    want = torch.stack([logits[i, t].log_softmax(-1)[ids[i, t]] for i in range(4) for t in range(5) if mask[i, t]])
    torch.testing.assert_close(a.logprobs[mask].detach(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [1.0, float("nan")])
def test_masked_reductions_ignore_what_is_masked(poison):
    x, mask = torch.randn(4, 6), torch.arange(6) < torch.tensor([[6], [3], [1], [5]])
    ragged = [row[m] for row, m in zip(x, mask, strict=True)]
    torch.testing.assert_close(masked_mean(x.masked_fill(~mask, poison), mask), torch.cat(ragged).mean())
    torch.testing.assert_close(masked_sum(x.masked_fill(~mask, poison), mask), torch.stack([r.sum() for r in ragged]))


@pytest.mark.parametrize("value", [0, 1, 3])
def test_more_padding_of_any_token_changes_nothing(model, value):
    batch = collate(SEQUENCES, pad_token_id=exact.EOS)
    wide = widen(batch, 5, value)
    for a, b in zip(response_logprobs(model, batch), response_logprobs(model, wide), strict=True):
        torch.testing.assert_close(a, b[:, : a.shape[1]], rtol=0, atol=1e-12)
    gradients = []
    for b in (batch, wide):
        model.zero_grad()
        masked_sum(response_logprobs(model, b).logprobs, b.response_mask).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_temperature_divides_the_logits(model):
    batch = collate(SEQUENCES, 0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    found = response_logprobs(model, batch, temperature=0.7).logprobs
    for i, (prompt, response) in enumerate(SEQUENCES):
        logp = (logits[i, len(prompt) - 1 : len(prompt) + len(response) - 1] / 0.7).log_softmax(-1)
        torch.testing.assert_close(found[i, : len(response)], logp[range(len(response)), response], rtol=0, atol=1e-12)


def test_entropy_and_accuracy_are_exact(model):
    batch = collate(SEQUENCES[:1], 0)
    p = model(input_ids=batch.input_ids).logits[0, 0:3].softmax(-1)
    scores = response_logprobs(model, batch)
    torch.testing.assert_close(scores.entropy[0], -(p * p.log()).sum(-1), rtol=0, atol=1e-12)
    assert scores.correct[0].tolist() == (p.argmax(-1) == torch.tensor(SEQUENCES[0][1])).double().tolist()


def test_the_stop_token_has_a_gradient(model):
    batch = collate([([0], [1, exact.EOS])], exact.EOS)
    logits = model(input_ids=batch.input_ids).logits.detach()[:, 0:2].requires_grad_()
    sft.nll_loss(
        score_tokens(logits, batch.response_ids, batch.response_mask).logprobs, batch.response_mask
    ).sum().backward()
    assert logits.grad[0, 1, exact.EOS] < -1e-3


# ---- one optimizer step ----
PAIRS = [
    {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "ref_chosen": -3.0 - i, "ref_rejected": -4.0 + i / 2}
    for i, (p, c, r) in enumerate(
        [([0], [1, 2, 3], [0, 3]), ([1, 2], [3], [2, 2, 2, 2]), ([2, 0, 1], [0, 3], [1, 3]), ([1], [1, 1, 3], [3]),
         ([0, 2], [2, 3], [0, 1, 3]), ([2], [0, 0, 3], [2, 1, 0, 3]), ([1, 1], [3], [0, 3])]
    )
]  # fmt: skip


def one_step(pairs, micro: int, mutate=lambda losses: losses, loss_type="logistic"):
    """(gradient, logged row) of one step of irft.py on a fresh model."""
    from accelerate import Accelerator

    model = exact.make_model("gpt_neox", 0)
    args = irft.Args(beta=0.3, per_device_train_batch_size=micro, max_grad_norm=1e9, loss_type=loss_type)
    run = Run.__new__(Run)
    run.args, run.accelerator, run.rank, run.world = args, Accelerator(cpu=True), 0, 1
    run.dir = SimpleNamespace()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]

    def loss_fn(part):
        losses, stats = irft.pair_loss(model, part, args, "cpu")
        return mutate(losses), stats

    row = run.step(model, optimizer, pairs, loss_fn, irft.pair_length, lr=1.0)
    change = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    return change, row


@pytest.mark.parametrize("loss_type", ["logistic", "linear"])
def test_micro_batches_change_neither_gradient_nor_row(loss_type):
    whole, row = one_step(PAIRS, 8, loss_type=loss_type)
    assert whole.norm() > 1e-3
    for micro in (1, 2, 3):
        part, other = one_step(PAIRS, micro, loss_type=loss_type)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)
        assert other == pytest.approx(row, rel=1e-10, abs=1e-12)


def test_order_of_pairs_does_not_matter():
    whole, row = one_step(PAIRS, 2)
    turned, other = one_step(PAIRS[::-1], 2)
    torch.testing.assert_close(turned, whole, rtol=0, atol=1e-12)
    assert other == pytest.approx(row, rel=1e-10, abs=1e-12)


def test_step_is_the_gradient_of_the_mean_loss_computed_by_hand():
    model = exact.make_model("gpt_neox", 0)
    losses = []
    for p in PAIRS:
        chosen, rejected = exact.response_logprobs(model, p["prompt_ids"], [p["chosen_ids"], p["rejected_ids"]])
        d = (chosen - p["ref_chosen"]) - (rejected - p["ref_rejected"])
        losses.append(torch.log1p(torch.exp(-0.3 * d)))
    torch.stack(losses).mean().backward()
    expected = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    found, row = one_step(PAIRS, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert row["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-12)
    wrong, _ = one_step(PAIRS, 2, mutate=lambda x: x / len(x))  # mean of the micro-batch, then summed
    assert (wrong - expected).abs().max() > 1e-3


def test_metrics_of_pairs_are_what_they_say():
    _, row = one_step(PAIRS, 3)
    model = exact.make_model("gpt_neox", 0)
    c = torch.stack([exact.response_logprobs(model, p["prompt_ids"], [p["chosen_ids"]])[0] for p in PAIRS]).detach()
    r = torch.stack([exact.response_logprobs(model, p["prompt_ids"], [p["rejected_ids"]])[0] for p in PAIRS]).detach()
    reward_c = 0.3 * (c - torch.tensor([p["ref_chosen"] for p in PAIRS]))
    reward_r = 0.3 * (r - torch.tensor([p["ref_rejected"] for p in PAIRS]))
    assert row["logps/chosen"] == pytest.approx(c.mean().item()) and row["logps/rejected"] == pytest.approx(
        r.mean().item()
    )
    assert row["rewards/margins"] == pytest.approx((reward_c - reward_r).mean().item())
    assert row["rewards/accuracies"] == pytest.approx((reward_c > reward_r).double().mean().item())
    tokens = sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in PAIRS)
    assert row["num_tokens"] * len(PAIRS) == pytest.approx(tokens)


def test_batches_are_not_edited_in_place(model):
    batch = collate(SEQUENCES, 0)
    before = copy.deepcopy(batch)
    response_logprobs(model, batch).logprobs.sum().backward()
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(batch, field.name), getattr(before, field.name))


# ---- measurements ----
def test_kl_estimates_agree_with_the_exact_kl():
    """k1 and the token-wise k3, averaged over all responses with their probabilities, are the exact KL."""
    policy, ref = exact.make_model("gpt_neox", 0), exact.make_model("gpt_neox", 1)
    prompt = exact.PROMPTS[1]
    run = Run.__new__(Run)
    run.args, run.accelerator = SimpleNamespace(per_device_eval_batch_size=32), SimpleNamespace(device="cpu")
    run.rank, run.world = 0, 1
    sequences = [(prompt, y) for y in exact.RESPONSES]
    ours, theirs = evals.sequence_logprobs(run, policy, sequences), evals.sequence_logprobs(run, ref, sequences)
    k1, k3 = evals.kl_estimates([t for _, t in ours], [t for _, t in theirs])
    p = exact.response_logprobs(policy, prompt).detach()
    truth = exact.kl(p, exact.response_logprobs(ref, prompt).detach()).item()
    assert truth > 0.01
    assert float(p.exp().numpy() @ k1) == pytest.approx(truth, abs=1e-10)
    assert float(p.exp().numpy() @ k3) == pytest.approx(truth, abs=1e-10)
    assert (k3 >= 0).all()


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    import numpy as np

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = evals.bootstrap_interval(rng.exponential(1.0, 60), draws=400)
        covered += low < 1.0 < high
    assert 0.86 < covered / 200 < 0.99


def test_rouge_l_is_the_longest_common_subsequence():
    assert evals.rouge_l("the cat sat", "the cat sat") == 1.0
    assert evals.rouge_l("dog", "the cat") == 0.0
    assert evals.rouge_l("the black cat", "the cat sat") == pytest.approx(2 / 3)
