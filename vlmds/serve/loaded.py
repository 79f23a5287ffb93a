"""The models that a server has loaded, and the queues of its requests."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlmds.errors import InputError, SampleError
from vlmds.inference.options import GenerationOptions
from vlmds.inference.video_captioner import Ending, VideoCaptioner
from vlmds.models.artifact import read_artifact
from vlmds.runs.folder import final_artifact
from vlmds.serve.limits import Limits
from vlmds.video.pool import video_facts

WAITING = 16  # requests that may use or wait for the device or a decoder; more are refused
DECODERS = 2  # videos decoded at once


class Busy(Exception):
    """Too many requests are waiting."""


class RequestError(Exception):
    """A request that this server does not serve. The message is for the client.

    status: of HTTP.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Models:
    """Captioners by name, which take turns on one device.

    Args:
        captioners: by the name that requests use; the first is the default.
    """

    def __init__(self, captioners: dict[str, VideoCaptioner], limits: Limits):
        self.captioners, self.limits = captioners, limits
        self._device = _Queue(1)
        self._decoders = _Queue(DECODERS)

    @classmethod
    def load(
        cls, runs: Sequence[Path], limits: Limits, *, device: str | None = None, overrides: Sequence[str] = ()
    ) -> Models:
        """Raises InputError: a run that cannot be loaded."""
        artifacts = [read_artifact(final_artifact(run)) for run in runs]  # all, before one is loaded
        return cls(
            {
                name: VideoCaptioner.from_pretrained(artifact, device=device, overrides=overrides)
                for name, artifact in zip(_names(runs), artifacts)
            },
            limits,
        )

    @property
    def names(self) -> list[str]:
        return list(self.captioners)

    def get(self, name: str | None) -> VideoCaptioner:
        """The captioner of this name; None: the default. Raises RequestError."""
        name = self.names[0] if name is None else name
        if name not in self.captioners:
            raise RequestError(f"model {name[:100]!r} is not here; there are: " + ", ".join(self.names), 404)
        return self.captioners[name]

    def options(self, prompt: str | None, **options) -> tuple[str | None, GenerationOptions]:
        """The prompt (None if it is blank) and the options of a request. Raises RequestError: beyond the
        limits."""
        if prompt is not None and len(prompt) > self.limits.prompt:
            raise RequestError(
                f"the prompt has {len(prompt):,} characters; this server takes at most {self.limits.prompt:,}"
            )
        try:
            made = GenerationOptions(**options)
        except InputError as error:
            raise RequestError(str(error)) from None
        if made.max_new_tokens > self.limits.tokens:
            raise RequestError(
                f"{made.max_new_tokens:,} tokens are too many; this server writes at most {self.limits.tokens:,}"
            )
        return prompt if prompt and prompt.strip() else None, made

    def facts(self, path: Path) -> dict[str, Any]:
        """The facts of :func:`vlmds.video.pool.video_facts` about a video file.

        Raises:
            SampleError: not a video, or beyond the limits.
            Busy: too many requests are waiting.
        """
        if path.stat().st_size > self.limits.bytes:
            raise SampleError(f"file too large: this server takes at most {self.limits.megabytes:g} MB")
        with self._decoders.turn():
            found = next(video_facts([str(path)], workers=1, deadline=self.limits.decode_seconds))
        if isinstance(found, SampleError):
            raise found
        if found["duration"] > self.limits.seconds:
            raise SampleError(
                f"video too long: {found['duration']:,.0f} s; this server takes at most {self.limits.seconds:,g} s"
            )
        return found

    def frames(self, path: Path, captioner: VideoCaptioner) -> np.ndarray:
        """The video's frames for this captioner, uint8 [F, 3, S, S]. Raises SampleError, Busy."""
        with self._decoders.turn():
            frames = next(captioner.frames([str(path)], workers=1, deadline=self.limits.decode_seconds))
        if isinstance(frames, SampleError):
            raise frames
        return frames

    def stream(
        self,
        captioner: VideoCaptioner,
        frames: np.ndarray,
        prompt: str | None,
        options: GenerationOptions,
        stop: Sequence[str] = (),
    ) -> Generator[str, None, Ending]:
        """:meth:`VideoCaptioner.stream`, once the device is free; empty pieces until then. Raises
        Busy."""
        with self._device.place():
            while not self._device.lanes.acquire(timeout=1.0):
                yield ""
            try:
                return (yield from captioner.stream(frames, prompt, options, stop))
            finally:
                self._device.lanes.release()


class _Queue:
    """`lanes` requests at a time. Running and waiting ones are at most WAITING."""

    def __init__(self, lanes: int):
        self.lanes = threading.Semaphore(lanes)
        self._places = threading.Semaphore(WAITING)

    @contextmanager
    def place(self) -> Iterator[None]:
        if not self._places.acquire(blocking=False):
            raise Busy
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self.place(), self.lanes:
            yield


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, numbered where two are equal."""
    names: list[str] = []
    for run in runs:
        name, number = run.resolve().name, 1
        while name in names:
            number += 1
            name = f"{run.resolve().name}-{number}"
        names.append(name)
    return names
