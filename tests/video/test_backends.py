"""The table of tests/video/backend_table.py: no way to decode gives wrong frames."""

from dataclasses import fields

import numpy as np
import pytest

from tests.manual.decode_memory import growth
from tests.video import backend_table
from vlmds.errors import SampleError
from vlmds.video.pool import FrameDecoder
from vlmds.video.probe import probe

NAMES = [*backend_table.WRITTEN, *backend_table.DERIVED]
# The cut transport stream begins with frames that refer to what was cut off.
DAMAGED = {"truncated.mp4", "truncated.mkv", "flipped.mp4", "flipped-vp9.webm", "cut-h265.ts"}
REPAIRED = {name for name in NAMES if name.startswith("cut-") or name.endswith(".ts")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return backend_table.files(tmp_path_factory.mktemp("backends"))


@pytest.fixture(scope="module")
def decoder():
    decoder = FrameDecoder(30.0)
    yield decoder
    decoder.close()


def check(row, damaged):
    assert not row.wrong, row
    if damaged and row.child != "equal":
        assert row.child.startswith("refused: cannot be "), row
    if not damaged:
        assert row.pyav == row.child == "equal", row
        assert row.decord in ("equal", "not cleared"), row
        assert not row.packed.startswith("refused"), row


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_decode_is_right_or_refuses(files, decoder, name):
    path = files[name]
    if isinstance(path, str):
        pytest.skip(path)
    row = backend_table.row(path, decoder)
    check(row, name in DAMAGED)
    if row.packed in ("copy", "encode"):
        assert name in REPAIRED or name in DAMAGED
        assert row.packed_pyav == "equal" or row.packed_pyav.endswith(" dB")
    if name in ("truncated.mp4", "cut-h265.ts"):
        assert row.probe.startswith("refused") and row.child.startswith("refused")


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".mp4", ".mov"))])
def test_headers_tell_what_decoding_at_opening_would(files, name, monkeypatch):
    """The probe opens these without FFmpeg's own decoding, and decodes one packet."""
    path = files[name]
    if isinstance(path, str):
        pytest.skip(path)
    hasty = probed(path)
    monkeypatch.setattr("vlmds.video.probe.is_mp4", lambda source: False)
    assert hasty == probed(path)


def probed(path):
    try:
        info = probe(path.read_bytes())
    except SampleError as error:
        return str(error)
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in ((f.name, getattr(info, f.name)) for f in fields(info))
    }


def test_shared_videos(files, decoder, shared_videos):
    for path in sorted(shared_videos.glob("odd/*")):
        check(backend_table.row(path, decoder), path.name == "corrupted.mp4")


def test_memory_does_not_grow(tmp_path):
    found = growth(tmp_path, decodes=450, warm_up=150)
    assert max(found.values()) < 3000, found
