"""Work with a deadline, for calls that have no timeout of their own and may never return."""

from __future__ import annotations

import threading
from collections.abc import Callable

_NAME = "work-with-deadline"


def finishes_within(seconds: float, work: Callable[[], None]) -> bool:
    """Call ``work`` in another thread, and return whether it ends in time. If it does not, its thread is
    left behind and does not keep the process from ending."""
    thread = threading.Thread(target=work, name=_NAME, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def work_is_left() -> bool:
    """Whether a thread of :func:`finishes_within` is still running past its deadline."""
    return any(thread.name == _NAME for thread in threading.enumerate())
