"""accelerate launch that leaves the last word to the script: `python -m extras.quiet` in place of `accelerate launch`.

After a script's one-line error, accelerate and torchrun print a traceback of their own and a report of every process. This
starts them in the same way, with the same options, but prints neither, and ends with the script's own exit status.
"""

import logging
import subprocess
import sys

REPORTS = "torch.distributed.elastic.multiprocessing.api"  # logger of what torchrun says of a process that has ended


def main() -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger(REPORTS).disabled = True
    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as error:
        sys.exit(status(error.get_first_failure()[1].exitcode))
    except subprocess.CalledProcessError as error:
        sys.exit(status(error.returncode))


def status(code: int) -> int:
    """A process's exit status as a shell gives it: 128 + its number for a signal, which is negative here."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    main()
