"""aihf_mujoco.py and extras/control.py: environments, episodes, seeds side by side, resumed runs, what a method may see, wrong words.

Most tests run on an environment of this file, which needs no gymnasium, may terminate and has noise. gymnasium's and MuJoCo's
own are tested where they are installed.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, child_environment

import aihf_mujoco as script
from common import UserError
from common.args import main
from common.streams import stream_seed
from extras import control, run_directory, terminal
from extras import episodes as episodes_of
from extras.control import Environments
from extras.episodes import Episodes

LIMIT = 9  # steps of an episode of the toy


class Toy:
    """x' = x + 0.2 (a_0 + a_1) + noise, reward 1 - x^2, over when |x| > 1. Actions in [-2, 2] x [-1, 3]."""

    spec = SimpleNamespace(max_episode_steps=LIMIT)
    observation_space = SimpleNamespace(shape=(2,))
    action_space = SimpleNamespace(low=np.array([-2, -1], np.float32), high=np.array([2, 3], np.float32))
    factor, noise = 1.0, 0.2

    def __init__(self):
        self.received = []

    @property
    def unwrapped(self):
        return self

    def observe(self) -> np.ndarray:
        return np.array([self.state[0], self.state[0] ** 2])

    def reset(self, seed=None):
        if seed is not None:
            self.np_random = np.random.default_rng(seed)
        self.state = self.np_random.uniform(-0.5, 0.5, 1)
        return self.observe(), {}

    def step(self, action):
        self.received.append(action)
        self.state = self.state + 0.2 * action.sum() + self.noise * self.np_random.normal(size=1)
        over = bool(abs(self.state[0]) > 1)
        return self.observe(), self.factor * (1 - self.state[0] ** 2), over, False, {}


class Limit:
    """What gymnasium's TimeLimit does."""

    def __init__(self, env):
        self.env, self.unwrapped, self._elapsed_steps = env, env, 0

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, seed=None):
        self._elapsed_steps = 0
        return self.env.reset(seed)

    def step(self, action):
        self._elapsed_steps += 1
        observation, reward, terminated, _, more = self.env.step(action)
        return observation, reward, terminated, self._elapsed_steps >= LIMIT, more


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """`toy` is an environment, and what a run changes in its process is put back."""
    make = control.make_environment
    monkeypatch.setattr(control, "make_environment", lambda name: Limit(Toy()) if name == "toy" else make(name))
    monkeypatch.setattr(run_directory, "lock", lambda folder: None)  # a run of this process may be resumed in it
    handlers = {number: signal.getsignal(number) for number in terminal.SIGNALS}
    monkeypatch.setattr(terminal, "asked", 0)
    monkeypatch.setattr(terminal, "hint", "")
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


SMALL = dict(
    env="toy", total_steps=48, random_steps=8, eval_every=16, expert_steps=60, checkpoint_every=12, num_envs=2, hidden=8,
    batch_size=6, bc_steps=20, ipl_steps=40, preference_steps=10, critic_warmup=8, reward_every=8, reward_steps=2,
    num_preferences=12, segment_length=3, preference_batch_size=5, policy_window=14, eval_episodes=2, checkpoint_episodes=2,
    save_steps=20, learning_rate=1e-2, num_demonstrations=2, expert_alpha=0.2, expert_seeds=1,
)  # fmt: skip
METHODS = {
    "sac": dict(method="sac", alpha=0.0),
    "aihf": dict(),
    "aihf, prior bc": dict(prior="bc"),
    "aihf from scratch, terminate": dict(start="scratch", horizon="terminate", discount_demo=True),
    "rlhf": dict(demo_weight=0.0),
    "irl": dict(preference_weight=0.0),
    "bc": dict(method="bc", eval_every=5),
    "ipl": dict(method="ipl", eval_every=10),
}


def settings(**given) -> script.Args:
    return script.Args(**SMALL | given)


def follow(gain: float, noise: float, seed: int):
    """A policy that pushes x to 0, with noise of its own."""
    rng = torch.Generator().manual_seed(seed)

    def act(observations):
        push = (-gain * observations[..., :1]).expand(*observations.shape[:-1], 2)
        return (push + noise * torch.randn(push.shape, generator=rng) - torch.tensor([0.0, 0.5])).clamp(-1, 1)

    return act


def made_episodes() -> tuple[Episodes, np.ndarray]:
    """Four episodes of each of five policies of the toy, the worst first."""
    played = []
    for c, (gain, noise) in enumerate([(-2.0, 1.0), (-2.0, 1.0), (0.0, 0.9), (1.0, 0.4), (2.0, 0.1)]):
        seeds = [[1000 * c + n for n in range(4)]]
        played += control.play(Environments("toy", seeds), seeds, follow(gain, noise, c))
    fields = Episodes.__dataclass_fields__
    return Episodes(*(np.concatenate([getattr(e, f) for e in played]) for f in fields)), np.repeat(np.arange(5), 4)


@pytest.fixture
def expert(monkeypatch, toy):
    """An expert's episodes without its training."""
    episodes, checkpoint = made_episodes()
    monkeypatch.setattr(script, "expert_episodes", lambda *_: (episodes, checkpoint, Path("nowhere")))
    return episodes, checkpoint


def learner(data=None, **given) -> script.Learner:
    """A Learner whose run keeps nothing but its rows of metrics."""

    @contextlib.contextmanager
    def phase(*_):
        yield lambda n: None

    rows: list[dict] = []
    run = SimpleNamespace(args=settings(**given), phase=phase, position={"step": 0}, rows=rows)
    run.log, run.save_weights = lambda row, **axis: rows.append({**axis, **row}), lambda *_: None
    if data is None and run.args.method != "sac":
        data = script.Data(run.args)
    return script.Learner(run, data)


def work(of: script.Learner, updates: int) -> script.Learner:
    """The warm start and some updates."""
    of.warm_start()
    step = {"aihf": of.interact, "sac": of.interact, "bc": of.clone, "ipl": of.learn_offline}[of.args.method]
    for k in range(updates):
        step(k)
    return of


def steady(of: script.Learner) -> script.Learner:
    """Give it a policy whose noise alone ends some episodes of the toy, but not all."""
    with torch.no_grad():
        of.sac.policy.weights[-1].mul_(0.1)
        of.sac.policy.biases[-1].copy_(torch.tensor([0, -0.55, -0.3, -0.3]))
    return of


def networks(of: script.Learner) -> dict[str, torch.Tensor]:
    """Every weight, seeds first: twin Q as (2, S, ...)."""
    parts = {
        "policy": of.sac.policy,
        "critic": of.sac.critic,
        "target": of.sac.target,
        "reward": of.reward,
        "q": of.implied,
    }
    found = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    return {**found, "log_alpha": of.sac.log_alpha.detach()}


def of_seed(value: torch.Tensor, s: int, seeds: int) -> torch.Tensor:
    return value[s::seeds]


# ---- seeds side by side ----
def as_linear(mlp: script.MLP, m: int) -> torch.nn.Sequential:
    """Network m of an MLP, from torch's own layers."""
    layers: list[torch.nn.Module] = []
    for weight, bias in zip(mlp.weights, mlp.biases, strict=True):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data, linear.bias.data = weight[m].T.detach().clone(), bias[m, 0].detach().clone()
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def test_stacked_networks_are_stacks_of_linear_layers():
    generators = [torch.Generator().manual_seed(s) for s in (3, 4, 5)]
    mlp = script.MLP((4, 16, 16, 2), generators)
    x = torch.randn(3, 7, 4, requires_grad=True)
    y = mlp(x)
    (y**2).sum().backward()
    for m in range(3):
        alone = as_linear(mlp, m)
        own = x[m].detach().requires_grad_()
        (alone(own) ** 2).sum().backward()
        torch.testing.assert_close(y[m], alone(own))
        torch.testing.assert_close(x.grad[m], own.grad)
        for i, linear in enumerate(alone[::2]):
            torch.testing.assert_close(mlp.weights[i].grad[m], linear.weight.grad.T)
            torch.testing.assert_close(mlp.biases[i].grad[m, 0], linear.bias.grad)
    mlp.zero_grad()
    constant = x.detach().requires_grad_()
    (mlp(constant, constant=True) ** 2).sum().backward()
    torch.testing.assert_close(constant.grad, x.grad)
    assert all(p.grad is None for p in mlp.parameters())


def test_networks_begin_as_torchs_own_and_each_from_its_generator():
    mlp = script.MLP((5, 400, 3), [torch.Generator().manual_seed(s) for s in (1, 2)])
    for i, fan_in in enumerate((5, 400)):
        for value in (mlp.weights[i], mlp.biases[i]):
            assert value.abs().max() <= 1 / math.sqrt(fan_in)
        spread = mlp.weights[i].std().item()
        assert spread == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05)  # of a uniform distribution
    second = script.MLP((5, 400, 3), [torch.Generator().manual_seed(2)])
    for both, alone in zip(mlp.parameters(), second.parameters(), strict=True):
        assert torch.equal(both[1:], alone) and not torch.equal(both[:1], alone)


@pytest.mark.parametrize("method", METHODS)
def test_seeds_side_by_side_are_the_seeds_alone(expert, method):
    updates = 24 if method in ("bc", "ipl") else SMALL["total_steps"] // SMALL["num_envs"]
    together = work(learner(num_seeds=2, seed=5, **METHODS[method]), updates)
    for s in range(2):
        alone = work(learner(seed=5 + s, **METHODS[method]), updates)
        for name, value in networks(alone).items():
            torch.testing.assert_close(of_seed(networks(together)[name], s, 2), value, rtol=2e-3, atol=2e-4, msg=name)
        torch.testing.assert_close(together.replay[s], alone.replay[0], rtol=2e-3, atol=2e-4)
        for name, total in alone.totals.items():
            torch.testing.assert_close(together.totals[name][s], total[0], rtol=2e-3, atol=2e-3, msg=name)
    first, second = (of_seed(networks(together)["policy.weights.0"], s, 2) for s in range(2))
    assert (first - second).abs().max() > 0.01


def test_seeds_side_by_side_on_gymnasiums_pendulum(expert):
    pytest.importorskip("gymnasium")
    given = dict(method="sac", env="Pendulum-v1", num_envs=3)
    together = work(learner(num_seeds=2, **given), 16)
    for s in range(2):
        alone = work(learner(seed=1 + s, **given), 16)
        for name, value in networks(alone).items():
            torch.testing.assert_close(of_seed(networks(together)[name], s, 2), value, rtol=2e-3, atol=2e-4, msg=name)


# ---- the policy step ----
def tanh_normal(policy: torch.nn.Sequential, observations: torch.Tensor) -> torch.distributions.Distribution:
    mean, log_std = policy(observations).chunk(2, -1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
    return torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("train_policy", [True, False])
def test_an_update_of_sac_is_that_of_plain_torch(prior, train_policy):
    """Gradients of critic, policy and temperature, by steps of plain gradient descent; the target moves after the critic."""
    torch.manual_seed(0)
    args = settings(method="sac", alpha=0.3 if prior else 0.0, gamma=0.9, tau=0.1)
    seeds = [
        torch.Generator().manual_seed(n) for n in (1, 2)
    ]  # the second one is there to be left out of the first's sums
    sac = script.SAC(3, 2, args, seeds)
    with torch.no_grad():  # all Q apart
        for p in (*sac.target.parameters(), *sac.critic.parameters()):
            p.add_(0.3 * torch.randn_like(p))
        sac.critic.biases[-1].sub_(
            sac.critic(torch.randn(4, 64, 5)).mean(1, keepdim=True)
        )  # and either the lower at times
    if prior:
        sac.prior = script.Policy((3, 8, 8, 4), seeds)
    descend = lambda module: torch.optim.SGD(module.parameters(), lr=0.1)  # noqa: E731
    sac.policy_optimizer, sac.critic_optimizer = descend(sac.policy), descend(sac.critic)
    sac.alpha_optimizer = torch.optim.SGD([sac.log_alpha], lr=0.1)
    policy = as_linear(sac.policy, 0)
    (q1, q2), (t1, t2) = ([as_linear(critic, m) for m in (0, 2)] for critic in (sac.critic, sac.target))
    pi_0 = as_linear(sac.prior, 0) if prior else None
    s, a, s2, r = torch.randn(5, 3), torch.rand(5, 2) * 2 - 1, torch.randn(5, 3), torch.randn(5)
    over, noise = torch.tensor([0.0, 1, 0, 0, 1]), torch.randn(2, 2, 5, 2)
    log_alpha = sac.log_alpha.detach()[:1].clone().requires_grad_()

    def sampled(observations, eps):
        mean, log_std = policy(observations).chunk(2, -1)
        u = mean + log_std.clamp(-5, 2).exp() * eps
        actions = torch.tanh(u)
        logprobs = tanh_normal(policy, observations).log_prob(actions).sum(-1)
        ratio = logprobs - (tanh_normal(pi_0, observations).log_prob(actions).sum(-1) if prior else 0.0)
        return actions, ratio, logprobs

    with torch.no_grad():
        a2, ratio, _ = sampled(s2, noise[0, 0])
        following = torch.cat([s2, a2], -1)
        y = r + 0.9 * (1 - over) * (torch.minimum(t1(following), t2(following))[:, 0] - log_alpha.exp()[0, 0] * ratio)
    for q in (q1, q2):
        ((q(torch.cat([s, a], -1))[:, 0] - y) ** 2).mean().backward()
        with torch.no_grad():
            for p in q.parameters():
                p -= 0.1 * p.grad
    new, ratio, logprobs = sampled(s, noise[1, 0])
    pair = torch.cat([s, new], -1)
    assert 0 < (q1(pair) < q2(pair)).sum() < 5
    (log_alpha.exp().detach()[0, 0] * ratio - torch.minimum(q1(pair), q2(pair))[:, 0]).mean().backward()
    (-log_alpha * (logprobs.detach() - 2)).mean().backward()

    before = copy.deepcopy(sac.policy.state_dict())
    sac.update(tuple(torch.stack([x, x.flip(0)]) for x in (s, a, s2, r, over)), noise, train_policy)
    same = dict(rtol=1e-4, atol=1e-5)
    for m, q, t in ((0, q1, t1), (2, q2, t2)):
        for i, layer in enumerate(q[::2]):
            torch.testing.assert_close(sac.critic.weights[i][m], layer.weight.T, **same)
            moved = 0.9 * t[2 * i].weight + 0.1 * layer.weight
            torch.testing.assert_close(sac.target.weights[i][m], moved.T, **same)
    for i, layer in enumerate(policy[::2]):
        expected = layer.weight - 0.1 * layer.weight.grad * train_policy
        torch.testing.assert_close(sac.policy.weights[i][0], expected.T, **same)
        assert layer.weight.grad.abs().max() > 1e-3
    learned = train_policy and not prior
    torch.testing.assert_close(sac.log_alpha[:1], log_alpha - 0.1 * log_alpha.grad * learned, **same)
    if not train_policy:
        assert all(torch.equal(value, before[name]) for name, value in sac.policy.state_dict().items())


def test_deviations_of_a_policy_are_within_bounds():
    policy = script.Policy((3, 8, 4), [torch.Generator().manual_seed(1)])
    policy.biases[-1].data[..., 2:] = torch.tensor([-50.0, 50.0])
    mean, log_std = policy(torch.randn(1, 6, 3))
    assert mean.shape == log_std.shape == (1, 6, 2) and (log_std == torch.tensor([-5.0, 2.0])).all()


# ---- environments ----
def test_actions_reach_an_environment_in_its_own_bounds():
    environments = Environments("toy", [[1, 2]])
    environments.step(np.array([[[-1, -1], [1, 1]]], np.float32))
    environments.step(np.array([[[0, 0], [0.5, -0.5]]], np.float32))
    first, second = (env.unwrapped.received for env in environments.envs[0])
    assert np.array_equal(first, [[-2, -1], [0, 1]]) and np.array_equal(second, [[2, 3], [1, 0]])


def test_actions_reach_pendulum_in_its_own_bounds():
    pytest.importorskip("gymnasium")
    environments = Environments("Pendulum-v1", [[1, 2, 3]])
    environments.step(np.array([[[-1], [0], [0.5]]], np.float32))
    assert [env.unwrapped.last_u for env in environments.envs[0]] == [-2, 0, 1]


def test_episodes_end_begin_anew_and_keep_their_own_last_observation():
    """Against copies of the environment that are driven one by one."""
    seeds = [[1, 2], [3, 4]]
    environments = Environments("toy", seeds)
    copies = [[Toy() for _ in row] for row in seeds]
    observed = [[e.reset(seed)[0] for e, seed in zip(*both, strict=True)] for both in zip(copies, seeds, strict=True)]
    steps, ends = np.zeros((2, 2), int), {"terminated": 0, "truncated": 0}
    rng = np.random.default_rng(0)
    for _ in range(60):
        np.testing.assert_array_equal(environments.observations, np.array(observed, np.float32))
        actions = rng.uniform(-1, 1, (2, 2, 2)).astype(np.float32) * 0.5 - np.array([0, 0.5], np.float32)
        following, rewards, terminated, at = environments.step(actions)
        np.testing.assert_array_equal(at, steps)
        for s in range(2):
            for n in range(2):
                low, high = Toy.action_space.low, Toy.action_space.high
                o, reward, over, _, _ = copies[s][n].step(low + (actions[s, n] + 1) * (high - low) / 2)
                steps[s, n] += 1
                np.testing.assert_array_equal(following[s, n], o.astype(np.float32))
                assert rewards[s, n] == reward and terminated[s, n] == over
                ends["terminated"] += over
                ends["truncated"] += not over and steps[s, n] == LIMIT
                if over or steps[s, n] == LIMIT:
                    o, steps[s, n] = copies[s][n].reset()[0], 0
                observed[s][n] = o
    assert min(ends.values()) > 3


@pytest.mark.parametrize(
    "name, before, after, ends",
    [
        ("toy", 5, 40, {"terminated", "cut"}),
        ("Pendulum-v1", 190, 30, {"cut"}),
        ("MountainCarContinuous-v0", 4, 30, set()),
        ("Hopper-v5", 10, 80, {"terminated"}),
        ("HalfCheetah-v5", 990, 30, {"cut"}),
        ("Ant-v5", 4, 20, {"terminated"}),  # its reward compares with positions that are no function of the state
    ],
)
def test_environments_go_on_from_their_state(name, before, after, ends):
    """Other copies that load it then do the same to the last bit, across the ends of episodes."""
    if name != "toy":
        pytest.importorskip("gymnasium")
    if name.endswith("-v5"):
        pytest.importorskip("mujoco")
    one, other = Environments(name, [[1], [3]]), Environments(name, [[5], [7]])
    rng, limit, ended = np.random.default_rng(0), one.limit, set()
    actions = rng.uniform(-1, 1, (before + after, 2, 1, one.sizes[1])).astype(np.float32)
    for action in actions[:before]:
        one.step(action)
    for action in actions[:3]:
        other.step(action)
    state = one.state()
    expected = [(*one.step(action), one.observations.copy()) for action in actions[before:]]
    other.load_state(state)
    for action, values in zip(actions[before:], expected, strict=True):
        for x, y in zip((*other.step(action), other.observations), values, strict=True):
            np.testing.assert_array_equal(x, y)
        _, _, terminated, at, _ = values
        ended |= {"terminated"} if terminated.any() else set()
        ended |= {"cut"} if (at == limit - 1).any() else set()
    assert ended == ends


def test_play_keeps_whole_episodes_and_nothing_after_their_ends():
    seeds = [[n for n in range(12)], [n + 50 for n in range(12)]]
    act = follow(-0.5, 0.0, 0)
    for s, episodes in enumerate(control.play(Environments("toy", seeds), seeds, act)):
        assert 0 < episodes.terminated.sum() < 12
        for n in range(12):
            env, total = Toy(), 0.0
            o, _ = env.reset(seeds[s][n])
            length = episodes.lengths[n]
            for t in range(length):
                np.testing.assert_array_equal(episodes.observations[n, t], o.astype(np.float32))
                a = act(torch.tensor(o, dtype=torch.float32)).numpy()
                np.testing.assert_array_equal(episodes.actions[n, t], a)
                o, reward, over, _, _ = env.step(np.array([-2, -1], np.float32) + (a + 1) * np.float32(2))
                total += reward
                assert over == (t == length - 1 and episodes.terminated[n])
            assert over or length == LIMIT
            np.testing.assert_array_equal(episodes.observations[n, length], o.astype(np.float32))
            assert not episodes.observations[n, length + 1 :].any() and not episodes.actions[n, length:].any()
            assert episodes.returns[n] == pytest.approx(total, rel=1e-12)


# ---- the replay buffer ----
def columns(of: script.Learner) -> list[np.ndarray]:
    """observation, action, following, true reward, terminated, step: (S, n, ...) each."""
    return [part.numpy() for part in of.replay[:, : of.filled].split(of.split, -1)]


def test_the_replay_buffer_holds_what_happened():
    """Each environment's rows are a chain, but after an end; termination and the time limit are told apart."""
    of = work(learner(method="sac", total_steps=120, random_steps=120, num_seeds=2, num_envs=3), 40)
    assert of.filled == 120
    kinds = {"terminated": 0, "cut": 0}
    for s in range(2):
        for n in range(3):
            observation, action, following, reward, terminated, at = (part[s, n::3] for part in columns(of))
            env = Toy()
            o, _ = env.reset(of.episode_seeds(3, script.ENVIRONMENT)[s][n])
            t = 0
            for i in range(40):
                np.testing.assert_array_equal(observation[i], o.astype(np.float32))
                low, high = Toy.action_space.low, Toy.action_space.high
                o, r, over, _, _ = env.step(low + (action[i] + 1) * (high - low) / 2)
                np.testing.assert_array_equal(following[i], o.astype(np.float32))
                assert reward[i, 0] == np.float32(r) and terminated[i, 0] == over and at[i, 0] == t
                t += 1
                if over or t == LIMIT:
                    kinds["terminated" if over else "cut"] += 1
                    o, t = env.reset()[0], 0
    assert min(kinds.values()) >= 1
    actions = columns(of)[1]  # uniform, as they are random
    assert np.abs(actions).max() > 0.95 and (np.abs(actions) < 0.5).mean() == pytest.approx(0.5, abs=0.05)


def test_a_batch_holds_rows_of_the_seeds_own_buffer():
    of = learner(method="sac", total_steps=120, random_steps=20, num_seeds=2, batch_size=400)
    for _ in range(10):
        of.act()
    of.replay[:, of.filled :] = math.nan  # not yet written
    observations, actions, following, rewards, terminated = of.draw()
    for s in range(2):
        rows = torch.cat([observations, actions, following, rewards[..., None], terminated[..., None]], -1)[s]
        own = of.replay[s, : of.filled, :-1]
        matches = (rows[:, None] == own[None]).all(-1)
        assert matches.any(1).all() and matches.any(0).all()  # each row is one of them, and each of them is drawn


def test_random_steps_come_before_updates_and_a_cloned_policy_needs_no_random_actions(expert):
    for given, uniform in ((dict(method="sac"), True), (dict(start="scratch"), True), (dict(), False)):
        of = learner(total_steps=60, random_steps=20, critic_warmup=0, **given)
        if given.get("method") != "sac":
            of.warm_start()
        before = copy.deepcopy(networks(of))
        with torch.no_grad():  # a policy that always says 1
            of.sac.policy.biases[-1][..., :2] = 20.0
        for k in range(10):
            of.interact(k)
        still = {n for n, v in networks(of).items() if not n.startswith("policy")}
        assert all(torch.equal(networks(of)[n], before[n]) for n in still)
        constant = (columns(of)[1] == 1).all()
        assert "sac/q" not in of.counts
        assert constant != uniform
        of.interact(10)
        assert of.counts["sac/q"] == 2  # an update for each step
        assert not torch.equal(networks(of)["critic.weights.0"], before["critic.weights.0"])
        if uniform:
            assert (columns(of)[1][:, 20:] == 1).all()  # from then on the policy's


# ---- episodes as rows, pairs and weights ----
def numbered(lengths, terminated, limit: int = 8, first: int = 0) -> Episodes:
    """Episodes whose observation at step t of the n-th is (n, t), and whose action is (n, t) / 1000."""
    n = len(lengths)
    observations = np.zeros((n, limit + 1, 2), np.float32)
    observations[..., 0], observations[..., 1] = first + np.arange(n)[:, None], np.arange(limit + 1)
    observations *= np.arange(limit + 1)[None, :, None] <= np.array(lengths)[:, None, None]
    actions = observations[:, :-1] / 1000 * (np.arange(limit)[None, :, None] < np.array(lengths)[:, None, None])
    return Episodes(observations, actions, np.array(lengths), np.array(terminated), np.arange(n) * 10.0)


@pytest.mark.parametrize("absorbing", [True, False])
def test_rows_go_on_after_a_termination_and_nowhere_else(absorbing):
    episodes = numbered([3, 8, 5, 8], [True, False, False, True])
    rows, counted = episodes.rows(absorbing)
    assert rows.shape == (4, 8, 5) and rows.dtype == np.float32
    for n, (length, over) in enumerate(zip(episodes.lengths, episodes.terminated, strict=True)):
        for t in range(8):
            if t < length:
                assert counted[n, t] and rows[n, t] == pytest.approx([n, t, n / 1000, t / 1000, 0])
            else:
                goes_on = bool(over and absorbing)
                assert counted[n, t] == goes_on and list(rows[n, t]) == [0, 0, 0, 0, float(goes_on)]


def test_an_episode_that_is_cut_has_no_end():
    episodes = numbered([3, 8, 5, 4], [True, False, True, True]).cut(4)
    assert list(episodes.lengths) == [3, 4, 4, 4] and list(episodes.terminated) == [True, False, False, True]
    rows, counted = episodes.rows(True)
    assert rows.shape[:2] == (4, 4) and list(counted.sum(1)) == [4, 4, 4, 4]
    assert rows[:, :, -1].tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4, [0] * 4]
    assert list(episodes[np.array([2, 0])].lengths) == [4, 3] and len(episodes[np.array([2, 0])]) == 2


@pytest.mark.parametrize("horizon", ["absorbing", "terminate"])
def test_pairs_are_segments_with_the_preferred_first(horizon):
    preferred = numbered([8, 6, 2, 8], [False, True, True, True], first=10)
    rejected = numbered([8, 1, 5], [False, True, True], first=20)
    args = settings(horizon=horizon, segment_length=3, flip_labels=0.0)
    pairs = episodes_of.draw_pairs(preferred, rejected, 2000, args, 0)
    assert pairs.rows.shape == (2000, 2, 3, 5) and pairs.following.shape == (2000, 2, 3, 2)
    seen = set()
    for p in range(2000):
        for side, episodes, first in ((0, preferred, 10), (1, rejected, 20)):
            rows, counted = pairs.rows[p, side].numpy(), pairs.counted[p, side].numpy()
            assert counted[0] and not rows[0, -1]  # two that begin after the end would have nothing to compare
            n, t = int(rows[0, 0]) - first, int(rows[0, 1])
            seen.add((side, n, t))
            all_rows, all_counted = episodes[np.array([n])].rows(horizon == "absorbing")
            assert np.array_equal(rows, all_rows[0, t : t + 3])
            assert np.array_equal(counted, all_counted[0, t : t + 3])
            assert np.array_equal(pairs.following[p, side].numpy(), episodes.observations[n, t + 1 : t + 4])
            over, length = episodes.terminated[n], episodes.lengths[n]
            assert pairs.ended[p, side].tolist() == [float(over and t + i + 1 >= length) for i in range(3)]
    for side, episodes in ((0, preferred), (1, rejected)):
        for n, (length, over) in enumerate(zip(episodes.lengths, episodes.terminated, strict=True)):
            starts = min(length, 6) if over and horizon == "absorbing" else max(length - 3, 0) + 1
            assert {t for s, m, t in seen if (s, m) == (side, n)} == set(range(starts))


def test_a_share_of_the_labels_is_wrong_and_nothing_else_changes():
    preferred, rejected = numbered([8] * 3, [False] * 3, first=10), numbered([8] * 3, [False] * 3, first=20)
    right = episodes_of.draw_pairs(preferred, rejected, 4000, settings(), 0)
    wrong = episodes_of.draw_pairs(preferred, rejected, 4000, settings(flip_labels=0.3), 0)
    flipped = wrong.rows[:, 0, 0, 0] >= 20
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.03) and not (right.rows[:, 0, 0, 0] >= 20).any()
    for name in ("rows", "counted", "following", "ended"):
        a, b = getattr(right, name), getattr(wrong, name)
        assert torch.equal(torch.where(flipped.view(-1, *[1] * (a.ndim - 1)), a.flip(1), a), b)


def test_pairs_that_judge_are_right_and_other_ones(expert):
    data = script.Data(settings(flip_labels=1.0, num_preferences=500))
    clean = script.Data(settings(num_preferences=500))
    assert torch.equal(data.pairs.rows.flip(1), clean.pairs.rows) and torch.equal(data.held.rows, clean.held.rows)
    assert not torch.equal(clean.held.rows, clean.pairs.rows) and len(clean.held.rows) == 500
    episodes, checkpoint = expert
    medium = {tuple(o) for o in clean.medium.observations.reshape(-1, 2)}
    alive = (clean.held.counted * (1 - clean.held.rows[..., -1]))[:, 0] > 0
    assert all(tuple(o) in medium for o in clean.held.rows[:, 0][alive][:, :2].numpy())


@pytest.mark.parametrize("horizon", ["absorbing", "terminate"])
@pytest.mark.parametrize("discount", [True, False])
def test_steps_of_demonstrations_and_their_weights(horizon, discount):
    episodes = numbered([3, 8], [True, False])
    rows, weights = episodes_of.steps_of(episodes, settings(horizon=horizon, discount_demo=discount, gamma=0.9))
    expected = [(n, t) for n in range(2) for t in range(8) if n == 1 or t < 3 or horizon == "absorbing"]
    assert len(rows) == len(weights) == len(expected)
    for row, weight, (n, t) in zip(rows.tolist(), weights.tolist(), expected, strict=True):
        assert weight == pytest.approx(0.9**t if discount else 1.0, rel=1e-6)
        assert row == pytest.approx([0, 0, 0, 0, 1] if n == 0 and t >= 3 else [n, t, n / 1000, t / 1000, 0])


def from_replay(of: script.Learner, s: int) -> Episodes:
    """Complete episodes of a buffer of one environment."""
    observation, action, following, _, terminated, at = (part[s] for part in columns(of))
    starts = np.flatnonzero(at[:, 0] == 0)
    ends = [*starts[1:], len(at)]
    n = len(starts)
    observations, actions = np.zeros((n, LIMIT + 1, 2), np.float32), np.zeros((n, LIMIT, 2), np.float32)
    for i, (a, b) in enumerate(zip(starts, ends, strict=True)):
        observations[i, : b - a], observations[i, b - a], actions[i, : b - a] = (
            observation[a:b],
            following[b - 1],
            action[a:b],
        )
    return Episodes(observations, actions, np.array(ends) - starts, terminated[np.array(ends) - 1, 0] > 0, np.zeros(n))


@pytest.mark.parametrize("horizon", ["absorbing", "terminate"])
@pytest.mark.parametrize("discount", [True, False])
def test_the_policys_steps_are_weighed_as_the_demonstrations_are(expert, horizon, discount):
    """Of complete episodes: the weighted mean of any reward is that over the episodes, continued to the time limit."""
    of = learner(
        horizon=horizon,
        discount_demo=discount,
        gamma=0.9,
        num_envs=1,
        num_seeds=2,
        policy_window=10**6,
        total_steps=200,
    )
    steady(of).args.random_steps = 0
    value = lambda rows: torch.sin(rows @ torch.arange(1.0, 6.0)) + 3 * rows[..., -1]  # noqa: E731
    while of.filled < 60:
        of.act()
    for s in range(2):  # to the end of this seed's episode
        while of.environments.steps[s, 0]:
            of.act()
        rows, weights = of.recent_steps()
        assert rows.shape == (2, of.filled + 1, 5) and weights.shape == (2, of.filled + 1)
        episodes = from_replay(of, s)
        assert episodes.terminated.sum() > 2 and not episodes.terminated.all()
        total, time = 0.0, 0.0
        for n in range(len(episodes)):
            padded, counted = episodes[np.array([n])].rows(horizon == "absorbing")
            for t in range(LIMIT):
                if counted[0, t]:
                    weight = 0.9**t if discount else 1.0
                    total += weight * value(torch.from_numpy(padded[0, t])).item()
                    time += weight
        assert weights[s].sum().item() == pytest.approx(time, rel=1e-5)
        assert (weights[s] * value(rows[s])).sum().item() == pytest.approx(total, rel=1e-4)
        assert rows[s, -1].tolist() == [0, 0, 0, 0, 1]
    of.args.policy_window = 5
    short, weights = of.recent_steps()
    assert torch.equal(short[:, :5], rows[:, -6:-1]) and weights.shape == (2, 6)
    terminated, at = columns(of)[4][:, -5:, 0], columns(of)[5][:, -5:, 0]
    for s in range(2):
        left = sum(
            sum(0.9**t if discount else 1.0 for t in range(int(at[s, i]) + 1, LIMIT))
            for i in range(5)
            if terminated[s, i] and horizon == "absorbing"
        )
        assert weights[s, -1].item() == pytest.approx(left, rel=1e-5, abs=1e-5)


# ---- the reward step ----
def loss_by_hand(
    of: script.Learner, which: torch.Tensor, model: torch.nn.Sequential, sampled: Episodes
) -> torch.Tensor:
    """Sums over episodes and segments, in loops. which: the pairs of the batch; sampled: the policy's episodes."""
    args, data = of.args, of.data
    absorbing = args.horizon == "absorbing"
    reward = lambda row: model(torch.as_tensor(row))[0]  # noqa: E731
    means, squares = [], []
    for episodes in (data.demonstrations, sampled):
        rows, counted = episodes.rows(absorbing)
        steps = [
            (args.gamma**t if args.discount_demo else 1.0, reward(rows[n, t]))
            for n, t in zip(*np.nonzero(counted), strict=True)
        ]
        time = sum(weight for weight, _ in steps)
        means.append(sum(weight * r for weight, r in steps) / time)
        squares.append(sum(weight * r**2 for weight, r in steps) / time)
    loss = args.demo_weight * (means[1] - means[0]) + args.reward_l2 * sum(squares) if args.demo_weight else 0.0
    if not args.preference_weight:
        return loss
    nll, square = [], []
    for p in which.tolist():
        sums = []
        for side in (0, 1):
            steps = [
                reward(data.pairs.rows[p, side, i])
                for i in range(args.segment_length)
                if data.pairs.counted[p, side, i]
            ]
            sums.append(sum(steps))
            square += [r**2 for r in steps]
        nll.append(torch.log1p(torch.exp(sums[1] - sums[0])))
    return loss + args.preference_weight * sum(nll) / len(nll) + args.reward_l2 * sum(square) / len(square)


@pytest.mark.parametrize(
    "given",
    [
        dict(demo_weight=0.7, preference_weight=1.9, reward_l2=0.3),
        dict(demo_weight=0.7, preference_weight=1.9, reward_l2=0.3, horizon="terminate", discount_demo=True, gamma=0.8),
        dict(preference_weight=0.0),
        dict(demo_weight=0.0, preference_weight=1.9, reward_l2=0.3),
    ],
    ids=["aihf", "aihf, terminate, discounted", "irl", "rlhf"],
)
def test_a_reward_step_descends_the_loss_by_hand(expert, given):
    of = steady(learner(num_envs=1, policy_window=10**6, total_steps=200, **given))
    while of.filled < 30 or of.environments.steps[0, 0]:
        of.act()
    with torch.no_grad():
        of.reward.weights[-1].mul_(5)  # rewards whose squares matter
    model = as_linear(of.reward, 0)
    again = torch.Generator()
    again.set_state(of.generators[0].get_state())
    which = torch.randint(SMALL["num_preferences"], (SMALL["preference_batch_size"],), generator=again)
    loss_by_hand(of, which, model, from_replay(of, 0)).backward()
    of.reward_optimizer = torch.optim.SGD(of.reward.parameters(), lr=0.1)
    of.reward_step()
    for i, layer in enumerate(model[::2]):
        assert layer.weight.grad.abs().max() > 1e-3
        torch.testing.assert_close(
            of.reward.weights[i][0], (layer.weight - 0.1 * layer.weight.grad).T, rtol=1e-4, atol=2e-6
        )
        torch.testing.assert_close(of.reward.biases[i][0, 0], layer.bias - 0.1 * layer.bias.grad, rtol=1e-4, atol=2e-6)
    assert ("reward/demonstration_gap" in of.totals) == (of.args.demo_weight > 0)
    assert ("reward/preference_loss" in of.totals) == (of.args.preference_weight > 0)


def test_rewards_are_within_the_bound_and_scaled_before_it():
    reward = script.Reward((3, 8, 1), [torch.Generator().manual_seed(s) for s in (0, 1)])
    rows = torch.randn(2, 50, 3)
    plain = reward(rows).detach()
    reward.scale.copy_(torch.tensor([[3.0], [1000.0]]))
    torch.testing.assert_close(reward(rows)[0], 3 * plain[0])
    assert reward(rows).abs().max() == 10 and torch.equal(reward(rows)[1].sign(), plain[1].sign())


@pytest.mark.parametrize("horizon", ["absorbing", "terminate"])
def test_the_absorbing_state_is_worth_nothing_to_the_critic(expert, horizon):
    of = learner(horizon=horizon, num_seeds=2)
    o, a = torch.randn(2, 6, 2), torch.rand(2, 6, 2)
    for s in range(2):
        model = as_linear(of.reward, s)
        row = torch.cat([o[s], a[s], torch.zeros(6, 1)], -1)
        end = model(torch.tensor([0.0, 0, 0, 0, 1])) if horizon == "absorbing" else 0.0
        torch.testing.assert_close(of.rewards(o, a)[s], (model(row)[:, 0] - end).detach())


def test_rewards_are_those_of_now_when_a_batch_is_drawn(expert):
    of = work(learner(), 6)
    state = [g.get_state() for g in of.generators]
    before = of.draw()[3]
    with torch.no_grad():
        of.reward.weights[-1].mul_(2)
        of.reward.biases[-1].mul_(2)
    for generator, stored in zip(of.generators, state, strict=True):
        generator.set_state(stored)
    torch.testing.assert_close(of.draw()[3], 2 * before)


def test_reward_rounds_come_as_often_as_the_flags_say(expert, monkeypatch):
    at: list[int] = []
    monkeypatch.setattr(script.Learner, "reward_step", lambda self: at.append(self.filled))
    work(learner(reward_every=7, reward_steps=3, total_steps=48), 24)
    assert at == [
        step for step in (14, 22, 28, 36, 42) for _ in range(3)
    ]  # the first even number from each multiple of 7
    at.clear()
    work(learner(reward_every=7, reward_steps=3, demo_weight=0.0), 24)
    assert at == [0] * SMALL["preference_steps"]  # RLHF: all before the policy step
    at.clear()
    work(learner(method="sac"), 24)
    assert not at


def test_rlhf_freezes_a_reward_of_the_asked_deviation(expert):
    of = learner(demo_weight=0.0, rlhf_reward_std=0.7, num_seeds=2, preference_steps=60)
    of.warm_start()
    rewards = of.reward(of.each(of.data.pairs.rows.flatten(0, 2)))
    assert rewards.std(1).tolist() == pytest.approx([0.7, 0.7], rel=1e-4)
    frozen = copy.deepcopy(of.reward.state_dict())
    before = copy.deepcopy(of.sac.policy.state_dict())
    for k in range(24):
        of.interact(k)
    assert all(torch.equal(value, frozen[name]) for name, value in of.reward.state_dict().items())
    assert not torch.equal(before["weights.0"], of.sac.policy.state_dict()["weights.0"])
    assert of.totals["reward/preference_loss"].max() / of.counts["reward/preference_loss"] < 0.6
    assert "reward/demonstration_gap" not in of.totals


def test_the_policy_rests_while_the_critic_warms_up(expert):
    of = learner(random_steps=8, critic_warmup=12, total_steps=60)
    of.warm_start()
    cloned, critic = copy.deepcopy(of.sac.policy.state_dict()), copy.deepcopy(of.sac.critic.state_dict())
    same = lambda: all(torch.equal(v, cloned[n]) for n, v in of.sac.policy.state_dict().items())  # noqa: E731
    for k in range(10):  # to step 20
        of.interact(k)
        assert same()
    assert not torch.equal(critic["weights.0"], of.sac.critic.state_dict()["weights.0"])
    of.interact(10)
    assert not same()


def test_a_prior_is_the_cloned_policy_and_rests(expert):
    of = learner(prior="bc", critic_warmup=0)
    of.warm_start()
    cloned = copy.deepcopy(of.sac.policy.state_dict())
    for k in range(12):
        of.interact(k)
    assert all(torch.equal(v, cloned[n]) for n, v in of.sac.prior.state_dict().items())
    assert not torch.equal(cloned["weights.0"], of.sac.policy.state_dict()["weights.0"])
    o, noise = torch.randn(1, 6, 2), torch.randn(1, 6, 2)
    actions, ratio, logprobs = of.sac.sample(o, noise)
    prior = tanh_normal(as_linear(of.sac.prior, 0), o[0]).log_prob(actions[0].clamp(-1 + 1e-6, 1 - 1e-6)).sum(-1)
    torch.testing.assert_close(ratio[0], logprobs[0] - prior, rtol=1e-2, atol=1e-2)


# ---- what a method may see ----
@pytest.mark.parametrize("method", METHODS)
def test_only_sac_sees_the_true_reward(expert, monkeypatch, method):
    """The data held fixed, every reward of the environment is turned round: all weights but SAC's are the same."""
    updates = 24 if method in ("bc", "ipl") else 16
    one = work(learner(**METHODS[method]), updates)
    one.evaluate(0)
    monkeypatch.setattr(Toy, "factor", -3.0)
    other = work(learner(**METHODS[method]), updates)
    same = {n: torch.equal(v, networks(other)[n]) for n, v in networks(one).items()}
    assert all(same.values()) == (method != "sac"), same
    other.evaluate(0)
    if method != "sac":  # the same policy, and the judge is true
        assert other.run.rows[0]["eval/return"] == pytest.approx(-3 * one.run.rows[0]["eval/return"])


def test_irl_alone_does_not_see_preferences_and_rlhf_no_demonstrations(expert):
    for given, part in ((dict(preference_weight=0.0), "pairs"), (dict(demo_weight=0.0, start="scratch"), "rows")):
        one, other = learner(**given), learner(**given)
        value = getattr(other.data, part)
        setattr(
            other.data, part, dataclasses.replace(value, rows=value.rows * 0 + 7) if part == "pairs" else value * 0 + 7
        )
        if part == "rows":  # the deviation is that of the preferences' steps
            assert not torch.equal(one.data.rows, other.data.rows)
        found = [networks(work(of, 16)) for of in (one, other)]
        assert all(torch.equal(v, found[1][n]) for n, v in found[0].items())
    found = [networks(work(learner(**given), 16)) for given in ({}, dict(preference_weight=0.0))]
    assert not torch.equal(found[0]["reward.weights.0"], found[1]["reward.weights.0"])


# ---- behaviour cloning, IPL, and what is measured ----
def test_cloning_finds_the_actions_of_a_linear_expert(expert):
    data = script.Data(settings())
    generator = torch.Generator().manual_seed(0)
    o = torch.rand(400, 2, generator=generator) * 2 - 1
    means = torch.tanh(o @ torch.tensor([[0.8, -0.5], [0.3, 0.6]]) + 0.6)
    absorbing = torch.tensor([0.0, 0, 0, 0, 1]).expand(300, 5)  # says nothing about actions
    data.rows = torch.cat([torch.cat([o, means, torch.zeros(400, 1)], -1), absorbing])
    of = learner(data, method="bc", bc_steps=400, hidden=32, batch_size=64, learning_rate=3e-3, num_seeds=2)
    losses = []
    for k in range(400):
        of.totals, of.counts = {}, {}
        of.clone(k)
        losses.append(of.totals["bc/loss"])
    first, last = torch.stack(losses[:20]).mean(0), torch.stack(losses[-20:]).mean(0)
    assert (last < first - 2).all()
    assert (of.sac.policy.best(o.expand(2, -1, -1)) - means).abs().mean() < 0.05
    assert (of.sac.policy.best(torch.zeros(2, 1, 2)) - math.tanh(0.6)).abs().max() < 0.1  # where the absorbing rows are


@pytest.mark.parametrize("horizon", ["absorbing", "terminate"])
def test_ipl_orders_pairs_and_moves_towards_better_actions(expert, horizon):
    """Preferred segments push x to 0, rejected ones away from it: the implied reward and the policy learn so."""
    generator = torch.Generator().manual_seed(1)
    p, length = 300, 3
    x = torch.rand(p, 2, length, 1, generator=generator) * 1.6 - 0.8
    sign = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    push = (sign * x * 1.5).expand(-1, -1, -1, 2) + 0.1 * torch.randn(p, 2, length, 2, generator=generator)
    o = torch.cat([x, x**2], -1)
    rows = torch.cat([o, push.clamp(-0.99, 0.99), torch.zeros(p, 2, length, 1)], -1)
    none = torch.zeros(p, 2, length)
    after = x + 0.2 * push.sum(-1, keepdim=True)
    pairs = episodes_of.Pairs(rows, none + 1, torch.cat([after, after**2], -1), none)
    data = script.Data(settings(horizon=horizon))
    data.pairs = episodes_of.Pairs(*(getattr(pairs, f.name)[:200] for f in dataclasses.fields(pairs)))
    of = learner(
        data,
        method="ipl",
        horizon=horizon,
        num_preferences=200,
        preference_batch_size=32,
        hidden=16,
        num_seeds=2,
        ipl_temperature=0.1,
    )
    for k in range(250):
        if k == 200:
            of.totals, of.counts = {}, {}
        of.learn_offline(k)
    assert (of.totals["ipl/preference_loss"] / 50 < 0.3).all()
    held = slice(200, None)
    q = of.implied(of.each(rows[held].flatten(0, 2)))[..., 0]
    implied = q - of.args.gamma * of.value(of.each(pairs.following[held].flatten(0, 2)), (q.shape[1], 2))
    sums = implied.view(2, 100, 2, length).sum(-1)
    assert (sums[:, :, 0] > sums[:, :, 1]).float().mean() > 0.9
    states = torch.tensor([[0.6, 0.36], [-0.6, 0.36]])
    best = of.sac.policy.best(of.each(states)).mean(-1)
    assert (best[:, 0] < -0.2).all() and (best[:, 1] > 0.2).all()


@pytest.mark.parametrize("horizon", ["absorbing", "terminate"])
def test_ipl_bootstraps_from_where_a_segment_goes_on(expert, horizon):
    """The gradient of Q against loops: V of the following state, of the absorbing one after a termination, or nothing."""
    of = learner(
        method="ipl",
        horizon=horizon,
        gamma=0.9,
        segment_length=4,
        ipl_l2=0.2,
        num_preferences=3,
        preference_batch_size=3,
    )
    pairs = of.data.pairs
    assert pairs.ended.any() and not pairs.ended.all()
    again = torch.Generator()
    again.set_state(of.generators[0].get_state())
    which, noise = torch.randint(3, (3,), generator=again), torch.randn(24, 2, generator=again).view(3, 2, 4, 2)
    model, policy = as_linear(of.implied, 0), as_linear(of.sac.policy, 0)
    nll, square = 0.0, 0.0
    for b, p in enumerate(which.tolist()):
        sums = []
        for side in (0, 1):
            total = 0.0
            for i in range(4):
                if pairs.counted[p, side, i]:
                    following = pairs.following[p, side, i]
                    mean, log_std = policy(following).detach().chunk(2)
                    action = torch.tanh(mean + log_std.exp() * noise[b, side, i])
                    v = model(torch.cat([following, action, torch.zeros(1)]))[0]
                    if pairs.ended[p, side, i]:
                        v = model(torch.tensor([0.0, 0, 0, 0, 1]))[0] if horizon == "absorbing" else 0.0
                    r = model(pairs.rows[p, side, i])[0] - 0.9 * v
                    total, square = total + r, square + r**2
            sums.append(total)
        nll = nll + torch.log1p(torch.exp(sums[1] - sums[0]))
    (nll / 3 + 0.2 * square / (3 * 2 * 4)).backward()
    of.implied_optimizer = torch.optim.SGD(of.implied.parameters(), lr=0.1)
    of.learn_offline(0)
    for i, layer in enumerate(model[::2]):
        torch.testing.assert_close(
            of.implied.weights[i][0], (layer.weight - 0.1 * layer.weight.grad).T, rtol=1e-4, atol=2e-6
        )


@pytest.mark.parametrize("horizon", ["absorbing", "terminate"])
def test_what_the_judge_says_by_numpy(expert, horizon):
    of = work(learner(num_seeds=2, horizon=horizon), 12)
    of.evaluate(0)
    for s, row in enumerate(of.run.rows):
        assert row["seed"] == 1 + s
        model = as_linear(of.reward, s)

        def score(episodes, model=model):
            rows, counted = episodes.rows(horizon == "absorbing")
            return np.array(
                [model(torch.from_numpy(r[c])).sum().item() / LIMIT for r, c in zip(rows, counted, strict=True)]
            )

        own = of.examine(of.episode_seeds(2, script.EVALUATION), of.sac.policy.best)[s]
        assert row["eval/return"] == pytest.approx(own.returns.mean()) and row["eval/length"] == own.lengths.mean()
        data, high = of.data, of.data.known[2]
        for name, episodes in (
            ("policy", own), ("demonstrations", data.demonstrations), ("preferred", data.medium), ("non_preferred", data.low),
        ):  # fmt: skip
            assert row[f"eval/reward/{name}"] == pytest.approx(score(episodes).mean(), abs=1e-5)
        learned = np.concatenate([score(e) for e in (data.low, data.medium, high)])
        true = np.concatenate([e.returns for e in (data.low, data.medium, high)])
        difference = learned.argsort().argsort() - true.argsort().argsort()
        n = len(true)
        spearman = 1 - 6 * (difference**2).sum() / (n * (n**2 - 1))
        assert row["eval/reward/rank_correlation"] == pytest.approx(spearman, abs=1e-6)
        rewards = (model(data.held.rows)[..., 0] * data.held.counted).sum(-1)
        assert row["eval/reward/accuracy"] == pytest.approx(
            (rewards[:, 0] > rewards[:, 1]).float().mean().item(), abs=0.005
        )


def test_means_of_metrics_are_over_what_was_counted_since_the_last_evaluation():
    of = learner(method="sac", num_seeds=2)
    for value in (1.0, 2.0, 6.0):
        of.count({"sac/q": torch.tensor([value, 10 * value])})
    of.count({"sac/alpha": torch.tensor([1.0, 4.0])})
    of.evaluate(0)
    assert [(row["sac/q"], row["sac/alpha"]) for row in of.run.rows] == [(3.0, 1.0), (30.0, 4.0)]
    of.evaluate(1)
    assert all("sac/q" not in row for row in of.run.rows[2:])
    assert [row["eval/return"] for row in of.run.rows[:2]] == [row["eval/return"] for row in of.run.rows[2:]]


def test_a_seed_that_has_diverged_ends_the_run_and_is_named():
    of = learner(method="sac", num_seeds=2)
    of.count({"sac/q": torch.tensor([1.0, 2.0])})
    of.count({"sac/critic_loss": torch.tensor([1.0, math.inf])})
    with pytest.raises(UserError, match="found sac/critic_loss of seed 2 not finite at step 0: it has diverged"):
        of.evaluate(0)
    assert len(of.run.rows) == 2


@pytest.mark.parametrize("order, expected", [([0, 1, 2, 3, 4], 1.0), ([4, 3, 2, 1, 0], -1.0), ([1, 0, 2, 4, 3], 0.8)])
def test_rank_correlation(order, expected):
    x = torch.tensor([0.1, 0.5, 2.0, 30.0, 31.0])
    assert script.rank_correlation(x[torch.tensor(order)] ** 3, x).item() == pytest.approx(expected)


# ---- the expert and its data ----
def leveled(levels: list[float]) -> tuple[Episodes, np.ndarray]:
    """Two episodes of each checkpoint, whose mean return is the level."""
    episodes = numbered([8] * 2 * len(levels), [False] * 2 * len(levels))
    episodes.returns = np.repeat(levels, 2) + np.tile([-0.5, 0.5], len(levels))
    return episodes, np.repeat(np.arange(len(levels)), 2)


def test_checkpoints_are_sorted_between_the_untrained_and_the_best():
    episodes, checkpoint = leveled([-100, -150, -61, -59, -31, -29, -12, -9, 0, -95])
    low, medium, high = episodes_of.sort_episodes(episodes, checkpoint, settings())
    assert sorted(set(low.observations[:, 0, 0] // 2)) == [0, 1, 2, 9]
    assert sorted(set(medium.observations[:, 0, 0] // 2)) == [3, 4]
    assert sorted(set(high.observations[:, 0, 0] // 2)) == [7, 8]
    assert len(low) == 8 and len(medium) == 4 and len(high) == 4  # 0.7 to 0.9 is in no class


@pytest.mark.parametrize(
    "levels, name", [([0, 30, 95, 100], "--medium-most"), ([0, 50, 60], "--medium-most"), ([5, 5, 5], "--medium-most")]
)
def test_too_few_checkpoints_is_one_line(levels, name):
    episodes, checkpoint = leveled(levels)
    if levels == [0, 50, 60]:
        levels, name = [0, 50, 60], "--medium-most"  # 0.83 and 1
    with pytest.raises(
        UserError, match=f"^{name}: found no checkpoint of the expert in its class, .*; levels: 0.00, "
    ) as error:
        episodes_of.sort_episodes(episodes, checkpoint, settings())
    assert "\n" not in str(error.value)


def test_demonstrations_are_a_few_of_the_high_class(expert):
    one, four = script.Data(settings(num_demonstrations=1)), script.Data(settings(num_demonstrations=4))
    high = one.known[2]
    assert len(one.demonstrations) == 1 and len(four.demonstrations) == 4
    assert np.array_equal(four.demonstrations.observations[:1], one.demonstrations.observations)  # one more, none other
    assert set(four.demonstrations.returns) <= set(high.returns) and len(set(four.demonstrations.returns)) == 4
    cut = script.Data(settings(num_demonstrations=4, demonstration_steps=3))
    assert (cut.demonstrations.lengths <= 3).all() and not cut.demonstrations.terminated.any()
    assert len(cut.rows) == 12 and len(four.rows) == 4 * LIMIT
    other = script.Data(settings(num_demonstrations=4, expert_seed=3))
    assert not np.array_equal(other.demonstrations.returns, four.demonstrations.returns)
    with pytest.raises(UserError, match="^--num-demonstrations: found 99, expected at most 8"):
        script.Data(settings(num_demonstrations=99))
    classes = {"non-preferred": four.low, "preferred": four.medium, "demonstrations": four.demonstrations}
    for name, episodes in classes.items():
        assert (
            f"{name} {np.mean(episodes.returns):.0f} ± {np.std(episodes.returns):.0f} ({len(episodes)})" in four.table()
        )


def small_expert(tmp_path, **given) -> script.Args:
    """Settings of the toy's own expert, a real one."""
    return settings(data_dir=str(tmp_path / "data"), hidden=4, save_steps=24, **given)


class Killed(Exception):
    """What stands for SIGKILL: nothing is saved on the way out."""


def kill(*_):
    raise Killed


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def test_an_expert_is_made_once_for_all_methods_and_seeds(tmp_path, monkeypatch):
    made, train = [], script.train
    monkeypatch.setattr(script, "train", lambda args, run: made.append(args) or train(args, run))
    args = small_expert(tmp_path)
    episodes, checkpoint, folder = script.expert_episodes(args)
    (expert,) = made
    assert (expert.method, expert.num_seeds, expert.seed, expert.total_steps) == ("sac", 1, 0, 60)
    # evaluations at 0, 12, ..., 60 are the checkpoints
    assert list(checkpoint) == [c for c in range(6) for _ in range(2)] and len(episodes) == 12
    assert {"made_by.json", "episodes.npz", "expert/args.json"} <= files(folder)
    assert not [name for name in files(tmp_path) if ".partial" in name]
    first = episodes[checkpoint < 2]  # before the first update the policy is one, but its noise is not
    assert not np.array_equal(first.observations[0], first.observations[2])
    for other in (
        dict(method="bc"), dict(seed=7), dict(num_seeds=3), dict(demo_weight=0.0), dict(total_steps=96), dict(num_preferences=3),
        dict(horizon="terminate"), dict(random_steps=20), dict(eval_every=8), dict(render=True), dict(prior="bc"), dict(alpha=0.1),
    ):  # fmt: skip
        again, _, same = script.expert_episodes(dataclasses.replace(args, **other))
        assert same == folder and np.array_equal(again.observations, episodes.observations)
    assert len(made) == 1


@pytest.mark.parametrize(
    "given",
    [
        {name: value}
        for name, value in dict(
            expert_steps=72, hidden=5, learning_rate=2e-2, batch_size=7, expert_alpha=0.1, expert_seeds=2, gamma=0.9, tau=0.1, num_envs=1,
            expert_seed=4, checkpoint_every=20, checkpoint_episodes=3,
        ).items()
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_each_setting_of_an_expert_has_data_of_its_own(tmp_path, monkeypatch, given):
    monkeypatch.setattr(script, "train", kill)
    args = small_expert(tmp_path)
    for one in (args, dataclasses.replace(args, **given)):
        with pytest.raises(Killed):
            script.expert_episodes(one)
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_episodes_of_a_checkpoint_are_those_of_its_policy(tmp_path):
    from safetensors.torch import load_file, save_file

    of = run_of(tmp_path / "run", method="sac")
    path = tmp_path / "run" / "policies" / "00000016.safetensors"
    weights = load_file(path)
    weights["policy.biases.2"][..., :2] = 50.0  # says 1 in every state
    save_file(weights, path)
    episodes, checkpoint = of.play_checkpoints()
    ones = [(e.actions[0, : e.lengths[0]] == 1).all() for e in (episodes[i : i + 1] for i in range(len(episodes)))]
    assert [bool(one) for one in ones] == [c == 1 for c in checkpoint] and set(checkpoint) == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", [0, 5])
def test_the_best_of_several_experts_makes_the_data(tmp_path, monkeypatch, seed):
    log, best = script.ControlRun.log, seed + 1
    returns = {seed: [90.0, 1.0, 1.0, 1.0], best: [0.0, 2.0, 6.0, 2.0], seed + 2: [0.0, 3.0, 3.0, 3.0]}
    counts = dict.fromkeys(returns, 0)

    def logged(self, row, **axis):  # the last three evaluations count; the mean of the first one is the highest
        late = min(counts[axis["seed"]], 3)
        counts[axis["seed"]] += 1
        log(self, {**row, "eval/return": returns[axis["seed"]][late]}, **axis)

    monkeypatch.setattr(script.ControlRun, "log", logged)
    args = small_expert(tmp_path, expert_seeds=3, expert_seed=seed, checkpoint_every=20)
    episodes, checkpoint, _ = script.expert_episodes(args)
    assert len(episodes) == 8 and list(checkpoint) == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, c in enumerate(checkpoint):
        first = Toy().reset(stream_seed(best, script.CHECKPOINTS, int(c), i % 2) % 2**31)[0]
        np.testing.assert_array_equal(episodes.observations[i, 0], first.astype(np.float32))


def test_versions_of_what_made_an_expert_are_in_its_key(tmp_path, monkeypatch):
    args, folders = small_expert(tmp_path), set()
    for found in (
        {"gymnasium": "1", "mujoco": "3"},
        {"gymnasium": "1", "mujoco": "4"},
        {"gymnasium": "2", "mujoco": "3"},
    ):
        monkeypatch.setattr(control, "versions", lambda found=found: found)
        monkeypatch.setattr(script, "train", kill)
        with pytest.raises(Killed):
            script.expert_episodes(args)
        folders |= set((tmp_path / "data").iterdir())
    assert len(folders) == 3
    for folder in folders:
        made_by = json.loads((folder / "made_by.json").read_text())
        assert folder.name == f"toy__{episodes_of.cache_key(made_by)}" and {"hidden", "seed", "mujoco"} <= set(made_by)


def test_a_corrupt_file_of_episodes_is_one_line(tmp_path):
    args = small_expert(tmp_path)
    _, _, folder = script.expert_episodes(args)
    path = folder / "episodes.npz"
    whole = path.read_bytes()
    middle = len(whole) // 3
    for content in (
        b"", b"PK", whole[: len(whole) // 2], b"x" * 1000, whole[:-1],
        *(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in range(middle, middle + 400, 7)),
    ):  # fmt: skip
        path.write_bytes(content)
        try:
            script.expert_episodes(args)  # a byte that no reader looks at
        except UserError as error:
            assert str(error).startswith(f"{path}: found no readable episodes (") and "\n" not in str(error)
        else:
            assert len(content) == len(whole)
    np.savez(path, observations=np.zeros(3))
    with pytest.raises(UserError, match="found no readable episodes"):
        script.expert_episodes(args)
    path.unlink()  # as the line says
    script.expert_episodes(args)
    assert path.read_bytes() == whole


def strike(monkeypatch, name: str, n: int) -> None:
    """Send SIGTERM to this process in the n-th call of a method of Learner. The run ends by SystemExit."""
    original, calls = getattr(script.Learner, name), [0]

    def wrapped(self, *args):
        calls[0] += 1
        if calls[0] == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(script.Learner, name, wrapped)
    monkeypatch.setattr(terminal, "leave", lambda number: sys.exit(128 + number))


@pytest.mark.parametrize("at, n", [("interact", 20), ("evaluate", 4), ("play_checkpoints", 1)])
def test_an_interrupted_expert_is_continued(tmp_path, monkeypatch, at, n):
    whole = small_expert(tmp_path / "whole")
    _, _, folder = script.expert_episodes(whole)
    args = small_expert(tmp_path / "cut")
    with monkeypatch.context() as patch:
        strike(patch, at, n)
        with pytest.raises(SystemExit) as stop:
            script.expert_episodes(args)
    assert stop.value.code == 143
    monkeypatch.setattr(terminal, "asked", 0)
    _, _, again = script.expert_episodes(args)
    for name in ("episodes.npz", "expert/metrics.jsonl", "expert/final.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


# ---- runs ----
def run_of(folder: Path, **given) -> script.Learner:
    return script.train(settings(output_dir=str(folder), **given))


def resumed(folder: Path, **given) -> script.Learner:
    return script.train(settings(output_dir=str(folder), resume=str(folder), **given))


def assert_same_runs(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "final.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not [name for name in files(other) if ".partial" in name]


STRIKES = {  # method and n-th call of its work at which a signal comes, later than a checkpoint and than an evaluation
    "sac": ("interact", 13), "aihf": ("interact", 19), "aihf, prior bc": ("interact", 14),
    "aihf from scratch, terminate": ("interact", 9), "rlhf": ("interact", 14), "irl": ("evaluate", 3),
    "bc": ("clone", 7), "ipl": ("learn_offline", 13),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_and_resumed_is_the_run_left_alone(expert, tmp_path, monkeypatch, capfd, method):
    given = dict(num_seeds=2, **METHODS[method])
    run_of(tmp_path / "whole", **given)
    at, n = STRIKES[method]
    with monkeypatch.context() as patch:
        strike(patch, at, n + SMALL["bc_steps"] * (at == "clone" and method != "bc"))
        with pytest.raises(SystemExit) as stop:
            run_of(tmp_path / "cut", **given)
    assert stop.value.code == 143 and not (tmp_path / "cut" / "final.safetensors").exists()
    assert f"SIGTERM: stopped; continue with --resume {tmp_path / 'cut'}" in capfd.readouterr().out
    monkeypatch.setattr(terminal, "asked", 0)
    newest = max(int(path.name) for path in (tmp_path / "cut" / "checkpoint").iterdir())
    assert newest == (34 if at == "evaluate" else n * (2 if at == "interact" else 1))  # the update in progress is kept
    rows = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert 2 <= len(rows) < len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    resumed(tmp_path / "cut", **given)
    assert "resumed from" in capfd.readouterr().out
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("name, n", [("evaluate", 2), ("reward_step", 9), ("evaluate", 4), ("warm_start", 1)])
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(expert, tmp_path, monkeypatch, name, n):
    run_of(tmp_path / "whole")
    original, calls = getattr(script.Learner, name), [0]

    def wrapped(self, *args):
        result = original(self, *args)
        calls[0] += 1
        if calls[0] == n:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(script.Learner, name, wrapped)
        with pytest.raises(Killed):
            run_of(tmp_path / "cut")
    resumed(tmp_path / "cut")
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    for folder in ("whole", "cut"):
        assert len(list((tmp_path / folder / "checkpoint").iterdir())) == 2


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(expert, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        run_of(folder)
    (cut / "final.safetensors").unlink()
    older, newest = sorted((cut / "checkpoint").iterdir())
    content = (newest / "state.pt").read_bytes()
    (newest / "state.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed(cut)
    said = capsys.readouterr().out
    assert f"checkpoint {newest.name} is damaged (state.pt differs" in said and f"resumed from {older}" in said
    assert_same_runs(whole, cut)
    for path in (cut / "checkpoint").iterdir():
        (path / "state.pt").unlink()
    with pytest.raises(UserError, match="^--resume: none of the 2 checkpoints in .* is whole"):
        resumed(cut)


def test_lost_rows_of_metrics_are_noticed(expert, tmp_path):
    run_of(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="^--resume: found .*metrics.jsonl of .* bytes, expected .* rows are lost"):
        resumed(tmp_path / "run")


def test_a_full_disk_is_one_line_and_leaves_what_is_there(expert, tmp_path, monkeypatch):
    save = torch.save

    def full(state, path):
        if "0000000032" in str(path):
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    folder = tmp_path / "full"
    with pytest.raises(UserError, match=f"^checkpoint could not be written to .*No space left.*--resume {folder}$"):
        run_of(folder)
    assert [p.name for p in sorted((folder / "checkpoint").iterdir())] == ["0000000016", "0000000020"]
    monkeypatch.setattr(torch, "save", save)
    resumed(folder)
    run_of(tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", folder)


def test_rows_of_metrics_are_those_of_the_flags(expert, tmp_path):
    learner_ = run_of(tmp_path / "run", num_seeds=2, seed=5)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["seed"]) for row in rows] == [(t, s) for t in (0, 16, 32, 48) for s in (5, 6)]
    assert all(row.keys() - {"step", "seed"} <= script.METRICS.keys() for row in rows)
    assert {"eval/return", "eval/reward/accuracy", "bc/loss"} <= rows[0].keys()
    assert {"sac/q", "reward/demonstration_gap", "reward/preference_loss"} <= rows[-1].keys()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "final.safetensors")
    assert torch.equal(saved["policy.weights.0"], learner_.sac.policy.weights[0])
    assert torch.equal(saved["reward.scale"], learner_.reward.scale)


@pytest.mark.parametrize("name", ["Pendulum-v1", "Hopper-v5"])
def test_a_run_on_gymnasiums_environments_is_resumed_exactly(tmp_path, monkeypatch, name):
    pytest.importorskip("gymnasium")
    if name.endswith("-v5"):
        pytest.importorskip("mujoco")
    given = dict(env=name, method="sac", total_steps=240, random_steps=60, eval_every=120, eval_episodes=1, num_envs=2)
    monkeypatch.setattr(script, "expert_episodes", None)  # the true reward needs none
    run_of(tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        strike(patch, "interact", 70)
        with pytest.raises(SystemExit):
            run_of(tmp_path / "cut", **given)
    monkeypatch.setattr(terminal, "asked", 0)
    resumed(tmp_path / "cut", **given)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


# ---- the command line ----
def typed(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the script, in this process."""
    monkeypatch.setattr(sys, "argv", ["aihf_mujoco.py", *words])
    status = 0
    try:
        main(lambda: script.train(script.parse()))
    except SystemExit as stop:
        status = stop.code or 0
    return status, *capsys.readouterr()


def one_line(found: tuple[int, str, str]) -> str:
    status, _, err = found
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, found
    return err[7:-1]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--gama 0.9", "--gama: found no flag of this name, expected --gamma, or one that --help shows"),
        ("--method ppo", "--method: found ppo, expected one of aihf, bc, ipl, sac"),
        ("--gamma 1.5", "--gamma: found 1.5, expected a number above 0 and at most 1"),
        ("--num-seeds 0", "--num-seeds: found 0, expected 1 or more"),
        ("--total-steps -5", "--total-steps: found -5, expected a number above 0"),
        ("--flip-labels 1.2", "--flip-labels: found 1.2, expected between 0 and 1"),
        ("--low-most 0.8", "--medium-most: found 0.7, expected more than --low-most 0.8"),
        ("--high-least 0.6", "--high-least: found 0.6, expected more than --medium-most 0.7"),
        (
            "--demo-weight 0 --preference-weight 0",
            "--preference-weight: found 0, expected above 0 where --demo-weight is 0",
        ),
        ("--prior bc --start scratch", "--prior: found bc, expected uniform where --start is scratch"),
        ("--prior bc --alpha 0", "--alpha: found 0.0, expected above 0 with --prior bc, whose KL it weighs"),
        ("--resume nowhere", "--resume: found no args.json in nowhere, expected a run directory"),
    ],
)
def test_a_wrong_flag_is_one_line(monkeypatch, capsys, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    assert one_line(typed(monkeypatch, capsys, "--env", "toy", *words.split())) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Hoper-v5", "found Hoper-v5, expected an environment of gymnasium ("),
        ("Hopper-v2", "found Hopper-v2, which cannot be made here ("),
        ("CartPole-v1", "found CartPole-v1 with actions Discrete(2), expected a vector of numbers (Box)"),
        ("FrozenLake-v1", "found FrozenLake-v1 with observations Discrete(16), expected a vector of numbers (Box)"),
        ("no_such_module:X-v0", "found no_such_module:X-v0, which cannot be made here ("),
    ],
)
@pytest.mark.parametrize("more", [[], ["--render"]])
def test_an_environment_that_cannot_be_used_is_one_line(monkeypatch, capsys, tmp_path, name, expected, more):
    pytest.importorskip("gymnasium")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    said = one_line(typed(monkeypatch, capsys, "--env", name, *more))
    assert said.startswith(f"--env: {expected}")
    assert name != "Hopper-v2" or said.endswith("and a -v5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [[], ["--render"], ["--dry-run"]])
def test_without_gymnasium_it_is_one_line(monkeypatch, capsys, tmp_path, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    said = one_line(typed(monkeypatch, capsys, "--env", "Pendulum-v1", *more))
    assert said == "--env: found no gymnasium, expected it: pip install -r requirements/mujoco.txt"


def test_without_mujoco_it_is_one_line(tmp_path):
    """In a process of its own: gymnasium looks for mujoco when its module of these environments is imported."""
    pytest.importorskip("gymnasium")
    code = (
        "import sys; sys.modules['mujoco'] = None; import runpy; runpy.run_path('aihf_mujoco.py', run_name='__main__')"
    )
    words = [sys.executable, "-c", code, "--env", "Hopper-v5"]
    environment = child_environment()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: --env: found Hopper-v5, ")
        and done.stderr.count("\n") == 1
    )
    assert "requirements/mujoco.txt" in done.stderr


def test_without_a_renderer_it_is_one_line_before_anything_is_trained(monkeypatch, capsys, tmp_path):
    gymnasium = pytest.importorskip("gymnasium")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    make = gymnasium.make

    def refuse(name, render_mode=None, **given):
        if render_mode:
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
        return make(name, **given)

    monkeypatch.setattr(gymnasium, "make", refuse)
    said = one_line(typed(monkeypatch, capsys, "--env", "Pendulum-v1", "--render"))
    assert (
        said.startswith("--render: found no way to draw with MUJOCO_GL=egl ('NoneType' object has")
        and "libegl1" in said
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_another_run_is_refused(expert, monkeypatch, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = one_line(typed(monkeypatch, capsys, "--env", "toy", "--output-dir", str(tmp_path)))
    assert said.startswith(f"--output-dir: {tmp_path} already holds files; expected a new or empty folder")
    assert files(tmp_path) == {"notes.txt"}


def test_a_dry_run_has_no_side_effects(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words, expected in (
        ([], ["aihf on toy, w1 = 1, 1 seed(s)", "200000 environment steps", "41 evaluations of 10 episodes"]),
        (["--method", "ipl"], ["ipl on toy", f"{script.Args().ipl_steps} updates"]),
        (["--demo-weight", "0"], ["0 reward rounds"]),
        (["--method", "sac", "--render"], ["sac on toy"]),
    ):
        status, out, err = typed(monkeypatch, capsys, "--env", "toy", "--dry-run", *words)
        assert status == 0 and not err and all(text in out for text in expected), out
        assert ("3 expert(s) of 200000 environment steps" in out) == ("sac" not in words)
    assert not list(tmp_path.iterdir())


def test_settings_of_the_environments_are_whole(monkeypatch, capsys):
    for name in script.SETTINGS:
        monkeypatch.setattr(sys, "argv", ["aihf_mujoco.py", "--env", name])
        args = script.parse()
        assert "auto" not in [v for k, v in dataclasses.asdict(args).items() if k != "output_dir"]
        assert args.total_steps == script.SETTINGS[name]["total_steps"]
    monkeypatch.setattr(sys, "argv", ["aihf_mujoco.py", "--env", "Hopper-v5", "--total-steps", "77", "--num-envs", "2"])
    args = script.parse()
    assert (args.total_steps, args.updates, args.env_steps, args.eval_updates) == (77, 39, 78, 2500)


def test_help_imports_nothing_that_is_slow():
    """Neither what language models need nor the environments."""
    code = (
        "import runpy, sys\n"
        "try: runpy.run_path('aihf_mujoco.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print([n for n in ('transformers', 'datasets', 'accelerate', 'pyarrow', 'gymnasium', 'mujoco', 'PIL') if n in sys.modules])"
    )
    words = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=child_environment(), check=True)
    assert "--preference-weight" in done.stdout and done.stdout.splitlines()[-1] == "[]"


# ---- a picture ----
def test_frames_are_drawn_side_by_side(tmp_path):
    image = pytest.importorskip("PIL.Image")
    env = Limit(Toy())
    env.render = lambda: np.full((4, 6, 3), len(env.env.received), np.uint8)
    seen = []
    control.draw(env, 3, lambda o: seen.append(o) or torch.zeros(1, 1, 2), tmp_path / "frames.png", frames=5)
    picture = np.array(image.open(tmp_path / "frames.png"))
    assert picture.shape == (4, 30, 3) and seen[0].shape == (1, 1, 2) and seen[0].dtype == torch.float32
    steps = picture[0, ::6, 0].tolist()
    assert steps[0] == 1 and steps == sorted(steps)
    assert all(np.array_equal(a, [0, 1]) for a in env.env.received)  # the middle of its bounds


# ---- does it learn ----
@pytest.mark.slow
def test_sac_learns_pendulum(tmp_path):
    pytest.importorskip("gymnasium")
    args = script.Args(
        env="Pendulum-v1", method="sac", num_seeds=3, total_steps=8000, random_steps=400, eval_every=4000, expert_steps=8000, expert_alpha=0.2, expert_seeds=1,
        checkpoint_every=500, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    script.train(args)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = ([row["eval/return"] for row in rows if row["step"] == step] for step in (0, 8000))
    assert np.median(last) > -400 and np.median(first) < -800


@pytest.mark.slow
def test_the_script_end_to_end(tmp_path):
    """From the command line: the expert, AIHF, BC on the same data; a real SIGTERM, and the run goes on."""
    pytest.importorskip("gymnasium")
    small = "--env Pendulum-v1 --expert-steps 3000 --checkpoint-every 250 --hidden 32 --bc-steps 100 --total-steps 800"
    small += " --eval-every 400 --eval-episodes 2 --checkpoint-episodes 2 --critic-warmup 200 --random-steps 100"
    small += f" --high-least 0.71 --data-dir {tmp_path / 'data'}"
    environment = child_environment()

    def script_run(*words):
        command = [sys.executable, "aihf_mujoco.py", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    done = script_run(*small.split(), "--output-dir", str(tmp_path / "aihf"))
    assert done.returncode == 0, done.stderr
    assert (
        "aihf_mujoco: aihf on Pendulum-v1, seeds [1], 200 updates" in done.stdout and "non-preferred -" in done.stdout
    )
    began = (tmp_path / "data").stat().st_mtime
    done = script_run(*small.split(), "--method", "bc", "--output-dir", str(tmp_path / "bc"))
    assert done.returncode == 0 and "sac on" not in done.stdout and (tmp_path / "data").stat().st_mtime == began
    words = [sys.executable, "aihf_mujoco.py", *small.split(), "--output-dir", str(tmp_path / "cut")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        while not (tmp_path / "cut" / "metrics.jsonl").exists() and process.poll() is None:
            pass
        process.send_signal(signal.SIGTERM)
        assert f"SIGTERM: stopped; continue with --resume {tmp_path / 'cut'}" in process.stdout.read()
    assert process.returncode == 143
    assert script_run("--resume", str(tmp_path / "cut")).returncode == 0
    assert_same_runs(tmp_path / "aihf", tmp_path / "cut")
