"""The sampler: the distribution it claims, transformers' own tokens when greedy, and independence of the batch."""

import exact
import pytest
import torch
from helpers import make_model, make_tokenizer

from common.generation import Generator, inverse_cdf

PROMPTS = [[5, 6, 7], [9] * 20, [11, 12], [30] * 7, [40, 41, 42, 43, 44]]


def load(folder, architecture):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_model(folder, architecture)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["gpt_neox", "mistral"])
def test_greedy_equals_transformers_one_prompt_at_a_time(tmp_path, architecture):
    model, tokenizer = load(tmp_path, architecture)
    found = Generator(model, tokenizer, 3, 24).sample(PROMPTS, list(range(5)), seed=0, temperature=0)
    for prompt, response in zip(PROMPTS, found.response_ids, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id
        )[0, len(prompt) :].tolist()
        assert response == expected


def test_a_response_does_not_depend_on_its_batch(tmp_path):
    model, tokenizer = load(tmp_path, "gpt_neox")
    rows = [7, 1, 9, 4, 2]
    together = Generator(model, tokenizer, 5, 16).sample(PROMPTS, rows, seed=3)
    for size in (1, 2):
        assert Generator(model, tokenizer, size, 16).sample(PROMPTS, rows, seed=3).response_ids == together.response_ids
    turned = Generator(model, tokenizer, 2, 16).sample(PROMPTS[::-1], rows[::-1], seed=3)
    assert turned.response_ids == together.response_ids[::-1]
    assert Generator(model, tokenizer, 5, 16).sample(PROMPTS, rows, seed=4).response_ids != together.response_ids


def test_sampled_responses_have_the_models_distribution():
    """20,000 samples from the enumerable language against the exact probability of every response: chi-square within 4 sd."""
    model = exact.make_model("gpt_neox", 2, scale=2.0)
    tokenizer = make_tokenizer()
    tokenizer.eos_token_id = exact.EOS
    prompt, n = exact.PROMPTS[1], 20_000
    sampler = Generator(model, tokenizer, 2000, exact.LENGTH)
    sampler.eos_ids = {exact.EOS}
    rollout = sampler.sample([prompt] * n, list(range(n)), seed=1)
    index = {tuple(y): i for i, y in enumerate(exact.RESPONSES)}
    counts = torch.zeros(len(index), dtype=torch.float64)
    for y in rollout.response_ids:
        counts[index[tuple(y)]] += 1
    expected = n * exact.response_logprobs(model, prompt).exp().detach()
    usual = expected >= 5
    statistic = ((counts - expected)[usual] ** 2 / expected[usual]).sum().item()
    freedom = int(usual.sum()) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    assert [y[-1] == exact.EOS for y in rollout.response_ids] == rollout.finished
    logp = exact.response_logprobs(model, prompt).detach()
    picked = torch.tensor([logp[index[tuple(y)]] for y in rollout.response_ids])
    torch.testing.assert_close(
        torch.tensor([sum(t) for t in rollout.logprobs], dtype=torch.float64), picked, rtol=0, atol=1e-9
    )


def test_temperature_reaches_the_sampler():
    model = exact.make_model("gpt_neox", 2, scale=2.0)
    sampler = Generator(model, make_tokenizer(), 4000, 1)
    sampler.eos_ids = {exact.EOS}
    n = 8000
    for temperature in (0.5, 2.0):
        rollout = sampler.sample([[0]] * n, list(range(n)), seed=5, temperature=temperature)
        p = (model(input_ids=torch.tensor([[0]])).logits[0, -1] / temperature).softmax(-1).detach()
        share = torch.tensor([sum(y[0] == t for y in rollout.response_ids) / n for t in range(4)], dtype=torch.float64)
        assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_inverse_cdf_takes_the_interval_the_uniform_falls_in():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(5, 3)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999999])
    assert inverse_cdf(logits, uniforms).tolist() == [0, 0, 1, 1, 2]
    never = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert {inverse_cdf(never, torch.tensor([u])).item() for u in (0.0, 0.3, 0.5, 0.9)} == {0, 2}


def test_the_model_keeps_its_mode(tmp_path):
    model, tokenizer = load(tmp_path, "gpt_neox")
    model.train()
    Generator(model, tokenizer, 2, 4).sample(PROMPTS[:1], [0], seed=0)
    assert model.training
