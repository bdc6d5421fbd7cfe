"""Control tasks: environments, and a run that has environments where others have tokenizers."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import UserError
from common.args import require
from common.checkpoint import checkpoints
from common.run import Run
from common.store import sync_path, write_json, write_manifest
from extras import screen, terminal
from extras.episodes import Episodes
from extras.resume import cut_metrics, newest_whole

INSTALL = "pip install -r requirements/mujoco.txt"


# ---- environments ----
def make_environment(name: str):
    """A gymnasium environment with numbers as observations and actions, and a time limit. Raises UserError, naming --env."""
    try:
        import gymnasium
    except ImportError:
        raise UserError(f"--env: found no gymnasium, expected it: {INSTALL}") from None
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    keep_mujoco_quiet()
    try:
        env = gymnasium.make(name, disable_env_checker=True)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:  # an old version has moved elsewhere
        reason = " ".join(str(error).split())
        raise UserError(
            f"--env: found {name}, which cannot be made here ({reason}); expected {INSTALL}, and a -v5"
        ) from None
    except (gymnasium.error.Error, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--env: found {name}, expected an environment of gymnasium ({reason})") from None
    for space, what in ((env.observation_space, "observations"), (env.action_space, "actions")):
        found = f"{name} with {what} {space}"
        require(
            isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1, "env", found, "a vector of numbers (Box)"
        )
    bounds: Any = env.action_space
    require(bool(bounds.is_bounded()), "env", f"{name} without bounds of its actions", "bounds")
    require(time_limit(env) > 0, "env", f"{name} without a time limit", "one")
    return env


def keep_mujoco_quiet() -> None:
    """Show MuJoCo's warnings as Python's, but for what gymnasium's own models use that is deprecated.

    By itself it prints each one every time, and adds it to a file in the current folder.
    """
    with contextlib.suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else warnings.warn(text, stacklevel=1))


def time_limit(env) -> int:
    """Steps after which an episode is cut; 0: none."""
    return (env.spec and env.spec.max_episode_steps) or 0


class Environments:
    """S x N copies of one environment. An episode that ends begins anew at once; actions are in [-1, 1]."""

    def __init__(self, name: str, seeds: list[list[int]]):
        self.envs = [[make_environment(name) for _ in row] for row in seeds]
        env = self.envs[0][0]
        self.limit = time_limit(env)
        self.low, self.high = env.action_space.low, env.action_space.high
        self.begin(seeds)

    def begin(self, seeds: list[list[int]]) -> None:
        """Begin an episode in every copy, each from a seed of its own."""
        first = [
            [e.reset(seed=s)[0] for e, s in zip(*both, strict=True)] for both in zip(self.envs, seeds, strict=True)
        ]
        self.observations = np.array(first, dtype=np.float32)  # (S, N, O), what to act on
        self.steps = np.zeros(self.observations.shape[:2], dtype=np.int64)  # of each running episode

    @property
    def sizes(self) -> tuple[int, int]:
        """(O, A)."""
        return self.observations.shape[-1], len(self.low)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(S, N, A) -> following observations (S, N, O), true rewards, terminated and step in the episode, each (S, N).

        The following observation of an episode that ends is its last one; self.observations has the next one's first.
        """
        following, at = np.empty_like(self.observations), self.steps.copy()
        rewards, terminated = np.zeros(at.shape), np.zeros(at.shape, dtype=bool)
        scaled = self.low + (actions + 1) * (self.high - self.low) / 2
        for s, row in enumerate(self.envs):
            for n, env in enumerate(row):
                observation, rewards[s, n], terminated[s, n], truncated, _ = env.step(scaled[s, n])
                following[s, n] = self.observations[s, n] = observation
                self.steps[s, n] += 1
                if terminated[s, n] or truncated:
                    self.observations[s, n], self.steps[s, n] = env.reset()[0], 0
        return following, rewards, terminated, at

    def state(self) -> list[dict]:
        """Whatever the next steps depend on, as numbers: physics, random stream and step of each copy, row by row."""
        return [
            {
                "physics": physics(env.unwrapped),
                "stream": json.dumps(env.unwrapped.np_random.bit_generator.state),
                "step": int(self.steps[s, n]),
                "observation": self.observations[s, n].tolist(),
            }
            for s, row in enumerate(self.envs)
            for n, env in enumerate(row)
        ]

    def load_state(self, state: list[dict]) -> None:
        """Go on from state()."""
        copies = iter(state)
        for s, row in enumerate(self.envs):
            for n, env in enumerate(row):
                copy = next(copies)
                set_physics(env.unwrapped, copy["physics"])
                env.unwrapped.np_random.bit_generator.state = json.loads(copy["stream"])
                self.steps[s, n], self.observations[s, n] = copy["step"], copy["observation"]
                wrapper = env
                while wrapper is not env.unwrapped:
                    if hasattr(wrapper, "_elapsed_steps"):
                        wrapper._elapsed_steps = copy["step"]
                    wrapper = wrapper.env


def physics(env) -> Tensor:
    """The state of MuJoCo's integrator, or the `state` of gymnasium's classic control, whose dtype may change with a step.

    After the integrator's come the positions of bodies, which Ant and Humanoid compare the next ones with: they are those of
    the last step's start, and no function of the state.
    """
    if not hasattr(env, "data"):
        return torch.from_numpy(np.array(env.state))
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    values = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, values, kind)
    return torch.from_numpy(np.concatenate([values, env.data.xpos.ravel(), env.data.xipos.ravel()]))


def set_physics(env, values: Tensor) -> None:
    if not hasattr(env, "data"):
        env.state = np.array(values)
        return
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state, positions = np.split(np.array(values), [mujoco.mj_stateSize(env.model, kind)])
    mujoco.mj_setState(env.model, env.data, state, kind)
    env.data.xpos.flat, env.data.xipos.flat = np.split(positions, 2)


# ---- episodes ----
def play(environments: Environments, seeds: list[list[int]], act: Callable[[Tensor], Tensor]) -> list[Episodes]:
    """One episode in each of S x N environments -> Episodes of N, for each of S. act: (S, N, O) -> (S, N, A)."""
    environments.begin(seeds)
    (o, a), limit, shape = environments.sizes, environments.limit, environments.steps.shape
    observations, actions = np.zeros((*shape, limit + 1, o), np.float32), np.zeros((*shape, limit, a), np.float32)
    lengths, ended, returns = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape)
    running = np.ones(shape, bool)
    observations[:, :, 0] = environments.observations
    for t in range(limit):
        taken = act(torch.from_numpy(environments.observations)).numpy()
        following, rewards, terminated, _ = environments.step(taken)
        observations[running, t + 1], actions[running, t] = following[running], taken[running]
        lengths, returns, ended = lengths + running, returns + running * rewards, ended | (running & terminated)
        running &= ~terminated
        if not running.any():
            break
    return [Episodes(observations[s], actions[s], lengths[s], ended[s], returns[s]) for s in range(len(returns))]


def versions() -> dict[str, str]:
    """Versions of what an environment is made of."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("gymnasium", "mujoco"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


# ---- pictures ----
def drawing(name: str):
    """An environment that draws frames without a screen. Call it before any other is made: mujoco reads MUJOCO_GL once.

    Raises UserError where nothing can be drawn.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    make_environment(name)
    import gymnasium

    try:
        env = gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
        env.reset(seed=0)
        env.render()
    except Exception as error:  # the libraries of OpenGL raise errors of many kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--render: found no way to draw with MUJOCO_GL={os.environ['MUJOCO_GL']} ({reason}); expected a GL library,"
            " such as libegl1, and pygame for environments without MuJoCo"
        ) from None
    return env


def draw(env, seed: int, act: Callable[[Tensor], Tensor], path: Path, frames: int = 8) -> None:
    """Play the first tenth of an episode and write a strip of frames to a PNG. act: (1, 1, O) -> (1, 1, A)."""
    from PIL import Image

    observation, strip, over = env.reset(seed=seed)[0], [], False
    low, high = env.action_space.low, env.action_space.high
    every = max(time_limit(env) // (10 * frames), 1)
    for t in range(every * frames):
        if not over:
            action = act(torch.from_numpy(observation.astype(np.float32))[None, None])[0, 0].numpy()
            observation, _, terminated, truncated, _ = env.step(low + (action + 1) * (high - low) / 2)
            over = terminated or truncated
        if t % every == 0:
            strip.append(env.render())
    Image.fromarray(np.concatenate(strip, axis=1)).save(path)


# ---- a run ----
class ControlRun(Run):
    """A run of one process without a tokenizer. state() and load_state() of its `learner` are what a checkpoint holds."""

    learner: Any
    hint: str

    def __init__(self, args, script: str, metrics: dict[str, str], within: "ControlRun | None" = None):
        from extras.run_directory import make_directory

        self.args, self.script, self.metrics, self.can_resume = args, script, metrics, True
        self.rank, self.world, self.is_main = 0, 1, True
        self.stop_requested, self.stop_signal, self.in_updates = 0.0, 0, False
        self.dir, self.learner = Path(args.resume or args.output_dir), None
        try:
            make_directory(self)
        except OSError as error:
            name = "resume" if args.resume else "output_dir"
            require(False, name, f"{self.dir}, which could not be opened ({error})", "a folder that can be written")
        for name in ("samples", "evals", "generations"):  # of language models
            (self.dir / name).rmdir()
        self.position, self.update = {"outer_iteration": 0, "step": 0}, {}
        self.saved, self.last_step, self.seconds = "", 0, {}
        self.hint = within.hint if within else terminal.hint  # an expert goes on with the run that waits for it
        torch.use_deterministic_algorithms(args.deterministic)
        self.listen()

    def end(self) -> None:
        """Nothing is open: this run has no tracker and no other process."""

    def log(self, row: dict[str, float], **axis: int) -> None:
        super().log(row, **axis)
        screen.show(row)

    def listen(self) -> None:
        """Have signals stop this run."""
        terminal.catch(lambda number, frame=None: terminal.on_signal(self, number, frame))
        terminal.hint = self.hint

    def stop_if_asked(self) -> None:
        if self.stop_signal:
            self.save_checkpoint()
            terminal.stop(self, self.stop_signal)

    def save_checkpoint(self) -> None:
        """Write the learner's state and the position under checkpoint/<step>; the two newest are kept."""
        if self.saved == str(self.position):
            return
        folder = self.dir / "checkpoint"
        final = folder / f"{self.position['step']:010d}"
        partial = folder / f".partial_{final.name}"
        metrics = self.dir / "metrics.jsonl"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            torch.save(self.learner.state(), partial / "state.pt")
            size = metrics.stat().st_size if metrics.exists() else 0
            write_json(partial / "position.json", {**self.position, "metrics_bytes": size})
            write_manifest(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync_path(folder)
            for old in checkpoints(self)[:-2]:
                shutil.rmtree(old)
        except (OSError, RuntimeError) as error:  # torch raises the latter where a disk is full
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"checkpoint could not be written to {folder} ({error}); free space, then --resume {self.dir}"
            ) from error
        self.saved = str(self.position)

    def load_checkpoint(self) -> dict | None:
        """With --resume, load the newest checkpoint that is whole, and cut metrics.jsonl back to it. Returns its position."""
        if not self.args.resume:
            return None
        path = newest_whole(self)
        if path is None:
            return None
        position = json.loads((path / "position.json").read_text())
        cut_metrics(self, path, position.pop("metrics_bytes"))
        self.learner.load_state(torch.load(path / "state.pt", weights_only=True))
        self.print(f"resumed from {path}")
        self.position, self.saved, self.last_step = position, str(position), position["step"]
        return position

    def save_weights(self, name: str, modules: dict[str, torch.nn.Module]) -> Path:
        """Write the weights of modules to <name>.safetensors in the run's folder, whole or not at all."""
        from safetensors.torch import save

        tensors = {f"{part}.{key}": value for part, m in modules.items() for key, value in m.state_dict().items()}
        path = self.dir / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial_{path.name}")
        partial.write_bytes(save(tensors))
        os.replace(partial, path)
        return path
