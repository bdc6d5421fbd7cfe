import os
import runpy
import signal
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test process for each core: more threads would wait for one another

for number in (signal.SIGINT, signal.SIGHUP):  # a shell lets what it starts in the background ignore them
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "tests")]

# NATIVE_BF16=1 or 0: all tests as on a CPU that multiplies bf16 natively, or as on one that does not; children do the same
runpy.run_path(str(ROOT / "tests" / "native_bf16" / "sitecustomize.py"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Let accelerate forget the precision of a test's runs: a process keeps the first one, and refuses another to later tests."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


LONGEST = (  # files that take longest, the longest first: begun early, they leave no process alone at the end
    "test_models",
    "test_stop",
    "test_aihf_runs",
    "test_resume",
    "test_scripts",
    "test_launch",
    "test_aihf_direct",
    "test_rft_runs",
    "test_irl_dpo_runs",
    "test_irl_runs",
    "test_irl_ppo",
    "test_theory",
    "test_control",
    "test_rft",
    "test_aihf",
    "test_bad_input",
)


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first; the other files keep their order."""
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
