"""Write the generated parts of the docs: tables of settings, flags, metrics and modules, and the picture of the imports.

`python docs/generate.py --check` writes nothing and fails if a page is out of date.

A flag that common/ declares is listed once, on flags.md. A script's page lists the flags that the script declares itself, and
those for which it has another default or meaning. A metric that means the same in six or more scripts is listed once, on
metrics.md. A script's page lists its other metrics. aihf_mujoco.py trains no language model and inherits
the flags of extras/flags.py alone.
"""

import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import aihf  # noqa: E402
import aihf_direct  # noqa: E402
import aihf_mujoco  # noqa: E402
import aihf_ppo  # noqa: E402
import evaluate  # noqa: E402
import irft  # noqa: E402
import irl_dpo_ultrachat  # noqa: E402
import irl_ppo_tldr  # noqa: E402
import rft  # noqa: E402
import sft  # noqa: E402
from common.args import BaseArgs  # noqa: E402
from docs import imports  # noqa: E402
from extras.help import all_meanings  # noqa: E402

MODULES = (  # in reading order
    sft, irft, rft, aihf, aihf_ppo, aihf_direct, irl_ppo_tldr, irl_dpo_ultrachat, evaluate, aihf_mujoco,
)  # fmt: skip
SCRIPTS = {module.__name__: module for module in MODULES}
SHARING = [name for name, module in SCRIPTS.items() if issubclass(module.Args, BaseArgs)]  # flags of common/
TRAINING = [name for name in SHARING if name != "evaluate"]
SHARED_BY = 6  # scripts that log a metric with the same meaning, from which on metrics.md lists it


def flag_rows(cls) -> dict[str, tuple[str, str]]:
    """{field: (default, meaning)} of a dataclass of flags; fields of base classes come first."""
    docs = all_meanings(cls)
    defaults = {f.name: "(empty)" if f.default == "" else f"`{f.default}`" for f in dataclasses.fields(cls)}
    return {name: (default, docs[name]) for name, default in defaults.items()}


def shared_flags() -> dict[str, dict[str, tuple[str, str]]]:
    """Rows of the flags that the scripts inherit: {"every": those of every program, "training": those of training scripts}."""
    inherited = {
        name: {field: row for base in SCRIPTS[name].Args.__mro__[1:-1] for field, row in flag_rows(base).items()}
        for name in SHARING
    }
    every = {k: row for k, row in inherited["evaluate"].items() if all(k in rows for rows in inherited.values())}
    training = {k: row for name in TRAINING for k, row in inherited[name].items() if k not in every}
    return {"every": every, "training": training}


def own_flags(name: str) -> dict[str, tuple[str, str]]:
    """Rows of a script's flags that flags.md does not have, or has with another default or meaning."""
    shared = {k: row for rows in shared_flags().values() for k, row in rows.items()}
    return {k: row for k, row in flag_rows(SCRIPTS[name].Args).items() if shared.get(k) != row}


def shared_metrics() -> dict[tuple[str, str], tuple[str, ...]]:
    """{(metric, meaning): the scripts that log it} of what means the same in SHARED_BY or more scripts."""
    logged = {}
    for name in SHARING:
        for row in SCRIPTS[name].METRICS.items():
            logged.setdefault(row, []).append(name)
    return {row: tuple(names) for row, names in logged.items() if len(names) >= SHARED_BY}


def own_metrics(name: str) -> dict[str, str]:
    """{metric: meaning} of a script's metrics that metrics.md does not have, or has with another meaning."""
    return {k: v for k, v in SCRIPTS[name].METRICS.items() if (k, v) not in shared_metrics()}


def table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def flag(field: str) -> str:
    return f"`--{field.replace('_', '-')}`"


def flags_table(rows: dict[str, tuple[str, str]]) -> str:
    return table(["flag", "default", "meaning"], [[flag(k), *row] for k, row in rows.items()])


def settings_table(name: str) -> str:
    settings = SCRIPTS[name].SETTINGS
    models = {"other": "any other", "pythia": "`pythia-14m` to `pythia-2.8b`", "smollm2": "`smollm2-135m`"}
    fields = dict.fromkeys(k for row in settings.values() for k in row)
    rows = [[flag(k), *(str(row.get(k, "")) for row in settings.values())] for k in fields]
    return table(["flag", *(models.get(k, f"`{k}`") for k in settings)], rows)


def metrics_table(rows: dict[str, str]) -> str:
    return table(["metric", "meaning"], [[f"`{k}`", v] for k, v in rows.items()])


def shared_metrics_tables() -> str:
    """A table for each set of scripts that log the same metrics, the largest set first."""
    sets = Counter(shared_metrics().values())
    parts = []
    for names in sorted(sets, key=lambda names: (-len(names), names)):
        title = {tuple(SHARING): "Every script", tuple(TRAINING): "Every training script"}.get(names, ", ".join(names))
        rows = {metric: meaning for (metric, meaning), scripts in shared_metrics().items() if scripts == names}
        parts.append(f"### {title}\n\n{metrics_table(rows)}")
    return "\n\n".join(parts)


def common_table() -> str:
    modules = imports.read_modules()
    level = imports.levels(modules)
    rows = [
        [
            f"`{name.replace('.', '/')}.py`",
            modules[name].summary,
            ", ".join(sorted(short(n) for n in modules[name].imports)),
        ]
        for name in sorted(level, key=lambda name: (level[name], name))
    ]
    return table(["module", "what it has", "imports"], rows)


def extras_table() -> str:
    modules = imports.read_modules()
    rows = []
    for name in [name for name in modules if name.startswith("extras.")]:
        users = {user: module for user, module in modules.items() if name in module.imports or name in module.doors}
        doors = [
            f"{short(user)}: {', '.join(sorted(module.doors.get(name, ['always'])))}" for user, module in users.items()
        ]
        rows.append([f"`{name.replace('.', '/')}.py`", modules[name].summary, "; ".join(doors)])
    return table(["module", "what it has", "functions that import it"], rows)


def short(name: str) -> str:
    return name.removeprefix("common.")


def tables(page: str) -> dict[str, str]:
    """{name of a table: its text} of a page of docs/."""
    if page == "architecture":
        return {"common": common_table(), "extras": extras_table()}
    if page == "flags":
        return {kind: flags_table(rows) for kind, rows in shared_flags().items()}
    if page == "metrics":
        return {"metrics": shared_metrics_tables()}
    if page not in SCRIPTS:
        return {}
    return {
        "settings": settings_table(page),
        "flags": flags_table(own_flags(page)),
        "metrics": metrics_table(own_metrics(page)),
    }


def render(page: str, text: str) -> str:
    """The page, with new text between each `<!-- table:NAME -->` and its `<!-- end -->`."""
    for name, made in tables(page).items():
        block = f"<!-- table:{name} -->\n\n{made}\n\n<!-- end -->"
        text, found = re.subn(rf"<!-- table:{name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
        if found != 1:
            sys.exit(f"docs/{page}.md: found table:{name} {found} times, expected once")
    return text


def main() -> None:
    made = {path: render(path.stem, path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))}
    made[ROOT / "docs" / "imports.svg"] = imports.svg(imports.read_modules())
    stale = []
    for path, text in made.items():
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date, run `make docs`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
