"""People's labels as pairs in RewardBench's format, for `evaluate.py --reward-pairs`: LLMBar and PandaLM.

LLMBar (arXiv:2310.07641, MIT): the JSON files of princeton-nlp/LLMBar, rows of input, output_1, output_2 and label. The subset is
the file's name, or its folder's where the file is called dataset.json. PandaLM (arXiv:2306.05087, Apache-2.0): the file with
three people's choices of WeOpenML/PandaLM. A pair counts where at least two of the three chose the same response; ties and
pairs without a majority are left out and counted.

    python benchmark/reward_pairs.py --files llmbar/*.json pandalm.json --output pairs.jsonl
    python evaluate.py --model runs/x/final --ref-model runs/x/sft --reward-pairs pairs.jsonl
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import UserError  # noqa: E402
from common.args import main


@dataclass
class Args:
    files: tuple[str, ...]
    """JSON files of LLMBar and PandaLM."""
    output: str
    """file to write: a JSON line with prompt, chosen, rejected, subset and id for each pair."""
    most: int = 0
    """pairs of each file to keep, the first ones; 0 keeps all."""


def read(path: Path) -> tuple[list[dict], int]:
    """(pairs of a file, how many of its rows have no label). UserError for a file of neither kind."""
    try:
        rows = json.loads(path.read_text())
        kind = panda if "annotator1" in rows[0] else llmbar
        found = [kind(row) for row in rows]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"--files: found {path} ({reason}), expected a JSON file of LLMBar or PandaLM") from error
    name = path.parent.name if path.stem == "dataset" else path.stem
    subset = "pandalm" if kind is panda else f"llmbar-{name}"
    pairs = [{**pair, "subset": subset, "id": f"{subset}-{i}"} for i, pair in enumerate(found) if pair]
    return pairs, len(rows) - len(pairs)


def llmbar(row: dict) -> dict:
    """label is 1 or 2, the number of the better output."""
    return ordered(row["input"], [row["output_1"], row["output_2"]], row["label"])


def panda(row: dict) -> dict | None:
    """Each annotator says 1 or 2, the number of the better response, or 0 for a tie; None without a majority for one."""
    choice, count = Counter(row[f"annotator{i}"] for i in (1, 2, 3)).most_common(1)[0]
    if not choice or count < 2:
        return None
    prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return ordered(prompt, [row["response1"], row["response2"]], choice)


def ordered(prompt: str, responses: list[str], better: int) -> dict:
    """A pair; `better` is 1 or 2. ValueError for another label."""
    return {"prompt": prompt, "chosen": responses[(1, 2).index(better)], "rejected": responses[(2, 1).index(better)]}


def write(args: Args) -> None:
    lines = []
    for name in args.files:
        pairs, without = read(Path(name))
        lines += [json.dumps(pair) + "\n" for pair in pairs[: args.most or len(pairs)]]
        print(f"{name}: {len(pairs)} pairs, {without} rows without a label left out")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text("".join(lines))
    print(f"{len(lines)} pairs: {args.output}")


if __name__ == "__main__":
    main(lambda: write(tyro.cli(Args, description=__doc__)))
