"""Stored samples: frames and descriptions, also damaged or hostile ones."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlmds.data.stored import read_description, read_jpegs, read_video
from vlmds.errors import SampleError

META = {"num_frames": 2, "image_size": 28}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n%%EOF\n"


def picture(width: int = 28, height: int = 28, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 0)).save(buffer, form)
    return buffer.getvalue()


def huge() -> bytes:
    """A small file of which the header claims 65,500 x 65,500 pixels."""
    data = bytearray(picture())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (65500).to_bytes(2, "big") * 2
    return bytes(data)


def test_frames():
    frames = read_jpegs({"json": b"{}", "1.jpg": picture(), "0.jpg": picture()}, META)
    assert frames.shape == (2, 3, 28, 28) and frames.dtype == np.uint8


@pytest.mark.parametrize(
    "second, reason",
    [
        ({}, "^1 frames, not 2"),
        ({"1.jpg": picture(), "2.jpg": picture()}, "^3 frames, not 2"),
        ({"2.jpg": picture()}, "^frame 1: '1.jpg'"),
        ({"1.jpg": b"x" * 99}, "^frame 1: cannot identify"),
        ({"1.jpg": picture(28, 30)}, "^frame 1: 28 x 30 pixels, not 28 x 28"),
        ({"1.jpg": picture(form="PNG")}, "^frame 1: cannot identify"),
        ({"1.jpg": huge()}, "^frame 1: Image size"),
        ({"1.jpg": picture()[:400]}, "^frame 1: "),
    ],
)
def test_other_frames_than_promised_are_refused(second, reason):
    with pytest.raises(SampleError, match=reason):
        read_jpegs({"0.jpg": picture()} | second, META)


def test_a_still_picture_is_one_frame():
    """Of older stores the first of its copies; other numbers are refused."""
    meta = META | {"num_frames": 3}
    one = {"json": b"{}", "0.jpg": picture()}
    copies = one | {"1.jpg": picture(), "2.jpg": picture()}
    frames = read_jpegs(one, meta, still=True)
    assert frames.shape == (1, 3, 28, 28) and np.array_equal(read_jpegs(copies, meta, still=True), frames)
    assert len(read_jpegs(copies, meta)) == 3
    for members, number in ((one | {"1.jpg": picture()}, 2), ({"json": b"{}"}, 0), (copies | {"3.jpg": picture()}, 4)):
        with pytest.raises(SampleError, match=f"^{number} frames, not 3, of a still picture"):
            read_jpegs(members, meta, still=True)
    with pytest.raises(SampleError, match="^1 frames, not 3$"):
        read_jpegs(one, meta)


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow calls Ghostscript for EPS, whatever the file's name is."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SampleError, match="^frame 0: cannot identify"):
        read_jpegs({"0.jpg": EPS, "1.jpg": EPS}, META)
    assert not (tmp_path / "started").exists()


def test_a_description():
    description = read_description({"json": '{"captions": ["가"], "fps": 9}'.encode(), "mp4": b""})
    assert description == {"captions": ["가"], "fps": 9}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        ("[" * 100_000, "RecursionError"),
        *(
            (json.dumps({"captions": captions}), "captions is not a list of texts")
            for captions in ([], "가", None, [1], ["가", None], {"a": "가"})
        ),
        ('{"captions": ["가"], "prompt": 5}', "prompt is not a text"),
    ],
)
def test_a_description_that_is_none_is_refused(text, reason):
    with pytest.raises(SampleError, match=f"^its description cannot be read: {reason}"):
        read_description({"json": text.encode()})
    with pytest.raises(SampleError, match="KeyError"):
        read_description({})


def test_one_video():
    assert read_video({"json": b"{}", "mp4": b"x"}) == b"x"
    for members in ({"json": b"{}"}, {"mp4": b"x", "mkv": b"y"}):
        with pytest.raises(SampleError, match="videos instead of one"):
            read_video(members)
