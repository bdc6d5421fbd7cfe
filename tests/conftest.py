import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy"), str(ROOT / "tests")]

# 1 or 0: all tests as on a CPU that multiplies bf16 natively, or as on one that does not (test_precision.py)
if "NATIVE_BF16" in os.environ:
    import common.run

    common.run.native_bf16 = lambda: os.environ["NATIVE_BF16"] == "1"
