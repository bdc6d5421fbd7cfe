"""The error of a run whose numbers are no longer finite: what it found, the likely cause, and what is left on disk."""

import dataclasses
import math

from common import UserError
from common.args import flag
from common.checkpoint import last_checkpoint


def explain_update(run, row: dict[str, float], rows: list[dict], rate: str, fresh: bool) -> UserError:
    """The error of an update whose loss or gradient is not finite, with its cause as far as it can be known.

    row: what the update would log. rows: its global batch. rate: name of the flag with its learning rate.
    fresh: the optimizer has not moved a weight yet.
    """
    found = f"found loss {row['loss']}, gradient norm {row['grad_norm']}, expected finite numbers"
    if bad := next(((k, v) for r in rows for k, v in r.items() if has_nan(v)), None):
        values = bad[1] if isinstance(bad[1], list) else [bad[1]]
        value = next(v for v in values if not math.isfinite(v))
        return UserError(f"{found}: a row of this update holds {bad[0]} {value}, which was computed before it")
    if fresh:
        numbers = [(f.name, getattr(run.args, f.name)) for f in dataclasses.fields(run.args)]
        large = [f"{flag(n)} {v:g}" for n, v in numbers if isinstance(v, float) and not abs(v) < 1e6]
        where = f"look at {', '.join(large)}" if large else "look at the model, its --dtype, and the data"
        return UserError(
            f"first update: {found}; it has moved no weight yet, so {flag(rate)} is not the cause: {where}"
        )
    return UserError(
        f"training diverged: {found}; nothing of this update was kept."
        f" Lower {flag(rate)}; last good checkpoint: {last_checkpoint(run)}"
    )


def explain_model(run, names: list[str], loss: float, weights: bool) -> UserError:
    """The error of a model that is not saved.

    names: parameters of this rank that are not finite. weights: some rank has such ones; else the loss is not finite.
    """
    where = f"weights that are not finite ({names[0] if names else 'on another rank'})" if weights else ""
    where = where or f"loss {loss if not math.isfinite(loss) else math.nan} after the last update"
    rate = run.probe[3] if run.probe else "learning_rate"
    return UserError(
        f"training diverged: found {where}, expected finite numbers; they were not saved."
        f" Lower {flag(rate)}; last good checkpoint: {last_checkpoint(run)}"
    )


def has_nan(value) -> bool:
    """True if a number, or one of a list of numbers, is not finite."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(v, float) and not math.isfinite(v) for v in values)
