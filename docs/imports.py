"""Read the imports of the repository from its code, and draw them: docs/imports.svg and the tables of docs/architecture.md."""

import ast
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "extras")
Modules = dict[str, "Module"]


@dataclass
class Module:
    """A file of common/ or extras/: what it imports when it is imported, and what its functions import when they are called."""

    summary: str  # first line of its docstring
    imports: set[str] = field(default_factory=set)
    doors: dict[str, set[str]] = field(default_factory=dict)  # module -> the functions that import it


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def targets(node: ast.Import | ast.ImportFrom, known: set[str]) -> set[str]:
    """Names in `known` that an import statement asks for: "from common import evals" asks for common.evals."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & known
    return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & known


def read_module(path: Path, known: set[str]) -> Module:
    tree = ast.parse(path.read_text())
    module = Module(summary=(ast.get_docstring(tree) or "").split("\n")[0])

    def visit(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            inside = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{function}.{child.name}".lstrip(".")
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in targets(child, known) - {name_of(path)}:
                    if function:
                        module.doors.setdefault(target, set()).add(function)
                    else:
                        module.imports.add(target)
            visit(child, inside)

    visit(tree, "")
    return module


def read_modules() -> Modules:
    """{"common.data": its Module, ...} of common/ and extras/."""
    paths = [p for package in PACKAGES for p in sorted((ROOT / package).glob("*.py")) if p.stem != "__init__"]
    known = {name_of(p) for p in paths}
    return {name_of(p): read_module(p, known) for p in paths}


def levels(modules: Modules) -> dict[str, int]:
    """{module of common/: the length of the longest chain of imports below it}. ValueError if imports form a circle."""
    found: dict[str, int] = {}

    def level(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError("imports form a circle: " + " -> ".join([*above[above.index(name) :], name]))
        if name not in found:
            below = [level(other, (*above, name)) for other in modules[name].imports if other.startswith("common.")]
            found[name] = 1 + max(below, default=-1)
        return found[name]

    for name in modules:
        if name.startswith("common."):
            level(name, ())
    return found


def reachable(modules: Modules, name: str) -> set[str]:
    below = {other for other in modules[name].imports if other.startswith("common.")}
    return below.union(*(reachable(modules, other) for other in below))


def direct(modules: Modules, name: str) -> list[str]:
    """Imports of a module of common/ that none of its other imports reaches: the arrows that are needed."""
    below = {other for other in modules[name].imports if other.startswith("common.")}
    return sorted(other for other in below if not any(other in reachable(modules, via) for via in below - {other}))


def extras_of(module: Module) -> str:
    """The extras that a module imports at its top, then those behind the doors of its functions."""
    always = sorted(name.removeprefix("extras.") for name in module.imports if name.startswith("extras."))
    doors = sorted(name.removeprefix("extras.") for name in module.doors if name.startswith("extras."))
    parts = [f"{title}: {', '.join(names)}" for title, names in (("uses", always), ("doors", doors)) if names]
    return "; ".join(parts)


WIDTH, GAP, HEIGHT, STEP = 210, 30, 68, 108  # of a box, between boxes, of a box, from row to row; pixels
Chain = list[
    tuple[str, ...]
]  # an arrow's way through the rows: ("common.run",), ("common.run", "common.args", "1"), ...


def chains(modules: Modules, level: dict[str, int]) -> list[Chain]:
    """The arrows of the picture. One that is longer than a row has a place in every row that it passes, between the boxes."""
    imported = {other for name in level for other in modules[name].imports}
    arrows = [(name, other) for name in level for other in direct(modules, name)]
    arrows += [("scripts", name) for name in sorted(set(level) - imported)]
    height = level | {"scripts": max(level.values()) + 1}
    return [
        [(upper,), *((upper, lower, str(i)) for i in range(height[upper] - 1, height[lower], -1)), (lower,)]
        for upper, lower in arrows
    ]


def arrange(ways: list[Chain], level: dict[str, int]) -> dict[tuple[str, ...], tuple[float, int]]:
    """{box or place of an arrow: (x of its middle, row from the bottom)}. Neighbours in other rows draw each other near."""
    rows: list[list[tuple[str, ...]]] = [[] for _ in range(max(level.values()) + 2)]
    for name in level:
        rows[level[name]].append((name,))
    rows[-1].append(("scripts",))
    near: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for way in ways:
        for place in way[1:-1]:
            rows[int(place[2])].append(place)
        for upper, lower in zip(way, way[1:], strict=False):
            near.setdefault(upper, []).append(lower)
            near.setdefault(lower, []).append(upper)
    x: dict[tuple[str, ...], float] = {}
    for row in [*rows, *reversed(rows), *rows, *reversed(rows)]:
        wish = {place: [x[other] for other in near.get(place, []) if other in x] or [0.0] for place in row}
        row.sort(key=lambda place, wish=wish: sum(wish[place]) / len(wish[place]))
        widths = [WIDTH if len(place) == 1 else 10 for place in row]
        left = -(sum(widths) + GAP * (len(row) - 1)) / 2
        for place, width in zip(row, widths, strict=True):
            x[place], left = left + width / 2, left + width + GAP
    return {place: (x[place], i) for i, row in enumerate(rows) for place in row}


def svg(modules: Modules) -> str:
    """The picture: a box for each module of common/ with the extras that it uses, and arrows to the modules that it imports."""
    level = levels(modules)
    ways = chains(modules, level)
    places = arrange(ways, level)
    width = 2 * max(abs(x) for x, _ in places.values()) + WIDTH + 2 * GAP
    height = (max(level.values()) + 1) * STEP + HEIGHT + 40
    middle = {place: (round(x + width / 2), round(height - 20 - HEIGHT - i * STEP)) for place, (x, i) in places.items()}
    arrows, boxes = [], []
    for way in ways:
        (x, y), line = middle[way[0]], ""
        y += HEIGHT
        line = f"M{x} {y}"
        for place in way[1:]:
            (to, top), last = middle[place], place == way[-1]
            end = top - 7 if last else top
            line += f" C{x} {(y + end) // 2} {to} {(y + end) // 2} {to} {end}"
            x, y = to, end
            if not last:
                y = top + HEIGHT
                line += f" L{x} {y}"
        arrows.append(f'<path d="{line}"/>')
    for place, (x, y) in middle.items():
        if len(place) > 1:
            continue
        scripts = place == ("scripts",)
        below = "read them in the order of the README" if scripts else extras_of(modules[place[0]])
        boxes.append(
            f'<rect x="{x - WIDTH // 2}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"'
            f' class="{"scripts" if scripts else "module"}"/>'
        )
        boxes.append(f'<text x="{x}" y="{y + 20}" class="name">{place[0].removeprefix("common.")}</text>')
        for i, text in enumerate(textwrap.wrap(below, 34)):
            boxes.append(f'<text x="{x}" y="{y + 36 + 13 * i}" class="extras">{text}</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}"'
        ' role="img">',
        "<title>What the modules of common/ import, and the extras that they use</title>",
        "<style>text{font-family:sans-serif;text-anchor:middle;fill:#111}.name{font-size:14px;font-weight:bold}.extras{font-size:11px}"
        ".scripts{fill:#fdf3e1;stroke:#555}.module{fill:#e8f0fb;stroke:#555}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height}" fill="#fff"/>',
        '<g fill="none" stroke="#555" marker-end="url(#tip)">', *arrows, "</g>", *boxes, "</svg>", "",
    ])  # fmt: skip
