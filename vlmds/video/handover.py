"""The transfer of bytes to another process: as the descriptor of an anonymous file, not through a
socket."""

import mmap
import os
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle


def give(connection: Connection, parts: list[bytes | memoryview]) -> None:
    """Send bytes that :func:`take` receives."""
    connection.send([len(part) for part in parts])
    if any(parts):
        with open(os.memfd_create("vlmds"), "wb") as file:
            file.writelines(parts)
            file.flush()
            send_handle(connection, file.fileno(), None)


def take(connection: Connection) -> list[memoryview]:
    """What :func:`give` sent, as writable views; the memory is freed with the last of them."""
    sizes = connection.recv()
    if not any(sizes):
        return [memoryview(b"")] * len(sizes)
    descriptor = recv_handle(connection)
    try:
        whole = memoryview(mmap.mmap(descriptor, sum(sizes)))
    finally:
        os.close(descriptor)
    ends = list(accumulate(sizes))
    return [whole[end - size : end] for end, size in zip(ends, sizes)]
