"""Experiment trackers: TensorBoard, trackio, wandb."""

import configparser
import contextlib
import dataclasses
import importlib.util
import json
import netrc
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from common.args import require
from common.store import write_json

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}  # their packages


def check_tracker(name: str) -> None:
    """Raise UserError unless the tracker is installed and wandb would not ask for a key. Called before models are loaded."""
    if name == "none":
        return
    installed = any(importlib.util.find_spec(package) for package in TRACKERS[name])
    require(
        installed, "report_to", f"{name}, which is not installed here", f"none, or {name} installed: pip install {name}"
    )
    require(
        name != "wandb" or wandb_can_start(), "report_to", "wandb, which has no key here",
        "none, or a key (wandb login, or the variable WANDB_API_KEY), or WANDB_MODE=offline",
    )  # fmt: skip


def wandb_can_start() -> bool:
    """True if wandb has a key, in the environment, a settings file or netrc, or is told to do without: offline, disabled."""
    home, variable = Path.home(), os.environ.get
    stored = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
        folder = Path(variable("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
        stored.read([folder / "settings", Path(variable("WANDB_DIR") or ".") / "wandb" / "settings"])
    settings = stored["default"] if "default" in stored else {}
    mode = variable("WANDB_MODE") or settings.get("mode", "online")
    if mode in ("offline", "dryrun", "disabled") or settings.get("api_key"):
        return True
    if variable("WANDB_API_KEY") or variable("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(variable("WANDB_BASE_URL") or settings.get("base_url", "https://api.wandb.ai")).netloc
    for path in [variable("NETRC")] if variable("NETRC") else [home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(path).authenticators(host):
                return True
    return False


def tracker_settings(tracker: str, folder: Path) -> dict[str, dict]:
    """init_kwargs of accelerate's init_trackers: a run under the folder's name, whose id stays in the folder for a resume."""
    path = folder / "tracker.json"
    if not path.exists():
        write_json(path, {"report_to": tracker, "id": secrets.token_hex(4)})
    kept = json.loads(path.read_text())["id"]
    name = folder.resolve().name
    return {
        "wandb": {"name": name, "id": kept, "resume": "allow"},
        "trackio": {"name": f"{name}-{kept}", "resume": "allow"},  # which knows a run by its name alone
    }


def flat_config(args) -> dict:
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in dataclasses.asdict(args).items()}


def log_samples(run, rows: list[dict], texts: list[str], iteration: int) -> None:
    """Send the answers to the prompts of samples/ to the run's tracker, a table at the run's optimizer step.

    rows: held-out. texts: an answer to each. Rank 0 calls it.
    """
    from common.evals import SHOWN

    columns = ["row", "prompt", "demonstration", "sample"]
    shown = list(zip(rows, texts, strict=True))[:SHOWN]
    table = [[row["row"], row["prompt_text"].strip(), row["response_text"], text] for row, text in shown]
    step = run.position["step"]
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text("samples", markdown(columns, table), step)
        elif tracker.name == "wandb":
            tracker.log_table("samples", columns=columns, data=table, step=step)
        else:
            import trackio

            tracker.log({"samples": trackio.Table(columns=columns, data=table)}, step=step)


def markdown(columns: list[str], table: list[list]) -> str:
    """A table as TensorBoard shows it: a cell is one line, its line breaks as HTML."""

    def cell(value) -> str:
        text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
        return "<br>".join(text.splitlines())

    rows = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def open_tracker(run) -> None:
    """Start the run's tracker, or go on with the one it had. All ranks call it together."""
    kept = tracker_settings(run.args.report_to, run.dir) if run.is_main else {}
    run.accelerator.init_trackers("cleanirl", config=flat_config(run.args), init_kwargs=kept)
