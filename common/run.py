"""What every run shares: flags, processes, run directory, metrics, progress, optimizer steps, checkpoints and resume."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common import UserError
from common.args import BaseArgs, flag, mixes_bf16, require
from common.data import collate, stop_at_end_of_turn
from common.store import (
    broken_seal,
    lock,
    new_directory,
    read_metrics,
    read_pairs,
    seal,
    sync_path,
    untouched,
    without_nan,
    write_json,
    write_pairs,
)
from common.streams import bias_correction, data_order
from extras import sharding, terminal
from extras.terminal import progress


def names_flag_when_out_of_memory(name: str):
    """Of a method of Run: an allocator's error becomes one line with the flag `name` to lower and the plan's estimate."""

    def decorate(method):
        @functools.wraps(method)
        def wrapped(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                from extras.memory import explain_out_of_memory

                explain_out_of_memory(error, self.args, name)
                raise

        return wrapped

    return decorate


def leaves_nothing_half_written(method):
    """Decorate a method of Run that writes a folder as .partial_*: a failed write becomes one line, and its part is removed."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            for partial in self.dir.glob(".partial_*"):
                shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError) and "os error" not in str(error):  # as safetensors words its own
                raise
            reason = " ".join(str(error).split())[:200]
            after = terminal.hint and f"; free space, then{terminal.hint}"
            raise UserError(f"the model could not be written to {self.dir} ({reason}){after}") from error

    return wrapped


class Run:
    """One run of one script: its processes, its directory, its log and its checkpoints."""

    engine = "plain"  # sharding.engine_name
    args: Any  # of a script: BaseArgs or RunArgs, with flags of its own
    views: dict = {}  # prepared model -> its view

    def __init__(self, args: BaseArgs, script: str, metrics: dict[str, str]):
        from accelerate.utils import ProjectConfiguration, set_seed
        from transformers.utils import logging as transformers_logging

        from extras.adapters import leave_out_loaded
        from extras.launch import expected_processes
        from extras.trackers import flat_config, tracker_settings

        transformers_logging.disable_progress_bar()  # ours speak for the phases
        self.args, self.script, self.metrics = args, script, metrics
        self.can_resume = any(field.name == "resume" for field in dataclasses.fields(args))
        expected = expected_processes()
        # decided here once: args.json says it, so that a run goes on in its precision on whatever machine resumes it
        precision = args.mixed_precision = "bf16" if mixes_bf16(args) else "no"
        log_with = None if args.report_to == "none" else args.report_to
        self.dir = Path(args.resume or args.output_dir)
        project = ProjectConfiguration(logging_dir=str(self.dir))  # the directory is settled below, by rank 0
        self.accelerator = sharding.open_accelerator(
            mixed_precision=precision, log_with=log_with, project_config=project
        )
        if args.lora_r:
            self.accelerator.register_save_state_pre_hook(leave_out_loaded)
        if self.accelerator.num_processes != expected:
            raise UserError(
                f"launched for {expected} processes, but accelerate runs {self.accelerator.num_processes}: they would train"
                f" apart. Type: accelerate launch --config_file configs/cpu.yaml --num_processes {expected} {script}.py ..."
            )
        self.engine = sharding.engine_name(self.accelerator)
        one = "one process, or DDP (configs/ddp.yaml): 4-bit weights are not cut up"
        require(not args.load_in_4bit or self.engine == "plain", "load_in_4bit", self.engine, one)
        known = args.dtype == "float32" or precision == "bf16" or not self.engine.startswith("zero")
        require(
            known,
            "dtype",
            f"{args.dtype} without mixed precision, under {self.engine}",
            "--mixed-precision bf16 beside it",
        )
        self.views = {}
        self.rank, self.world, self.is_main = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.accelerator.is_main_process,
        )
        if os.environ.get("OMP_NUM_THREADS") is None and self.accelerator.device.type == "cpu" and self.world > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.world))
        set_seed(args.seed)
        self.stop_requested, self.stop_signal = 0.0, 0  # when a stop was asked for, and by which signal
        self.in_updates = False  # whether weights change
        self.probe: tuple | None = None  # of the last update, for refuse_diverged
        terminal.catch(self._on_signal)
        self._make_directory()
        if log_with:
            project.logging_dir = str(self.dir)
            kept = tracker_settings(args.report_to, self.dir) if self.is_main else {}
            self.accelerator.init_trackers("cleanirl", config=flat_config(args), init_kwargs=kept)
        self.position: dict = {"outer_iteration": 0, "step": 0}  # optimizer steps that are done; the loops' own counts
        self.update: dict[str, int] = {}  # the update in progress, as its row of metrics names it
        self.saved, self.last_step = "", 0  # position of the last checkpoint; step of the last row of metrics
        self.seconds: dict[str, float] = {}

    @staticmethod
    def print_plan(args: BaseArgs, script: str, *lines: str) -> None:
        """--dry-run: print what would run, and the memory it would take."""
        from extras.memory import print_memory_plan

        print(f"{script} --dry-run: model {args.model}, {lines[0]}", *lines[1:], sep="\n  ")
        print_memory_plan(args)

    # ---- directory ----
    def _make_directory(self) -> None:
        """Create (or, with --resume, reopen) the run directory; rank 0 decides its name, all ranks learn it."""
        from accelerate.utils import broadcast_object_list

        problem = None
        if self.is_main:
            try:
                self._open_directory()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                name = "--resume" if self.args.resume else "--output-dir"
                problem = f"{name}: {self.dir} could not be opened: {error}; expected a folder that can be written"
        message = broadcast_object_list([problem, str(self.dir)])
        if message[0]:
            raise UserError(message[0])
        self.dir = Path(message[1])

    def _open_directory(self) -> None:
        from extras.provenance import changed_inputs, digests, environment

        args = self.args
        if args.output_dir == "auto" and not args.resume:
            self.dir = new_directory(Path("runs") / f"{self.script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
        used = f"--output-dir: {self.dir} already holds files; expected a new or empty folder"
        used += f", or --resume {self.dir}" if self.can_resume else ""
        if not args.resume and self.dir.exists() and not untouched(self.dir):
            raise UserError(used)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.dir)
        if args.resume:
            changed_inputs(args, json.loads((self.dir / "args.json").read_text()))
        elif not untouched(self.dir):  # another process was faster
            raise UserError(used)
        for name in ("samples", "evals", *(("generations", "checkpoint") if self.can_resume else ())):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        if not args.resume:
            made_by = {"script": self.script, "args": dataclasses.asdict(args), "inputs": digests(args)}
            write_json(self.dir / "args.json", {**made_by, **environment()})
        if self.can_resume:
            terminal.hint = f" continue with --resume {self.dir}"

    def _on_signal(self, number: int, _=None) -> None:
        """Between updates there is something to save: stop_if_asked does it. Elsewhere the last checkpoint says it all.

        A launcher that is stopped with its processes passes the signal on: one that comes again at once is the same.
        """
        if not self.in_updates or (self.stop_requested and time.time() - self.stop_requested > 10):
            self._stop(number)
        if not self.stop_requested and self.is_main and sys.stderr.isatty():
            terminal.tell(f"{signal.Signals(number).name}: stopping after this update", 2)
        self.stop_requested, self.stop_signal = self.stop_requested or time.time(), self.stop_signal or number
        terminal.asked = number

    def _stop(self, number: int) -> None:
        if self.is_main:
            terminal.tell(f"{signal.Signals(number).name}: stopped{terminal.hint and f';{terminal.hint}'}", 1)
        terminal.leave(number)

    def stop_if_asked(self) -> None:
        """After a signal on any rank: write a checkpoint and exit on all ranks, with status 128 + its number."""
        asked = torch.tensor([float(self.stop_signal == n) for n in terminal.SIGNALS], device=self.accelerator.device)
        asked = self.accelerator.reduce(asked).tolist()
        if any(asked):
            self.save_checkpoint()
            self._stop(next(n for n, found in zip(terminal.SIGNALS, asked, strict=True) if found))

    def finished(self) -> bool:
        """True, and says so, if --resume names a run that has its final model."""
        done = bool(self.args.resume) and (self.dir / "final").is_dir()
        if done:
            self.say(f"{self.dir} is finished: its model is in {self.dir / 'final'}")
        return done

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    # ---- metrics ----
    def log(self, row: dict[str, float], **axis: int) -> None:
        """Append one row to metrics.jsonl, null for what is not a finite number; an eval/nll that is none is a UserError.

        KeyError on a name that METRICS does not describe.
        """
        if unknown := row.keys() - self.metrics.keys():
            raise KeyError(f"describe {sorted(unknown)} in METRICS")
        self.last_step = max(self.last_step, axis.get("step", 0))
        if self.is_main:
            with open(self.dir / "metrics.jsonl", "a") as f:
                f.write(json.dumps({**axis, **without_nan(row)}, allow_nan=False) + "\n")
        if self.args.report_to != "none":
            self.accelerator.log(row, step=axis.get("step"))
        if not math.isfinite(nll := row.get("eval/nll", 0.0)):
            raise UserError(
                f"found eval/nll {nll} on held-out rows, expected a finite number: the model has diverged; it is not saved"
            )

    def log_update(self, row: dict[str, float], count: int = 0, **axis: int) -> None:
        """Log the row of the update in progress, of every --logging-steps-th one.

        count: number of the update, from 1; by default its number within the phase.
        """
        if (count or self.update["count"]) % self.args.logging_steps == 0:
            self.log(row, step=self.update["step"], outer_iteration=self.update["outer_iteration"], **axis)

    def logged(self) -> list[dict]:
        """Rows of metrics.jsonl so far."""
        path = self.dir / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    @contextlib.contextmanager
    def phase(self, name: str, total: int, updates: bool = False, **axis: int) -> Iterator[Callable[[int], None]]:
        """Progress for one phase; its wall time goes to timing.jsonl, apart from the metrics, which a rerun repeats exactly.

        updates: the phase changes weights and calls stop_if_asked after each step.
        """
        started, outer = time.time(), (self.in_updates, self.seconds)  # an evaluation may stand inside a training phase
        parts = self.seconds = {}
        self.in_updates = updates
        with progress(name, total, self.is_main) as advance:
            yield advance
        self.in_updates, self.seconds = outer
        if self.is_main:
            row = {**axis, "phase": name, "items": total, "seconds": round(time.time() - started, 3)}
            row |= {part: round(value, 3) for part, value in parts.items()}
            with open(self.dir / "timing.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def updates(
        self, name: str, batches: list, outer_iteration: int = 0, first: int = 0, per_update: int = 1,
        evaluate: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """Loop over the updates of a training phase: yield (k, batch) for those that a resumed run has not done yet.

        After the loop's body the position moves to the end of the update, a checkpoint is written where one is due, the run
        stops if a signal has asked for it, and progress advances. A checkpoint is due every --save-steps optimizer steps and
        at the end of the phase.

        first: optimizer steps of the run before this phase. per_update: optimizer steps of one update.
        evaluate: is called with the number of updates done, before the first one of the run, every --eval-updates updates
        and after the last one.
        """
        save_every = max(1, self.args.save_steps // per_update)
        with self.phase(name, len(batches), updates=True, outer_iteration=outer_iteration) as advance:
            for k, batch in enumerate([*batches, None] if evaluate else batches):
                if first + k * per_update < self.position["step"]:
                    advance(1)
                    continue
                if evaluate and (k == len(batches) or (k % self.args.eval_updates == 0 and (k or not outer_iteration))):
                    self.save_checkpoint()  # an evaluation is long, and a stop in it would lose what is not saved
                    with self.timed("evaluate"):
                        evaluate(k)
                if k == len(batches):
                    break
                step = first + (k + 1) * per_update
                self.update = {"count": k + 1, "step": step, "outer_iteration": outer_iteration}
                yield k, batch
                self.position.update(outer_iteration=outer_iteration, step=step)
                if (k + 1) % save_every == 0 or k + 1 == len(batches):
                    self.save_checkpoint()
                self.stop_if_asked()
                advance(1)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Wall time of a part of the current phase, summed under its name in the phase's row of timing.jsonl."""
        started, parts = time.time(), self.seconds
        yield
        parts[part] = parts.get(part, 0.0) + time.time() - started

    # ---- models ----
    def prepare(self, *objects) -> list:
        """model, optimizer, model, optimizer, ... made ready to be trained by this launch."""
        prepared, views = sharding.prepare(self.accelerator, self.args, *objects)
        self.views |= views
        return prepared

    def unwrap(self, model):
        """What to generate, score and save with in place of a prepared model (engines.py); any other model itself."""
        return self.views.get(model, model)

    def load_weights(self, model, source, part: str = "") -> None:
        """Give a prepared model, or the part of it at an attribute path, the weights of another model."""
        with sharding.whole(source, cast=False):
            sharding.load_weights(self.accelerator, model, source.state_dict(), part)

    # ---- sharing work ----
    @names_flag_when_out_of_memory("per_device_eval_batch_size")
    def map_rows(self, n: int, work: Callable[[list[int]], list]) -> list:
        """work(indices) -> results on each rank's share of range(n), gathered in order on all ranks."""
        from accelerate.utils import gather_object

        mine = list(range(self.rank, n, self.world))
        results = list(zip(mine, work(mine), strict=True))
        if self.world > 1:
            results = gather_object(results)
        return [r for _, r in sorted(results, key=lambda pair: pair[0])]

    def score_batches(self, sequences: list[tuple], score: Callable, advance=lambda n: None) -> list:
        """score(batch) -> a result per row, on this rank, over length-sorted batches of [(prompt ids, response ids)].

        Without gradient; results in the order of `sequences`.
        """
        order = sorted(range(len(sequences)), key=lambda i: -sum(map(len, sequences[i])))
        size, out = self.args.per_device_eval_batch_size, [None] * len(sequences)
        with torch.no_grad():
            for i in range(0, len(order), size):
                part = order[i : i + size]
                batch = collate([sequences[j] for j in part], pad_token_id=0)  # the id is never read
                for j, result in zip(part, score(batch.to(self.accelerator.device)), strict=True):
                    out[j] = result
                advance(len(part))
        return out

    def map_sequences(self, sequences: list[tuple], score: Callable, advance=lambda n: None) -> list:
        """score_batches shared over ranks, gathered in order on all of them."""
        shared = self.shared(advance)
        return self.map_rows(
            len(sequences), lambda mine: self.score_batches([sequences[i] for i in mine], score, shared)
        )

    def cached(self, path: Path, keys: list[str], work: Callable, name: str, block: int = 4096) -> list:
        """A value per key: from the Parquet file, else by work(indices, advance) in all ranks together.

        The file is written after every block, so that a run cut off loses one block.
        """
        from accelerate.utils import broadcast_object_list

        stored = {r["key"]: r["value"] for r in read_pairs(path)} if self.is_main and path.exists() else {}
        (known,) = broadcast_object_list([stored])
        missing = [i for i, key in enumerate(keys) if key not in known]
        with self.phase(name, len(missing), step=0) as advance:
            for start in range(0, len(missing), block):
                part = missing[start : start + block]
                known |= dict(zip((keys[i] for i in part), work(part, advance), strict=True))
                if self.is_main:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_pairs(path, [{"key": k, "value": v} for k, v in known.items()])
        return [known[key] for key in keys]

    def stored(self, path: Path, make: Callable[[], list[dict]], since: int | None = None) -> list[dict]:
        """Rows of a Parquet file of this run; if it is not there, made by make() in all ranks together and written by rank 0.

        since: optimizer step from which the run trains on them. UserError if it is past that step and the file is gone.
        """
        if not path.exists():
            if since is not None and self.position["step"] > since:
                raise UserError(f"--resume: found no {path}, expected the rows that the run was already training on")
            rows = make()
            if self.is_main:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_pairs(path, rows)
            self.accelerator.wait_for_everyone()
        return read_pairs(path)

    def shared(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Progress of work that all ranks share, from this rank's part of it."""
        return lambda n: advance(n * self.world)

    def batches(self, n: int, *key: int) -> list[list[int]]:
        """Global batches of one epoch over range(n), in the order of (seed, key); the last one may be smaller."""
        order = data_order(n, self.args.seed, *key)
        return [order[i : i + self.args.batch_size] for i in range(0, n, self.args.batch_size)]

    def epochs(self, n: int, epochs: int, *key: int) -> list[list[int]]:
        """Global batches of several epochs over range(n), each in an order of its own."""
        return [batch for e in range(epochs) for batch in self.batches(n, *key, e)]

    def prompt_batches(self, n: int, total: int, *key: int) -> list[list[int]]:
        """Batches of --rollout-batch-size over `total` draws from range(n): every index once before any comes again.

        Each pass over range(n) has an order of its own. The last batch may be smaller.
        """
        order = [i for e in range(math.ceil(total / n)) for i in data_order(n, self.args.seed, *key, e)][:total]
        return [order[i : i + self.args.rollout_batch_size] for i in range(0, total, self.args.rollout_batch_size)]

    @names_flag_when_out_of_memory("per_device_train_batch_size")
    def step(
        self, model, optimizer, rows: list, loss_fn: Callable, length: Callable, lr: float | tuple[float, ...],
        rate: str = "learning_rate",
    ) -> dict[str, float]:  # fmt: skip
        """One optimizer step on `rows`, the global batch; the same on any number of devices and micro-batches.

        loss_fn(rows) -> (losses (b,), {name: (sum, count)}); the objective is the mean of all losses of the global batch.
        lr is this step's learning rate, or one for each part that make_optimizer was given: a part rests at 0, its weights
        keep their bytes, weight decay or not. `rate` is the name of the flag it comes from.
        Rows are sorted by length so that a micro-batch holds similar ones. Raises UserError on a loss that is not finite.
        """
        micro = self.args.per_device_train_batch_size
        ordered = sorted(rows, key=length, reverse=True)
        mine = ordered[self.rank :: self.world]
        # as many micro-batches on every rank: one that has run out takes part in the collectives with weight 0
        most = math.ceil(math.ceil(len(rows) / self.world) / micro)
        parts = [(mine[i * micro : (i + 1) * micro] or ordered[:1], float(i * micro < len(mine))) for i in range(most)]
        weight = self.world / len(rows)  # gradients are averaged over ranks
        rates = lr if isinstance(lr, tuple) else (lr,) * len(optimizer.param_groups)
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = own * bias_correction(optimizer)
        names: list[str] = []
        totals: Any = 0.0
        fresh = not optimizer.state
        for i, (part, share) in enumerate(parts):
            last = i == most - 1
            with contextlib.nullcontext() if last or self.engine != "plain" else self.accelerator.no_sync(model):
                losses, stats = loss_fn(part)
                sharding.backward(self.accelerator, model, losses.sum() * (weight * share), last)
            stats = {"loss": (losses.detach().sum(), losses.new_tensor(len(part))), **stats}
            names = list(stats)
            totals = totals + share * torch.stack([torch.stack([s.double(), c.double()]) for s, c in stats.values()])
        totals = self.accelerator.reduce(totals, reduction="sum")
        row = {name: (s / c).item() for name, (s, c) in zip(names, totals, strict=True) if c > 0}
        row["grad_norm"] = sharding.clip(self.accelerator, model, self.args.max_grad_norm)
        row["learning_rate"] = max(rates)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise self._diverged(row, rows, rate, fresh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.probe = model, loss_fn, parts[0][0], rate
        return row

    def _diverged(self, row: dict[str, float], rows: list[dict], rate: str, fresh: bool) -> UserError:
        """Why an update's loss is not finite, as far as it can be known. fresh: its optimizer has not moved a weight yet."""
        found = f"found loss {row['loss']}, gradient norm {row['grad_norm']}, expected finite numbers"
        if bad := next(((k, v) for r in rows for k, v in r.items() if has_nan(v)), None):
            values = bad[1] if isinstance(bad[1], list) else [bad[1]]
            value = next(v for v in values if not math.isfinite(v))
            return UserError(f"{found}: a row of this update holds {bad[0]} {value}, which was computed before it")
        if fresh:
            numbers = [(f.name, getattr(self.args, f.name)) for f in dataclasses.fields(self.args)]
            large = [f"{flag(n)} {v:g}" for n, v in numbers if isinstance(v, float) and not abs(v) < 1e6]
            where = f"look at {', '.join(large)}" if large else "look at the model, its --dtype, and the data"
            return UserError(
                f"first update: {found}; it has moved no weight yet, so {flag(rate)} is not the cause: {where}"
            )
        return UserError(
            f"training diverged: {found}; nothing of this update was kept."
            f" Lower {flag(rate)}; last good checkpoint: {self.last_checkpoint() or 'none yet'}"
        )

    def refuse_diverged(self) -> None:
        """UserError, on all ranks, unless what is about to be saved is of use: all weights of the prepared models are finite
        numbers, and so is the loss of rows of the last update now that it is made. Weights of 1e30 are finite."""
        names = [name for m in self.accelerator._models if (name := sharding.not_finite(m))]
        loss, rate = 0.0, "learning_rate"
        if self.probe is not None:
            *probe, rate = self.probe
            loss = sharding.probe(*probe)
        bad = torch.tensor([float(bool(names)), float(not math.isfinite(loss))], device=self.accelerator.device)
        bad = self.accelerator.reduce(bad, reduction="sum").tolist()
        if any(bad):
            where = f"weights that are not finite ({names[0] if names else 'on another rank'})" if bad[0] else ""
            where = where or f"loss {loss if not math.isfinite(loss) else math.nan} after the last update"
            raise UserError(
                f"training diverged: found {where}, expected finite numbers; they were not saved."
                f" Lower {flag(rate)}; last good checkpoint: {self.last_checkpoint() or 'none yet'}"
            )
        self.probe = None

    # ---- checkpoints ----
    def last_checkpoint(self) -> Path | None:
        found = sorted(p for p in (self.dir / "checkpoint").iterdir() if not p.name.startswith("."))
        return found[-1] if found else None

    def save_checkpoint(self) -> None:
        """Models, optimizers, RNG and position under checkpoint/<iteration>_<step>; the two newest are kept.

        With LoRA, of a frozen base only what is no longer as it was loaded: of --model itself, nothing.

        Everything is written to a temporary folder, listed with its SHA-256, synced, then renamed: a reader sees a whole
        checkpoint or none. A failed write leaves the earlier ones as they were and raises UserError.
        """
        folder, position = self.dir / "checkpoint", self.position
        if self.saved == str(position):
            return
        self.refuse_diverged()
        final = folder / f"{position['outer_iteration']:04d}_{position['step']:08d}"
        partial = folder / f".partial_{final.name}"
        error = None
        try:
            if self.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            fresh = sharding.save_state(self.accelerator, str(partial))
        except Exception as e:  # any failure to write: disk full, quota, permissions, a library's own wrapper of these
            error = e
            if self.engine != "plain":  # the others may wait in the midst of the library's own collectives
                raise self._not_written(e) from e
        failed = self.accelerator.reduce(torch.tensor(float(error is not None), device=self.accelerator.device)).item()
        if self.is_main and not failed:
            try:
                metrics = self.dir / "metrics.jsonl"
                size = metrics.stat().st_size if metrics.exists() else 0
                made_by = {"engine": self.engine, "processes": self.world, "fresh_optimizers": fresh}
                write_json(partial / "position.json", {**position, "metrics_bytes": size, **made_by})
                seal(partial)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                sync_path(folder)
                for old in sorted(p for p in folder.iterdir() if not p.name.startswith("."))[:-2]:
                    shutil.rmtree(old)
            except OSError as e:
                error = e
        if self.is_main and (failed or error):
            shutil.rmtree(partial, ignore_errors=True)
        failed = self.accelerator.reduce(torch.tensor(float(error is not None), device=self.accelerator.device)).item()
        if failed:
            raise self._not_written(error)
        self.saved = str(position)

    def _not_written(self, error: Exception | None) -> UserError:
        return UserError(
            f"checkpoint could not be written to {self.dir / 'checkpoint'} ({error or 'on another rank'});"
            f" last good checkpoint: {self.last_checkpoint() or 'none yet'}; free space, then --resume {self.dir}"
        )

    def load_checkpoint(self) -> dict | None:
        """With --resume, load the newest checkpoint that is whole; name and skip those that are not. Returns its position.

        The run goes on from there, and metrics.jsonl is cut back to it. None if there is nothing to resume. UserError if
        checkpoints exist and none is whole, or if the newest one was made by another engine, or by ZeRO on another number of
        processes: its optimizer state is cut up for that number.
        """
        if not self.args.resume:
            return None
        self.accelerator.wait_for_everyone()
        found = sorted((p for p in (self.dir / "checkpoint").iterdir() if not p.name.startswith(".")), reverse=True)
        for path in found:
            if problem := broken_seal(path):
                self.say(f"checkpoint {path.name} is damaged ({problem}); trying the one before it")
                continue
            position = json.loads((path / "position.json").read_text())
            size = position.pop("metrics_bytes")
            made_by = position.pop("engine", "plain"), position.pop("processes", self.world)
            fresh = position.pop("fresh_optimizers", [])
            if made_by[0] != self.engine or (self.engine.startswith("zero") and made_by[1] != self.world):
                raise UserError(
                    f"--resume: found {path.name} of {made_by[0]} on {made_by[1]} process(es), but this is {self.engine} on"
                    f" {self.world}; expected the same engine, and with ZeRO the same --num_processes"
                )
            # an adapter-only checkpoint lacks weights that are loaded already; engines keep all of them
            known = {"strict": False} if self.args.lora_r and self.engine == "plain" else {}
            try:
                sharding.load_state(self.accelerator, str(path), fresh, **known)
            except ValueError as error:  # optimizers with other groups of parameters
                raise UserError(
                    f"--resume: found {path.name}, which another version wrote ({error}); expected a checkpoint of this one"
                ) from error
            metrics = self.dir / "metrics.jsonl"
            if self.is_main and metrics.exists():
                if metrics.stat().st_size < size:
                    raise UserError(
                        f"--resume: found {metrics} of {metrics.stat().st_size} bytes, expected {size} at {path.name}: rows are"
                        " lost; put it back, or delete it to go on without them"
                    )
                os.truncate(metrics, size)
            self.say(f"resumed from {path}")
            self.position, self.saved, self.last_step = position, str(position), position["step"]
            return position
        if found:
            raise UserError(f"--resume: none of the {len(found)} checkpoints in {self.dir / 'checkpoint'} is whole")
        if self.is_main:
            (self.dir / "metrics.jsonl").unlink(missing_ok=True)
        return None

    def model_card(self, method: str, paper: str, note: str = "", base: str = "", measure: str = "eval/nll") -> str:
        """README.md of a saved model: front matter, how it was made, a note of its own, the last row that holds `measure`.

        base: the model it was made from, if that is not --model. Without such a row there is no table.
        """
        args = self.args
        last: dict = next((r for r in reversed(self.logged()) if measure in r), {}) if self.is_main else {}
        measured = "".join(
            f"| {k} | {v:.4g} | {meaning} |\n"
            for k, v in last.items()
            if (meaning := self.metrics.get(k, "").replace("|", "\\|"))
        )
        table = f"| held-out measure | value | meaning |\n|---|---|---|\n{measured}" if measured else ""
        base = base or args.model
        lora = f", LoRA r = {args.lora_r} merged" if args.lora_r else ""
        data = [d for d in dict.fromkeys((args.dataset, getattr(args, "preference_dataset", "none"))) if d != "none"]
        listed, named = "\n- ".join(data), " and ".join(f"`{name}`" for name in data)
        return (
            f"---\nlibrary_name: transformers\nbase_model: {base}\ndatasets:\n- {listed}\n"
            f"tags:\n- cleanirl\n- {self.script}\n---\n\n# {base} after {method}\n\n"
            f"Trained with `{self.script}.py` of CleanIRL ({paper}) on {named}{lora}.\n\n{note}"
            f"```\n{' '.join(['python', *sys.argv])}\n```\n\nAll settings: `args.json` of the run.\n\n{table}"
        )

    @leaves_nothing_half_written
    def save_final(self, model, tokenizer, card: str, name: str = "final", part: str = "") -> Path:
        """<name>/: weights (safetensors), tokenizer and model card, loadable with from_pretrained.

        part: attribute path of the model to save inside a prepared module that holds several, such as "policy".
        """
        self.accelerator.wait_for_everyone()
        self.refuse_diverged()
        path, partial = self.dir / name, self.dir / f".partial_{name}"
        model = self.unwrap(model)  # with its mixed precision: training may go on
        model = model.get_submodule(part) if part else model
        with sharding.whole(model, cast=False):
            if self.is_main:
                if self.args.lora_r:
                    from extras.adapters import merged

                    model = merged(self.args, model)
                shutil.rmtree(partial, ignore_errors=True)
                stop_at_end_of_turn(model, tokenizer)
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                (partial / "README.md").write_text(card)
                seal(partial)
                shutil.rmtree(path, ignore_errors=True)
                os.replace(partial, path)
        self.accelerator.wait_for_everyone()
        return path

    def rename(self, name: str, new: str) -> Path:
        """Give what save_final has saved another name, on all ranks together."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            shutil.rmtree(self.dir / new, ignore_errors=True)
            os.replace(self.dir / name, self.dir / new)
        self.accelerator.wait_for_everyone()
        return self.dir / new

    def end(self) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def has_nan(value) -> bool:
    """True if a number, or one of a list of numbers, is not finite."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(v, float) and not math.isfinite(v) for v in values)
