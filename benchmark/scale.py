"""Data at scale: memory and time of reading a data set into a run, by rows and processes, at the first start and the second.

Each process does what every script does before its model is loaded: it loads and encodes the training rows and 500 held-out
rows, and counts the prompts they share. Then it reads batches in a random order. `own` is the largest memory that belongs to
the process alone (RssAnon of Linux, sampled), with Python, torch and all libraries in it; `mapped` are the pages of files at
the end (RssFile), which all processes of a machine share and which the system takes back when it needs them. In the rows
whose start is "lists" the data lie in Python lists, as for a small source.

    python benchmark/scale.py --rows 2000 10000                      # minutes
    python benchmark/scale.py --rows 10000 100000 208000             # UltraChat's size
    python benchmark/scale.py --rows 1000000 --tokens 120 --lists 0  # a million short rows
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from extras import figures
from extras.lazy import size_of

WORDS = "the of a file list and number item return open read count value name for each line text is in".split()
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
HELD_OUT = 500
BATCH, BATCHES = 64, 100  # rows of a batch, and batches that are read after the start


@dataclass
class Args:
    rows: tuple[int, ...] = (2_000, 10_000)
    """sizes of the data set, each a case."""
    tokens: int = 1_200
    """mean tokens of a row, a third of them prompt; lengths vary by half of it to both sides."""
    processes: tuple[int, ...] = (1, 2)
    """processes that read the data at the same time."""
    lists: int = 10_000
    """sizes up to this one are measured in Python lists too."""
    output: str = "scale.png"
    """the curves."""
    child: str = ""
    """what to measure in this process; for the command's own use."""


# ---- one process ----
def read_status() -> dict[str, int]:
    """Bytes of this process by the names of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}


def measure(path: str, lists: bool) -> dict[str, float]:
    """Read the data file as a run does -> {seconds, own and mapped in MB, microseconds to read a row, tokens of a row, ...}.

    lists: in Python lists, however large it is.
    """
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, read_status()["RssAnon"])

    import tiny
    from common import demos, models
    from common.data import collate
    from extras import lazy
    from extras.records import count_shared
    from extras.sources import Source

    lazy.LARGE = sys.maxsize if lists else 0
    tokenizer = models.read_tokenizer(str(tiny.MODEL), False, "--model")
    tokenizer.chat_template = TEMPLATE
    threading.Thread(target=watch, daemon=True).start()
    lengths = dict(max_length=2048, max_prompt_length=1024, max_new_tokens=2048)
    args = SimpleNamespace(
        dataset=path,
        turns="auto",
        columns="",
        max_samples=0,
        seed=1,
        cut_demonstrations=False,
        select_top_k=0,
        eval_dataset="auto",
        **lengths,
    )
    begin = time.time()
    training = demos.load_demonstrations(args, tokenizer)
    source = Source(path, "test")
    held_out = demos.encode_subset(args, tokenizer, source, HELD_OUT, demos.EVAL_SEED, flag="--eval-dataset")
    shared = count_shared(held_out, training)
    seconds = time.time() - begin
    order = random.Random(0).sample(range(len(training)), min(BATCH * BATCHES, len(training)))
    begin, tokens = time.time(), 0
    for i in range(0, len(order), BATCH):
        rows = [training[j] for j in order[i : i + BATCH]]
        tokens += int(collate([(r["prompt_ids"], r["response_ids"]) for r in rows], 0).attention_mask.sum())
    each = (time.time() - begin) / len(order)
    done.set()
    peak = max(peak, read_status()["RssAnon"])
    return {
        "seconds": seconds, "own": peak / 1e6, "mapped": read_status()["RssFile"] / 1e6, "us": each * 1e6,
        "tokens": tokens / len(order), "training": len(training), "held_out": len(held_out), "shared": shared,
    }  # fmt: skip


# ---- all cases ----
def write_rows(path: Path, n: int, tokens: int) -> None:
    """n rows of words, a JSON object a line."""
    with open(path, "w") as f:
        for i in range(n):
            stream = random.Random(i)
            scale = stream.uniform(0.5, 1.5) * tokens * 0.95  # words, of little more than a token each
            prompt, response = (" ".join(stream.choices(WORDS, k=max(1, round(scale * s)))) for s in (1 / 3, 2 / 3))
            f.write(json.dumps({"prompt": f"{i} {prompt}", "completion": response}) + "\n")


def read_together(path: Path, cache: Path, processes: int, lists: bool) -> dict[str, float]:
    """Largest of the measurements of `processes` children that start at the same time."""
    words = [sys.executable, __file__, "--child", json.dumps([str(path), lists])]
    env = {**os.environ, "CLEANIRL_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    children = [subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    printed = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(1)  # the child has said why
    found = [json.loads(text.splitlines()[-1]) for text in printed]
    return {name: max(f[name] for f in found) for name in found[0]}


def show(case: dict) -> str:
    values = (case["rows"], f"{case['tokens']:.0f}", case["processes"], case["start"], f"{case['seconds']:.3g}")
    values += (*(f"{case[name]:.0f}" for name in ("own", "mapped", "us")), f"{case['file']:.2f}")
    return f"| {' | '.join(map(str, values))} |"


def draw(cases: list[dict], path: str) -> None:
    """Own memory and seconds over rows, a line for each kind of start."""
    fig, (axes,) = figures.subplots(1, 2, (8, 3.2))
    for ax, name, label in zip(axes, ("own", "seconds"), ("own memory of a process, MB", "start, s"), strict=True):
        for kind, color in figures.colored(dict.fromkeys((c["start"], c["processes"]) for c in cases)):
            points = [(c["rows"], c[name]) for c in cases if (c["start"], c["processes"]) == kind]
            label = f"{kind[0]}, {kind[1]} process(es)"
            figures.draw(ax, *zip(*points, strict=True), color=color, label=label)
        ax.set(xscale="log", yscale="log", xlabel="rows", ylabel=label)
    axes[0].legend(frameon=False, fontsize=7)
    figures.save(fig, Path(path))


def main(args: Args) -> None:
    if args.child:
        print(json.dumps(measure(*json.loads(args.child))))
        return
    cases: list[dict] = []
    print("| rows | tokens a row | processes | start | seconds | own, MB | mapped, MB | read a row, us | files, MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.jsonl"
            write_rows(path, rows, args.tokens)
            for processes in args.processes:
                cache = Path(folder) / f"cache{processes}"
                for start in ("first", "second", *(["lists"] if rows <= args.lists else [])):
                    found = read_together(path, cache, processes, start == "lists")
                    size = size_of(cache) / 1e6 if start != "lists" else 0.0
                    cases.append({"rows": rows, "processes": processes, "start": start, "file": size, **found})
                    print(show(cases[-1]), flush=True)
    draw(cases, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
