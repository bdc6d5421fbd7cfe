"""Make the embedded data and the embedded model: pydoc.parquet and model/ in this folder.

    python tiny/make.py data         # seconds: harvest the standard library of the Python that runs this
    python tiny/make.py model        # train on the data's training rows

Another version of Python gives slightly different data, and another machine slightly different weights.
"""

import ast
import sys
import sysconfig
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.data import encode
from common.streams import data_order, learning_rate_at
from extras.sources import held_out, load_rows
from tiny import DATA, MODEL  # noqa: E402

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 576,
    "max_position_embeddings": 512,
}
TRAINING = {"epochs": 1, "batch_size": 16, "learning_rate": 5e-3, "max_length": 224, "seed": 0}


# ---- the data ----
def harvest() -> list[dict]:
    """{module, test, prompt, response, next_response} of the documented functions and classes of the standard library.

    module: path of the file. test: the module is held out, with all its rows. prompt: the definition and the docstring
    after its summary, or, where there is no more, the first lines of the code. response: the summary line. next_response:
    the next other summary in the module, if there is one. Files are parsed, never imported.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    rows, seen_prompts, seen_responses = [], set(), {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if "site-packages" in parts or any(p.startswith(("test", "idle_test", "_test")) or p == "tests" for p in parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        module = "/".join(parts)
        lines, own = source.splitlines(), []
        for row in documented(tree, lines):
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
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def train_model() -> None:
    """A GPT-NeoX language model over the training rows, prompt and response alike."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rows = load_rows("pydoc", "train")
    tokenizer = train_tokenizer(rows)
    torch.manual_seed(TRAINING["seed"])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoded = encode(rows, tokenizer, TRAINING["max_length"], TRAINING["max_length"] - 32)
    texts = [torch.tensor(r["prompt_ids"] + r["response_ids"]) for r in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1, fused=True)
    size = TRAINING["batch_size"]
    total = TRAINING["epochs"] * (len(texts) // size)
    for epoch in range(TRAINING["epochs"]):
        order = data_order(len(texts), TRAINING["seed"], epoch)
        blocks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]  # similar lengths share a batch
        by_length = [sorted(block, key=lambda i: len(texts[i])) for block in blocks]
        batches = [b[i : i + size] for b in by_length for i in range(0, len(b) - size + 1, size)]
        for step, j in enumerate(data_order(len(batches), TRAINING["seed"], epoch, 1)):
            ids = torch.nn.utils.rnn.pad_sequence([texts[i] for i in batches[j]], batch_first=True, padding_value=-100)
            logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            done = min(epoch * len(batches) + step, total - 1)
            optimizer.param_groups[0]["lr"] = learning_rate_at(done, total, TRAINING["learning_rate"], 0.05)
            optimizer.step()
            optimizer.zero_grad()
    model.half().save_pretrained(
        MODEL
    )  # float16: no weight is near its limits, and it rounds eight times finer than bfloat16
    tokenizer.save_pretrained(MODEL)


if __name__ == "__main__":
    parts = sys.argv[1:] or ["data", "model"]
    if not set(parts) <= {"data", "model"}:
        sys.exit(f"found {' '.join(parts)}, expected data, model or both")
    if "data" in parts:
        write_data()
    if "model" in parts:
        train_model()
