"""The main loop of a decoding process, which `vlmds.video.pool` starts.

A limit on its memory makes a video bomb an error of this process alone.
"""

import math
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import av.logging

from vlmds.errors import SampleError
from vlmds.video.decode_work import FramesRequest, VideoReply, VideoRequest, prepare_video, read_file, read_frames
from vlmds.video.handover import give, take

MEMORY = 6 << 30  # bytes of address space for this process, besides its video


def main(descriptor: int, deadline: float) -> None:
    """Answer requests until the parent closes the connection."""
    av.logging.set_level(av.logging.PANIC)  # errors become reasons
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may have ignored it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        # Schedulers signal all processes of a job; this one ends when its parent does.
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    connection = Connection(descriptor)

    def more_time(seconds: float) -> None:
        whole = float(math.ceil(deadline + seconds))
        connection.send(whole)  # before the alarm may fire
        signal.setitimer(signal.ITIMER_REAL, whole)

    try:
        connection.send_bytes(b"ready")
        while True:
            request = connection.recv()
            data = bytes(take(connection)[0]) if isinstance(request, FramesRequest) else b""
            signal.setitimer(signal.ITIMER_REAL, deadline)
            reply = _answer(request, data, more_time)
            del data
            signal.setitimer(signal.ITIMER_REAL, 0)  # receiving may take the parent longer
            connection.send((reply.reason, reply.facts, list(reply.members)))
            give(connection, list(reply.members.values()))
            del reply
            _limit_memory(None)  # the next request is received without a limit
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(request: VideoRequest | FramesRequest, data: bytes, more_time: Callable[[float], None]) -> VideoReply:
    try:
        if isinstance(request, VideoRequest):
            data = read_file(request.video)
            _limit_memory(MEMORY + 3 * len(data))  # a repaired copy, and writing it
            return prepare_video(request, data, more_time)
        _limit_memory(MEMORY + len(data))
        return read_frames(data, request)
    except SampleError as error:
        return VideoReply(str(error))
    except MemoryError:
        return VideoReply(f"out of memory: decoding needs more than {MEMORY >> 30} GiB")


def _limit_memory(size: int | None) -> None:
    """Limit this process to `size` more bytes of address space than it has now; None: to the limit
    with which it was started."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard
    if size is not None:
        with open("/proc/self/statm", "rb") as file:
            soft = int(file.read().split()[0]) * resource.getpagesize() + size
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
