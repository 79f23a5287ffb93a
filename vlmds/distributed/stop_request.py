"""Stop on request: SIGTERM (schedulers, launchers), SIGUSR1 (Slurm's early warning), Ctrl-C.

A signal only records the request. Every step begins with a sum over ranks that includes the requests, so
all ranks finish the same step, save, and exit with code 3. Before the first step there is nothing to
save, and the process ends at once, also with code 3.
"""

from __future__ import annotations

import os
import signal
import socket
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Handler of the signals. requested: name of the signal that asked this rank to stop, or None."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._training = False
        self._interrupts = 0
        for number in SIGNALS:
            signal.signal(number, self._interrupt)
        # Python runs handlers between its own instructions, which may be much later if a rank is waiting
        # for others in C++. The byte that the signal writes here arrives at once.
        self._ours, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()

    def training_begins(self) -> None:
        """From now on the training checks ``requested`` before every step."""
        self._training = True

    def _listen(self) -> None:
        while data := self._ours.recv(1):
            if data[0] in SIGNALS:
                self.requested = self.requested or signal.Signals(data[0]).name
                if not self._training:
                    os._exit(3)

    def _interrupt(self, number: int, frame) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2:
            raise KeyboardInterrupt  # Ctrl-C twice: the user does not want to wait
