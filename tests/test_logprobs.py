"""Log-probs and the optimizer step: padding never matters, micro-batches never matter, EOS is trained."""

import copy
import dataclasses
import sys
from types import SimpleNamespace

import architectures
import exact
import pytest
import torch
from architectures import gradients
from helpers import ROOT, LookUp
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import irft
import sft
from common import UserError, evals, logprobs
from common.data import Batch, collate
from common.engine import Engine
from common.logprobs import masked_mean, masked_sum, plain_logprobs, response_logprobs
from common.rewards import ScalarModel
from common.run import Run
from extras import fused_head, packing, statistics, token_scores
from extras.adapters import add_lora

sys.path.append(str(ROOT / "benchmark"))
from memory import measured_peak

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
    """Hidden states that predict no response token have no effect, whatever they are."""
    torch.manual_seed(0)
    batch = collate([([0] * p, [1 + i % 6 for i in range(r)]) for p, r in ((1, 5), (3, 2), (2, 1), (1, 4))], 0)
    hidden, head = torch.randn(4, 6, 3, dtype=torch.float64), torch.nn.Linear(3, 7).double()
    end = batch.response_start + batch.response_mask.sum(-1) - 1
    columns = torch.arange(6)
    read = (columns >= batch.response_start[:, None] - 1) & (columns < end[:, None])
    clean = hidden.clone().requires_grad_()
    dirty = torch.where(read[..., None], hidden, poison).requires_grad_()
    before = dirty.detach().clone()
    a, b = (response_logprobs(LookUp(x, head), batch) for x in (clean, dirty))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
        assert (x[~batch.response_mask] == 0).all()
    masked_sum(a.logprobs, batch.response_mask).sum().backward()
    masked_sum(b.logprobs, batch.response_mask).sum().backward()
    torch.testing.assert_close(clean.grad, dirty.grad, rtol=0, atol=0)
    assert torch.equal(before.nan_to_num(7), dirty.detach().nan_to_num(7))
    logp = head(hidden).log_softmax(-1)
    want = [
        logp[i, columns[read[i]]][range(m.sum()), y[m]]
        for i, (m, y) in enumerate(zip(batch.response_mask, batch.response_ids, strict=True))
    ]
    torch.testing.assert_close(a.logprobs[batch.response_mask].detach(), torch.cat(want).detach(), rtol=0, atol=1e-12)


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
    logits = model(input_ids=batch.input_ids).logits.detach().requires_grad_()
    scores = response_logprobs(LookUp(logits, torch.nn.Identity()), batch)
    sft.nll_loss(scores.logprobs, batch.response_mask).sum().backward()
    assert logits.grad[0, 1, exact.EOS] < -1e-3


# ---- the head: response tokens only, in chunks ----
def tiny_config(architecture: str, **overrides):
    size = dict(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    size |= {} if architecture == "gpt_neox" else {"num_key_value_heads": 2}
    return AutoConfig.for_model(architecture, **size, max_position_embeddings=32, **overrides)


def tiny_model(architecture: str, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides)).double()


def full_scores(model, batch: Batch, temperature: float):
    """The same from the logits of every position, row by row."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits / temperature
    logp, out = logits.log_softmax(-1), torch.zeros(3, *batch.response_mask.shape, dtype=torch.float64)
    for i, (start, length) in enumerate(zip(batch.response_start, batch.response_mask.sum(-1), strict=True)):
        part, ids = logp[i, start - 1 : start + length - 1], batch.response_ids[i, :length]
        out[0, i, :length] = part.gather(-1, ids[:, None])[:, 0]
        out[1, i, :length] = -(part.exp() * part).sum(-1)
        out[2, i, :length] = part.argmax(-1) == ids
    return out


class Wrapper(torch.nn.Module):
    """As accelerate's engines wrap a model: what must happen in its forward is lost if it is not called."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, **kwargs):
        self.calls += 1
        return self.module(**kwargs)


ARCHITECTURES = ["gpt_neox", "llama", "mistral", "qwen2", "lora", "tied"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    if request.param == "lora":
        model = add_lora(tiny_model("mistral"), irft.Args(lora_r=2))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        return model
    return tiny_model("llama", tie_word_embeddings=True) if request.param == "tied" else tiny_model(request.param)


@pytest.mark.parametrize("tokens", [1, 3, 10, 1000])
def test_chunks_of_response_tokens_are_the_full_logits(architecture, tokens, monkeypatch):
    """Values, gradients, entropy and accuracy, through a wrapper, whatever the size of a chunk."""
    monkeypatch.setattr(fused_head, "CHUNK", 11 * tokens)
    wrapped, batch = Wrapper(architecture), collate(SEQUENCES, 0)
    ours, full = response_logprobs(wrapped, batch, 0.7), full_scores(architecture, batch, 0.7)
    assert wrapped.calls == 1
    for found, want in zip(ours, full, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert ours.logprobs.requires_grad and not ours.entropy.requires_grad
    found, want = gradients(architecture, ours.logprobs), gradients(architecture, full[0])
    assert want.norm() > 1e-2
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert "forward" not in vars(logprobs.language_model(architecture).get_output_embeddings())
    plain = plain_logprobs(architecture, batch, 0.7)
    torch.testing.assert_close(ours.logprobs, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, gradients(architecture, plain), rtol=0, atol=1e-12)


def test_no_more_logits_than_a_chunk_are_made(monkeypatch):
    """1,024 tokens of 2,048, 8,192 words: the full float32 logits take 64 MiB, these 32, and a chunk here 2."""
    config = tiny_config("llama")
    config.vocab_size, config.hidden_size, config.max_position_embeddings = 8192, 16, 256
    model = AutoModelForCausalLM.from_config(config)
    batch = collate([([1] * 128, [2] * 128)] * 8, 0)

    def step():
        response_logprobs(model, batch).logprobs.sum().backward()

    monkeypatch.setattr(fused_head, "CHUNK", 2**30)
    whole = measured_peak(step)
    monkeypatch.setattr(fused_head, "CHUNK", 2**19)
    chunked = measured_peak(step)
    assert 2 * 32 * 2**20 < whole < 2.5 * 32 * 2**20  # the logits and their gradient
    assert chunked < 6 * 2 * 2**20 + 8 * 2**20


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_blocks_of_logits_are_scored_as_all_of_them(rows, dtype, autocast, monkeypatch):
    """Values and gradient of score_tokens, of 10 tokens in blocks of `rows`, the last one smaller."""
    monkeypatch.setattr(token_scores, "BLOCK", 17 * rows + 5)
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(10, 17, generator=draw) * 3).to(dtype)
    targets, weights = torch.randint(17, (10,), generator=draw), torch.randn(10, generator=draw)
    logits[:2, [4, 9]] = 20.0  # the first of the most likely words counts
    targets[:2] = torch.tensor([4, 9])
    assert type(token_scores.score(logits.clone().requires_grad_(), targets).grad_fn).__name__ == "BlocksBackward"
    results = []
    for score in (logprobs.score_tokens, token_scores.score):
        given = logits.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = score(given, targets, 0.7)
        (found[0] * weights).sum().backward()
        results.append((found.detach(), given.grad))
        assert torch.equal(given, logits)
    (want, gradient), (found, own_gradient) = results
    exact = dict(rtol=0, atol=1e-12 if dtype == torch.float64 else 5e-6)
    torch.testing.assert_close(found, want, **exact)
    assert torch.equal(found[2], want[2]) and found.dtype == want.dtype and 0 < want[2].sum() < 10
    torch.testing.assert_close(
        own_gradient, gradient, **(exact if dtype != torch.bfloat16 else dict(rtol=1e-2, atol=1e-3))
    )
    assert gradient.float().abs().sum(-1).min() > 1e-3  # every token has one


def test_blocks_have_no_gradient_through_entropy_and_accuracy(monkeypatch):
    monkeypatch.setattr(token_scores, "BLOCK", 5)
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 3])
    token_scores.score(logits, targets)[1:].sum().backward()
    assert not logits.grad.any()
    torch.autograd.gradcheck(lambda z: token_scores.score(z, targets, 0.7)[0], logits)


CHANGED = {  # architecture -> the number by which it changes the logits of its head, and what else it needs
    "gemma2": {"head_dim": 4, "final_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 4, "final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "nanochat": {"final_logit_softcapping": 0.5},
    "recurrent_gemma": {"logits_soft_cap": 0.5, "lru_width": 16},
}


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("architecture", CHANGED)
def test_soft_capped_and_scaled_logits_are_scored_as_the_model_returns_them(architecture, known, monkeypatch):
    """Value and gradient of the full logits, in chunks where the change is known, at once where it is not."""
    monkeypatch.setattr(fused_head, "CHUNK", 11 * 3)
    if not known:
        monkeypatch.setattr(fused_head, "known_changes", lambda config: [])
    model, batch = tiny_model(architecture, **CHANGED[architecture]), collate(SEQUENCES, 0)
    with torch.no_grad():  # logits far enough from 0 for the change to show
        model.get_output_embeddings().weight.mul_(20)
    ours, full = response_logprobs(model, batch, 0.7), full_scores(model, batch, 0.7)
    for found, want in zip(ours, full, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    found = gradients(model, ours.logprobs)
    torch.testing.assert_close(found, gradients(model, full[0]), rtol=0, atol=1e-12)
    plain = plain_logprobs(model, batch, 0.7)
    torch.testing.assert_close(ours.logprobs, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, gradients(model, plain), rtol=0, atol=1e-12)
    seen = fused_head.HEADS[model.get_output_embeddings()]
    assert (seen.change is not None) == known and seen.vocabulary == 11
    hidden = torch.randn(1, 3, 16, dtype=torch.float64)
    plain = model.get_output_embeddings()(hidden)
    assert not known or not torch.equal(seen.change(plain), plain)


QUICK = (  # absolute, rotary and no positions, one and several heads, experts, tied and scaled logits, states instead of caches
    "bloom", "cohere2", "falcon", "gemma", "gemma2", "gpt2", "gpt_neo", "gptj", "granite", "mamba", "olmo2", "opt", "phi", "qwen3",
    "starcoder2",
)  # fmt: skip
EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe")  # in float32: their products over experts take no float64


@pytest.mark.parametrize("name", QUICK + EXPERTS)
def test_scores_are_those_of_the_plain_version_for_many_architectures(name, monkeypatch):
    """The head that scores in chunks and the plain eight lines: same value, same gradient, at the first call and at the second."""
    monkeypatch.setattr(fused_head, "CHUNK", 3 * architectures.VOCABULARY)
    model, batch = architectures.build(name).eval(), collate(SEQUENCES, 0)
    model, near = (model, 1e-4) if name in EXPERTS else (model.double(), 1e-5)  # some layers compute in float32 always
    plain = plain_logprobs(model, batch, 0.7)
    expected = gradients(model, plain)
    assert plain.std() > 0.01 and expected.norm() > 1e-2
    for _ in range(2):
        found = response_logprobs(model, batch, 0.7).logprobs
        torch.testing.assert_close(found, plain, rtol=0, atol=near)
        torch.testing.assert_close(gradients(model, found), expected, rtol=near, atol=near)


class Shorter(torch.nn.Module):
    """A model that leaves out the last words of its head, and one whose logits are not its head's at all."""

    def __init__(self, inner, made: bool):
        super().__init__()
        self.inner, self.made, self.config = inner, made, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        logits = self.inner(**inputs).logits
        return SimpleNamespace(logits=logits[..., :8] if self.made else logits.new_zeros(4, 9, 11))


def test_a_head_with_more_rows_than_words_is_scored_over_the_words():
    model, batch = Shorter(tiny_model("llama"), True), collate(SEQUENCES, 0)
    for found, want in zip(response_logprobs(model, batch), full_scores(model, batch, 1.0), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="--model: found Shorter, whose logits are not made by its language-model head"):
        response_logprobs(Shorter(tiny_model("llama"), False), batch)


# ---- without padding ----
def block_diagonal(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, cu_seq_lens_k, **others):
    """What flash attention of sequences of their own lengths computes, from what it is given."""
    assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    lengths = cu_seq_lens_q.diff()
    assert others["max_length_q"] == others["max_length_k"] == lengths.max() and cu_seq_lens_q.dtype == torch.int32
    own = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    allowed = (own[:, None] == own) & torch.ones(len(own), len(own)).tril().bool()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("flash_attention_in_words", block_diagonal)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:1]])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_in_words"])
def test_one_row_without_padding_scores_as_padded_rows_do(architecture, sequences, attention, monkeypatch):
    """Under flash attention's stand-in, and under sdpa, for which transformers makes the same mask from the positions."""
    model, batch = tiny_model(architecture), collate(sequences, 0)
    padded = response_logprobs(model, batch)
    expected = gradients(model, padded.logprobs)
    if attention == "sdpa":
        monkeypatch.setattr(packing, "padding_free", lambda config: True)
    else:
        model.config._attn_implementation = attention
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    packed = response_logprobs(model, batch)
    assert (
        seen[0]["input_ids"].shape == (1, sum(len(p) + len(r) for p, r in sequences))
        and "attention_mask" not in seen[0]
    )
    for found, want in zip(packed, padded, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(model, packed.logprobs), expected, rtol=0, atol=1e-12)


def test_scalar_models_without_padding(monkeypatch):
    torch.manual_seed(0)
    scalar = ScalarModel(AutoModelForSequenceClassification.from_config(tiny_config("mistral", num_labels=1)).double())
    batch = collate(SEQUENCES, 0)
    padded = scalar(batch), scalar(batch, every=True)
    monkeypatch.setattr(packing, "padding_free", lambda config: True)
    torch.testing.assert_close((scalar(batch), scalar(batch, every=True)), padded, rtol=0, atol=1e-12)


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
    run.args, run.engine, run.rank, run.world = args, Engine(Accelerator(cpu=True)), 0, 1
    run.accelerator = run.engine.accelerator
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
    batch = collate([*SEQUENCES, SEQUENCES[0]], 0)
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
    run.args, run.accelerator = irft.Args(per_device_eval_batch_size=32), SimpleNamespace(device="cpu")
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
        low, high = statistics.bootstrap_interval(rng.exponential(1.0, 60), draws=400)
        covered += low < 1.0 < high
    assert 0.86 < covered / 200 < 0.99


def test_rouge_l_is_the_longest_common_subsequence():
    assert evals.rouge_l("the cat sat", "the cat sat") == 1.0
    assert evals.rouge_l("dog", "the cat") == 0.0
    assert evals.rouge_l("the black cat", "the cat sat") == pytest.approx(2 / 3)
