"""The model card of a saved model: README.md with front matter for the hub."""

import contextlib
import json
import shlex
import sys
from pathlib import Path

import tiny
from common import UserError
from common.data import render_prompt
from extras.hub_names import hub_name
from extras.loading import is_path, resolve_model
from extras.mixture import names_of
from extras.sources import looks_like_path

QUESTION = "What is two plus two?"


def model_card(run, method: str, paper: str, note: str, base: str, measure: str) -> str:
    """Text of the card: front matter, how the model was made, a note of its own, the last row that holds `measure`.

    base: the model it was made from; empty: --model. Without such a row there is no table. save_model adds how to use it.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    args = run.args
    base = base or args.model
    given = dict.fromkeys((args.dataset, getattr(args, "preference_dataset", "none")))
    data = [name for value in given if value != "none" for name in names_of(value)]
    last: dict = next((r for r in reversed(run.logged()) if measure in r), {}) if run.is_main else {}
    values = {k: v for k, v in last.items() if run.metrics.get(k) and v is not None}
    hub, licence = base_of(base)
    results = [
        EvalResult("text-generation", "held-out", f"held-out rows of {', '.join(data)}", k, round(v, 6))
        for k, v in values.items()
    ]
    matter = ModelCardData(
        library_name="transformers", tags=["cleanirl", run.script], license=licence or None, base_model=hub or None,
        datasets=[hub_name(name).id for name in data if is_hub_set(name)] or None,
        model_name=f"{hub or Path(base).name} after {method}" if results else None, eval_results=results or None,
    )  # fmt: skip
    measured = "".join(
        "| {} | {:.4g} | {} |\n".format(k, v, run.metrics[k].replace("|", "\\|")) for k, v in values.items()
    )
    table = f"| held-out measure | value | meaning |\n|---|---|---|\n{measured}" if measured else ""
    named = " and ".join(f"`{name}`" for name in data)
    lora = f", LoRA r = {args.lora_r} merged" if args.lora_r else ""
    terms = f"that of the base model ({licence})" if licence else "that of the base model and of the data"
    card = ModelCard(
        f"---\n{matter.to_yaml()}\n---\n\n# {base} after {method}\n\n"
        f"Trained with `{run.script}.py` of CleanIRL ({paper}) on {named}{lora}. Base model: `{hub or base}`."
        f" Licence: {terms}.\n\n"
        f"{note}```\n{shlex.join(['python', *sys.argv])}\n```\n\nAll settings: `args.json` of the run.\n\n{table}"
    )
    return str(card)


def is_hub_set(name: str) -> bool:
    return not (name == "pydoc" or looks_like_path(name) or Path(name).exists())


def base_of(name: str) -> tuple[str, str]:
    """(hub id, licence) of the model that a model was made from, over all runs in between; empty texts where they are unknown.

    A folder says it by the card that lies in it, else by args.json of its run; a hub id by its card in the hub's cache.
    """
    folder = Path(name)
    if tiny.is_tiny(name):
        return "", ""
    if not folder.is_dir():
        hub = resolve_model(name)
        return ("", "") if is_path(hub) else (hub, front_matter(cached_card(hub)).get("license", ""))
    card = front_matter(str(folder / "README.md"))
    hub, licence = card.get("base_model", ""), card.get("license", "")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not the folder of a run
        before = json.loads((folder.parent / "args.json").read_text())["args"]["model"]
        if not hub and before != name:
            hub, licence = base_of(before)
    return (hub if isinstance(hub, str) else ""), (licence if isinstance(licence, str) else "")


def cached_card(hub: str) -> str:
    """Path of a hub model's card in the cache on this machine; empty if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        found = try_to_load_from_cache(hub, "README.md")
        return found if isinstance(found, str) else ""
    return ""


def front_matter(path: str) -> dict:
    """What stands at the beginning of the card in a file; empty if there is no card, or none that can be read."""
    try:
        return yaml_of(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}


def yaml_of(text: str) -> dict:
    """What stands between the two --- at the beginning of a card."""
    import yaml

    try:
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def write_card(folder: Path, path: Path, card: str, tokenizer, model) -> None:
    """README.md of a model in `folder`, which is about to get the name `path`: the card, the prompt's format, how to use it."""
    reward = type(model).__name__.endswith("ForSequenceClassification")
    try:
        prompt = render_prompt(tokenizer, QUESTION)
    except UserError:  # the template wants another conversation
        prompt = ""
    written = (
        f"The tokenizer's chat template makes this prompt of the question {QUESTION!r}:\n\n````\n{prompt}\n````\n\n"
    )
    usage = REWARD_USAGE if reward else POLICY_USAGE
    (folder / "README.md").write_text(
        f"{card.rstrip()}\n\n## Prompt\n\n{written if prompt else ''}{usage.format(path=path, question=QUESTION)}"
    )


POLICY_USAGE = """The model was trained on prompts of this form. `apply_chat_template` and chat servers send the same tokens.

## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", model="{path}")
print(chat([{{"role": "user", "content": "{question}"}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```

As a server with OpenAI's chat API, at http://localhost:8000/v1, by vLLM or by transformers:

```bash
vllm serve {path} --port 8000
transformers serve {path} --port 8000
```
"""
REWARD_USAGE = """The model was trained on prompts of this form, each followed by a response and its end.

## Use

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForSequenceClassification.from_pretrained("{path}")
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "{question}"}}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(prompt + "Four." + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    print(model(**ids).logits.item() - model.config.reward_center)
```
"""
