"""The learning rate of each method: of those tried on the development set, the one whose samples have the highest gold score.

Rates that carry the policy further than --most-kl from the base are out: its text is broken there, whatever the gold reward says.
Rates of a reward model are tried as well. Of these the one counts that orders most held-out pairs as the gold reward does.

    python benchmark/sentiment_grid.py --grid runs/sentiment/grid --gold runs/film/world   # table.md; rates: <method> <rate>
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.film import Gold  # noqa: E402
from benchmark.sentiment_table import METHODS, load, pair_wins  # noqa: E402
from benchmark.tables import markdown
from common import UserError
from common.args import main

REWARD = "reward_"  # how the folder of a method begins in which rates of its reward are tried
DEV_PAIRS = ("dev_medium_low", "dev_high_medium")


@dataclass
class Args:
    grid: str
    """folder of the runs: <method>/<rate>."""
    gold: str
    """folder of the gold reward, made by benchmark/film.py."""
    most_kl: float = 5.0
    """KL to the base, nats per answer, up to which a rate counts."""


def best(scores: dict[str, float]) -> str:
    """The rate with the highest score; of equal ones the lowest rate."""
    return max(sorted(scores, key=float), key=scores.__getitem__)


def policies(folders: list[Path], gold: Gold, most_kl: float) -> tuple[dict[str, float], dict[str, str]]:
    """({rate: mean gold of the last samples}, {rate: what the table says}) of the runs of one method.

    The scores leave out rates beyond the KL, unless all are.
    """
    ends = {folder.name: load(folder, gold).points[-1].columns for folder in folders}
    scores = {rate: float(end["good"].mean()) for rate, end in ends.items()}
    kls = {rate: float(end["kl_k3"].mean()) for rate, end in ends.items()}
    said = {rate: f"{scores[rate]:.3f} (KL {kls[rate]:.2f}, NLL {end['nll'].mean():.1f})" for rate, end in ends.items()}
    return {rate: score for rate, score in scores.items() if kls[rate] <= most_kl} or scores, said


def rewards(folders: list[Path], gold: Gold, _: float) -> tuple[dict[str, float], dict[str, str]]:
    """The same for the reward's rate: {rate: mean share of right pairs} of both kinds."""
    shares = {f.name: [float(pair_wins(load(f, gold), name).mean()) for name in DEV_PAIRS] for f in folders}
    scores = {rate: float(np.mean(own)) for rate, own in shares.items()}
    return scores, {rate: " and ".join(f"{share:.3f}" for share in own) for rate, own in shares.items()}


def choose(args: Args) -> None:
    root, gold = Path(args.grid), Gold(args.gold)
    rows, chosen = [], {}
    for name in [*(REWARD + m for m in METHODS), *METHODS]:
        folders = sorted(root.glob(f"{name}/*/done"), key=lambda path: float(path.parent.name))
        if not folders:
            continue
        measure = rewards if name.startswith(REWARD) else policies
        scores, said = measure([path.parent for path in folders], gold, args.most_kl)
        chosen[name] = best(scores)
        label = METHODS[name.removeprefix(REWARD)] + (": reward" if measure is rewards else "")
        rows.append([label, "; ".join(f"{rate}: {text}" for rate, text in said.items()), chosen[name]])
    if not chosen:
        raise UserError(f"--grid: found no finished run in {root}, expected <method>/<rate>")
    table = markdown(["", "learning rates", "taken"], rows)
    (root / "table.md").write_text(table)
    (root / "rates").write_text("".join(f"{method} {rate}\n" for method, rate in chosen.items()))
    print(table)


if __name__ == "__main__":
    main(lambda: choose(tyro.cli(Args, description=__doc__)))
