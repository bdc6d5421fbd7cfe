"""Run a script in forked children, one after another; a child may SIGKILL itself (or send itself
another signal, or raise an error) at the n-th call of some function.

    python kill_at.py '[{"argv": ["irft.py", ...], "at": "common.run.Run.step", "n": 3}, ...]'

Prints the children's exit statuses as JSON (-9 for one that was killed). Importing once and forking saves the imports.
Under a launcher of several processes each forks its children, with "rank" only that one is hit, and rank 0 prints. One
scenario that is no list runs in the process itself, as the launcher started it.
"""

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from fork_server import import_libraries  # noqa: E402


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
    """Send this process a signal, or raise if it is 0, when the function is called for the n-th time."""
    owner, attribute = resolve(name)
    original, calls = getattr(owner, attribute), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            if not number:
                raise RuntimeError(f"failure that the test asked for in {name}")
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapped)


def report_writes(folder: str) -> None:
    """Print WROTE and the path whenever Python of this process opens a file to write, or makes, moves or removes one, below."""

    def hook(event: str, arguments: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR) > 0
        if writes and str(arguments[0]).startswith(folder):
            os.write(2, f"WROTE {event} {arguments[0]}\n".encode())

    sys.addaudithook(hook)


def meet_apart(i: int) -> None:
    """The i-th children of all ranks find each other under keys of their own, not under those that earlier ones left."""
    from torch.distributed import PrefixStore

    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # the package's own name for it is a function
    create = rendezvous._create_c10d_store
    rendezvous._create_c10d_store = lambda *args, **kwargs: PrefixStore(f"children_{i}", create(*args, **kwargs))


def child(scenario: dict) -> int:
    from common import args

    sys.argv = scenario["argv"]
    script = importlib.import_module(Path(sys.argv[0]).stem)
    rank = int(os.environ.get("RANK", 0))
    if scenario.get("report_writes") and rank:
        report_writes(scenario["report_writes"])
    for name, value in scenario.get("set", {}).items():
        setattr(*resolve(name), value)
    if limit := scenario.get("file_limit"):  # bytes past which the kernel refuses to write, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if scenario.get("at") and rank == scenario.get("rank", rank):
        kill_self_at(scenario["at"], scenario["n"], scenario.get("signal", signal.SIGKILL))
    begin = "train" if hasattr(script, "train") else "evaluate"
    try:
        args.main(lambda: getattr(script, begin)(args.parse_args(script.Args, "", script.SETTINGS)))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def main() -> None:
    import_libraries()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed  # noqa: F401
    scenarios, statuses = json.loads(sys.argv[1]), []
    if isinstance(scenarios, dict):
        sys.exit(child(scenarios))
    for i, scenario in enumerate(scenarios):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)
            if "RANK" in os.environ:
                meet_apart(i)
            print(f"=== {scenario.get('mark', '')}", flush=True)
            status = 1
            try:
                status = child(scenario)
            except BaseException:  # of which torch's CheckpointException is one
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, result = os.waitpid(pid, 0)
        statuses.append(os.waitstatus_to_exitcode(result))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(statuses))


if __name__ == "__main__":
    main()
