"""Start Python scripts from one process that has already imported the libraries: a fork instead of seconds of imports.

The server reads one request per line from standard input, {"argv", "cwd", "env", "stdout", "stderr", "ranks"}, forks a child
that runs the script argv[0] as `python argv[0] ...` would, and answers with two lines: the child's process id, then its exit
status as subprocess gives it. The two outputs are paths of files. With ranks above 0 the child does what torchrun does: it
forks so many processes that find one another, and ends with status 1 if one of them fails.
"""

import gc
import importlib
import importlib.machinery
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Libraries read these when they are imported: a script that needs other values needs an interpreter of its own.
READ_AT_IMPORT = (
    "CUDA",
    "DS_",
    "HF_",
    "HOME",
    "KMP_",
    "LD_",
    "MKL_",
    "MPL",
    "OMP_",
    "PYTHON",
    "TOKENIZERS_",
    "TRANSFORMERS_",
    "XDG_",
)


# What scripts import, at once or on first use. Nothing of this project: each child imports that from its own folder.
LIBRARIES = (
    "accelerate",
    "fsspec",
    "matplotlib.backends.backend_agg",
    "pandas",
    "peft",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "pyarrow.parquet",
    "rich.live",
    "rich.progress",
    "rich.table",
    "rouge_score.rouge_scorer",
    "safetensors.torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.elastic.multiprocessing.errors",
    "transformers",
    "tyro._backends._tyro_backend",
)


def import_libraries() -> None:
    """Import what scripts use."""
    for name in LIBRARIES:
        importlib.import_module(name)
    import transformers
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
    if request["ranks"]:
        become_ranks(request["ranks"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def become_ranks(world: int) -> None:
    """Fork `world` ranks, in which this function returns, with the variables that torchrun sets. This process waits for them.

    It keeps the store where they meet, stops all when one fails, and passes on SIGTERM. A group of processes of its own lets a
    caller kill all of them.
    """
    os.setpgid(0, 0)
    writers, pids = [], []
    for rank in range(world):
        reader, writer = os.pipe()
        writers.append(writer)
        if (pid := os.fork()) == 0:
            for end in writers:
                os.close(end)
            port = os.read(reader, 16).decode()
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "ROLE_RANK": str(rank), "GROUP_RANK": "0"})
            os.environ.update({name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")})
            return
        os.close(reader)
        pids.append(pid)
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after the forks: it has threads
    for writer in writers:
        os.write(writer, str(store.port).encode())
        os.close(writer)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in pids])
    failed = False
    while pids:
        pid, status = os.waitpid(-1, 0)
        pids.remove(pid)
        if status and not failed:
            failed = True
            for other in pids:
                os.kill(other, signal.SIGTERM)
    os._exit(int(failed))


def keep_compiled(sources: Iterable[Path]) -> None:
    """Compile files here, so that no child has to where Python keeps no compiled files (PYTHONDONTWRITEBYTECODE)."""
    loader = importlib.machinery.SourceFileLoader
    kept, compile_source = {}, loader.source_to_code
    for path in sources:
        data = path.read_bytes()
        kept[str(path)] = data, compile(data, str(path), "exec", dont_inherit=True)

    def source_to_code(self, data, path, **options):
        known, code = kept.get(path, (None, None))
        return code if known == data else compile_source(self, data, path, **options)

    loader.source_to_code = source_to_code


def serve() -> None:
    import_libraries()
    keep_compiled([*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("extras/*.py")])
    gc.freeze()  # a child's collections do not touch, and so copy, what the server has made
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
            return  # the interpreter ends as it would after the script
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
