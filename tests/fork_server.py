"""Start Python scripts from one process that has already imported the libraries: a fork instead of seconds of imports.

The server reads one request per line from standard input, {"argv", "cwd", "env", "stdout", "stderr"}, forks a child that runs
the script argv[0] as `python argv[0] ...` would, and answers with two lines: the child's process id, then its exit status as
subprocess gives it. The two outputs are paths of files.
"""

import json
import os
import runpy
import sys
from pathlib import Path

# Libraries read these when they are imported: a script that needs other values needs an interpreter of its own.
READ_AT_IMPORT = (
    "CUDA",
    "DS_",
    "HF_",
    "HOME",
    "KMP_",
    "LD_",
    "MKL_",
    "OMP_",
    "PYTHON",
    "TOKENIZERS_",
    "TRANSFORMERS_",
    "XDG_",
)


def import_libraries() -> None:
    """Import what every script uses, but nothing of this project: each child imports that from its own folder."""
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
        "MistralForCausalLM",
        "DynamicCache",
    ):
        getattr(transformers, name)


def at_import(env: dict[str, str]) -> dict[str, str]:
    """The part of an environment that libraries read when they are imported."""
    return {name: value for name, value in env.items() if name.startswith(READ_AT_IMPORT)}


def become(request: dict) -> None:
    """Turn this process, just forked, into the script of a request; return when the script's last line has run."""
    for target, source, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_APPEND),
        (2, request["stderr"], os.O_WRONLY | os.O_APPEND),
    ):
        handle = os.open(source, flags)
        os.dup2(handle, target)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve() -> None:
    import_libraries()
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
            return  # the interpreter ends as it would after the script
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
