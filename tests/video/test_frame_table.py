"""The frame table: as it is stored, and damaged descriptions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.clips import cut_video, rotate_video, write_manifest, write_video
from tests.video.test_decode import FILES
from vlmds.data.dataset import Dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader
from vlmds.errors import SampleError
from vlmds.packing.pack import pack
from vlmds.video.decode_work import FramesRequest, VideoRequest, prepare_video, read_frames
from vlmds.video.frame_table import DESCRIBED, FrameTable
from vlmds.video.probe import VideoInfo, probe


def description(info: VideoInfo) -> dict:
    """As a packed sample's json has it."""
    found = {
        "width": info.width,
        "height": info.height,
        "rotation": info.rotation,
        "frames": info.frames,
        "timing": info.timing(),
    }
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def info(tmp_path_factory) -> VideoInfo:
    path = write_video(tmp_path_factory.mktemp("v") / "v.mp4", **{"x264-params": "keyint=12"})
    return probe(path)


@pytest.mark.parametrize("name", [*FILES, "cut.mp4", "turned.mp4", "raw.h264"])
def test_a_description_says_what_a_probe_finds(tmp_path, name, monkeypatch):
    path = tmp_path / name
    if name == "cut.mp4":
        cut_video(write_video(tmp_path / "g.mp4", **FILES["gops.mp4"][0]), path, 2.25)
    elif name == "turned.mp4":
        rotate_video(write_video(tmp_path / "plain.mp4"), path, 90)
    else:
        write_video(path, **FILES.get(name, ({},))[0])
    data = path.read_bytes()
    info = probe(data)
    described = description(info)
    table = FrameTable.from_described(described)
    for field in ("width", "height", "rotation", "duration", "decoder", "by_pts", "frames", "start_time", "time_base"):
        assert getattr(table, field) == getattr(info, field), field
    assert np.array_equal(table.pts, info.pts) and np.array_equal(table.keyframes, info.keyframes)
    start = info.duration / 3
    probed = read_frames(data, FramesRequest(4, 32, start, None, info.decoder))
    monkeypatch.setattr("vlmds.video.decode_work.probe", None)
    for decoder in {info.decoder, "pyav"}:
        read = read_frames(data, FramesRequest(4, 32, start, None, decoder, described))
        assert read.members == probed.members


def test_constant_rates_take_no_room(tmp_path):
    described = probe(write_video(tmp_path / "v.mp4", frames=500, g="1")).timing()
    assert len(json.dumps(described)) < 150


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"width": 1 << 20, "height": 1 << 20},
        {"rotation": 45},
        {"frames": 41},
        {"frames": float("inf")},
        {"timing": None},
        {"timing": {}},
        {"timing": []},
        {"ticks": []},
        {"ticks": [0, [-5, 39]]},
        {"ticks": [0, [5, -39]]},
        {"ticks": [0, [1 << 70, 39]]},
        {"ticks": [0, [1 << 62, 39]]},
        {"ticks": "0123"},
        {"ticks": [[1, 2, 3]]},
        {"ticks": None},
        {"keys": [-1]},
        {"keys": [40]},
        {"keys": [0, 0]},
        {"keys": {}, "ticks": {"a": 1}},
        {"time_base": [1, 0]},
        {"time_base": [-1, 10]},
        {"time_base": 3},
        {"time_base": [1.5, 2]},
        {"duration": -1},
        {"duration": float("nan")},
        {"duration": "x"},
    ],
)
def test_what_is_no_description_is_refused(info, change):
    described = description(info)
    for name, value in change.items():
        (described if name in DESCRIBED else described["timing"])[name] = value
    with pytest.raises(ValueError):
        FrameTable.from_described(described)
    with pytest.raises(SampleError, match="its description cannot be read: timing"):
        read_frames(b"", FramesRequest(4, 32, None, None, "pyav", described))


def test_a_reader_probes_only_what_has_no_description(tmp_path):
    """The same frames from a shard of today, and from one as an older vlmds wrote it."""
    rows = [{"video": "v.webm", "caption": "글"}, {"video": "w.mp4", "caption": "글", "start": 2.0}]
    write_video(tmp_path / "v.webm", **FILES["vp9.webm"][0])
    write_video(tmp_path / "w.mp4", **{"x264-params": "keyint=12"})
    pack(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", progress=False)
    index = ShardIndex.open(tmp_path / "out")
    reader = SampleReader(Dataset([index]), "train", 4, 32, shuffle=False)
    asked = []
    frames = reader._decoder.frames
    reader._decoder.frames = lambda data, **more: asked.append(more) or frames(data, **more)
    read = index.read

    def old(row):
        members = read(row)
        described = json.loads(members["json"])
        del described["timing"]
        return members | {"json": json.dumps(described).encode()}

    for position in range(2):
        new = reader.load(position)
        index.read = old
        assert np.array_equal(reader.load(position).frames, new.frames)
        index.read = read
    assert [more["described"] is None for more in asked] == [False, True, False, True]
    reader._decoder.close()  # the lambda keeps it alive: no process may outlive the test


def test_a_description_of_another_video_is_an_error_not_other_frames(tmp_path, info):
    data = write_video(tmp_path / "w.mp4", frames=20).read_bytes()
    with pytest.raises(SampleError, match="cannot be decoded"):
        read_frames(data, FramesRequest(4, 32, None, None, "decord", description(info)))


def test_a_mended_file_is_described_as_it_is_kept(tmp_path):
    whole = write_video(tmp_path / "g.mp4", **{"x264-params": "keyint=12"})
    path = cut_video(whole, tmp_path / "cut.mp4", 2.25)
    reply = prepare_video(VideoRequest(str(path), None, None, "video", 4, 32), path.read_bytes())
    (kept,) = reply.members.values()
    assert reply.facts["timing"] == replace(probe(kept)).timing()
    assert reply.facts["timing"] != probe(path).timing()
