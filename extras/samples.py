"""Rows and sampled answers that a run prints and sends to its tracker, as the model sees them: special tokens shown."""

import shutil
import textwrap

from extras import screen

LONGEST = 600  # characters of a text on the screen; the middle of a longer one is left out
NAMES = {"response_ids": "response", "chosen_ids": "chosen", "rejected_ids": "rejected"}


def fold(label: str, text: str, width: int) -> str:
    """A text on lines of at most `width` columns beside its label. Line breaks and other control characters are escaped."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
    lines = textwrap.wrap(text, max(width - 12, 20), drop_whitespace=False) or [""]
    return "\n".join(f"  {label if i == 0 else '':<9} {line.rstrip()}" for i, line in enumerate(lines))


def decoded(tokenizer, row: dict) -> dict[str, str]:
    """{prompt, then its responses: text} of a row's tokens, special tokens among them."""
    names = {"prompt_ids": "prompt"} | NAMES
    return {label: tokenizer.decode(row[name]) for name, label in names.items() if row.get(name)}


def block(title: str, texts: dict[str, str]) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return "\n".join([title, *(fold(label, text, width) for label, text in texts.items())])


def show_training_row(run, tokenizer, trained: tuple[list[dict], ...]) -> None:
    """Print the first row that the run trains on, decoded from its tokens, before anything is trained."""
    rows = next((rows for rows in trained if len(rows)), [])
    if not len(rows):
        return
    run.print(block(f"first training row (row {rows[0]['row']}):", decoded(tokenizer, rows[0])))


def show_samples(run, tokenizer, rows: list[dict], rollout, texts: list[str], iteration: int) -> None:
    """Print the answer to the first held-out row, and the last row trained on; send the answers to the run's tracker.

    rows: held-out. rollout, texts: the answers to them.
    """
    texts_of = {"prompt": tokenizer.decode(rows[0]["prompt_ids"]), "answer": tokenizer.decode(rollout.response_ids[0])}
    run.print(block(f"evaluation {iteration}, held-out row {rows[0]['row']}:", texts_of))
    if screen.screen.trained is not None:
        run.print(block("last row trained on:", decoded(tokenizer, screen.screen.trained)))
    if run.args.report_to != "none":
        from extras.trackers import log_samples

        log_samples(run, rows, texts, iteration)
