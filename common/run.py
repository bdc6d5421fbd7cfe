"""One run of a script: its processes, its metrics, its loop over updates with progress, and its optimizer steps."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common import UserError, checkpoint
from common.args import BaseArgs
from common.data import collate
from common.engine import Engine, all_weights, mixes_bf16, open_engine
from common.store import read_metrics, read_pairs, without_nan, write_pairs
from common.streams import bias_correction, data_order
from extras import phases, screen, terminal
from extras.lazy import pick
from extras.out_of_memory import names_flag_when_out_of_memory
from extras.shared_prompts import same_prompts, scoring_order


class Run:
    """One run of one script: its processes, its directory, its log and its checkpoints."""

    engine: Engine
    args: Any  # of a script: BaseArgs or RunArgs, with flags of its own
    unwrapped: dict[torch.nn.Module, torch.nn.Module]  # prepared model -> its view

    def __init__(self, args: BaseArgs, script: str, metrics: dict[str, str]):
        from accelerate.utils import ProjectConfiguration, set_seed
        from transformers.utils import logging as transformers_logging

        from extras.launch import check_engine
        from extras.run_directory import open_directory

        transformers_logging.disable_progress_bar()  # ours speak for the phases
        self.args, self.script, self.metrics = args, script, metrics
        self.can_resume = any(field.name == "resume" for field in dataclasses.fields(args))
        # decided here once: args.json says it, so that a run goes on in its precision on whatever machine resumes it
        precision = args.mixed_precision = "bf16" if mixes_bf16(args) else "no"
        log_with = None if args.report_to == "none" else args.report_to
        self.dir = Path(args.resume or args.output_dir)
        project = ProjectConfiguration(logging_dir=str(self.dir))  # rank 0 settles the directory below
        self.engine = open_engine(mixed_precision=precision, log_with=log_with, project_config=project)
        self.accelerator, self.unwrapped = self.engine.accelerator, {}
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        check_engine(args, self.engine.name, self.world, script)
        if args.lora_r:
            from extras.adapters import leave_out_loaded

            self.accelerator.register_save_state_pre_hook(leave_out_loaded)
        if os.environ.get("OMP_NUM_THREADS") is None and self.accelerator.device.type == "cpu" and self.world > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.world))
        set_seed(args.seed, deterministic=args.deterministic)
        self.stop_requested, self.stop_signal = 0.0, 0  # time at which a stop was asked for, and by which signal
        self.in_updates = False  # True in a phase that changes weights
        self.probe: tuple | None = None  # model, loss_fn, rows and rate of the last update (checkpoint.refuse_diverged)
        terminal.catch(functools.partial(terminal.on_signal, self))
        open_directory(self)
        if log_with:
            from extras.trackers import open_tracker

            project.logging_dir = str(self.dir)
            open_tracker(self)
        self.position: dict = {"outer_iteration": 0, "step": 0}  # optimizer steps that are done; the loops' own counts
        self.update: dict[str, int] = {}  # the update in progress, as its row of metrics names it
        self.saved, self.last_step = "", 0  # position of the last checkpoint; step of the last row of metrics
        self.seconds: dict[str, float] = {}

    # ---- signals ----
    def stop_if_asked(self) -> None:
        """After a signal on any rank: write a checkpoint and exit on all ranks, with status 128 + its number."""
        asked = torch.tensor([float(self.stop_signal == n) for n in terminal.SIGNALS], device=self.accelerator.device)
        asked = self.accelerator.reduce(asked).tolist()
        if any(asked):
            self.save_checkpoint()
            terminal.stop(self, next(n for n, found in zip(terminal.SIGNALS, asked, strict=True) if found))

    def finished(self) -> bool:
        """True if --resume names a run that has its final model; it prints so."""
        done = bool(self.args.resume) and (self.dir / "final").is_dir()
        if done:
            self.print(f"{self.dir} is finished: its model is in {self.dir / 'final'}")
        return done

    def print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    # ---- metrics ----
    def log(self, row: dict[str, float], **axis: int) -> None:
        """Append one row to metrics.jsonl, with null for numbers that are not finite.

        Raises UserError if eval/nll is not finite, KeyError on a name that METRICS does not describe.
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
        """Log the row of the update in progress if its number is a multiple of --logging-steps.

        count: number of the update, from 1; by default its number within the phase.
        """
        screen.show(row)
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
        started, outer = time.time(), (self.in_updates, self.seconds)  # a training phase may contain an evaluation
        parts = self.seconds = {}
        self.in_updates = updates
        with screen.progress(name, total, self.is_main) as advance:
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
        save_every, before = max(1, self.args.save_steps // per_update), self.position["step"]
        with self.phase(name, len(batches), updates=True, outer_iteration=outer_iteration) as advance:
            for k, batch in enumerate([*batches, None] if evaluate else batches):
                if first + k * per_update < self.position["step"]:
                    screen.skip()
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
        phases.stop_after(self, name, self.position["step"] > before)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Wall time of a part of the current phase, summed under its name in the phase's row of timing.jsonl."""
        started, parts = time.time(), self.seconds
        yield
        parts[part] = parts.get(part, 0.0) + time.time() - started

    # ---- models ----
    def prepare(self, *objects) -> list:
        """model, optimizer, model, optimizer, ... made ready to be trained by this launch."""
        prepared, views = self.engine.prepare(self.args, *objects)
        self.unwrapped |= views
        return prepared

    def unwrap(self, model):
        """The view of a prepared model, to generate, score and save with (common/engine.py); any other model itself."""
        return self.unwrapped.get(model, model)

    def load_weights(self, model, source, part: str = "") -> None:
        """Give a prepared model, or the part of it at an attribute path, the weights of another model."""
        with all_weights(source, cast=False):
            self.engine.load_weights(model, source.state_dict(), part)

    # ---- sharing work ----
    @names_flag_when_out_of_memory("per_device_eval_batch_size")
    def map_rows(self, n: int, work: Callable[[list[int]], list], groups: list[list[int]] | None = None) -> list:
        """work(indices) -> results on each rank's share of range(n), gathered in order on all ranks.

        groups: all indices, those together that one rank must take; by default each is alone.
        """
        from extras.gather import gather_rows

        groups = groups or [[i] for i in range(n)]
        shares = [[i for group in groups[rank :: self.world] for i in group] for rank in range(self.world)]
        return gather_rows(self.accelerator, shares, work(shares[self.rank]))

    def score_batches(self, sequences: Sequence[tuple], score: Callable, advance=lambda n: None) -> list:
        """score(batch) -> a result per row, on this rank, over length-sorted batches of [(prompt ids, response ids)].

        Sequences with the same prompt stand together. Without gradient; results in the order of `sequences`.
        """
        order = scoring_order(self.args, sequences)
        size, out = self.args.per_device_eval_batch_size, [None] * len(sequences)
        with torch.no_grad():
            for i in range(0, len(order), size):
                part = order[i : i + size]
                batch = collate(rows := [sequences[j] for j in part], pad_token_id=0)  # the id is never read
                for j, result in zip(part, score(batch.to(self.accelerator.device)), strict=True):
                    out[j] = result
                screen.saw_sequences(rows)
                advance(len(part))
        return out

    def map_sequences(self, sequences: Sequence[tuple], score: Callable, advance=lambda n: None) -> list:
        """score_batches shared over ranks, gathered in order on all of them. A rank scores all sequences with one prompt."""
        shared, groups = self.shared(advance), same_prompts(self.args, sequences)
        return self.map_rows(
            len(sequences), lambda mine: self.score_batches(pick(sequences, mine), score, shared), groups
        )

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
            phases.stop_after(self, phases.answers_or_rows(path))
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
        screen.saw_rows(rows)
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
            with self.engine.part(model, last):
                losses, stats = loss_fn(part)
                self.engine.backward(model, losses.sum() * (weight * share), last)
            stats = {"loss": (losses.detach().sum(), losses.new_tensor(len(part))), **stats}
            names = list(stats)
            totals = totals + share * torch.stack([torch.stack([s.double(), c.double()]) for s, c in stats.values()])
        totals = self.accelerator.reduce(totals, reduction="sum")
        row = {name: (s / c).item() for name, (s, c) in zip(names, totals, strict=True) if c > 0}
        row["grad_norm"] = float(self.engine.clip(model, self.args.max_grad_norm))
        row["learning_rate"] = max(rates)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            from extras.divergence import explain_update

            raise explain_update(self, row, rows, rate, fresh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.probe = model, loss_fn, parts[0][0], rate
        return row

    # ---- checkpoints and saved models ----
    def save_checkpoint(self) -> None:
        """Write a checkpoint of the position, unless the last one is of it (checkpoint.save_checkpoint)."""
        checkpoint.save_checkpoint(self)

    def load_checkpoint(self) -> dict | None:
        """Go on from the newest whole checkpoint with --resume. Returns its position, or None (extras/resume.py)."""
        if not self.args.resume:
            return None
        from extras.resume import load_checkpoint

        return load_checkpoint(self)

    def save_final(self, model, tokenizer, card: str, name: str = "final", part: str = "") -> Path:
        """Save a model, or the part of it at an attribute path, to the folder `name` (checkpoint.save_model)."""
        return checkpoint.save_model(self, model, tokenizer, card, name, part)

    def rename(self, name: str, new: str) -> Path:
        """Give a model that save_final has written another name (checkpoint.rename_model)."""
        return checkpoint.rename_model(self, name, new)

    def model_card(self, method: str, paper: str, note: str = "", base: str = "", measure: str = "eval/nll") -> str:
        """Text of the README.md of a saved model (extras/card.py)."""
        from extras.card import model_card

        return model_card(self, method, paper, note, base, measure)

    def end(self) -> None:
        from extras.ending import finish

        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        finish(self)
