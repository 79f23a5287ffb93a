"""Frames for a judge, from each kind of store."""

import base64
import io

import pytest
from PIL import Image

from tests import tiny
from tests.clips import write_manifest, write_video
from vlmds.errors import InputError, SampleError
from vlmds.judge.frames import ClipFrames
from vlmds.packing.pack import pack


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    rows = [
        {"id": f"c{i}", "video": str(write_video(folder / f"v{i}.mp4", frames=30)), "caption": "캡션", "split": "val"}
        for i in range(3)
    ]
    manifest = write_manifest(folder / "manifest.jsonl", rows)
    pack(manifest, folder / "video", store="video", progress=False)
    return {"video": folder / "video", "frames": tiny.pack_frames(manifest, folder / "frames")}


@pytest.mark.parametrize("store", ["video", "frames"])
def test_as_many_frames_as_asked_for_as_jpegs(stores, store):
    frames = ClipFrames(str(stores[store]), "val", {"c0", "c2"}, 2)
    urls = frames.of("c2")
    assert len(urls) == 2 and all(url.startswith("data:image/jpeg;base64,") for url in urls)
    picture = Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2])))
    assert picture.size == ((448, 448) if store == "video" else (tiny.SIDE, tiny.SIDE))
    assert frames.of("c2") == urls  # the cache of answers depends on it


def test_other_clips_are_refused_and_damaged_ones_raise(stores, tmp_path):
    with pytest.raises(InputError, match="has no clip other"):
        ClipFrames(str(stores["video"]), "val", {"c0", "other"}, 2)
    rows = [{"id": "c0", "video": str(write_video(tmp_path / "v.mp4", frames=30)), "caption": "캡션", "split": "val"}]
    pack(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", store="video", progress=False)
    (shard,) = (tmp_path / "out").rglob("*.tar")
    data = bytearray(shard.read_bytes())
    data[600 : len(data) // 2] = bytes(len(data) // 2 - 600)
    shard.write_bytes(data)
    with pytest.raises(SampleError):
        ClipFrames(str(tmp_path / "out"), "val", {"c0"}, 2).of("c0")
