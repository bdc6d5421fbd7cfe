"""Optimizers: no step is longer than its learning rate when the state is new, and weights that rest keep their bytes."""

import contextlib
import math
import signal
from types import SimpleNamespace

import exact
import pytest
import torch
from test_rft import scalar_model

import aihf_ppo
import irl_ppo_tldr
import rft
import sft
from common.args import resolve_auto
from common.generation import Generator
from common.run import Run
from common.streams import make_optimizer

RATE, STEPS = 1e-3, 60


@pytest.fixture
def make_run(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)

    def make(script, **given):
        sizes = dict(per_device_train_batch_size=1024, per_device_eval_batch_size=1024, max_new_tokens=exact.LENGTH)
        place = dict(output_dir=str(tmp_path / script.__name__), mixed_precision="no", max_length=16)
        args = script.Args(
            **{**sizes, **place, "temperature": 1.0, **given} if script is not sft else {**sizes, **place, **given}
        )
        resolve_auto(args, script.SETTINGS)
        return Run(args, script.__name__, script.METRICS)

    yield make
    signal.signal(signal.SIGTERM, handler)


def lengths(run, optimizer, weight, gradients, rates) -> list[float]:
    """Longest move of a number of `weight` in each step, in units of the step's learning rate."""
    model, found = torch.nn.Module(), []
    model.weight = weight
    for gradient, rate in zip(gradients, rates, strict=True):
        before = weight.detach().clone()
        run.step(model, optimizer, [0], lambda _, g=gradient: ((weight * g).sum()[None], {}), lambda _: 1, rate)
        found.append((weight.detach() - before).abs().max().item() / rate)
    return found


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_the_first_steps_are_as_long_as_the_learning_rate_says(make_run, name):
    """An even gradient moves every number by the rate, from the first step on, and so again after the state was cleared.

    torch's RMSprop alone would begin with 10, 7.1 and 5.8 times the rate. Of any gradients the k-th step is at most sqrt(k)
    times the rate (RMSprop), and the first one the rate.
    """
    run = make_run(sft, max_grad_norm=math.inf)
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = make_optimizer(name, [weight])
    even = [torch.tensor([3.0, -0.2, 1e-3], dtype=torch.float64)] * STEPS
    for _ in range(2):
        assert lengths(run, optimizer, weight, even, [RATE] * STEPS) == pytest.approx([1.0] * STEPS, rel=1e-4)
        optimizer.state.clear()
    noise = torch.Generator().manual_seed(0)
    uneven = [torch.randn(3, dtype=torch.float64, generator=noise) * 10.0 ** (k % 3) for k in range(STEPS)]
    found = lengths(run, optimizer, weight, uneven, [RATE] * STEPS)
    assert found[0] == pytest.approx(1.0, rel=1e-4)
    assert name == "adamw" or all(length <= math.sqrt(k + 1) for k, length in enumerate(found))
    optimizer.state.clear()
    plain = torch.optim.RMSprop([weight], lr=RATE)
    before = weight.detach().clone()
    weight.grad = even[0]
    plain.step()
    assert (weight.detach() - before).abs().max().item() / RATE == pytest.approx(10.0, rel=1e-3)  # what is corrected


def test_later_steps_are_those_of_torchs_rmsprop(make_run):
    """The correction fades: after 1,000 steps it is below 3e-5, and the steps are torch's own."""
    run, noise = make_run(sft, max_grad_norm=math.inf), torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    other = torch.nn.Parameter(weight.detach().clone())
    optimizer, plain = make_optimizer("rmsprop", [weight]), torch.optim.RMSprop([other], lr=RATE)
    gradients = [torch.randn(3, dtype=torch.float64, generator=noise) for _ in range(1000)]
    lengths(run, optimizer, weight, gradients, [RATE] * 1000)
    for gradient in gradients:
        other.grad = gradient
        plain.step()
    before = weight.detach().clone(), other.detach().clone()
    lengths(run, optimizer, weight, gradients[:1], [RATE])
    other.grad = gradients[0]
    plain.step()
    moved, expected = weight.detach() - before[0], other.detach() - before[1]
    assert torch.allclose(moved, expected, rtol=3e-5, atol=0)


# ---- parts that rest ----
SCRIPTS = {module.__name__: module for module in (rft, aihf_ppo, irl_ppo_tldr)}


def bytes_of(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def parts(run, name: str, decay: float):
    """(actor-critic in float64, its optimizer as the scripts make it, rollouts with advantages)."""
    script = SCRIPTS[name]
    own = script.ActorCritic(exact.make_model(), scalar_model())
    generator = Generator(own.policy, SimpleNamespace(eos_token_id=exact.EOS), 1024, exact.LENGTH)
    rows, here = [{"prompt_ids": x} for x in exact.PROMPTS], contextlib.nullcontext(exact.make_model(seed=1))
    rollouts = script.collect(run, own, scalar_model("mistral"), generator, lambda: here, rows, 1)
    script.add_advantages(rollouts, run.args)
    groups = own.policy.parameters(), own.value.parameters()
    return own, make_optimizer("adamw", *groups, weight_decay=decay), rollouts


@pytest.mark.parametrize("name", SCRIPTS)
def test_while_the_value_model_learns_alone_the_policy_keeps_its_bytes(make_run, name):
    """Weight decay included; beside the policy the value model moves as it does alone, and the policy then moves too."""
    run = make_run(SCRIPTS[name], num_ppo_epochs=2, max_grad_norm=math.inf)
    own, optimizer, rollouts = parts(run, name, decay=0.1)
    policy, value, update = bytes_of(own.policy), bytes_of(own.value), SCRIPTS[name].ppo_update
    for u in range(2):
        update(run, own, optimizer, rollouts, 0.1, u, policy_weight=0.0)
        assert same(bytes_of(own.policy), policy) and not same(bytes_of(own.value), value)
    update(run, own, optimizer, rollouts, 1e-5, 2)
    assert not same(bytes_of(own.policy), policy)


@pytest.mark.parametrize("name", SCRIPTS)
def test_while_the_policy_is_fine_tuned_the_value_model_keeps_its_bytes(make_run, name):
    run = make_run(SCRIPTS[name])
    own, optimizer, _ = parts(run, name, decay=0.1)
    rows = [{"prompt_ids": exact.PROMPTS[0], "response_ids": exact.RESPONSES[5]}] * 2
    extra = (run.args,) if name == "irl_ppo_tldr" else ()
    loss = lambda part: SCRIPTS[name].sft_batch_loss(own, part, *extra, "cpu")  # noqa: E731
    policy, value = bytes_of(own.policy), bytes_of(own.value)
    run.step(own, optimizer, rows, loss, rft.row_length, (0.1, 0.0))
    assert same(bytes_of(own.value), value) and not same(bytes_of(own.policy), policy)


@pytest.mark.parametrize("kind", ["rmsprop", "adamw"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_policys_first_steps_after_the_value_warm_up_are_no_longer_than_the_rate(
    make_run, tmp_path, monkeypatch, name, kind
):
    """A run's own policy step, whose first half is warm-up: it keeps the policy, and leaves nothing in its optimizer state.

    Means over zero gradients would make the first steps up to 10 (RMSprop) or 6.6 (AdamW) times as long.
    """
    script = SCRIPTS[name]
    exact.make_model().float().save_pretrained(tmp_path / "model")
    decay = {"weight_decay": 0.5} if name == "irl_ppo_tldr" else {"reward_model": ""}
    run = make_run(
        script, model=str(tmp_path / "model"), optimizer=kind, sft_epochs=0, total_episodes=32, rollout_batch_size=4,
        value_warmup_ratio=0.5, num_ppo_epochs=2, learning_rate=RATE, max_grad_norm=math.inf, eval_updates=1000,
        save_steps=1000, warmup_ratio=0.0, **decay,
    )  # fmt: skip
    rows = [{"row": i, "prompt_ids": x, "response_ids": exact.RESPONSES[i]} for i, x in enumerate(exact.PROMPTS)]
    tokenizer = words(tmp_path)
    aligner = {
        "rft": lambda: rft.RFT(run, tokenizer, rows, []),
        "aihf_ppo": lambda: aihf_ppo.AIHF(run, tokenizer, rows, rows, []),
        "irl_ppo_tldr": lambda: irl_ppo_tldr.IRL(run, tokenizer, rows, rows, [], []),
    }[name]()
    run.position["step"] = aligner.steps.before_policy(0)  # as if the reward had been learned
    monkeypatch.setattr(aligner, "measure", lambda *_: None)
    start, moves, real = bytes_of(aligner.raw.policy), [], script.ppo_update

    def watched(run, actor_critic, optimizer, rollouts, lr, *key, **given):
        step, seen = Run.step, []

        def measured(self, *rest):
            before = bytes_of(aligner.raw.policy)
            row = step(self, *rest)
            pairs = zip(bytes_of(aligner.raw.policy), before, strict=True)
            seen.append(max((a - b).abs().max().item() for a, b in pairs) / lr)
            return row

        monkeypatch.setattr(Run, "step", measured)
        row = real(run, actor_critic, optimizer, rollouts, lr, *key, **given)
        monkeypatch.setattr(Run, "step", step)
        moves.append(seen)
        return row

    monkeypatch.setattr(script, "ppo_update", watched)
    aligner.policy_step(0)
    assert len(moves) == 8 and all(length == 0.0 for seen in moves[:4] for length in seen)
    assert not same(bytes_of(aligner.raw.policy), start)
    decayed = decay.get("weight_decay", 0.0) * max(p.abs().max().item() for p in start)
    assert moves[4][0] == pytest.approx(1.0, abs=1e-2 + decayed)
    assert moves[4][1] < math.sqrt(2) + 1e-2 + decayed


def words(folder):
    """Tokenizer of the enumerable language."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "</s>": exact.EOS}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    return tokenizer
