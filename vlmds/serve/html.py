"""HTML pieces of the web page: the state of a request, a player, the frames that a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

from vlmds.video.jpeg import data_uri
from vlmds.video.sampling import sample_times


def state(message: str, bad: bool = False) -> str:
    role, kind = ("alert", " bad") if bad else ("status", "")
    return f'<div class="vlmds-state{kind}" role="{role}">{escape(message)}</div>'


def strip(frames: np.ndarray, facts: dict[str, Any], names: Sequence[str], what: str) -> str:
    """HTML of the frames with their times. frames: uint8 [F, 3, S, S]."""
    about = (
        f"{facts['width']} × {facts['height']}, {facts['duration']:,.1f} s, {facts['fps']:.4g} fps, {facts['codec']}"
    )
    head = f"{len(frames)} × {frames.shape[-1]} px: {what}"
    if names:
        head += f" ({', '.join(names)})"
    figures = "".join(
        f'<figure><img alt="{time:.1f} s" src="{data_uri(frame)}"><figcaption>{time:.1f} s</figcaption></figure>'
        for frame, time in zip(frames, sample_times(len(frames), 0.0, facts["duration"]))
    )
    return (
        f'<div class="vlmds-about">{escape(about)} · {escape(head)}</div>'
        f'<div class="vlmds-frames" style="--row: {min(len(frames), 8)}">{figures}</div>'
    )


def player(path: str, otherwise: str, strip: str, text: dict[str, str], note: str | None = None) -> str:
    """HTML of a player of an upload, with a note. Where the browser cannot play it, the frames take its place, with
    the note `otherwise`, and for "encoding" a copy is asked for."""
    instead = (
        "this.onerror = null; this.parentElement.hidden = true; this.parentElement.nextElementSibling.hidden = false"
    )
    if otherwise == "encoding":
        instead += "; document.getElementById('encode').click()"
    return (
        f'<div><video controls preload="metadata" aria-label="{text["preview"]}" '
        f'src="gradio_api/file={escape(quote(path))}" onerror="{instead}" '
        f'onloadedmetadata="if (!this.videoWidth &amp;&amp; this.onerror) this.onerror()"></video>'
        + (f'<p role="note">{text[note]}</p>' if note else "")
        + f"</div><div hidden>{without_player(otherwise, strip, text)}</div>"
    )


def without_player(note: str, strip: str, text: dict[str, str]) -> str:
    return f'<p role="note">{text[note]}</p>{strip}'
