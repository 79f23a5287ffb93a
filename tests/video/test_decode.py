"""Decoding of chosen frames against a full sequential decode."""

from dataclasses import replace

import numpy as np
import pytest

from tests.clips import cut_video, decode_all, rotate_video, write_video
from vlmds.errors import SampleError
from vlmds.video.decode import decode_frames
from vlmds.video.probe import probe
from vlmds.video.sampling import pick, pick_frames, sample_times

X265 = {"codec": "libx265", "x265-params": "log-level=none:keyint=12"}
VFR = list(np.cumsum(np.random.default_rng(0).integers(20, 300, 40)) / 1000)

# name: (how to write it, decoder)
FILES = {
    "h264.mp4": ({}, "decord"),
    "gops.mp4": ({"x264-params": "keyint=12"}, "decord"),
    "gops.mkv": ({"x264-params": "keyint=12"}, "decord"),
    "vfr.mp4": ({"times": VFR, "x264-params": "keyint=12"}, "decord"),
    "late.mp4": ({"times": [5 + i / 10 for i in range(40)]}, "decord"),
    "one.mp4": ({"frames": 1}, "decord"),
    "closed265.mp4": (X265 | {"x265-params": X265["x265-params"] + ":open-gop=0"}, "decord"),
    "vp9.webm": ({"codec": "libvpx-vp9", "cpu-used": "8", "g": "12"}, "decord"),
    "open264.mp4": ({"x264-params": "keyint=12:open-gop=1:bframes=3"}, "pyav"),
    "open265.mp4": (X265, "pyav"),
    "refresh.mp4": ({"x264-params": "keyint=12:intra-refresh=1"}, "pyav"),
    "interlaced.mp4": ({"x264-params": "interlaced=1"}, "pyav"),
    "ten-bit.mp4": ({"pix_fmt": "yuv420p10le"}, "pyav"),
    "odd-size.mp4": ({"pix_fmt": "yuv444p", "width": 67, "height": 51}, "pyav"),
    "mpeg4.mp4": ({"codec": "mpeg4", "bf": "2", "g": "12"}, "pyav"),
    "mpeg4.avi": ({"codec": "mpeg4", "bf": "2", "g": "12"}, "pyav"),
    "vp8.webm": ({"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"}, "pyav"),
    "stream.ts": ({}, "pyav"),
    "av1.mkv": ({"codec": "libsvtav1", "preset": "12"}, "pyav"),
}


def assert_exact(path, info):
    """Each decoder gives what the rule picks from a full sequential decode."""
    reference = decode_all(path)
    assert len(reference) == info.frames
    spans = [(8,), (4, 0.55 * info.duration, 0.8 * info.duration), (3, None, 0.3 * info.duration)]
    for decoder in {info.decoder, "pyav"}:
        for span in spans:
            frames = decode_frames(path, replace(info, decoder=decoder), *span)
            assert frames.dtype == np.uint8 and frames.flags["C_CONTIGUOUS"]
            expected = [np.rot90(reference[i], -info.rotation // 90) for i in pick(info, *span)]
            assert np.array_equal(frames, expected), (decoder, span)


@pytest.mark.parametrize("name", FILES)
def test_decoders_equal_a_full_sequential_decode(tmp_path, name):
    options, decoder = FILES[name]
    path = write_video(tmp_path / name, **options)
    info = probe(path)
    assert info.decoder == decoder
    assert info.frames == options.get("frames", 40) and info.pts[0] == 0
    assert (info.width, info.height) == (options.get("width", 64), options.get("height", 48))
    times = np.array(options.get("times", np.arange(info.frames) / 10))
    assert np.allclose(info.pts, times - times[0], atol=2e-3)
    assert_exact(path, info)
    assert np.array_equal(decode_frames(path.read_bytes(), info, 4), decode_frames(path, info, 4))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path, degrees):
    plain = write_video(tmp_path / "plain.mp4", frames=5)
    path = rotate_video(plain, tmp_path / "turned.mp4", degrees)
    info = probe(path)
    assert (info.rotation, info.decoder) == (degrees, "pyav")
    turned = decode_frames(path, info, 3)
    assert turned.shape == (3, info.height, info.width, 3)
    # np.rot90 turns counterclockwise.
    upright = decode_frames(plain, probe(plain), 3)
    assert np.array_equal(turned, np.rot90(upright, -degrees // 90, axes=(1, 2)))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts"])
@pytest.mark.parametrize("source", ["gops.mp4", "open264.mp4", "open265.mp4"])
def test_stream_copy_cuts(tmp_path, name, source):
    options = FILES[source][0]
    if "x264-params" in options:  # parameter sets with every keyframe, as in broadcasts
        options = options | {"x264-params": options["x264-params"] + ":repeat-headers=1"}
    whole = write_video(tmp_path / source, **options)
    path = cut_video(whole, tmp_path / name, 2.25)
    info = probe(path)
    assert info.discarded or name != "cut.mp4"
    assert info.decoder == "pyav" or (name, source) == ("cut.mkv", "gops.mp4")
    assert_exact(path, info)


def test_shared_videos(shared_videos):
    rotations = {"rotated_90.mov": 90, "rotated_180.mov": 180}
    cleared = 0
    for path in sorted(shared_videos.glob("*/*")):
        info = probe(path)
        assert info.rotation == rotations.get(path.name, 0)
        cleared += info.decoder == "decord"
        if path.name == "corrupted.mp4":
            with pytest.raises(SampleError, match="cannot be decoded"):
                decode_frames(path, info, 8)
        elif path.parent.name == "odd" or info.decoder == "decord" and info.frames < 200:
            assert_exact(path, info)
    assert cleared >= 10


def test_sample_times_are_centres_and_picks_are_what_is_on_display():
    assert sample_times(4, 2.0, 4.0).tolist() == [2.25, 2.75, 3.25, 3.75]
    pts = np.array([0.0, 0.1, 1.0])
    picks = pick_frames(pts, np.array([-1.0, 0.0999995, 0.5, 1.0, 9.0]))
    assert picks.tolist() == [0, 1, 1, 2, 2] and picks.dtype == np.int64


def test_a_span_is_clamped_to_the_video_and_must_begin_in_it(tmp_path):
    path = write_video(tmp_path / "v.mp4")
    info = probe(path)
    assert info.duration == pytest.approx(4.0) and info.fps == pytest.approx(10.0)
    assert pick(info, 2, 3.0, 99.0).tolist() == [32, 37]
    with pytest.raises(SampleError, match="start past the end: 4.5 s of 4 s"):
        decode_frames(path, info, 2, 4.5)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_damage_is_refused_never_guessed(tmp_path, container):
    path = write_video(tmp_path / f"v.{container}", width=320, height=240)
    info = probe(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    with pytest.raises(SampleError, match="cannot be"):
        decode_frames(bytes(data), replace(info, decoder="pyav"), 8)


@pytest.mark.parametrize(
    "content, reason", [(b"", "cannot be read"), (b"not a video" * 1000, "cannot be read"), (None, "cannot be read")]
)
def test_what_is_no_video_is_refused(tmp_path, content, reason):
    path = tmp_path / "x.mp4"
    if content is None:  # the table of frames at the file's end is lost
        whole = write_video(path).read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(SampleError, match=reason) as error:
            probe(source)
        assert str(tmp_path) not in str(error.value)


def test_a_file_without_a_video_stream_is_refused(tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(SampleError, match="no video stream"):
        probe(path)
