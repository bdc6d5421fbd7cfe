"""Make the embedded data and the embedded model: pydoc.parquet and model/ in this folder.

    python tiny/make.py data         # seconds: harvest the standard library of the Python that runs this
    python tiny/make.py model        # train on the data's training rows

Another version of Python gives slightly different data, and another machine slightly different weights.
"""

import ast
import copy
import itertools
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.data import encode  # noqa: E402
from common.streams import data_order  # noqa: E402
from extras.sources import held_out  # noqa: E402
from tiny import DATA, MODEL  # noqa: E402

SHAPE = {  # of a GPT-NeoX
    "vocab_size": 1024,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 768,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
TRAINING = {
    "batch_size": 16,  # rows, or half as many blocks of source code
    "max_length": 224,  # tokens of a row, and of a block
    "weight_decay": 0.1,
    "dropout": 0.1,
    "seed": 0,
    "measured_every": 150,  # updates
}
PHASES = [  # (updates, learning rate at the beginning and at the end, share of updates on source code)
    (6240, 3e-3, 3e-3, 0.5),
    (3260, 3e-3, 6.5e-4, 0.0),  # on rows alone: the development NLL rises towards its end
    (1200, 6.5e-4, 0.0, 0.5),
]


# ---- the data ----
def harvest() -> list[dict]:
    """{module, test, prompt, response, next_response} of the documented functions and classes of the standard library.

    module: path of the file. test: the module is held out, with all its rows. prompt: the definition and the docstring
    after its summary, or, where there is no more, the first lines of the code. response: the summary line. next_response:
    the next other summary in the module, if there is one. Files are parsed, never imported.
    """
    rows, seen_prompts, seen_responses = [], set(), {}
    for module, source, tree in library():
        own = []
        for row in documented(tree, source.splitlines()):
            prompt, response = row["prompt"], row["response"]
            count = seen_responses.get(response, 0)
            if prompt in seen_prompts or count >= 3 or response in prompt:
                continue
            seen_prompts.add(prompt)
            seen_responses[response] = count + 1
            own.append(row)
        for i, row in enumerate(own):
            others = (r["response"] for r in own[i + 1 :] + own[:i] if r["response"] != row["response"])
            rows.append({"module": module, "test": held_out(module), **row, "next_response": next(others, None)})
    return rows


def library() -> Iterator[tuple[str, str, ast.Module]]:
    """(path within the library, source, its tree) of every module of the standard library but the tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if "site-packages" in parts or any(p.startswith(("test", "idle_test", "_test")) or p == "tests" for p in parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield "/".join(parts), source, ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue


def documented(tree: ast.AST, lines: list[str], limit: int = 240):
    """{prompt, response} of every documented definition below a tree, methods under their class's name."""
    stack = [(tree, "")]
    while stack:
        node, owner = stack.pop()
        children = [
            c
            for c in ast.iter_child_nodes(node)
            if isinstance(c, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        ]
        inner = f"{owner}{node.name}." if isinstance(node, ast.ClassDef) else owner
        stack += [(child, inner) for child in reversed(children)]
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        summary, _, body = text.strip().partition("\n\n")
        summary = " ".join(summary.split())
        if not 8 <= len(summary) <= 160:
            continue
        if isinstance(node, ast.ClassDef):
            head = f"class {owner}{node.name}({', '.join(ast.unparse(b) for b in node.bases)})"
        else:
            head = f"def {owner}{node.name}({ast.unparse(node.args)})"
        if not body.strip():
            first = node.body[0].end_lineno
            body = "\n".join(line.strip() for line in lines[first : min(node.end_lineno, first + 8)] if line.strip())
        yield {"prompt": f"{head}\n{cut_lines(body.strip(), limit)}", "response": summary}


def cut_lines(text: str, limit: int) -> str:
    """The whole lines of text that fit in limit characters; the beginning of the first line if it alone does not."""
    if len(text) <= limit:
        return text
    return text[:limit].rpartition("\n")[0] or text[:limit]


def write_data() -> None:
    rows = harvest()
    pq.write_table(pa.Table.from_pylist(rows), DATA, compression="zstd", compression_level=19)
    print(f"{DATA}: {len(rows)} rows of Python {sys.version.split()[0]}, {sum(r['test'] for r in rows)} held out")


# ---- the model ----
def train_tokenizer(rows: list[dict]):
    """Byte-level BPE over prompts and responses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator((f"{r['prompt']}\n{r['response']}" for r in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1])


def is_development(module: str) -> bool:
    """True for a tenth of the training modules: settings were chosen by their rows, which the weights have not seen."""
    return held_out(f"development/{module}")


def source_blocks(tokenizer, rows: list[dict]) -> list[Tensor]:
    """Token ids of the source code of the training modules, in blocks of at most max_length.

    Left out, beside held-out and development modules, are those with a definition that is also a held-out prompt.
    """
    unseen = {r["prompt"] for r in rows if r["test"] or is_development(r["module"])}
    blocks, length = [], TRAINING["max_length"]
    for module, source, tree in library():
        repeats = any(r["prompt"] in unseen for r in documented(tree, source.splitlines()))
        if repeats or held_out(module) or is_development(module):
            continue
        ids = tokenizer(source, add_special_tokens=False)["input_ids"]
        blocks += [torch.tensor(ids[i : i + length]) for i in range(0, len(ids) - 32, length)]
    return blocks


def batches(texts: list[Tensor], size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches without end: `size` texts of similar length, (size, L) ids padded with -100. L is a multiple of 32."""
    for epoch in itertools.count():
        order = data_order(len(texts), seed, epoch)
        blocks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        by_length = [sorted(block, key=lambda i: len(texts[i])) for block in blocks]
        groups = [b[i : i + size] for b in by_length for i in range(0, len(b) - size + 1, size)]
        for j in data_order(len(groups), seed, epoch, 1):
            yield padded([texts[i] for i in groups[j]])


def padded(texts: list[Tensor]) -> Tensor:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=-100)
    return F.pad(ids, (0, -ids.shape[1] % 32), value=-100)


def token_nll(model, ids: Tensor) -> Tensor:
    """(B, L - 1) NLL of each token after those before it [nats], 0 where padded. Padding is on the right: no mask is needed."""
    logits = model(input_ids=ids.clamp(min=0)).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def response_nll(model, rows: list[dict]) -> tuple[float, float]:
    """NLL of encoded rows' responses after their prompts: nats per response, nats per token."""
    model.eval()
    total = count = 0
    for i in range(0, len(rows), 32):
        part = rows[i : i + 32]
        nll = token_nll(model, padded([torch.tensor(r["prompt_ids"] + r["response_ids"]) for r in part]))
        for r, own in zip(part, nll, strict=True):
            total += own[len(r["prompt_ids"]) - 1 :].sum().item()
            count += len(r["response_ids"])
    model.train()
    return total / len(rows), total / count


def train_model() -> None:
    """Train a language model on the training rows, prompt and response alike, at first with source code between them.

    Rows of development modules are only measured. The weights that are saved are those with the lowest NLL on them.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    setting, size = TRAINING, TRAINING["batch_size"]
    rows = [{"row": i, **r} for i, r in enumerate(pq.read_table(DATA).to_pylist())]
    tokenizer = train_tokenizer([r for r in rows if not r["test"]])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def encoded(part: list[dict], max_length: int) -> list[dict]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of long rows
            return encode(part, tokenizer, max_length, max_length - 32)

    train = encoded([r for r in rows if not r["test"] and not is_development(r["module"])], setting["max_length"])
    development = encoded([r for r in rows if not r["test"] and is_development(r["module"])], 256)
    held = encoded([r for r in rows if r["test"]], 256)
    from_rows = batches([torch.tensor(r["prompt_ids"] + r["response_ids"]) for r in train], size, setting["seed"])
    from_source = batches(source_blocks(tokenizer, rows), size // 2, setting["seed"] + 1)

    torch.manual_seed(setting["seed"])
    special = dict(bos_token_id=eos, eos_token_id=eos, pad_token_id=pad)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, **special, hidden_dropout=setting["dropout"]))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": setting["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    coin, step, best, kept = random.Random(setting["seed"]), 0, float("inf"), {}
    for updates, start, end, source_share in PHASES:
        for i in range(updates):
            ids = next(from_source if coin.random() < source_share else from_rows)
            with torch.autocast("cpu", torch.bfloat16):
                nll = token_nll(model, ids)
            (nll.sum() / (ids[:, 1:] >= 0).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = (start + (end - start) * i / updates) * min(1.0, step / 200)
            optimizer.step()
            optimizer.zero_grad()
            if step % setting["measured_every"] == 0:
                per_response, per_token = response_nll(model, development)
                print(
                    f"update {step}: development rows {per_response:.3f} nats per response, {per_token:.4f} per token"
                )
                if per_response < best:
                    best, kept = per_response, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)

    model.config.hidden_dropout = 0.0
    # float16 rounds eight times finer than bfloat16, and no weight comes near its limits
    model.half().save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)
    per_response, per_token = response_nll(GPTNeoXForCausalLM.from_pretrained(MODEL, dtype=torch.float32), held)
    print(f"{MODEL}: {model.num_parameters():,} weights")
    print(f"held-out rows: {per_response:.3f} nats per response, {per_token:.4f} per token")


if __name__ == "__main__":
    parts = sys.argv[1:] or ["data", "model"]
    if not set(parts) <= {"data", "model"}:
        sys.exit(f"found {' '.join(parts)}, expected data, model or both")
    if "data" in parts:
        write_data()
    if "model" in parts:
        train_model()
