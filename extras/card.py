"""The model card of a saved model: README.md with front matter for the hub."""

import sys


def model_card(run, method: str, paper: str, note: str, base: str, measure: str) -> str:
    """Text of the card: front matter, how the model was made, a note of its own, the last row that holds `measure`.

    base: the model it was made from; empty: --model. Without such a row there is no table.
    """
    from huggingface_hub import ModelCard, ModelCardData

    args = run.args
    base = base or args.model
    data = [d for d in dict.fromkeys((args.dataset, getattr(args, "preference_dataset", "none"))) if d != "none"]
    matter = ModelCardData(
        library_name="transformers", base_model=base, datasets=data, tags=["cleanirl", run.script]
    ).to_yaml()
    last: dict = next((r for r in reversed(run.logged()) if measure in r), {}) if run.is_main else {}
    measured = "".join(
        f"| {k} | {v:.4g} | {meaning} |\n"
        for k, v in last.items()
        if (meaning := run.metrics.get(k, "").replace("|", "\\|"))
    )
    table = f"| held-out measure | value | meaning |\n|---|---|---|\n{measured}" if measured else ""
    named = " and ".join(f"`{name}`" for name in data)
    lora = f", LoRA r = {args.lora_r} merged" if args.lora_r else ""
    card = ModelCard(
        f"---\n{matter}\n---\n\n# {base} after {method}\n\n"
        f"Trained with `{run.script}.py` of CleanIRL ({paper}) on {named}{lora}.\n\n{note}"
        f"```\n{' '.join(['python', *sys.argv])}\n```\n\nAll settings: `args.json` of the run.\n\n{table}"
    )
    return str(card)
