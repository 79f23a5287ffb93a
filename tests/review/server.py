"""`vlmds review` as a process of its own."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path


class Server:
    """A real process of `vlmds review`."""

    def __init__(self, folder: Path, *more: str, port: str = "0"):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlmds.cli", "review", *more, "-o", str(folder), "--port", port],
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stdout:
            if found := re.search(r"reviews: (http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError("the server did not start")

    def end(self, number: int = signal.SIGINT) -> int:
        os.kill(self.process.pid, number)
        self.process.stdout.close()
        return self.process.wait(30)
