"""Exit codes and error reports of commands that run on several ranks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from vlmds.console.progress import log_line
from vlmds.distributed.lost_ranks import connection_lost
from vlmds.distributed.ranks import is_main, leave, rank_and_world
from vlmds.distributed.watchdog import note_failure, report_failure, report_lost_rank
from vlmds.errors import InputError, Stopped
from vlmds.permissions import unusable_place


def run_on_ranks(command: Callable[[], int]) -> int:
    """Call a command that joins the job's ranks, report what ends it, and leave the ranks.

    Returns:
        The exit code: that of the command; 2 for bad input; 3 if a signal stopped it and its checkpoint is
        saved. After any other failure the process ends, with 2 if a disk or a path cannot be used, else
        with 1 after a report of what the ranks were doing. In a process that has no rank, such a failure
        is raised.
    """
    try:
        code = command()
    except (InputError, Stopped) as error:
        if is_main():
            log_line(f"vlmds: {error}", sys.stderr)
        elif not error.shared and os.environ.get("LOCAL_RANK") == "0":
            # A problem of this node only, such as a missing file; rank 0 may still be waiting.
            log_line(f"vlmds: rank {os.environ['RANK']}: {error}", sys.stderr)
        if not error.shared:
            note_failure()
        code = 2 if isinstance(error, InputError) else 3
    except BaseException as error:
        if "RANK" not in os.environ:
            raise
        code = report_error(error)
        if code == 1 or rank_and_world()[1] > 1:
            # Destroying the process groups would wait for ranks that have ended.
            os._exit(code)
    leave()
    return code


def report_error(error: BaseException) -> int:
    """Print on stderr why this rank ends, and note it for the others. Returns the exit code."""
    if line := unusable_place(error):
        log_line(f"vlmds: {line}" if is_main() else f"vlmds: rank {os.environ['RANK']}: {line}", sys.stderr)
        note_failure()
        return 2
    if connection_lost(error):
        report_lost_rank()
    else:
        log_line("".join(traceback.format_exception(error)), sys.stderr)
        report_failure(f"{type(error).__name__}: {error}".splitlines()[0])
    return 1
