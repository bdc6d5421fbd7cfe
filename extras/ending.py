"""The end of a run: its curves, what was saved where, and what to type next."""

import shlex
from pathlib import Path

from common.args import flag

DATA = {
    "eval_dataset": "auto",
    "columns": "",
    "turns": "auto",
    "template": "auto",
}  # how the data are read: flag -> default


def finish(run) -> None:
    """Draw a finished run's curves, say what it saved and what to type next, and push it to the hub where --push-to-hub asks."""
    if not run.is_main or not any((run.dir / name).exists() for name in ("final", "final.safetensors")):
        return
    from extras.curves import draw_run

    saved = {"curves": draw_run(run), "metrics": run.dir / "metrics.jsonl"}
    samples = sorted((run.dir / "samples").glob("*.md"))
    saved |= {"samples": samples[-1]} if samples else {}
    run.print("\n".join(["saved:", *(f"  {name:<8} {path}" for name, path in saved.items())]))
    run.print("\n".join(["next:", *(f"  {command}" for command in commands(run, samples))]))
    if getattr(run.args, "push_to_hub", ""):
        from extras.hub import push

        for url in push(run.dir, run.args.push_to_hub):
            run.print(f"pushed: {url}")


def commands(run, samples: list[Path]) -> list[str]:
    """What a user types next: to see the curves and the samples, and to measure the model."""
    found = [["python", "plot.py", run.dir]]
    if samples:
        found.append(["less", samples[-1]])
    if (run.dir / "final").is_dir():
        reference = run.dir / "sft" if (run.dir / "sft").is_dir() else run.args.model
        words = ["python", "evaluate.py", "--model", run.dir / "final", "--ref-model", reference]
        words += ["--reward-model", run.dir / "reward"] if (run.dir / "reward").is_dir() else []
        own = {name: getattr(run.args, name, default) for name, default in DATA.items()}
        given = [word for name, value in own.items() if value != DATA[name] for word in (flag(name), value)]
        found.append([*words, "--dataset", run.args.dataset, *given])
    if run.args.report_to == "tensorboard":
        found.append(["tensorboard", "--logdir", run.dir])
    if run.args.report_to == "trackio":
        found.append(["trackio", "show", "--project", "cleanirl"])
    return [shlex.join(map(str, words)) for words in found]
