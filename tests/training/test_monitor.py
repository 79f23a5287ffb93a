"""What the monitor measures."""

import subprocess
import sys

from tests.training.launch import environment
from vlmds.training.monitor import peak_memory


def test_peak_memory_is_of_this_program_alone():
    """Linux tells a new program its starter's peak as if it were its own."""
    ballast = bytearray(b"x") * (1 << 30)
    assert peak_memory() > 1e9
    code = "from vlmds.training.monitor import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), text=True, timeout=120,
                          capture_output=True, check=True)
    del ballast
    assert 50e6 < int(done.stdout) < 1e9
