"""Small models, tokenizers and data made locally, and a way to run a script as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def command(script: str, model: Path, data: Path, out: Path, *flags: str) -> list[str]:
    """A run of a script small enough for a test."""
    small = "--max-length 96 --max-new-tokens 8 --max-prompt-length 64 --batch-size 4 --per-device-train-batch-size 2"
    small += " --per-device-eval-batch-size 8 --learning-rate 1e-3 --eval-samples 4 --save-steps 2 --max-samples 0"
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


def run(words: list[str], cwd: Path = ROOT, check: bool = True, timeout: float = 240, **env: str):
    """Run a command offline with one thread; returns the finished process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.update({"PYTHONPATH": str(ROOT), **env})
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def launcher(name: str) -> str:
    """accelerate or torchrun of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(one: Path, other: Path) -> None:
    """Of two runs, but for rounding, which alone decides who wins as long as policy and reference coincide."""
    from pytest import approx

    for x, y in zip(metrics(one), metrics(other), strict=True):
        if abs(x.get("rewards/margins", 1.0)) < 1e-6:
            del x["rewards/accuracies"], y["rewards/accuracies"]
        assert x == approx(y, rel=5e-3, abs=5e-4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "final" / "model.safetensors")


def drive(
    scenarios: list[dict], cwd: Path = ROOT, config: str = "", processes: int = 2, **env: str
) -> tuple[list[int], str]:
    """(exit statuses, what the children printed) of scenarios for kill_at.py; config: of configs/, to launch with."""
    start = launch(config, processes) if config else [sys.executable]
    done = run([*start, str(ROOT / "tests" / "kill_at.py"), json.dumps(scenarios)], cwd=cwd, timeout=2400, **env)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("[")][-1]), done.stderr


def launch(config: str, processes: int = 2) -> list[str]:
    """accelerate's command with a file of configs/."""
    start = [launcher("accelerate"), "launch", "--config_file", str(ROOT / "configs" / config)]
    return [*start, "--num_processes", str(processes)]


def assert_data_can_be_given_back(folder: Path, end: int) -> None:
    """Of a run: its pairs say which answers were cut, and are read again so; the prompts trained on are on record."""
    from common.data import load_rows, read_pairs
    from common.evals import TRAINED

    pairs = read_pairs(folder / "generations" / "iter_0.parquet")
    assert [p["finished"] for p in pairs] == [p["rejected_ids"][-1] == end for p in pairs] and pairs
    again = load_rows(str(folder / "generations" / "iter_0.parquet"), "all")
    ended = {row["row"]: row.get("rejected_finished", True) for row in again}  # rows without text are left out
    assert ended and all(pairs[i]["finished"] == done for i, done in ended.items())
    assert len(read_pairs(folder / TRAINED)) >= len(
        pairs
    )  # keys of each prompt's text, and of what the model saw of it
