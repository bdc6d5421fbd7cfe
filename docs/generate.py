"""Write the flags and metrics tables of docs/<script>.md from the scripts. `--check` only says whether they are up to date."""

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import aihf  # noqa: E402
import aihf_direct  # noqa: E402
import aihf_ppo  # noqa: E402
import evaluate  # noqa: E402
import irft  # noqa: E402
import irl_dpo_ultrachat  # noqa: E402
import irl_ppo_tldr  # noqa: E402
import rft  # noqa: E402
import sft  # noqa: E402

MODULES = (aihf, aihf_direct, aihf_ppo, evaluate, irft, irl_dpo_ultrachat, irl_ppo_tldr, rft, sft)
SCRIPTS = {module.__name__: module for module in MODULES}


def field_docs(cls) -> dict[str, str]:
    """{field: the docstring below it}, base class first."""
    docs = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0].body
        for node, following in zip(body, body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[node.target.id] = " ".join(following.value.value.split())
    return docs


def flags_table(module) -> str:
    docs = field_docs(module.Args)
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(module.Args):
        default = "(empty)" if field.default == "" else f"`{field.default}`"
        meaning = docs[field.name].replace("|", "\\|")
        lines.append(f"| `--{field.name.replace('_', '-')}` | {default} | {meaning} |")
    return "\n".join(lines)


def settings_table(module) -> str:
    names = list(dict.fromkeys(k for row in module.SETTINGS.values() for k in row))
    models = {"other": "any other", "pythia": "`pythia-14m` to `pythia-2.8b`"}
    lines = ["| flag | " + " | ".join(models.get(k, f"`{k}`") for k in module.SETTINGS) + " |"]
    lines.append("|---" * (len(module.SETTINGS) + 1) + "|")
    for name in names:
        cells = [str(row.get(name, "")) for row in module.SETTINGS.values()]
        lines.append(f"| `--{name.replace('_', '-')}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def metrics_table(module) -> str:
    escaped = {name: text.replace("|", "\\|") for name, text in module.METRICS.items()}
    return "\n".join(["| metric | meaning |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in escaped.items())])


TABLES = {"flags": flags_table, "settings": settings_table, "metrics": metrics_table}


def render(name: str, text: str) -> str:
    """The page with what stands between `<!-- table:NAME -->` and `<!-- end -->` made anew."""
    for table, make in TABLES.items():
        made = f"<!-- table:{table} -->\n\n{make(SCRIPTS[name])}\n\n<!-- end -->"
        text = re.sub(rf"<!-- table:{table} -->.*?<!-- end -->", lambda _, made=made: made, text, flags=re.S)
    return text


def main() -> None:
    stale = []
    for name in SCRIPTS:
        path = ROOT / "docs" / f"{name}.md"
        text = path.read_text()
        if (made := render(name, text)) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(made)
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date, run `make docs`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
