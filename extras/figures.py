"""How every figure of the repository looks: colours, axes, bands, titles with units, files. It imports matplotlib to draw."""

import ast
import itertools
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

COLORS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#aa3377",
    "#ccbb44",
    "#66ccee",
)  # Paul Tol's, told apart by the colour-blind
GREY = "#888888"
STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
BETTER = {"eval/nll": "lower is better", "eval/rouge_l": "higher is better", "eval/logps/gap": "higher is better"}
AXES = {  # what a row of metrics counts
    "step": "optimizer steps",
    "episodes": "answers sampled",
    "outer_iteration": "outer iterations",
    "updates": "policy updates",
    "num_tokens": "tokens trained on",
    "epoch": "epochs",
}


def new(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained"):
    """An empty figure in the house style, of width and height in inches. No screen is needed."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=size, layout=layout)


def subplots(rows: int, columns: int, size: tuple[float, float], **how):
    """(figure, axes); axes is an array (rows, columns). how: as matplotlib has it."""
    figure = new(size)
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def grid(panels: int, columns: int):
    """(figure, [axes of each panel]) of panels of one size with fixed margins, which is drawn in a third of the time."""
    rows = -(-panels // columns)
    width, height = max(3.3 * columns + 0.3, 6.2), 2.5 * rows + 0.9
    figure = new((width, height), None)
    axes = figure.subplots(rows, columns, squeeze=False)
    space = {"left": 0.75 / width, "right": 1 - 0.15 / width, "bottom": 0.85 / height, "top": 1 - 0.75 / height}
    figure.subplots_adjust(**space, wspace=0.34, hspace=0.5)
    for ax in axes.flat[panels:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:panels])


def mosaic(layout: str, size: tuple[float, float]):
    """(figure, {letter: axes}) of a layout of letters, rows separated by semicolons."""
    figure = new(size)
    return figure, figure.subplot_mosaic(layout)


def save(figure, path: Path, dpi: int = 130) -> None:
    """Write a PNG that depends on nothing but what is drawn: no version and no date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Software": None})


def colored(labels: Iterable[str]) -> list[tuple[str, str]]:
    """[(label, its colour)]."""
    return list(zip(labels, itertools.cycle(COLORS), strict=False))


def draw(ax, x, mean, low=None, high=None, color=COLORS[0], label: str = "", each: Iterable[tuple] = ()) -> None:
    """A curve with its band, and thin in the same colour the (x, y) of each run that it is the mean of."""
    for own_x, own_y in each:
        ax.plot(own_x, own_y, color=color, alpha=0.25, lw=1)
    few = len(x) <= 30
    ax.plot(x, mean, color=color, lw=1.8, marker="o" if few else "", ms=3.5, label=label)
    if low is not None:
        ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def level(ax, y: float, text: str = "") -> None:
    """A dashed line at a value that means something, such as chance."""
    ax.axhline(y, color=GREY, ls="--", lw=1)
    if text:
        ax.text(0.02, y, text, transform=ax.get_yaxis_transform(), color="#666666", va="bottom", size=8)


def legend(figure, ax) -> None:
    """One legend above all axes, from the labels of one of them, unless there is only one label."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        place = "outside upper center" if figure.get_layout_engine() else "upper center"
        figure.legend(handles, labels, loc=place, ncols=min(len(labels), 4), frameon=False)


def caption(figure, text: str) -> None:
    """A line below all axes: what bands and bars are."""
    figure.supxlabel(textwrap.fill(text, int(15 * figure.get_figwidth())), size=8, color="#555555")


# ---- units ----
UNITS = (  # in the meaning of a metric -> the unit of its axis; the first that is found counts
    (r"\bnats per ([\w ]*token)\b", "nats per token"),
    (r"\bnats per (response|answer|pair)\b", r"nats per \1"),
    (r"^share\b|^win rate\b|\brate\b", "share"),
    (r"^tokens\b|tokens trained on|tokens of", "tokens"),
    (r"\blog pi\b.*\bper token\b", "nats per token"),
    (r"\brewards?\b|\bscores?\b|\br\(|^mean true return", "reward units"),
    (r"\bin \[0, 1\]", "share"),
)


def unit(meaning: str) -> str:
    """The unit of a metric, from its meaning in METRICS; empty for a number without one."""
    for pattern, name in UNITS:
        if found := re.search(pattern, meaning):
            return found.expand(name) if "\\" in name else name
    return ""


def units(meanings: dict[str, str]) -> dict[str, str]:
    """{metric: unit}. A meaning that says "the same", or names an end of an interval, has the unit of the one before it."""
    found, last = {}, ""
    for name, meaning in meanings.items():
        if not re.search(r"\bthe same\b|^(upper|lower) end", meaning):
            last = unit(meaning)
        found[name] = last
    return found


def meanings(script: str) -> dict[str, str]:
    """METRICS of a script, read from its source without running it; those that several scripts share come first."""
    from extras import metrics

    found = metrics.EVAL_METRICS | metrics.REWARD_METRICS | metrics.PPO_METRICS
    root = Path(__file__).parent.parent
    sources = [path for path in (root / "extras" / "preference_data.py", root / f"{script}.py") if path.is_file()]
    for node in (node for path in sources for node in ast.parse(path.read_text()).body):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Dict)
            and "METRICS" in ast.unparse(node.targets[0])
        ):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            constant = [
                (k.value, v.value) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)
            ]
            found |= {str(name): str(meaning) for name, meaning in constant}
    return found


def axis_title(name: str, script: str) -> str:
    """A metric or a count of a row as the title of an axis, with its unit."""
    if name in AXES:
        return "environment steps" if (script, name) == ("aihf_mujoco", "step") else AXES[name]
    found = units(meanings(script)).get(name, "")
    return f"{name} [{found}]" if found else name
