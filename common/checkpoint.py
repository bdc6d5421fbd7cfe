"""Checkpoints and saved models of a run: each is written under another name, listed with its SHA-256, synced, then renamed.

They are our own because accelerate's save_state writes in place and its load_state checks nothing. A resumed run must find
a whole checkpoint or none, and must know which one is damaged. extras/resume.py reads them.
"""

import contextlib
import math
import os
import shutil
from pathlib import Path

import torch

from common import UserError
from common.data import stop_at_end_of_turn
from common.engine import all_weights, not_finite
from common.store import sync_path, write_json, write_manifest
from extras import terminal
from extras.card import write_card
from extras.templates import save_tokenizer


def checkpoints(run) -> list[Path]:
    """Folders of the run's checkpoints, the oldest first."""
    return sorted(p for p in (run.dir / "checkpoint").iterdir() if not p.name.startswith("."))


def last_checkpoint(run) -> Path | str:
    """Folder of the newest checkpoint, as an error message names it."""
    return next(reversed(checkpoints(run)), "none yet")


def on_any_rank(run, *happened: bool) -> list[bool]:
    """True for each of these that happened on some rank. All ranks call it together."""
    flags = torch.tensor([float(h) for h in happened], device=run.accelerator.device)
    return [n > 0 for n in run.accelerator.reduce(flags, reduction="sum").tolist()]


# ---- checkpoints ----
def save_checkpoint(run) -> None:
    """Models, optimizers, RNG and position under checkpoint/<iteration>_<step>; the two newest are kept.

    With LoRA, the part of a frozen base that is still as it was loaded is left out: nothing of --model itself is written.
    A failed write leaves the earlier checkpoints as they were and raises UserError on all ranks.
    """
    position = run.position
    if run.saved == str(position):
        return
    refuse_diverged(run)
    folder = run.dir / "checkpoint"
    final = folder / f"{position['outer_iteration']:04d}_{position['step']:08d}"
    partial = folder / f".partial_{final.name}"
    error, fresh = None, []
    try:
        if run.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        run.accelerator.wait_for_everyone()
        fresh = run.engine.save_state(str(partial))
    except Exception as e:  # any failure to write: disk full, quota, permissions, a library's own wrapper of these
        error = e
        if run.engine.name != "plain":  # the other ranks may wait inside a collective of the library
            raise not_written(run, e) from e
    if on_any_rank(run, error is not None) == [False] and run.is_main:
        try:
            metrics = run.dir / "metrics.jsonl"
            size = metrics.stat().st_size if metrics.exists() else 0
            made_by = {"engine": run.engine.name, "processes": run.world, "fresh_optimizers": fresh}
            write_json(partial / "position.json", {**position, "metrics_bytes": size, **made_by})
            write_manifest(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            sync_path(folder)
            for old in checkpoints(run)[:-2]:
                shutil.rmtree(old)
        except OSError as e:
            error = e
    if on_any_rank(run, error is not None) == [True]:
        if run.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise not_written(run, error)
    run.saved = str(position)


def not_written(run, error: Exception | None) -> UserError:
    return UserError(
        f"checkpoint could not be written to {run.dir / 'checkpoint'} ({error or 'on another rank'});"
        f" last good checkpoint: {last_checkpoint(run)}; free space, then --resume {run.dir}"
    )


def refuse_diverged(run) -> None:
    """Raise UserError, on all ranks, for a model that is of no use: it must not replace an earlier one on disk.

    All weights of the prepared models must be finite, and so must be the loss of some rows of the last update, computed
    again: weights of 1e30 are finite.
    """
    names = [name for m in run.accelerator._models if (name := not_finite(m))]
    loss = 0.0 if run.probe is None else run.engine.probe(*run.probe[:3])
    weights, losses = on_any_rank(run, bool(names), not math.isfinite(loss))
    if weights or losses:
        from extras.divergence import explain_model

        raise explain_model(run, names, loss, weights)
    run.probe = None


# ---- saved models ----
@contextlib.contextmanager
def nothing_half_written(run):
    """Context that writes a folder as .partial_*: a failed write becomes one line, and its part is removed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for partial in run.dir.glob(".partial_*"):
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) and "os error" not in str(error):  # as safetensors words its own
            raise
        reason = " ".join(str(error).split())[:200]
        after = terminal.hint and f"; free space, then{terminal.hint}"
        raise UserError(f"the model could not be written to {run.dir} ({reason}){after}") from error


def save_model(run, model, tokenizer, card: str, name: str, part: str) -> Path:
    """Write weights (safetensors), tokenizer and model card to the folder `name` of the run, for from_pretrained.

    part: attribute path of the model inside a prepared module that holds several, such as "policy"; empty: all of it.
    Raises UserError if the model has diverged or cannot be written. All ranks call it together.
    """
    run.accelerator.wait_for_everyone()
    refuse_diverged(run)
    path, partial = run.dir / name, run.dir / f".partial_{name}"
    model = run.unwrap(model)  # with its mixed precision: training may go on
    model = model.get_submodule(part) if part else model
    with nothing_half_written(run), all_weights(model, cast=False):
        if run.is_main:
            if run.args.lora_r:
                from extras.adapters import merged

                model = merged(run.args, model)
            shutil.rmtree(partial, ignore_errors=True)
            stop_at_end_of_turn(model, tokenizer)
            model.save_pretrained(partial)
            save_tokenizer(tokenizer, partial)
            write_card(partial, path, card, tokenizer, model)
            write_manifest(partial)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
    run.accelerator.wait_for_everyone()
    return path


def rename_model(run, name: str, new: str) -> Path:
    """Give a model that save_model has written another name. All ranks call it together."""
    run.accelerator.wait_for_everyone()
    if run.is_main:
        shutil.rmtree(run.dir / new, ignore_errors=True)
        os.replace(run.dir / name, run.dir / new)
    run.accelerator.wait_for_everyone()
    return run.dir / new
