"""Decode videos in child processes that may hang or crash without harm to the caller.

Neither FFmpeg nor decord can be interrupted from Python, so each child asks the kernel for SIGALRM
before it starts on a video. Its default action ends the process whatever it is doing, even when
the parent is gone; an idle child sees the end of its socket and exits. A limit on its memory makes
a video bomb an error of the child and not the end of the machine.

`DecodePool` has several children (packing, captioning), `FrameDecoder` one (a training reader).
"""

import hashlib
import io
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path, PurePosixPath
from typing import Any

import av.logging
import numpy as np
from PIL import Image

from vlmds.data import repair, video
from vlmds.errors import SampleError

LOOK_AHEAD = 256 << 20  # bytes of replies held back until an earlier one arrives
MAX_BYTES = 8 << 30  # the largest member that a ustar header can state
MEMORY = 6 << 30  # bytes of address space for a child, besides its video
GRACE = 30.0  # seconds past the deadline after which the parent itself ends a child


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
    """Frames of a video whose bytes follow; see `FrameDecoder.frames`."""

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


def prepare(request: Request, data: bytes) -> Reply:
    """Probe the video (a file's bytes) and make its members. Raises SampleError."""
    info = video.probe(data)
    content = hashlib.sha256(data).hexdigest()  # of what came in, to find duplicates
    if request.store == "video":
        reply = _prepare_video(request, data, info)
        reply.facts["content"] = content
        return reply

    span = (request.num_frames, request.start, request.end)
    picks = video.pick(info, *span)
    # PyAV, for it reports damage that decord passes over.
    frames = video.decode_frames(data, replace(info, decoder="pyav"), *span)
    images = video.resize_frames(frames, request.image_size)
    if request.store == "pixels":
        return Reply(members={"rgb": images.tobytes()})
    facts = _facts(info) | {"content": content} | {
        "decoder": "pyav", "timestamps": [round(float(t), 6) for t in info.pts[picks]]}
    return Reply(None, facts, {
        f"{i}.jpg": _jpeg(image, request.quality) for i, image in enumerate(images)})


def _prepare_video(request: Request, data: bytes, info: video.VideoInfo) -> Reply:
    """The file itself, or what `repair.mend` makes of it."""
    span = (request.num_frames, request.start, request.end)
    video.pick(info, *span)
    mended = repair.mend(data, info, request.start, request.end)
    extension = _extension(request.video, info.container)
    facts = {}
    if mended is not None:
        data, info = mended.data, mended.info
        extension = "mkv" if "matroska" in info.container else "mp4"
        span = (request.num_frames, mended.start, mended.end)
        # The span of the file that is kept, in place of the manifest's.
        facts = {"repair": mended.facts, "start": mended.start, "end": mended.end}
    facts |= _facts(info)
    if request.verify:
        facts["decoder"] = _verified_decoder(data, info, span)
    return Reply(None, facts, {extension: data})


def _facts(info: video.VideoInfo) -> dict[str, Any]:
    return {
        "frames": info.frames, "fps": round(info.fps, 6), "duration": round(info.duration, 6),
        "width": info.width, "height": info.height, "codec": info.codec,
        "rotation": info.rotation, "decoder": info.decoder}


def read_frames(data: bytes, request: FramesRequest) -> Reply:
    """The frames of a packed video. Raises SampleError."""
    info = video.probe(data)
    if request.decoder != "decord":  # what packing found wins, but decord needs the probe's consent
        info = replace(info, decoder="pyav")
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
    """Decodes videos in one child process, for one thread of its owner.

    The child starts with the first video, and again after it had to be ended. Can be pickled, and
    used after a fork: each process has a child of its own, which ends with it.

    Args:
        deadline: seconds that a video may take.
    """

    def __init__(self, deadline: float):
        self._deadline = deadline
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None before it starts and after it had to be ended."""
        return self._child.pid if self._child is not None and not self._child.closed else None

    def frames(
        self, data: bytes, *, num_frames: int, image_size: int, start: float | None = None,
        end: float | None = None, decoder: str = "decord",
    ) -> np.ndarray:
        """The frames that stand for [start, end] (seconds; default: the video), resized.

        data: a video file's bytes. decoder: "pyav", or "decord" to use it where the probe clears
        the file. Returns uint8 [num_frames, 3, image_size, image_size]. Raises SampleError: it
        cannot be decoded, or its decoder hung, crashed or ran out of memory.
        """
        if self._child is None or self._child.closed:  # closed: it is that of the forking process
            self._child = _Child(self._deadline)
        self._child.send(FramesRequest(num_frames, image_size, start, end, decoder), data)
        reply = self._child.reply()
        if not self._child.alive:
            self._child = None
        if reply.reason is not None:
            raise SampleError(reply.reason)
        pixels = np.frombuffer(bytearray(reply.members["rgb"]), np.uint8)
        return pixels.reshape(num_frames, 3, image_size, image_size)

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_deadline": self._deadline, "_child": None}


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
        reply = child.reply()
        if child.alive:
            self._idle.append(child)
        else:
            self._vacant += 1
        return reply

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_) -> None:
        for child in [*self._idle, *(child for child, _ in self._busy.values())]:
            child.kill()


class _Child:
    """The parent's end of one child process.

    closed: killed, or (after a fork) left to the process that started it.
    alive: whether it may be sent another request.
    """

    _all: "weakref.WeakSet[_Child]" = weakref.WeakSet()

    def __init__(self, deadline: float):
        ours, theirs = socket.socketpair()
        command = (f"from vlmds.data.decode_child import main; "
                   f"main({theirs.fileno()}, {float(deadline)})")
        with theirs:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        self.connection = Connection(ours.detach())
        self.alive = True
        self._owner = os.getpid()
        self._deadline = deadline
        self._ready = False
        self._all.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def closed(self) -> bool:
        return self.connection.closed

    def send(self, request: "Request | FramesRequest", data: bytes | None = None) -> None:
        """Send a request; data: the video's bytes, for a FramesRequest."""
        try:
            self.connection.send(request)
            if data is not None:
                self.connection.send_bytes(data)
        except OSError:
            pass  # it died meanwhile; reply() tells

    def reply(self) -> Reply:
        """Wait for the answer to the request. A dead child's is the reason."""
        try:
            if not self._ready:
                self.connection.recv_bytes()
                self._ready = True
            # The child's own alarm comes first, but where the kernel keeps a process from dying
            # (a stuck network drive) only this ends the wait.
            if not self.connection.poll(self._deadline + GRACE):
                return self._dead(-signal.SIGALRM)
            reason, facts, extensions = pickle.loads(self.connection.recv_bytes())
            return Reply(reason, facts, {e: self.connection.recv_bytes() for e in extensions})
        except (EOFError, OSError):
            try:
                code = self._process.wait(timeout=5.0)  # the socket closes a moment before
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            return self._dead(code)

    def _dead(self, code: int) -> Reply:
        self.kill()
        if not self._ready:
            raise RuntimeError(f"the decoding process did not start (exit code {code})")
        if code == -signal.SIGALRM:
            return Reply(f"decoder hung: stopped after {self._deadline:g} s")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Reply(f"decoder crashed: {how}")

    def kill(self) -> None:
        """End the process, unless it has ended."""
        self.alive = False
        if self.closed:
            return
        self.connection.close()
        self._process.kill()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            pass  # the kernel ends it when it can

    def __del__(self):
        if os.getpid() == getattr(self, "_owner", None):
            self.kill()

    @classmethod
    def _forked(cls) -> None:
        """A forked process must not keep a copy of the sockets, or the children that are not its
        own would not see the end of their parent."""
        for child in list(cls._all):
            child.connection.close()
            child._process.returncode = 0  # not a child of this process: nothing to wait for


os.register_at_fork(after_in_child=_Child._forked)


def main(descriptor: int, deadline: float) -> None:
    """The child: answer requests until the parent closes the connection."""
    import decord  # before the first deadline starts

    av.logging.set_level(av.logging.PANIC)  # what matters becomes a reason
    decord.logging.set_level(decord.logging.QUIET)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may have ignored it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        # Schedulers signal all processes of a job; this one ends when its parent does.
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    connection = Connection(descriptor)
    try:
        connection.send_bytes(b"ready")
        while True:
            request = connection.recv()
            data = connection.recv_bytes() if isinstance(request, FramesRequest) else None
            signal.setitimer(signal.ITIMER_REAL, deadline)
            reply = _answer(request, data)
            del data
            signal.setitimer(signal.ITIMER_REAL, 0)  # the parent may take its time to receive
            connection.send_bytes(pickle.dumps((reply.reason, reply.facts, list(reply.members))))
            for member in reply.members.values():
                connection.send_bytes(member)
            del reply
            _limit_memory(None)  # the next request is read without one
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(request: "Request | FramesRequest", data: bytes | None) -> Reply:
    try:
        if isinstance(request, Request):
            data = _read(request.video)
            _limit_memory(MEMORY + 3 * len(data))  # a mended copy, and its writing
            return prepare(request, data)
        _limit_memory(MEMORY + len(data))
        return read_frames(data, request)
    except SampleError as error:
        return Reply(str(error))
    except MemoryError:
        return Reply(f"out of memory: decoding needs more than {MEMORY >> 30} GiB")


def _limit_memory(size: int | None) -> None:
    """Limit this process to `size` more bytes of address space than it has now; None: no limit
    but that with which it was started."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard
    if size is not None:
        with open("/proc/self/statm", "rb") as file:
            soft = int(file.read().split()[0]) * resource.getpagesize() + size
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
