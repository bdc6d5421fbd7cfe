"""Draw curves of runs: any metric of any script against its steps, or against another metric.

Runs that differ in the seed alone are one group: the mean of its runs, each of them thin, and a band. The band is a 95%
interval: of an evaluation's measures a bootstrap over held-out rows, and over seeds if there are several; of all other metrics
Student's t over seeds. LABEL=DIR[,DIR...] makes and names a group by hand. A metric may be named by its end: kl_k3.

    python plot.py runs/a runs/b                                  # losses, scores and the measures of the printed table
    python plot.py runs/a runs/b --metric eval/gold/score nll
    python plot.py runs/a runs/b --x kl_k3 --metric gold/score    # a frontier
    python plot.py SPIN=runs/a,runs/b IRFT=runs/c --output spin.png
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError
from common.args import main
from extras import curves, figures


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """folders of runs, or LABEL=DIR[,DIR...]."""
    metric: tuple[str, ...] = ()
    """names of metrics, or their ends; a panel for each."""
    x: str = "step"
    """step, episodes, updates, outer_iteration, num_tokens, epoch, or a metric, for a frontier."""
    output: str = "auto"
    """PNG to write; auto: curves.png in the run's folder, or here for several runs."""
    title: str = ""
    """title of the figure."""


def plot(args: Args) -> Path:
    """Draw what the flags name and return the file. UserError, in one line, for what cannot be drawn."""
    groups = curves.read_groups(args.runs)
    x = args.x if args.x in figures.AXES else curves.resolve(args.x, groups, "--x")
    metrics = [curves.resolve(name, groups) for name in args.metric] or curves.default_metrics(groups)
    if not metrics:
        raise UserError(f"--metric: found none, expected some of {', '.join(curves.metric_names(groups))}")
    here = Path(args.runs[0]) if len(args.runs) == 1 and Path(args.runs[0]).is_dir() else Path()
    path = here / "curves.png" if args.output == "auto" else Path(args.output)
    if path.suffix != ".png":
        raise UserError(f"--output: found {path}, expected a name that ends in .png")
    curves.draw_curves(groups, metrics, path, x, args.title)
    return path


if __name__ == "__main__":
    main(lambda: print(f"figure: {plot(tyro.cli(Args, description=__doc__))}"))
