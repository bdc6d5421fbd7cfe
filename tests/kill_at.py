"""Run a script in forked children, one after another; a child may SIGKILL itself (or send itself
another signal) at the n-th call of some function.

    python kill_at.py '[{"argv": ["irft.py", ...], "at": "common.run.Run.step", "n": 3}, ...]'

Prints the children's exit statuses as JSON (-9 for one that was killed). Importing once and forking saves the imports.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def resolve(name: str):
    """(owner, attribute) of a dotted name such as common.run.Run.step."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ValueError(name)


def kill_self_at(name: str, n: int, number: int) -> None:
    """Send this process a signal when the function is called for the n-th time."""
    owner, attribute = resolve(name)
    original, calls = getattr(owner, attribute), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)


def child(scenario: dict) -> int:
    import common.run

    sys.argv = scenario["argv"]
    script = importlib.import_module(Path(sys.argv[0]).stem)
    if scenario.get("at"):
        kill_self_at(scenario["at"], scenario["n"], scenario.get("signal", signal.SIGKILL))
    try:
        common.run.main(lambda: script.train(common.run.parse_args(script.Args, "", script.SETTINGS)))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def main() -> None:
    import accelerate  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import safetensors.torch  # noqa: F401
    import transformers
    import tyro  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("gpt_neox")  # fills a cache
    for name in (
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        "GPTNeoXForCausalLM",
        "DynamicCache",
    ):
        getattr(transformers, name)
    statuses = []
    for scenario in json.loads(sys.argv[1]):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)
            print(f"=== {scenario.get('mark', '')}", flush=True)
            status = 1
            try:
                status = child(scenario)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, result = os.waitpid(pid, 0)
        statuses.append(os.waitstatus_to_exitcode(result))
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
