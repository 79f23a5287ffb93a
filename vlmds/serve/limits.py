"""The limits of a server. The command line's defaults come from here; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from vlmds.errors import InputError
from vlmds.experiments.defaults import DECODE_SECONDS


@dataclass(frozen=True)
class Limits:
    """Limits of the requests that a server accepts.

    Args:
        megabytes: size of a video file. seconds: length of a video.
        urls: whether videos may be fetched from http(s) URLs in a request.
        tokens: maximum of max_new_tokens. prompt: characters of a prompt.
        decode_seconds: time for decoding.

    Raises:
        InputError: a limit of 0 or less.
    """

    megabytes: float = 200.0
    seconds: float = 600.0
    urls: bool = False
    tokens: int = 1024
    prompt: int = 4000
    decode_seconds: float = DECODE_SECONDS

    def __post_init__(self):
        for option, value in (("--max-mb", self.megabytes), ("--max-seconds", self.seconds)):
            if not 0 < value < float("inf"):
                raise InputError(f"{option} {value:g}: must be above 0")

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)
