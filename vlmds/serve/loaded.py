"""The runs that a server has loaded, and its limits."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmds.errors import InputError, SampleError
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.runs.folder import final_artifact
from vlmds.video.pool import video_facts

WAITING = 16  # requests that may wait for, or have, the device or a decoder; more are turned away
DECODERS = 2  # videos decoded at once


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        megabytes: of a video file. seconds: of a video.
        urls: whether videos may be fetched from http(s) URLs that a request names.
        tokens: most that a request may ask for. prompt: its most characters.
        decode_seconds: that a decoder may take.

    Raises:
        InputError: a limit that lets nothing through.
    """

    megabytes: float = 200.0
    seconds: float = 600.0
    urls: bool = False
    tokens: int = 1024
    prompt: int = 4000
    decode_seconds: float = 60.0

    def __post_init__(self):
        for option, value in (("--max-mb", self.megabytes), ("--max-seconds", self.seconds)):
            if not 0 < value < float("inf"):
                raise InputError(f"{option} {value:g}: must be above 0")

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)


class Busy(Exception):
    """Too many requests wait already."""


class RequestError(Exception):
    """A request asks for what this server does not do. The message is for who sent it.

    status: the HTTP one.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Models:
    """Captioners by name, on one device, whose turns they take.

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
        artifacts = [final_artifact(run) for run in runs]  # all are looked at before one is loaded
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
        """The prompt (None if there is nothing in it) and the options, as a request may have them.
        Raises RequestError."""
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
        """What :func:`vlmds.video.pool.video_facts` knows of a video file.

        Raises:
            SampleError: it is no video, or more than the limits allow.
            Busy
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
        """What this captioner sees of the video: uint8 [F, 3, S, S]. Raises SampleError, Busy."""
        with self._decoders.turn():
            frames = next(captioner.frames([str(path)], workers=1, deadline=self.limits.decode_seconds))
        if isinstance(frames, SampleError):
            raise frames
        return frames

    def stream(
        self, captioner: VideoCaptioner, frames: np.ndarray, prompt: str | None, options: GenerationOptions
    ) -> Generator[str, None, str]:
        """:meth:`VideoCaptioner.stream`, once the device is free; empty pieces until then. Raises
        Busy."""
        with self._device.place():
            while not self._device.lanes.acquire(timeout=1.0):
                yield ""
            try:
                return (yield from captioner.stream(frames, prompt, options))
            finally:
                self._device.lanes.release()


class _Queue:
    """`lanes` at a time; of the others, so many wait that they are WAITING together."""

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
