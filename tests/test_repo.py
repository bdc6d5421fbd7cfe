"""The repository holds together: no dead flags, docs name what exists and are up to date, imports point one way."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import evaluate
import irft
import rft
import sft

SCRIPTS = {"irft.py": irft, "rft.py": rft, "sft.py": sft, "evaluate.py": evaluate}
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("benchmark/*.py")]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_dead_flags(script):
    """Every flag is read as an attribute in the script or in common/."""
    used = set()
    for path in (ROOT / script, *ROOT.glob("common/*.py")):
        tree = parse(path)
        used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert {f.name for f in dataclasses.fields(SCRIPTS[script].Args)} <= used


def test_every_metric_of_a_script_is_logged_by_it():
    """Names in METRICS occur as strings where rows are built; test_scripts.py compares them with a real run."""
    for script, module in SCRIPTS.items():
        text = (ROOT / script).read_text() + "".join(p.read_text() for p in ROOT.glob("common/*.py"))
        for name in module.METRICS:
            short = name.removeprefix("eval/")
            assert text.count(f'"{short}"') + text.count(f'"{name}"') + text.count(f"{short}=") >= 2, name


def test_docs_name_real_symbols_and_tests():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    found = 0
    for page in pages:
        for path, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text()):
            names = {getattr(n, "name", None) for n in ast.walk(parse(ROOT / path))}
            names |= {
                t.id
                for n in parse(ROOT / path).body
                if isinstance(n, ast.Assign)
                for t in n.targets
                if isinstance(t, ast.Name)
            }
            assert name.split(".")[-1] in names, f"{page.name}: {path}::{name}"
            found += 1
    assert found > 30


def test_generated_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_imports_point_one_way():
    """Scripts import common; common never imports a script; toy imports nothing of ours outside toy."""
    scripts = {p.stem for p in ROOT.glob("*.py")}
    for path in ROOT.glob("common/*.py"):
        assert not imported(path) & scripts, path
    for path in ROOT.glob("toy/*.py"):
        assert not imported(path) & (scripts | {"common"}), path


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_functions_of_the_same_name_in_two_scripts_are_the_same():
    seen = {}
    for path in ROOT.glob("*.py"):
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef) and node.name != "train":
                source = ast.unparse(node)
                assert seen.setdefault(node.name, source) == source, f"{node.name} differs in {path.name}"


def test_no_pickle_and_no_unsafe_load():
    for path in SOURCES:
        text = path.read_text()
        assert "import pickle" not in text and "torch.load(" not in text and "weights_only=False" not in text, path
    assert irft.Args().trust_remote_code is False


def test_readme_commands_name_existing_files_and_flags():
    text = (ROOT / "README.md").read_text()
    commands = [line for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S) for line in block.splitlines()]
    checked = 0
    for line in commands:
        if match := re.search(r"\b((?:toy/|benchmark/)?\w+\.(?:py|sh))\b(.*)", line.split("#")[0]):
            script, rest = match.groups()
            assert (ROOT / script).exists(), line
            if script in SCRIPTS:
                known = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(SCRIPTS[script].Args)}
                assert set(re.findall(r"--[\w-]+", rest)) <= known, line
            checked += 1
    assert checked >= 6
