"""Samples in trackers: a table in each of the three, and trackio's own page, read from a server that the test starts."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest
from helpers import ROOT

from extras import trackers

ROWS = [
    {"row": i, "prompt_text": f" ask {i}\n", "response_text": f"told <{i}>|", "prompt_ids": [1], "response_ids": [2]}
    for i in range(10)
]
TEXTS = [f"said\n{i}" for i in range(10)]
COLUMNS = ["row", "prompt", "demonstration", "sample"]


def tracked(tracker) -> SimpleNamespace:
    return SimpleNamespace(position={"step": 7}, accelerator=SimpleNamespace(trackers=[tracker]))


def test_tensorboard_and_wandb_get_the_eight_prompts_as_a_table():
    seen = []
    writer = SimpleNamespace(add_text=lambda *given: seen.append(given))
    trackers.log_samples(tracked(SimpleNamespace(name="tensorboard", writer=writer)), ROWS, TEXTS, 3)
    ((tag, text, step),) = seen
    assert (tag, step) == ("samples", 7)
    head, rule, *rows = text.splitlines()
    assert head == "| row | prompt | demonstration | sample |" and rule == "| --- | --- | --- | --- |"
    assert len(rows) == 8 and rows[3] == "| 3 | ask 3 | told &lt;3>&#124; | said<br>3 |"
    table = {}
    wandb = SimpleNamespace(name="wandb", log_table=lambda name, **given: table.update({name: given}))
    trackers.log_samples(tracked(wandb), ROWS, TEXTS, 3)
    assert table["samples"]["columns"] == COLUMNS and table["samples"]["step"] == 7
    assert table["samples"]["data"][3] == [3, "ask 3", "told <3>|", "said\n3"] and len(table["samples"]["data"]) == 8


LOG = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from extras import trackers
folder, rows, texts = Path(sys.argv[1]), *json.loads(sys.argv[2])
for step in (7, 14):  # the second time as a resumed run
    accelerator = Accelerator(log_with="trackio", cpu=True)
    accelerator.init_trackers("cleanirl", init_kwargs=trackers.tracker_settings("trackio", folder))
    accelerator.log({"eval/nll": float(step)}, step=step)
    run = SimpleNamespace(position={"step": step}, accelerator=accelerator)
    trackers.log_samples(run, rows, texts, step)
    accelerator.end_training()
"""
needs_trackio = pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="trackio is not installed")


@needs_trackio
def test_trackios_page_shows_a_resumed_run_under_one_name_with_its_samples(tmp_path):
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONUNBUFFERED": "1"}
    folder = tmp_path / "my_run"
    folder.mkdir()
    words = [sys.executable, "-c", LOG, str(folder), json.dumps([ROWS, TEXTS])]
    subprocess.run(words, env=env, cwd=ROOT, check=True)
    show = "from trackio.cli import main; main()"
    words = [sys.executable, "-c", show, "show", "--project", "cleanirl"]
    server = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        found = (re.search(r"http://127\.0\.0\.1:\d+", text) for text in server.stdout)
        base = next(match[0] for match in found if match)

        def ask(name: str, **given):
            body = json.dumps({"project": "cleanirl", **given}).encode()
            request = urllib.request.Request(f"{base}/api/{name}", body, {"Content-Type": "application/json"})
            return json.loads(urllib.request.urlopen(request).read())["data"]

        assert b"Trackio" in urllib.request.urlopen(base).read()
        (run,) = ask("get_runs_for_project")
        assert run["name"] == f"my_run-{json.loads((folder / 'tracker.json').read_text())['id']}"
        logs = ask("get_logs", run=run["name"])
        assert [row["step"] for row in logs if "eval/nll" in row] == [7, 14]
        tables = [row["samples"]["_value"] for row in logs if "samples" in row]
        assert len(tables) == 2 and len(tables[0]) == 8
        assert tables[0][3] == dict(zip(COLUMNS, [3, "ask 3", "told <3>|", "said\n3"], strict=True))
    finally:
        server.terminate()
        server.wait()
