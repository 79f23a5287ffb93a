"""Decode videos in child processes that may hang or crash without harm to the caller.

Neither FFmpeg nor decord can be interrupted from Python, so each child asks the kernel for SIGALRM
before it starts on a video. Its default action ends the process whatever it is doing, even when
the parent is gone.
"""

import hashlib
import io
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path, PurePosixPath
from typing import Any

import av.logging
import numpy as np
from PIL import Image

from vlmds.data import video
from vlmds.errors import SampleError

LOOK_AHEAD = 256 << 20  # bytes of replies held back until an earlier one arrives
MAX_BYTES = 8 << 30  # the largest member that a ustar header can state


@dataclass(frozen=True)
class Request:
    """A video to prepare; see `vlmds.data.pack.pack` for the options.

    store: as for packing, or "pixels": one member "rgb", uint8 [num_frames, 3, size, size].
    """

    video: str
    start: float | None
    end: float | None
    store: str
    num_frames: int
    image_size: int
    quality: int = 95
    verify: bool = True


@dataclass(frozen=True)
class Reply:
    """A reason for rejection, or facts about the video and its members {extension: bytes}."""

    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(member) for member in self.members.values())


def prepare(request: Request) -> Reply:
    """Probe the video and make its members. Raises SampleError."""
    span = (request.num_frames, request.start, request.end)
    data = _read(request.video)
    info = video.probe(data)
    picks = video.pick(info, *span)
    facts = {
        "frames": info.frames, "fps": round(info.fps, 6), "duration": round(info.duration, 6),
        "width": info.width, "height": info.height, "codec": info.codec,
        "rotation": info.rotation, "decoder": info.decoder,
        "content": hashlib.sha256(data).hexdigest()}
    if request.store == "video":
        if request.verify:
            facts["decoder"] = _verified_decoder(data, info, span)
        return Reply(None, facts, {_extension(request.video, info.container): data})

    # PyAV, for it reports damage that decord passes over.
    frames = video.decode_frames(data, replace(info, decoder="pyav"), *span)
    images = video.resize_frames(frames, request.image_size)
    if request.store == "pixels":
        return Reply(None, facts, {"rgb": images.tobytes()})
    facts["decoder"] = "pyav"
    facts["timestamps"] = [round(float(t), 6) for t in info.pts[picks]]
    return Reply(None, facts, {
        f"{i}.jpg": _jpeg(image, request.quality) for i, image in enumerate(images)})


def _verified_decoder(data: bytes, info: video.VideoInfo, span: tuple) -> str:
    """Decode the sampled frames, and keep decord only if it gives the same ones as PyAV."""
    frames = video.decode_frames(data, replace(info, decoder="pyav"), *span)
    if info.decoder == "pyav":
        return "pyav"
    try:
        same = np.array_equal(frames, video.decode_decord(data, info, video.pick(info, *span)))
    except SampleError:
        same = False
    return "decord" if same else "pyav"


def _read(path: str) -> bytes:
    """The bytes of a local file or URL."""
    try:
        data = _read_url(path) if "://" in path else _read_local(Path(path))
    except FileNotFoundError:
        raise SampleError("file not found") from None
    if not data:
        raise SampleError("file is empty")
    if len(data) >= MAX_BYTES:
        raise SampleError("file too large: 8 GiB is the limit of a tar member")
    return data


def _read_local(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SampleError(f"file cannot be read: {error.strerror}") from error


def _read_url(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise
    except Exception as error:  # each protocol's driver has its own
        raise SampleError(f"file cannot be read: {type(error).__name__}: {error}") from error


def _extension(path: str, container: str) -> str:
    extension = PurePosixPath(path.split("?")[0]).suffix[1:].lower()
    if extension.isascii() and extension.isalnum() and len(extension) <= 8 and extension != "json":
        return extension
    return {"matroska,webm": "mkv", "avi": "avi", "mpegts": "ts"}.get(container, "mp4")


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [3, size, size] as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(
        buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decode_videos(
    videos: Iterable[str], num_frames: int, image_size: int, *, workers: int, deadline: float = 60.0
) -> Iterator[np.ndarray | SampleError]:
    """For each video (path or URL), in order, its sampled frames, uint8 [F, 3, size, size], or why
    it cannot be used. A decoder that hangs or crashes ends with its child process."""
    requests = (Request(v, None, None, "pixels", num_frames, image_size) for v in videos)
    with DecodePool(workers, deadline) as pool:
        for reply in pool.map(requests):
            if reply.reason is not None:
                yield SampleError(reply.reason)
            else:
                pixels = np.frombuffer(bytearray(reply.members["rgb"]), np.uint8)
                yield pixels.reshape(num_frames, 3, image_size, image_size)


class DecodePool:
    """`lanes` child processes, each busy with one video at a time. Use as a context manager."""

    def __init__(self, lanes: int, deadline: float):
        self._deadline = deadline
        self._idle: list[_Child] = []
        self._busy: dict[Connection, tuple[_Child, int]] = {}
        self._vacant = lanes  # children that may yet be started

    def map(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Replies in the order of the requests. A child's death is a Reply with a reason."""
        waiting = enumerate(requests)
        done: dict[int, Reply] = {}
        held = 0  # bytes in done
        exhausted = False
        position = 0
        while True:
            while not exhausted and (self._idle or self._vacant) and held < LOOK_AHEAD:
                index, request = next(waiting, (None, None))
                if request is None:
                    exhausted = True
                else:
                    self._start(index, request)
            if position in done:
                reply = done.pop(position)
                held -= reply.size
                position += 1
                yield reply
            elif self._busy:
                for connection in wait(list(self._busy)):
                    child, index = self._busy.pop(connection)
                    done[index] = self._finish(child)
                    held += done[index].size
            else:
                return

    def _start(self, index: int, request: Request) -> None:
        if self._idle:
            child = self._idle.pop()
        else:
            child = _Child(self._deadline)
            self._vacant -= 1
        self._busy[child.connection] = child, index
        child.send(request)

    def _finish(self, child: "_Child") -> Reply:
        try:
            reply = child.receive()
        except (EOFError, OSError):
            self._vacant += 1
            code = child.reap()
            if not child.ready:
                raise RuntimeError(f"the decoding process did not start (exit code {code})")
            if code == -signal.SIGALRM:
                return Reply(f"decoder hung: stopped after {self._deadline:g} s")
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Reply(f"decoder crashed: {how}")
        self._idle.append(child)
        return reply

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_) -> None:
        for child in [*self._idle, *(child for child, _ in self._busy.values())]:
            child.kill()


class _Child:
    """The parent's end of one child process."""

    def __init__(self, deadline: float):
        ours, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(deadline)],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        self.connection = Connection(ours.detach())
        self.ready = False

    def send(self, request: Request) -> None:
        try:
            self.connection.send(request)
        except OSError:
            pass  # it died meanwhile; receive() tells

    def receive(self) -> Reply:
        """Raises EOFError or OSError if the child is dead."""
        if not self.ready:
            self.connection.recv_bytes()
            self.ready = True
        reason, facts, extensions = pickle.loads(self.connection.recv_bytes())
        return Reply(reason, facts, {e: self.connection.recv_bytes() for e in extensions})

    def reap(self) -> int:
        """The exit code of a child that closed its end of the connection."""
        try:
            self._process.wait(timeout=5.0)  # the socket closes a moment before the process ends
        except subprocess.TimeoutExpired:
            pass
        return self.kill()

    def kill(self) -> int:
        """End the process, unless it has ended, and return its exit code."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()


def main(descriptor: int, deadline: float) -> None:
    """The child: answer requests until the parent closes the connection."""
    import decord  # before the first deadline starts

    av.logging.set_level(av.logging.PANIC)  # what matters becomes a reason
    decord.logging.set_level(decord.logging.QUIET)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may have ignored it
    connection = Connection(descriptor)
    connection.send_bytes(b"ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, deadline)
        try:
            reply = prepare(request)
        except SampleError as error:
            reply = Reply(str(error))
        signal.setitimer(signal.ITIMER_REAL, 0)  # the parent may take its time to receive
        connection.send_bytes(pickle.dumps((reply.reason, reply.facts, list(reply.members))))
        for member in reply.members.values():
            connection.send_bytes(member)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
