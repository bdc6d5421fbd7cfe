"""Small models, tokenizers and data made locally, and a way to run a script as a user would."""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import fork_server
import pytest
import torch

ROOT = Path(__file__).parent.parent


def make_tokenizer(vocab_size: int = 300, chat_template: str | None = None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["return the number of items in the list", "open the file and read it"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")  # pad = eos
    tokenizer.chat_template = chat_template
    return tokenizer


ZEPHYR_TEMPLATE = (  # the shape of zephyr's template: role tags, EOS after every turn
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def make_model(folder: Path, architecture: str = "gpt_neox", tokenizer=None, window: int = 128, **overrides) -> Path:
    """A random model of a real architecture with its tokenizer, written by save_pretrained."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    eos = tokenizer.eos_token_id
    shared = dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=window, bos_token_id=eos, eos_token_id=eos, pad_token_id=eos,
    ) | overrides  # fmt: skip
    if architecture == "mistral":
        shape = dict(num_key_value_heads=2, head_dim=8, sliding_window=None)
        model = MistralForCausalLM(MistralConfig(**shape | shared))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shared))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def slow_unless(quick, values) -> list:
    """Parameters of a test: those of `values` that the function `quick` is not true of have the marker slow."""
    return [value if quick(value) else pytest.param(value, marks=pytest.mark.slow) for value in values]


def chosen(request, name: str) -> list:
    """Values of a parameter that the tests to be run of this module have: what a fixture for all of them has to make."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return list(dict.fromkeys(item.callspec.params[name] for item in items if name in item.callspec.params))


class OnDemand(dict):
    """A dictionary whose values are made by a function of the key when they are first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


class LookUp(torch.nn.Module):
    """A policy whose hidden states are given, (B, L, H) or what expands to it, with the language-model head `head`."""

    def __init__(self, hidden: torch.Tensor, head: torch.nn.Module):
        super().__init__()
        self.hidden, self.head = hidden, head
        width = head.out_features if isinstance(head, torch.nn.Linear) else hidden.shape[-1]
        self.config = SimpleNamespace(vocab_size=width)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.hidden.expand(*input_ids.shape, -1)))


def make_classifier(folder: Path, source: Path, labels: int = 1, seed: int = 3) -> Path:
    """A classifier on the backbone of a causal model, as a reward model somebody trained; its scores differ widely."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    classifier = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
    torch.nn.init.normal_(classifier.score.weight)
    classifier.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tldr_rows(n: int) -> list[dict]:
    """n posts of one to three lines with their summaries, as in TL;DR."""
    words = "return the number of items in list open file and read it".split()
    rows = []
    for i in range(n):
        lines = [" ".join(words[(i + j + k) % len(words)] for k in range(4)) for j in range(1 + i % 3)]
        row = {"subreddit": "x", "title": f"t{i}", "post": "\n".join(lines)}
        rows.append({**row, "summary": " ".join(words[i % 7 : i % 7 + 3])})
    return rows


def make_data(path: Path, n: int = 24, preference: bool = False) -> Path:
    """n prompt/completion (or prompt/chosen/rejected) rows of uneven length, as JSONL."""
    words = "return the number of items in list open file and read it".split()
    rows = []
    for i in range(n):
        text = " ".join(words[(i * 3 + j) % len(words)] for j in range(2 + i % 5))
        row = {"prompt": f"say {i}: " + text, "completion": text + "."}
        if preference:
            row = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no " * (1 + i % 4)}
        rows.append(row)
    jsonl(path, rows)
    return path


def assert_phases_as_planned(out: Path, n: int, m: int = 0) -> None:
    """A finished run's phases and items are those that its line counted from the start; the others were inside these.

    n, m: rows that it trained on, demonstrations and preferences or prompts.
    """
    from extras import schedule

    stored = json.loads((out / "args.json").read_text())
    cls = importlib.import_module(stored["script"]).Args
    args = SimpleNamespace(**stored["args"], scalar_models=cls.scalar_models)
    rows = [[{"prompt_ids": [1], "response_ids": [1]}] * count for count in (n, m)]
    planned = [(p.name, p.items) for p in schedule.of_run(stored["script"], args, *rows).planned]
    kinds = {schedule.kind(name) for name, _ in planned}
    timed = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    found = [(row["phase"], row["items"]) for row in timed if schedule.kind(row["phase"]) in kinds]
    assert [name for name, _ in found] == [name for name, _ in planned]
    measured = ("evaluation", "reward 0", "reward 1", "reward 2", "reference on held-out", "judge")
    for (name, items), (_, expected) in zip(
        found, planned, strict=True
    ):  # there may be fewer held-out rows than asked for
        assert items == expected or (items < expected and name.startswith(measured)), (name, items, expected)
    inside = {"evaluation #", "judge #"}  # the policy step
    before = {"gold scores of demonstrations", "expert's answers", "baseline on held-out rows"}
    assert {schedule.kind(row["phase"]) for row in timed} - kinds <= inside | before


def command(script: str, model: Path, data: Path, out: Path, *flags: str) -> list[str]:
    """A run of a script small enough for a test, in float32 on any CPU unless the flags say --mixed-precision bf16."""
    small = "--max-length 96 --max-new-tokens 8 --max-prompt-length 64 --batch-size 4 --per-device-train-batch-size 2"
    small += " --per-device-eval-batch-size 8 --learning-rate 1e-3 --eval-samples 4 --save-steps 2 --max-samples 0"
    small += " --mixed-precision no"
    words = [sys.executable, script, "--model", str(model), "--dataset", str(data), "--eval-dataset", str(data)]
    words += ["--output-dir", str(out), *small.split()]
    names = {f for f in flags if f.startswith("--")}
    kept = []
    skip = False
    for i, word in enumerate(words):  # a flag given by the test replaces the default one
        if skip:
            skip = False
        elif word in names and i > 1:
            skip = True
        else:
            kept.append(word)
    return [*kept, *flags]


class ForkServer:
    """The process of fork_server.py that this test process starts scripts from; made at its first use."""

    def __init__(self):
        self.process, self.env, self.lock = None, {}, threading.Lock()

    def can_run(self, words: list[str], env: dict[str, str]) -> bool:
        """True for `python script.py ...` in an environment like that of the server."""
        if words[0] != sys.executable or not str(words[1]).endswith(".py"):
            return False
        with self.lock:
            if self.process is None:
                self.env = fork_server.at_import(env)
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                start = [sys.executable, fork_server.__file__]
                self.process = subprocess.Popen(start, **pipes, text=True, bufsize=1, env=env)
        return fork_server.at_import(env) == self.env

    def start(self, words: list[str], cwd: Path, env: dict[str, str], ranks: int = 0) -> "Forked":
        """Start the command, one at a time. With ranks above 0 it runs on so many processes, as under torchrun."""
        self.lock.acquire()
        return Forked(self, [str(word) for word in words], cwd, env, ranks)


class Forked:
    """A script in a process forked from SERVER, its output captured; as a context it is killed at the end if it still runs."""

    def __init__(self, server: ForkServer, words: list[str], cwd: Path, env: dict[str, str], ranks: int):
        self.server, self.words, self.ranks = server, words, ranks
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for path in self.outputs:
            path.touch()
        request = {"argv": words[1:], "cwd": str(cwd), "env": env, "ranks": ranks}
        request |= {path.name: str(path) for path in self.outputs}
        server.process.stdin.write(json.dumps(request) + "\n")
        self.pid, self.finished = int(server.process.stdout.readline()), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.finished:
            with contextlib.suppress(ProcessLookupError):
                self.send_signal(signal.SIGKILL)
            self.wait(60)

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """What subprocess.run gives. TimeoutExpired after `timeout` seconds."""
        killed = []

        def kill() -> None:
            killed.append(self.pid)
            os.killpg(self.pid, signal.SIGKILL) if self.ranks else os.kill(self.pid, signal.SIGKILL)

        late = threading.Timer(timeout, kill)
        late.start()
        status = int(self.server.process.stdout.readline())
        late.cancel()
        self.finished = True
        self.server.lock.release()
        texts = [path.read_text(errors="replace") for path in self.outputs]
        self.folder.cleanup()
        if killed:
            raise subprocess.TimeoutExpired(self.words, timeout, *texts)
        return subprocess.CompletedProcess(self.words, status, *texts)


SERVER = ForkServer()


def child_environment(**env: str) -> dict[str, str]:
    """Variables of a process that a test starts: offline, one thread; NATIVE_BF16 is heard (tests/native_bf16)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.update({"PYTHONPATH": str(ROOT), **env})
    folders = [environment["PYTHONPATH"], str(ROOT / "tests" / "native_bf16")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def run(words: list[str], cwd: Path = ROOT, check: bool = True, timeout: float = 240, ranks: int = 0, **env: str):
    """Run a command offline with one thread; returns the finished process. Python scripts are forked from SERVER.

    ranks: run the script on so many processes of the CPU, as torchrun does, but without its seconds of imports.
    """
    environment = child_environment(**({"ACCELERATE_USE_CPU": "true"} if ranks else {}), **env)
    if SERVER.can_run(words, environment):
        done = SERVER.start(words, cwd, environment, ranks).wait(timeout)
    else:
        assert not ranks, "ranks are forked from SERVER, whose environment is another"
        done = subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def commands(folder: Path, script: str, *words: str, **env: str) -> list[str]:
    """The words of every python command of a shell script. A stand-in for python makes their --output-dir."""
    stand_in = folder / "stand_in" / "python"
    stand_in.parent.mkdir()
    each = 'for word; do [ "$before" != --output-dir ] || mkdir -p "$word"; before=$word; done'
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {folder}/said\n{each}\n')
    stand_in.chmod(0o755)
    run(["bash", script, *words], **env, PATH=f"{stand_in.parent}:{os.environ['PATH']}")
    return (folder / "said").read_text().splitlines()


def start(words: list[str], cwd: Path = ROOT, **env: str) -> Forked:
    """Start a script as run does, to send it signals and wait for it."""
    environment = child_environment(**env)
    assert SERVER.can_run(words, environment), words
    return SERVER.start(words, cwd, environment)


def launcher(name: str) -> str:
    """accelerate or torchrun of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(one: Path, other: Path, rel: float = 5e-3, abs_: float = 5e-4) -> None:
    """Of two runs, but for rounding, which alone decides who wins as long as policy and reference coincide."""
    for x, y in zip(metrics(one), metrics(other), strict=True):
        for kind in ("rewards", "demonstrations"):
            if abs(x.get(f"{kind}/margins", 1.0)) < 1e-6:
                del x[f"{kind}/accuracies"], y[f"{kind}/accuracies"]
        assert x == pytest.approx(y, rel=rel, abs=abs_)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "final" / "model.safetensors")


def drive(
    scenarios: list[dict], cwd: Path = ROOT, config: str = "", processes: int = 2, ranks: int = 0, **env: str
) -> tuple[list[int], str]:
    """(exit statuses, what the children printed) of scenarios for kill_at.py.

    config: a file of configs/, to launch `processes` processes with; ranks: processes that are forked instead.
    """
    start = launch(config, processes) if config else [sys.executable]
    words = [*start, str(ROOT / "tests" / "kill_at.py"), json.dumps(scenarios)]
    done = run(words, cwd=cwd, timeout=2400, ranks=ranks, **env)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("[")][-1]), done.stderr


def launch(config: str, processes: int = 2) -> list[str]:
    """accelerate's command with a file of configs/."""
    start = [launcher("accelerate"), "launch", "--config_file", str(ROOT / "configs" / config)]
    return [*start, "--num_processes", str(processes)]


@contextlib.contextmanager
def transformers_server(model: Path, log: Path):
    """The address of `transformers serve` with a model, on a free port of this machine, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = ["serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    with open(log, "w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words],
            stdout=out,
            stderr=out,
            env=child_environment(),
        )
    try:
        deadline = time.time() + 900
        while True:
            assert server.poll() is None and time.time() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)


def assert_data_can_be_given_back(folder: Path, end: int) -> None:
    """A run's pairs say which answers were cut, and are read again so. The prompts it trained on are on record."""
    from common.store import read_pairs
    from extras.records import TRAINED
    from extras.sources import load_rows

    pairs = read_pairs(folder / "generations" / "iter_0.parquet")
    assert [p["finished"] for p in pairs] == [p["rejected_ids"][-1] == end for p in pairs] and pairs
    again = load_rows(str(folder / "generations" / "iter_0.parquet"), "all")
    ended = {row["row"]: row.get("rejected_finished", True) for row in again}  # rows without text are left out
    assert ended and all(pairs[i]["finished"] == done for i, done in ended.items())
    assert len(read_pairs(folder / TRAINED)) >= len(
        pairs
    )  # keys of each prompt's text, and of what the model saw of it
