"""Episodes of a control task as arrays: their rows, their classes, preferences between their segments, and their file.

Dims: n episodes, T the time limit, L steps of a segment, O numbers of an observation, A of an action.
"""

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import UserError
from common.streams import stream_seed


@dataclass
class Episodes:
    """n episodes, zero after their ends. T: the time limit."""

    observations: np.ndarray  # (n, T + 1, O) float32; the last one of an episode is that after its last action
    actions: np.ndarray  # (n, T, A) float32, in [-1, 1]
    lengths: np.ndarray  # (n,) steps
    terminated: np.ndarray  # (n,) bool: the environment ended it, not the time limit
    returns: np.ndarray  # (n,) true, undiscounted

    def __getitem__(self, which) -> "Episodes":
        return Episodes(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.lengths)

    def cut(self, steps: int) -> "Episodes":
        """The first `steps` of each, which is their time limit; an episode that is cut has no end."""
        whole = self.lengths <= steps
        return Episodes(
            self.observations[:, : steps + 1],
            self.actions[:, :steps],
            np.minimum(self.lengths, steps),
            self.terminated & whole,
            self.returns,
        )

    def rows(self, absorbing: bool) -> tuple[np.ndarray, np.ndarray]:
        """((n, T, O + A + 1) float32 input of a reward, (n, T) bool whether there is a step).

        absorbing: a terminated episode goes on to the time limit in one state: zeros, and 1 in the last column.
        """
        steps = np.arange(self.actions.shape[1])[None]
        alive = steps < self.lengths[:, None]
        after = ~alive & self.terminated[:, None] & absorbing
        rows = np.concatenate([self.observations[:, :-1], self.actions, np.zeros_like(self.actions[..., :1])], -1)
        rows = np.where(alive[..., None], rows, 0.0).astype(np.float32)
        rows[after, -1] = 1.0
        return rows, alive | after


def steps_of(episodes: Episodes, args) -> tuple[Tensor, Tensor]:
    """((n, O + A + 1) rows of all steps, (n,) weights): 1 each, or gamma^t with --discount-demo."""
    rows, counted = episodes.rows(args.horizon == "absorbing")
    weights = (args.gamma if args.discount_demo else 1.0) ** np.arange(rows.shape[1]) * counted
    return torch.from_numpy(rows[counted]), torch.from_numpy(weights[counted].astype(np.float32))


def sort_episodes(episodes: Episodes, checkpoint: np.ndarray, args) -> list[Episodes]:
    """Low, medium and high: each checkpoint by its place between the untrained policy (0) and the best checkpoint (1)."""
    levels = np.array([episodes.returns[checkpoint == c].mean() for c in range(checkpoint.max() + 1)])
    level = ((levels - levels[0]) / max(levels.max() - levels[0], 1e-9))[checkpoint]
    classes = {
        "--low-most": level <= args.low_most,
        "--medium-most": (level > args.low_most) & (level <= args.medium_most),
        "--high-least": level >= args.high_least,
    }
    for name, members in classes.items():
        if not members.any():
            found = ", ".join(f"{x:.2f}" for x in (levels - levels[0]) / max(levels.max() - levels[0], 1e-9))
            raise UserError(
                f"{name}: found no checkpoint of the expert in its class, expected one or more; levels: {found}"
            )
    return [episodes[members] for members in classes.values()]


# ---- preferences ----
@dataclass
class Pairs:
    """P preferences over segments of L steps; in dimension 1 the preferred one is first."""

    rows: Tensor  # (P, 2, L, O + A + 1), as Episodes.rows
    counted: Tensor  # (P, 2, L) 1 where there is a step
    following: Tensor  # (P, 2, L, O) observation after it
    ended: Tensor  # (P, 2, L) 1 where the episode has terminated by then


def draw_pairs(preferred: Episodes, rejected: Episodes, count: int, args, *key: int) -> Pairs:
    """Pairs of random segments of random episodes of two classes. A share --flip-labels of them has the wrong order."""
    rng = np.random.default_rng(stream_seed(args.expert_seed, *key))
    sides = []
    for episodes in (preferred, rejected):
        which = rng.integers(len(episodes), size=count)
        rows, counted = episodes.rows(args.horizon == "absorbing")
        length = min(args.segment_length, rows.shape[1])
        last = np.maximum(episodes.lengths - length, 0)
        if args.horizon == "absorbing":
            # it begins in life and may go on after the end: two ends have nothing to compare
            last = np.where(episodes.terminated, np.minimum(episodes.lengths - 1, rows.shape[1] - length), last)
        first = rng.integers(last[which] + 1)
        steps = first[:, None] + np.arange(length)
        at = (which[:, None], steps)
        ended = episodes.terminated[which, None] & (steps + 1 >= episodes.lengths[which, None])
        sides.append((rows[at], counted[at], episodes.observations[which[:, None], at[1] + 1], ended))
    arrays = [np.stack(both, 1).astype(np.float32) for both in zip(*sides, strict=True)]
    wrong = rng.random(count) < args.flip_labels
    return Pairs(*(torch.from_numpy(np.where(wrong.reshape(-1, *[1] * (a.ndim - 1)), a[:, ::-1], a)) for a in arrays))


# ---- their file ----
def write_episodes(path: Path, episodes: Episodes, **more: np.ndarray) -> None:
    """Write episodes, and arrays with a row for each, to an .npz, whole or not at all."""
    partial = path.with_name(f".partial_{path.name}")
    with open(partial, "wb") as f:
        arrays: dict[str, Any] = {**vars(episodes), **more}
        np.savez_compressed(f, **arrays)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def read_episodes(path: Path) -> tuple[Episodes, dict[str, np.ndarray]]:
    """(episodes, the other arrays) of write_episodes. Raises UserError if the file is not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return Episodes(**{name: arrays.pop(name) for name in Episodes.__dataclass_fields__}), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: found no readable episodes ({reason}); delete it, and the next run makes it again"
        ) from None


def cache_key(made_by: dict) -> str:
    """Short name of a data set: a digest of all that made it."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]
