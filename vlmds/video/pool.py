"""Decoding in child processes, which may hang or crash without harm to the caller.

Neither FFmpeg nor decord can be interrupted from Python, so each child sets an alarm (SIGALRM) before
it starts on a video. The alarm's default action ends the process whatever it is doing, even if the
parent has ended; an idle child sees the end of its socket and exits. A repair of a long video takes
longer than the deadline: the child announces its own.

A process that hangs in the kernel (a stuck network drive) survives even the alarm: the parent gives it
up a while later and continues without it.

`DecodePool` has several children (packing, captioning), `FrameDecoder` one (a training reader).
"""

import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from vlmds.errors import SampleError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.video.decode_work import FramesRequest, VideoReply, VideoRequest
from vlmds.video.fit import FIT
from vlmds.video.handover import give, take
from vlmds.video.sampling import is_still

LOOK_AHEAD = 256 << 20  # bytes of replies that wait for an earlier one
LIFETIME = 2000  # videos after which a child is replaced: the decoders leak a few KB on some files
START = 300.0  # seconds that a child may take to start: Python may lie on a slow network drive
GRACE = 30.0  # seconds past the deadline after which the parent gives a child up


@dataclass(frozen=True)
class Clip:
    """A span of a video (path or URL), in seconds from its beginning; None: from or to the end."""

    video: str
    start: float | None = None
    end: float | None = None


def decode_videos(
    videos: Iterable[str | Clip],
    num_frames: int,
    image_size: int,
    *,
    workers: int,
    deadline: float = DECODE_SECONDS,
    fit: str = FIT,
) -> Iterator[np.ndarray | SampleError]:
    """For each video (path, URL or Clip), in order, its sampled frames, uint8 [F, 3, size, size] (F is 1 for a still
    picture, as in training), or why it cannot be used. A decoder that hangs or crashes ends with its child process."""
    clips = (video if isinstance(video, Clip) else Clip(str(video)) for video in videos)
    for result in decode_windows(
        ((clip, 1) for clip in clips), num_frames, image_size, workers=workers, deadline=deadline, fit=fit
    ):
        yield result if isinstance(result, SampleError) else result[0][0]


def decode_windows(
    clips: Iterable[tuple[Clip, int]],
    num_frames: int,
    image_size: int,
    *,
    workers: int,
    deadline: float = DECODE_SECONDS,
    fit: str = FIT,
) -> Iterator[tuple[np.ndarray, dict[str, Any]] | SampleError]:
    """For each clip, in order, the sampled frames of the W equal windows that it is cut into,
    uint8 [W, F, 3, size, size], and the facts as of :func:`video_facts`; or why it cannot be
    used. F is 1 for a still picture, as in training. The file is read once for all its windows.

    clips: with W. num_frames: F, of a window. deadline: seconds that a clip may take.
    fit: of the frames to the square (`resize_frames`).
    """
    # The centres of W x F equal spans are those of F spans of each window.
    counts: list[int] = []

    def requests() -> Iterator[VideoRequest]:
        for clip, windows in clips:
            counts.append(windows)
            yield VideoRequest(clip.video, clip.start, clip.end, "pixels", windows * num_frames, image_size, fit=fit)

    with DecodePool(workers, deadline) as pool:
        for number, reply in enumerate(pool.map(requests())):
            if reply.reason is not None:
                yield SampleError(reply.reason)
                continue
            shape = counts[number], num_frames, 3, image_size, image_size
            pixels = np.frombuffer(reply.members["rgb"], np.uint8).reshape(shape)
            yield pixels[:, :1] if is_still(reply.facts["frames"]) else pixels, reply.facts


def video_facts(
    videos: Iterable[str], *, workers: int, deadline: float = DECODE_SECONDS
) -> Iterator[dict[str, Any] | SampleError]:
    """For each video (path or URL), in order, what the probe says of it: frames, fps,
    duration (seconds), width, height (as displayed), codec, rotation (degrees), decoder; or why it
    cannot be read."""
    requests = (VideoRequest(str(video), None, None, "facts", 0, 0) for video in videos)
    with DecodePool(workers, deadline) as pool:
        for reply in pool.map(requests):
            yield reply.facts if reply.reason is None else SampleError(reply.reason)


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
        self,
        data: bytes,
        *,
        num_frames: int,
        image_size: int,
        start: float | None = None,
        end: float | None = None,
        decoder: str = "decord",
        described: dict[str, Any] | None = None,
        fit: str = FIT,
    ) -> np.ndarray:
        """The frames that stand for [start, end] (seconds; default: the video), fitted to squares.

        data: a video file's bytes. decoder: "pyav", or "decord" to use it where the probe clears
        the file. described: packing's description of the file, in place of a probe (see
        `FrameTable.from_described`). fit: as for `resize_frames`. Returns uint8 [num_frames, 3, image_size,
        image_size]. Raises SampleError: it cannot be decoded, or its decoder hung, crashed or ran out of memory.
        """
        if self._child is None or self._child.closed:  # closed: it is that of the forking process
            self._child = _Child(self._deadline)
        self._child.send(FramesRequest(num_frames, image_size, start, end, decoder, described, fit), data)
        reply = self._child.reply()
        if not self._child.alive:
            self._child = None
        if reply.reason is not None:
            raise SampleError(reply.reason)
        pixels = np.frombuffer(reply.members["rgb"], np.uint8)
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

    def map(self, requests: Iterable[VideoRequest]) -> Iterator[VideoReply]:
        """Replies in the order of the requests. A child's death is a VideoReply with a reason."""
        numbered = enumerate(requests)
        done: dict[int, VideoReply] = {}
        waiting_bytes = 0  # in done
        exhausted = False
        position = 0
        while True:
            while not exhausted and (self._idle or self._vacant) and waiting_bytes < LOOK_AHEAD:
                following = next(numbered, None)
                if following is None:
                    exhausted = True
                else:
                    self._start(*following)
            if position in done:
                reply = done.pop(position)
                waiting_bytes -= reply.size
                position += 1
                yield reply
            elif self._busy:
                for index, reply in self._answers():
                    done[index] = reply
                    waiting_bytes += reply.size
            else:
                return

    def _start(self, index: int, request: VideoRequest) -> None:
        if self._idle:
            child = self._idle.pop()
        else:
            child = _Child(self._deadline)
            self._vacant -= 1
        self._busy[child.connection] = child, index
        child.send(request)

    def _answers(self) -> Iterator[tuple[int, VideoReply]]:
        """Wait until a child sends a message or has to be given up; (index, reply) of those that are
        done then."""
        due = min(child.due for child, _ in self._busy.values())
        ready = wait(list(self._busy), max(due - time.monotonic(), 0.0))
        for connection, (child, index) in list(self._busy.items()):
            if connection not in ready and time.monotonic() < child.due:
                continue
            reply = child.receive() if connection in ready else child.give_up()
            if reply is None:
                continue
            del self._busy[connection]
            if child.alive:
                self._idle.append(child)
            else:
                self._vacant += 1
            yield index, reply

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_) -> None:
        children = [*self._idle, *(child for child, _ in self._busy.values())]
        for child in children:
            child.terminate()  # all of them before waiting for any
        for child in children:
            child.kill()


class _Child:
    """The parent's end of one child process.

    closed: killed, or (after a fork) left to the process that started it.
    alive: whether it may be sent another request. due: when it is given up unless it has sent a
    message (`time.monotonic`).
    """

    _all: "weakref.WeakSet[_Child]" = weakref.WeakSet()

    def __init__(self, deadline: float):
        ours, theirs = socket.socketpair()
        command = f"from vlmds.video.child import main; main({theirs.fileno()}, {float(deadline)})"
        with theirs:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # There is a child for each core; NumPy would start a thread for each, too.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self.connection = Connection(ours.detach())
        self.alive = True
        self._owner = os.getpid()
        self._deadline = deadline
        self._ready = False
        self.due = time.monotonic() + START
        self._served = 0
        self._all.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def closed(self) -> bool:
        return self.connection.closed

    def send(self, request: "VideoRequest | FramesRequest", data: bytes | None = None) -> None:
        """Send a request; data: the video's bytes, for a FramesRequest."""
        if self._ready:
            self._start_clock()
        try:
            self.connection.send(request)
            if data is not None:
                give(self.connection, [data])
        except OSError:
            pass  # it has died; reply() reports that

    def reply(self) -> VideoReply:
        """Wait for the answer to the request. If the child has died, the reason."""
        reply = None
        while reply is None:
            ready = self.connection.poll(max(self.due - time.monotonic(), 0.0))
            reply = self.receive() if ready else self.give_up()
        return reply

    def receive(self) -> VideoReply | None:
        """The child's reply, or why it has ended; None: it has only started, or begins a repair, which
        takes longer. Waits for a message if there is none."""
        try:
            if not self._ready:
                self.connection.recv_bytes()
                self._ready = True
                self._start_clock()
                return None
            message = self.connection.recv()
            if isinstance(message, float):
                self._start_clock(message, "repair took too long")
                return None
            reason, facts, extensions = message
            reply = VideoReply(reason, facts, dict(zip(extensions, take(self.connection))))
        except (EOFError, OSError):
            try:
                code = self._process.wait(timeout=5.0)  # the socket closes a moment before
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            return self._dead(code)
        self._served += 1
        if self._served == LIFETIME:
            self.kill()
        return reply

    def give_up(self) -> VideoReply:
        """End a child that has sent no message in time; its own alarm should have ended it before.
        Returns the reason."""
        if not self._ready:
            self.kill()
            raise RuntimeError(f"the decoding process did not start within {START:g} s")
        return self._dead(-signal.SIGALRM)

    def _start_clock(self, seconds: float | None = None, excess: str = "decoder hung") -> None:
        """seconds: the child's own deadline (default: the usual one). excess: the reason if it takes
        longer."""
        seconds = self._deadline if seconds is None else seconds
        self.due = time.monotonic() + seconds + GRACE
        self._excess = f"{excess}: stopped after {seconds:g} s"

    def _dead(self, code: int) -> VideoReply:
        self.kill()
        if not self._ready:
            raise RuntimeError(f"the decoding process did not start (exit code {code})")
        if code == -signal.SIGALRM:
            return VideoReply(self._excess)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return VideoReply(f"decoder crashed: {how}")

    def terminate(self) -> None:
        """Ask the kernel to end the process, which takes a moment."""
        self.alive = False
        if not self.closed:
            self._process.kill()

    def kill(self) -> None:
        """End the process, unless it has ended."""
        self.terminate()
        if self.closed:
            return
        self.connection.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            pass  # the kernel ends it when it can; waiting has no use

    def __del__(self):
        if os.getpid() == getattr(self, "_owner", None):
            self.kill()

    @classmethod
    def _forked(cls) -> None:
        """Close the copies of the sockets in a forked process: otherwise the children of the other
        process would not see the end of their parent."""
        for child in list(cls._all):
            child.connection.close()
            child._process.returncode = 0  # not a child of this process: there is no exit status


os.register_at_fork(after_in_child=_Child._forked)
