import os
import runpy
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test process for each core: more threads would wait for one another

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
