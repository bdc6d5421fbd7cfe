"""The repository holds together: no dead flags, docs name what exists and are up to date, imports point one way."""

import ast
import dataclasses
import difflib
import functools
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, run

import aihf
import aihf_direct
import aihf_mujoco
import aihf_ppo
import evaluate
import irft
import irl_dpo_ultrachat
import irl_ppo_tldr
import rft
import sft
from docs import generate

MODULES = (aihf, aihf_direct, aihf_mujoco, aihf_ppo, evaluate, irft, irl_dpo_ultrachat, irl_ppo_tldr, rft, sft)
SCRIPTS = {f"{module.__name__}.py": module for module in MODULES}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
SOURCES = [
    *ROOT.glob("*.py"),
    *ROOT.glob("common/*.py"),
    *ROOT.glob("extras/*.py"),
    *ROOT.glob("toy/*.py"),
    *ROOT.glob("tiny/*.py"),
    *ROOT.glob("benchmark/*.py"),
]


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_dead_flags(script):
    """Every flag is read as an attribute in the script, in common/ or in extras/."""
    used = set()
    for path in (ROOT / script, *ROOT.glob("common/*.py"), *ROOT.glob("extras/*.py")):
        tree = parse(path)
        used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert {f.name for f in dataclasses.fields(SCRIPTS[script].Args)} <= used


def occurrences(name: str, text: str) -> int:
    """How often a metric's name stands in the text, whole or with one word filled in: "gold/win_rate_{name}"."""
    short = name.removeprefix("eval/")
    words = re.split("([/_])", short)
    filled = [
        re.escape("".join(words[:i])) + r"\{\w+\}" + re.escape("".join(words[i + 1 :])) for i in range(0, len(words), 2)
    ]
    patterns = [re.escape(name), re.escape(short), *(filled if len(words) > 1 else [])]
    return sum(len(re.findall(f'"{p}"', text)) for p in patterns) + text.count(f"{short}=")


def test_every_metric_of_a_script_is_logged_by_it():
    """Names in METRICS occur as strings where rows are built; the tests of runs compare them with a real one."""
    for script, module in SCRIPTS.items():
        text = (ROOT / script).read_text() + "".join(
            p.read_text() for p in (*ROOT.glob("common/*.py"), *ROOT.glob("extras/*.py"))
        )
        for name in module.METRICS:
            assert occurrences(name, text) >= 2, name
    assert occurrences("policy/never_logged", text) == 0


@functools.cache
def defined(path: Path) -> set[str]:
    """Names of all functions and classes of a file, and of its constants."""
    tree = parse(path)
    assigned = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    return {getattr(n, "name", None) for n in ast.walk(tree)} | {t.id for t in assigned if isinstance(t, ast.Name)}


def test_docs_name_real_symbols_and_tests():
    found = 0
    for page in PAGES:
        for path, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text()):
            assert name.split(".")[-1] in defined(ROOT / path), f"{page.name}: {path}::{name}"
            found += 1
    assert found > 250


@functools.cache
def table_rows(page: str) -> set[tuple[str, ...]]:
    """Cells of all table rows of a page of docs/, without the back quotes around flags and metrics."""
    lines = (ROOT / "docs" / page).read_text().replace("\\|", "&#124;").splitlines()
    rows = [
        [cell.strip().replace("&#124;", "|") for cell in line.strip("|").split("|")]
        for line in lines
        if line[:1] == "|"
    ]
    return {(row[0].strip("`"), *row[1:]) for row in rows}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_and_metric_is_on_the_page_of_its_script_or_on_the_shared_page(script):
    """Each once, with the script's own default and meaning. A shared row that does not hold for a script is on its page."""
    module, page = SCRIPTS[script], script.replace(".py", ".md")
    for name, row in generate.flag_rows(module.Args).items():
        line = (f"--{name.replace('_', '-')}", *row)
        assert (line in table_rows(page)) != (line in table_rows("flags.md")), line
    for line in module.METRICS.items():
        assert (line in table_rows(page)) != (line in table_rows("metrics.md")), line


def test_generated_tables_are_up_to_date():
    done = run([sys.executable, "docs/generate.py", "--check"], check=False)
    assert done.returncode == 0, done.stderr


def headings(page: Path) -> list[str]:
    """Titles of a page's sections, in order; code blocks have none."""
    return re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)


def anchor(title: str) -> str:
    """What a link calls a section, on GitHub and on the site alike."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_links_in_the_docs_lead_somewhere():
    for page in PAGES:
        for target, section in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            if target.startswith("http"):
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not section or section in map(anchor, headings(path)), f"{page.name}: {target}#{section}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_of_a_script_begins_with_usage(script):
    assert headings(ROOT / "docs" / script.replace(".py", ".md"))[1] == "Usage"


def test_imports_point_one_way():
    """Scripts import common; common never imports a script; toy, and tiny but for what made it, import nothing of ours."""
    scripts = {p.stem for p in ROOT.glob("*.py")}
    for path in ROOT.glob("common/*.py"):
        assert not imported(path) & scripts, path
    for path in ROOT.glob("toy/*.py"):
        assert not imported(path) & (scripts | {"common"}), path
    assert not imported(ROOT / "tiny" / "__init__.py") & (scripts | {"common", "toy"})


def test_the_engines_that_cut_weights_up_are_behind_doors():
    """No script and no file of common/ imports them at its top: a run that does not ask for them executes none of them."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("common/*.py")):
        top = [node for node in parse(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("sharding" in ast.unparse(node) for node in top), path


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


# ---- circles of imports ----
def import_graph(root: Path) -> dict[str, set[str]]:
    """{module: modules it imports} of common/ and extras/ below root, at the file's top or inside a function.

    A door does not count: an import of extras inside a function of common/.
    """
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("common", "extras")
        for path in root.glob(f"{package}/**/*.py")
    }
    graph = {}
    for module, path in files.items():
        tree, found = parse(path), set()
        functions_ = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
        lazy = {id(node) for function in functions_ for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import, which this test does not follow"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                while name and name not in files:  # common.run.Run is in common.run
                    name = name.rpartition(".")[0]
                door = id(node) in lazy and module.startswith("common") and name.startswith("extras")
                if name and not door:
                    found.add(name)
        graph[module] = found - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, in which each imports the next; empty where there is none."""
    done, way = set(), []

    def visit(module: str) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        way.append(module)
        for other in sorted(graph[module]):
            if found := visit(other):
                return found
        way.pop()
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module))), [])


def test_no_circle_of_imports():
    graph = import_graph(ROOT)
    assert not (found := circle(graph)), " -> ".join([*found, found[0]])
    assert {"common.data", "common.run"} <= graph.keys() and "common.data" in graph["common.run"]


CIRCLES = {  # files of a small package -> the circle in it
    "at the top": ({"common/a.py": "import common.b\n", "common/b.py": "from common.a import x\n"}, ["common.a", "common.b"]),
    "inside a function": (
        {"common/a.py": "from common import b\n", "common/b.py": "def f():\n    from common import a\n"},
        ["common.a", "common.b"],
    ),
    "of three": (
        {"common/a.py": "from common import b\n", "common/b.py": "import extras.c as c\n", "extras/c.py": "import common.a\n"},
        ["common.a", "common.b", "extras.c"],
    ),
    "among extras": (
        {"extras/a.py": "def f():\n    import extras.b\n", "extras/b.py": "from extras.a import f\n"},
        ["extras.a", "extras.b"],
    ),
    "through a door": ({"common/a.py": "def f():\n    from extras import b\n", "extras/b.py": "from common import a\n"}, []),
    "none": ({"common/a.py": "import os, common.b\n", "common/b.py": "", "extras/c.py": "from common.a import y\n"}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CIRCLES)
def test_a_circle_of_imports_is_found(tmp_path, name):
    sources, expected = CIRCLES[name]
    for file, text in {"common/__init__.py": "", "extras/__init__.py": "", **sources}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert circle(import_graph(tmp_path)) == expected


OWN = {
    "train",
    "count_steps",
    "plan_lines",
    "plan_work",
    "expert_rows",
    "collect",
    "reward_batch_loss",
    "sft_batch_loss",
}  # each script's; no maths
OWN_PPO = {
    "ppo_batch_loss",
    "ppo_update",
    "add_advantages",
    "pad",
}  # irl_ppo_tldr.py's has a step after EOS, and a test of its own
OWN_CONTROL = {"demonstration_loss"}  # aihf_mujoco.py's is on trajectories, with an exact test of its own
SHARED = {  # of these, what two scripts have in common all the same: proved for one, it holds for the other
    ("aihf.py", "aihf_ppo.py"): (
        "reward_batch_loss",
        "loop.sample_pairs",
        "loop.start_reward",
        "weighted_rows",
        "mixed_batches",
        "Steps.before",
        "Steps.before_policy",
        "Args.needs_demonstrations",
    ),
    ("rft.py", "aihf_ppo.py"): (
        "collect",
        "sft_batch_loss",
        "loop.learn",
        "loop.start_reward",
        "loop.start_policy",
        "loop.policy_step",
        "loop.measure",
    ),  # fmt: skip
    ("rft.py", "irl_ppo_tldr.py"): ("reward_batch_loss",),
    ("rft.py", "irl_dpo_ultrachat.py"): ("reward_batch_loss",),
    ("irl_ppo_tldr.py", "irl_dpo_ultrachat.py"): (
        "reward_batch_loss",
        "loop.sample_pairs",
        "loop.start_reward",
        "Steps.before",
        "Steps.before_policy",
    ),
    ("aihf.py", "irl_dpo_ultrachat.py"): (
        "sft_batch_loss",
        "dpo_batch_loss",
        "makes_pair",
        "measure_candidates",
        "policy_rates",
        "loop.learn",
        "loop.episodes",
        "loop.measure",
    ),
    ("aihf.py", "aihf_direct.py"): ("dpo_loss", "mixed_batches", "weighted_rows"),
}


def functions(path: Path) -> dict[str, str]:
    """{name: code} of a script's functions, and of its classes' as Class.name; of the class with the loop as loop.name.

    Without docstrings of methods of the loop: they name the paper's algorithm.
    """
    found = {}
    for node in parse(path).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        members = [n for n in members if isinstance(n, ast.FunctionDef)]
        is_loop = isinstance(node, ast.ClassDef) and any(n.name == "learn" for n in members)
        prefix = "loop." if is_loop else f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for n in members:
            if is_loop and ast.get_docstring(n):
                n.body = n.body[1:]
            found[prefix + n.name] = ast.unparse(n)
    return found


def test_functions_of_the_same_name_in_two_scripts_are_the_same():
    seen = {}
    for path in ROOT.glob("*.py"):
        for name, source in functions(path).items():
            own = OWN | {"irl_ppo_tldr": OWN_PPO, "aihf_mujoco": OWN_CONTROL}.get(path.stem, set())
            if name not in own and "." not in name:
                assert seen.setdefault(name, source) == source, f"{name} differs in {path.name}"
    for scripts, names in SHARED.items():
        first, second = (functions(ROOT / script) for script in scripts)
        assert all(first[name] == second[name] for name in names), scripts


DIFFS = {  # two scripts -> lines that `diff` of them shows at most, of both
    ("rft.py", "aihf_ppo.py"): 250,
    ("rft.py", "irl_ppo_tldr.py"): 500,
    ("aihf_ppo.py", "aihf.py"): 490,
    ("aihf.py", "irl_dpo_ultrachat.py"): 600,
}


@pytest.mark.parametrize("scripts", DIFFS, ids=" ".join)
def test_a_diff_of_two_scripts_shows_the_method(scripts):
    first, second = ((ROOT / script).read_text().splitlines() for script in scripts)
    shown = [line for line in difflib.unified_diff(first, second, n=0) if line[0] in "+-"][2:]  # without the names
    assert len(shown) <= DIFFS[scripts]


def test_no_pickle_and_no_unsafe_load():
    for path in SOURCES:
        assert "import pickle" not in path.read_text(), path
        for call in (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, call.keywords), path
            if ast.unparse(call.func) in ("np.load", "numpy.load"):
                assert "allow_pickle=True" not in map(ast.unparse, call.keywords), path
    assert irft.Args().trust_remote_code is False


def test_commands_of_the_docs_name_existing_files_and_flags():
    checked = 0
    for line in [line for page in PAGES for line in commands(page)]:
        if match := re.search(r"\b((?:toy/|benchmark/)?\w+\.(?:py|sh))\b(.*)", line.split("#")[0]):
            script, rest = match.groups()
            assert (ROOT / script).exists(), line
            if script in SCRIPTS:
                known = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(SCRIPTS[script].Args)}
                assert set(re.findall(r"--[\w-]+", rest)) <= known, line
            checked += 1
    assert checked >= 60


def commands(page: Path) -> list[str]:
    """Lines of the code blocks of a page that are marked as shell commands; a line that ends in a backslash takes the next."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.S)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


# ---- sizes ----
MOST_LINES = {"rft.py": 580, "irl_ppo_tldr.py": 720, "aihf_mujoco.py": 890}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_what_a_reader_meets_is_short():
    sizes = {path.name: lines(path) for path in ROOT.glob("common/*.py")}
    assert sum(sizes.values()) <= 2300, sizes
    assert not {script: lines(ROOT / script) for script, most in MOST_LINES.items() if lines(ROOT / script) > most}


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "evaluate.py"])
def test_the_maths_comes_first_and_the_loop_before_the_flags(script):
    """The sections named the maths begin the file, each with a function before line 120; the loop comes next; flags end it.

    aihf_mujoco.py has no common/ for its networks, its policy step and its data: they stand between the maths and the loop.
    """
    text, tree = (ROOT / script).read_text(), parse(ROOT / script)
    headings = [(i, line[7:]) for i, line in enumerate(text.splitlines(), 1) if line.startswith("# ---- ")]
    maths = [i for i, title in headings if title.startswith("the maths")]
    assert maths and maths == [i for i, _ in headings[: len(maths)]], headings
    named = {n.name: n.lineno for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for heading in maths:
        assert min(line for line in named.values() if line > heading) < 120, heading
    between = ["networks", "the policy step", "the data"] if script == "aihf_mujoco.py" else []
    rest = headings[len(maths) :]
    assert all(title.startswith(name) for (_, title), name in zip(rest, between, strict=False)), rest
    begin, title = rest[len(between)]
    loop = next((named[name] for name in ("RFT", "AIHF", "IRL", "Learner") if name in named), named["train"])
    assert title.startswith("the loop") and begin < loop < named["Args"], headings
    assert not any(begin < line < loop for line in named.values() if line != loop)


# ---- what make test leaves out ----
COLLECT = """
import json, sys
import pytest
import yaml
class Marks:
    def pytest_collection_finish(self, session):
        found = {item.nodeid.partition("/")[2]: item.get_closest_marker("slow") is not None for item in session.items}
        open(sys.argv[1], "w").write(json.dumps(found))
sys.exit(pytest.main(["--collect-only", "-qq", "-n", "0", "-p", "no:cacheprovider"], plugins=[Marks()]))
"""
KILLED = "test_killed_and_resumed_equals_left_alone"
QUICK = {  # script -> tests of a whole run, and of one that is killed and resumed
    "sft.py": ("test_scripts.py::test_sft_lowers_the_loss_and_reductions_differ", f"test_resume.py::{KILLED}[sft.py-"),
    "irft.py": ("test_scripts.py::test_a_run_leaves_what_it_promises", f"test_resume.py::{KILLED}[irft.py-"),
    "rft.py": ("test_rft_runs.py::test_a_run_leaves_what_it_promises", f"test_resume.py::{KILLED}[rft.py-"),
    "aihf.py": ("test_aihf_runs.py::test_a_run_leaves_what_it_promises[aihf.py]", f"test_aihf_runs.py::{KILLED}[aihf.py-"),
    "aihf_ppo.py": (
        "test_aihf_runs.py::test_a_run_leaves_what_it_promises[aihf_ppo.py]",
        f"test_aihf_runs.py::{KILLED}[aihf_ppo.py-",
    ),
    "aihf_direct.py": ("test_aihf_direct.py::test_a_run_leaves_what_it_promises", f"test_aihf_direct.py::{KILLED}["),
    "irl_ppo_tldr.py": ("test_irl_runs.py::test_a_run_leaves_what_it_promises", f"test_irl_runs.py::{KILLED}["),
    "irl_dpo_ultrachat.py": (
        "test_irl_dpo_runs.py::test_a_run_leaves_what_it_promises",
        f"test_irl_dpo_runs.py::{KILLED}[",
    ),
    "aihf_mujoco.py": (
        "test_control.py::test_rows_of_metrics_are_those_of_the_flags",
        "test_control.py::test_a_run_that_is_killed_goes_on_from_its_last_checkpoint[",
    ),
    "evaluate.py": ("test_evaluate.py::test_the_json_agrees_with_the_rows", "test_judge.py::test_a_run_that_is_killed_asks_only_for_the_rest"),
}  # fmt: skip


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """{test: True if make test leaves it out}."""
    folder = tmp_path_factory.mktemp("collect")
    (folder / "collect.py").write_text(COLLECT)
    run([sys.executable, str(folder / "collect.py"), str(folder / "found.json")])
    return json.loads((folder / "found.json").read_text())


def test_make_test_has_a_whole_and_a_killed_run_of_every_script(slow):
    assert QUICK.keys() == SCRIPTS.keys()
    for names in QUICK.values():
        for name in names:
            assert any(test.startswith(name) and not left_out for test, left_out in slow.items()), name


def test_make_test_leaves_out_few_tests_and_make_test_all_none(slow):
    assert sum(slow.values()) < len(slow) / 5
    rules = (ROOT / "Makefile").read_text()
    quick, others = (re.search(rf"^{name}: .*\n((?:\t.*\n)+)", rules, re.M)[1] for name in ("test", "test-all"))
    assert re.search("^test-all: test$", rules, re.M)
    assert [line for line in quick.splitlines() if "pytest" in line] == [
        others.strip("\n").replace(" slow", ' "not slow"')
    ]
    assert "make types test test-all" in (ROOT / ".ci" / "run").read_text()


def test_the_project_file_names_every_script_package_and_list_of_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    assert set(setuptools["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    assert set(setuptools["packages"]) == {"common", "extras", "tiny"}
    dynamic = setuptools["dynamic"]
    lists = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    assert {name for entry in lists for name in entry["file"]} == {
        f"requirements/{path.name}" for path in ROOT.glob("requirements/*.txt")
    }


def test_the_site_has_every_page():
    def pages(entry) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert pages(nav) == {path.name for path in ROOT.glob("docs/*.md")}
