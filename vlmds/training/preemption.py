"""Stopping on request: SIGTERM (schedulers, launchers), SIGUSR1 (Slurm's early warning), Ctrl-C.

The handler only notes the request. Every step begins with a sum over ranks, to which each rank adds
whether it was asked: so all ranks finish the same step, save, and exit with code 3.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """requested: the name of the signal that asked this rank to stop, or None."""

    def __init__(self) -> None:
        self.requested: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt  # asked twice: the user does not want to wait
        self.requested = signal.Signals(number).name
