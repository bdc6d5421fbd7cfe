"""Choose the build of torch: print pip's arguments for the CPU build where no NVIDIA GPU is found, else nothing.

python requirements/torch_build.py INDEX [PIP_ARGS ...]     (as the Makefile does; it runs before anything is installed)

INDEX: where the CPU builds are. On Linux torch's build on PyPI brings several gigabytes of CUDA. If PIP_ARGS name a source of
packages themselves, or the index does not answer, nothing is printed, and pip takes torch from where it takes all packages.
"""

import glob
import shutil
import subprocess
import sys
import urllib.request

SECONDS = 10  # for the index to answer
SOURCES = ("-i", "-f", "--index-url", "--extra-index-url", "--find-links", "--no-index")  # options of pip


def has_gpu(devices: str = "/dev/nvidia[0-9]*") -> bool:
    """True if the driver lists an NVIDIA GPU, or the system has a device file of one."""
    if glob.glob(devices):
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def answers(index: str) -> bool:
    """True if the index has a page for torch."""
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=SECONDS) as page:
            return page.status == 200
    except (OSError, ValueError):  # no name, no route, no answer, an error page, no address
        return False


def names_source(words: list[str]) -> bool:
    """True if pip's arguments say where packages come from."""
    return any(word.partition("=")[0] in SOURCES or word[:2] in ("-i", "-f") for word in words)


def choose(index: str, pip_args: list[str], platform: str = sys.platform) -> tuple[list[str], str]:
    """(arguments for pip, the reason in words)."""
    if names_source(pip_args):
        return [], "from where PIP_ARGS says"
    if platform != "linux":
        return [], "the build for this system"
    if has_gpu():
        return [], "the build for the NVIDIA GPU that was found"
    if not answers(index):
        return [], f"no NVIDIA GPU was found, but {index} does not answer: the build that pip finds by itself"
    return ["--extra-index-url", index], f"the CPU build of {index}, since no NVIDIA GPU was found"


if __name__ == "__main__":
    arguments, reason = choose(sys.argv[1], sys.argv[2:])
    print(f"torch: {reason}", file=sys.stderr)
    print(*arguments)
