"""Decode videos in child processes that may hang or crash without harm to the caller.

Neither FFmpeg nor decord can be interrupted from Python, so each child asks the kernel for SIGALRM
before it starts on a video. Its default action ends the process whatever it is doing, even when
the parent is gone. Between videos a child ends as soon as its parent has: it watches the parent's
process, for a fork of the parent may hold the connection open.
"""

import hashlib
import io
import os
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
from vlmds.data.repair import repair
from vlmds.errors import SampleError

LOOK_AHEAD = 256 << 20  # bytes of replies held back until an earlier one arrives
MAX_BYTES = 8 << 30  # the largest member that a ustar header can state
GRACE = 10.0  # seconds past the deadline in which a child's alarm ends it, unless it is stopped
START_SECONDS = 120.0  # a child imports its libraries, at worst from a slow network disk
# A scheduler signals all processes of a job, and the parent still needs its children then.
IGNORED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


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
class FramesRequest:
    """Frames of a packed video, the bytes of which follow; see `FrameDecoder.frames`."""

    num_frames: int
    image_size: int
    start: float | None
    end: float | None
    decoder: str


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
        return _stored_video(request, data, info, facts)

    # PyAV, for it reports damage that decord passes over.
    frames = video.decode_frames(data, replace(info, decoder="pyav"), *span)
    images = video.resize_frames(frames, request.image_size)
    if request.store == "pixels":
        return Reply(None, facts, {"rgb": images.tobytes()})
    facts["decoder"] = "pyav"
    facts["timestamps"] = [round(float(t), 6) for t in info.pts[picks]]
    return Reply(None, facts, {
        f"{i}.jpg": _jpeg(image, request.quality) for i, image in enumerate(images)})


def _stored_video(
    request: Request, data: bytes, info: video.VideoInfo, facts: dict[str, Any]
) -> Reply:
    """The member of a video store. Only its decoder and span are those of what is stored; the
    other facts stay the original's."""
    stored = repair(data, info, request.num_frames, request.start, request.end)
    span = (request.num_frames, stored.start, stored.end)
    decoder = stored.info.decoder
    if request.verify:
        decoder = _verified_decoder(stored.data, stored.info, span)
    facts |= {"decoder": decoder, "start": stored.start, "end": stored.end}
    name = request.video
    if stored.record:
        facts["repair"] = stored.record
        name = ""  # its extension may be wrong now
    return Reply(None, facts, {_extension(name, stored.info.container): stored.data})


def decode(request: FramesRequest, data: bytes) -> Reply:
    """The request's frames as a member "rgb". Raises SampleError."""
    info = replace(video.probe(data), decoder=request.decoder)
    frames = video.decode_frames(data, info, request.num_frames, request.start, request.end)
    return Reply(members={"rgb": video.resize_frames(frames, request.image_size).tobytes()})


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


class FrameDecoder:
    """Decodes packed videos in a child process of its own, one at a time.

    The child starts with the first video and again after one that hung or crashed. Can be pickled,
    and used after a fork: each process has its own child. Not for several threads at once.

    deadline: seconds that a video may take.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline
        self._child: _Child | None = None

    def frames(
        self, data: bytes, *, num_frames: int, image_size: int, start: float | None,
        end: float | None, decoder: str,
    ) -> np.ndarray:
        """The frames sampled from [start, end]: uint8 [num_frames, 3, image_size, image_size].

        data: the video file. start, end: seconds, None for the video's own. decoder: "pyav" or
        "decord", as packing found. Raises SampleError: damaged, hung, crashed.
        """
        child = self._running_child()
        try:
            child.send(FramesRequest(num_frames, image_size, start, end, decoder), data)
            reply = child.receive()
        except (EOFError, OSError):
            self._child = None
            raise SampleError(child.last_words()) from None
        except BaseException:  # interrupted: its reply must not become the next video's
            self.close()
            raise
        if reply.reason is not None:
            raise SampleError(reply.reason)
        pixels = np.frombuffer(bytearray(reply.members["rgb"]), np.uint8)
        return pixels.reshape(num_frames, 3, image_size, image_size)

    def close(self) -> None:
        """End the child; the next video starts another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _running_child(self) -> "_Child":
        if self._child is None or not self._child.is_usable():
            self.close()
            self._child = _Child(self.deadline)
        return self._child

    def __getstate__(self) -> dict[str, Any]:
        return {"deadline": self.deadline, "_child": None}

    def __del__(self) -> None:
        self.close()


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
            return Reply(child.last_words())
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
        self._deadline = deadline
        self._owner = os.getpid()
        ours, theirs = socket.socketpair()
        # Blocked, such a signal waits until the child has come to ignore it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            with theirs:
                # A session of its own: Ctrl-C reaches the parent alone, which ends its children.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno()), str(deadline),
                     str(self._owner)],
                    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.connection = Connection(ours.detach())
        self._ready = False
        self._overdue = False

    def is_usable(self) -> bool:
        """Whether it runs, and for this process."""
        return self._owner == os.getpid() and self._process.poll() is None

    def send(self, request: Request | FramesRequest, data: bytes | None = None) -> None:
        try:
            self.connection.send(request)
            if data is not None:
                self._await_start()  # or sending could block for good
                self.connection.send_bytes(data)
        except OSError:
            pass  # it died meanwhile; receive() tells

    def receive(self) -> Reply:
        """Raises EOFError or OSError if the child is dead, or does not answer in time."""
        self._await_start()
        self._await(self._deadline + GRACE)
        reason, facts, extensions = pickle.loads(self.connection.recv_bytes())
        return Reply(reason, facts, {e: self.connection.recv_bytes() for e in extensions})

    def _await_start(self) -> None:
        if not self._ready:
            self._await(START_SECONDS)
            self.connection.recv_bytes()
            self._ready = True

    def _await(self, seconds: float) -> None:
        if not self.connection.poll(seconds):
            self._overdue = True
            self._process.kill()
            raise EOFError

    def last_words(self) -> str:
        """Why a child that closed its end of the connection has ended."""
        try:
            self._process.wait(timeout=5.0)  # the socket closes a moment before the process ends
        except subprocess.TimeoutExpired:
            pass
        code = self.kill()
        if not self._ready:
            raise RuntimeError(f"the decoding process did not start (exit code {code})")
        if self._overdue or code == -signal.SIGALRM:
            return f"decoder hung: stopped after {self._deadline:g} s"
        return f"decoder crashed: {f'signal {-code}' if code < 0 else f'exit code {code}'}"

    def kill(self) -> int:
        """End the process, unless it has ended, and return its exit code. In a fork of its owner:
        forget it."""
        self.connection.close()
        if self._owner != os.getpid():
            self._process.returncode = 0  # not ours to wait for
        self._process.kill()
        return self._process.wait()


def main(descriptor: int, deadline: float, parent: int) -> None:
    """The child: answer requests until the parent ends or closes the connection."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    import decord  # before the first deadline starts

    av.logging.set_level(av.logging.PANIC)  # what matters becomes a reason
    decord.logging.set_level(decord.logging.QUIET)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may have ignored it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    connection = Connection(descriptor)
    parent_end = os.pidfd_open(parent)
    if os.getppid() != parent:
        return
    try:
        connection.send_bytes(b"ready")
        while parent_end not in wait([connection, parent_end]):
            request = connection.recv()
            data = connection.recv_bytes() if isinstance(request, FramesRequest) else None
            signal.setitimer(signal.ITIMER_REAL, deadline)
            reply = _answer(request, data)
            signal.setitimer(signal.ITIMER_REAL, 0)  # the parent may take its time to receive
            connection.send_bytes(pickle.dumps((reply.reason, reply.facts, list(reply.members))))
            for member in reply.members.values():
                connection.send_bytes(member)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def _answer(request: Request | FramesRequest, data: bytes | None) -> Reply:
    try:
        return prepare(request) if data is None else decode(request, data)
    except SampleError as error:
        return Reply(str(error))
    except MemoryError:
        return Reply("cannot be decoded: out of memory")


if __name__ == "__main__":
    from vlmds.data import decode_child  # requests are instances of its classes, not of __main__'s

    decode_child.main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
