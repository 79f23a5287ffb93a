"""Repair of videos at packing."""

import numpy as np
import pytest

from tests.clips import cut_video, rotate_video, write_video
from vlmds.video import repair
from vlmds.video.decode import decode_frames
from vlmds.video.probe import probe
from vlmds.video.sampling import pick

GOPS = {"x264-params": "keyint=10:bframes=3"}
VFR = list(np.cumsum(np.random.default_rng(2).integers(20, 300, 40)) / 1000)


def same_frames(data, info, span, repaired) -> float:
    """The smallest PSNR (dB) of 8 sampled frames; infinite if equal."""
    old = decode_frames(data, info, 8, *span).astype(np.float32)
    new = decode_frames(repaired.data, repaired.info, 8, repaired.start, repaired.end)
    error = np.square(old - new).mean(axis=(1, 2, 3)).max()
    return np.inf if error == 0 else 20 * np.log10(255) - 10 * np.log10(error)


def test_a_sound_file_stays(tmp_path):
    for name, options in (
        ("a.mp4", GOPS),
        ("b.mkv", {"times": VFR}),
        ("c.mp4", {"x264-params": "keyint=10:open-gop=1:bframes=3"}),
    ):
        data = write_video(tmp_path / name, **options).read_bytes()
        info = probe(data)
        assert repair.flaw(info) is None and repair.repair_video(data, info) is None
        assert repair.repair_video(data, info, 0.0, 99.0) is None


def test_a_transport_stream_is_copied_and_equal(tmp_path):
    data = write_video(tmp_path / "v.ts", **GOPS).read_bytes()
    info = probe(data)
    repaired = repair.repair_video(data, info)
    assert (repaired.method, repaired.reason) == ("copy", "mpegts stream")
    assert repaired.info.container.startswith("mov") and repaired.info.decoder == "decord"
    assert np.allclose(repaired.info.pts, info.pts, rtol=0, atol=1e-6)
    assert same_frames(data, info, (None, None), repaired) == np.inf


def test_the_time_it_may_take_grows_with_the_frames(tmp_path):
    asked = []
    for name, frames, width in (("a.ts", 10, 64), ("b.ts", 30, 64), ("c.ts", 30, 128), ("sound.mp4", 30, 64)):
        data = write_video(tmp_path / name, frames=frames, width=width).read_bytes()
        repair.repair_video(data, probe(data), more_time=asked.append)
    assert np.allclose(
        asked,
        [
            frames * (repair.FRAME_SECONDS + area * repair.MEGAPIXEL_SECONDS)
            for frames, area in ((10, 0.003072), (30, 0.003072), (30, 0.006144))
        ],
    )
    repair.repair_video(data, probe(data), 0.5, 1.0, asked.append)  # a part of a sound file
    assert asked[3:] == [asked[1]]


@pytest.mark.parametrize("turned", [0, 90, 270])
def test_an_edit_list_that_hides_frames_is_encoded_away(tmp_path, turned):
    whole = write_video(tmp_path / "whole.mp4", **GOPS)
    path = cut_video(whole, tmp_path / "cut.mp4", 1.25)
    if turned:
        path = rotate_video(path, tmp_path / "turned.mp4", turned)
    data = path.read_bytes()
    info = probe(data)
    assert info.discarded and info.rotation == turned
    repaired = repair.repair_video(data, info)
    assert repaired.method == "encode" and "hidden" in repaired.reason
    assert (repaired.info.rotation, repaired.info.decoder) == (0, "decord")
    assert (repaired.info.width, repaired.info.height) == (info.width, info.height)
    assert np.allclose(repaired.info.pts, info.pts, rtol=0, atol=1e-6)
    assert same_frames(data, info, (None, None), repaired) > 32
    assert repair.repair_video(data, info).data == repaired.data  # the same bytes every time


@pytest.mark.parametrize(
    "name, options, method",
    [
        ("a.mp4", GOPS, "copy"),
        ("b.mkv", {"times": VFR, "x264-params": "keyint=10"}, "copy"),
        ("c.webm", {"codec": "libvpx-vp9", "cpu-used": "8", "g": "10"}, "copy"),
        ("d.mp4", {"codec": "mpeg4", "g": "10"}, "copy"),
        ("e.ts", GOPS, "copy"),
    ],
)
@pytest.mark.parametrize("part", [(0.4, 0.7), (None, 0.3), (0.6, None)])
def test_a_cut_gives_the_frames_of_the_span(tmp_path, name, options, method, part):
    data = write_video(tmp_path / name, **options).read_bytes()
    info = probe(data)
    span = tuple(p and p * info.duration for p in part)
    repaired = repair.repair_video(data, info, *span)
    assert repaired.method == method and len(repaired.data) < len(data)
    assert same_frames(data, info, span, repaired) == np.inf
    for count in (1, 3, 16):
        old = pick(info, count, *span)
        new = pick(repaired.info, count, repaired.start, repaired.end)
        assert np.allclose(info.pts[old], repaired.info.pts[new] + repaired.offset, rtol=0, atol=1e-6)
