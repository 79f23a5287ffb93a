"""Orientation, shape of pixels, changing sizes, real durations; animations and still pictures."""

import io
import json
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.clips import (
    MIRRORS,
    change_size,
    hold_last_frame,
    orient_video,
    picture,
    rotate_video,
    write_animation,
    write_manifest,
    write_video,
)
from tests.video.backend_table import SIZES
from vlmds.data.dataset import open_dataset
from vlmds.data.loader import SampleReader
from vlmds.errors import SampleError
from vlmds.packing.pack import pack
from vlmds.video.decode import decode_frames
from vlmds.video.decode_work import FramesRequest, VideoRequest, prepare_video, read_frames
from vlmds.video.frame_table import DESCRIBED
from vlmds.video.pool import Clip, decode_windows
from vlmds.video.probe import probe
from vlmds.video.sampling import pick

DELAYS = [100, 200, 300, 100, 900]


def test_a_mirror_is_applied_before_the_rotation_and_decord_is_not_used(tmp_path):
    plain = write_video(tmp_path / "plain.mp4", frames=5)
    frame = decode_frames(plain, probe(plain), 1)[0]
    for name, expected in (
        ("vflip", frame[::-1]),
        ("hflip", frame[:, ::-1]),
        ("cclock_flip", frame.swapaxes(0, 1)),
        ("clock_flip", frame[::-1, ::-1].swapaxes(0, 1)),
    ):
        path = orient_video(plain, tmp_path / f"{name}.mp4", MIRRORS[name])
        info = probe(path)
        assert (info.mirrored, info.decoder) == (True, "pyav")
        assert np.array_equal(decode_frames(path, info, 1)[0], expected), name


@pytest.mark.parametrize(
    "aspect, size", [(Fraction(2), (128, 48)), (Fraction(8, 9), (57, 48)), (Fraction(1280, 1281), (64, 48))]
)
def test_pixels_that_are_not_square_give_the_display_shape(tmp_path, aspect, size):
    path = write_video(tmp_path / "v.mp4", frames=5, aspect=aspect)
    info = probe(path)
    assert (info.width, info.height) == size
    assert (info.decoder == "decord") == (size == (64, 48))
    assert decode_frames(path, info, 2).shape == (2, *size[::-1], 3)
    turned = probe(rotate_video(path, tmp_path / "turned.mp4", 90))
    assert (turned.width, turned.height) == size[::-1]


def test_a_shape_of_pixels_too_large_for_any_memory_is_refused(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=2, aspect=Fraction(4))
    data = bytearray(path.read_bytes())
    at = data.index(b"pasp") + 4
    for ratio in ((1 << 30, 1), (1, 1 << 20)):
        data[at : at + 8] = b"".join(number.to_bytes(4, "big") for number in ratio)
        with pytest.raises(SampleError, match="frame too large or narrow"):
            probe(bytes(data))


@pytest.mark.parametrize(
    "name", ["mirror", "sar", "held", "sizes.webm", "sizes-vp9.webm", "sizes.mp4", "sizes.ts", "anim.webp"]
)
def test_every_store_and_reader_has_the_same_picture(tmp_path, name):
    """Packed as a video and read by its description; packed as frames; captioned; a cut span."""
    path = tmp_path / (name if "." in name else f"{name}.mp4")
    plain = write_video(tmp_path / "plain.mp4", frames=20, bf="0", **({"aspect": 2} if name == "sar" else {}))
    if name == "mirror":
        orient_video(plain, path, MIRRORS["cclock_flip"])
    elif name == "sar":
        path = plain
    elif name == "held":
        hold_last_frame(plain, path, 8.1)
    elif name == "anim.webp":
        write_animation(path, DELAYS)
    else:
        change_size(path, **SIZES[name][1])
    data = path.read_bytes()
    duration = probe(data).duration
    for span in ((None, None), (duration * 0.5, duration * 0.8)):
        asked = VideoRequest(str(path), *span, "pixels", 4, 48)
        expected = np.frombuffer(prepare_video(asked, data).members["rgb"], np.uint8).astype(np.float32)
        reply = prepare_video(replace(asked, store="video"), data)
        (kept,) = reply.members.values()
        described = json.loads(json.dumps({field: reply.facts[field] for field in DESCRIBED}))
        inner = (reply.facts.get("start"), reply.facts.get("end")) if "repair" in reply.facts else span
        request = FramesRequest(4, 48, *inner, reply.facts["decoder"], described)
        read = np.frombuffer(read_frames(bytes(kept), request).members["rgb"], np.uint8)
        encoded = reply.facts.get("repair", {}).get("method") == "encode"
        assert np.abs(read - expected).mean() < (4 if encoded else 1e-9), span
        jpegs = prepare_video(replace(asked, store="frames", quality=95), data).members
        frames = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))).transpose(2, 0, 1) for jpeg in jpegs.values()])
        assert np.abs(frames - expected.reshape(frames.shape)).mean() < 8
        (captioned,) = decode_windows([(Clip(str(path), *span), 1)], 4, 48, workers=1)
        assert np.array_equal(captioned[0].ravel(), expected)


def test_a_description_without_a_mirror_or_a_shape_of_pixels_reads_as_before(tmp_path):
    """As an older vlmds wrote it: width and height as stored, and no word of a mirror."""
    path = write_video(tmp_path / "v.mp4", frames=5, aspect=2)
    data = orient_video(path, tmp_path / "m.mp4", MIRRORS["vflip"]).read_bytes()
    info = probe(data)
    timing = info.timing()
    assert timing.pop("mirrored") is True
    described = {"width": 64, "height": 48, "rotation": 0, "frames": 5, "timing": timing}
    read = read_frames(data, FramesRequest(1, 32, None, None, "pyav", described)).members
    plain = write_video(tmp_path / "plain.mp4", frames=5).read_bytes()
    assert read == read_frames(plain, FramesRequest(1, 32, None, None, "pyav")).members
    assert "mirrored" not in probe(plain).timing()  # ordinary descriptions have not changed


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_the_last_frame_lasts_as_long_as_its_packet_says(tmp_path, suffix):
    source = write_video(tmp_path / "v.mp4", frames=10, bf="0")
    path = hold_last_frame(source, tmp_path / f"held.{suffix}", 9.1)
    with av.open(str(path)) as container:
        stated = container.duration / av.time_base
    info = probe(path)
    assert info.duration == pytest.approx(stated) == pytest.approx(10.0)
    assert pick(info, 4, 5.0, 8.0).tolist() == [9] * 4
    with pytest.raises(SampleError, match="start past the end: 10 s of 10 s"):
        pick(info, 4, 10.0)


def test_a_duration_of_the_last_packet_that_the_container_contradicts_is_not_used(tmp_path):
    path = hold_last_frame(write_video(tmp_path / "v.mp4", frames=10, bf="0"), tmp_path / "held.mp4", 9.1)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdhd") + 20  # the duration in it
    assert int.from_bytes(data[at : at + 4], "big") / int.from_bytes(data[at - 4 : at], "big") == pytest.approx(10)
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") // 4).to_bytes(4, "big")
    assert probe(bytes(data)).duration == pytest.approx(1.0)


@pytest.mark.parametrize("suffix", ["webp", "gif", "apng"])
def test_an_animation_is_a_video_with_its_own_durations(tmp_path, suffix):
    path = write_animation(tmp_path / f"a.{suffix}", DELAYS)
    for source in (path, path.read_bytes()):
        info = probe(source)
        assert info.frames == 5 and info.duration == pytest.approx(1.6)
        assert np.allclose(info.pts, [0, 0.1, 0.3, 0.6, 0.7])
        frames = decode_frames(source, info, 5)
        expected = [picture(i, 64, 48) for i in pick(info, 5)]
        if suffix == "gif":  # of few colours
            assert np.abs(frames.astype(int) - expected).mean() < 10
        else:
            assert np.array_equal(frames, expected)


def test_a_damaged_animation_is_refused(tmp_path):
    data = write_animation(tmp_path / "a.webp", DELAYS).read_bytes()
    for damaged in (data[: len(data) // 2], data[:40], data[:200] + bytes(400) + data[600:]):
        with pytest.raises(SampleError, match="cannot be "):
            probe(damaged)
    bomb = bytearray(data)
    bomb[24:30] = (16383).to_bytes(3, "little") * 2  # the size of the canvas - 1
    with pytest.raises(SampleError, match="cannot be |frame too large"):
        probe(bytes(bomb))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 4, 5, 6])
def test_a_still_picture_is_a_video_of_one_frame_and_upright(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"p.{form.lower()}"
    options = {} if form == "PNG" else {"quality": 100}
    Image.fromarray(picture(3, 64, 48)).save(path, form, exif=exif, **options)
    info = probe(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert (info.frames, info.height, info.width) == (1, *expected.shape[:2])
    frames = decode_frames(path, info, 3)
    assert frames.shape == (3, *expected.shape)
    assert np.abs(frames - expected.astype(int)).mean() < (0.1 if form == "PNG" else 8)


def test_pictures_and_animations_are_packed_and_read(tmp_path):
    write_animation(tmp_path / "a.webp", DELAYS)
    write_animation(tmp_path / "b.gif", DELAYS)
    Image.fromarray(picture(3, 64, 48)).save(tmp_path / "c.png")
    rows = [{"video": name, "caption": "글"} for name in ("a.webp", "b.gif", "c.png")]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    for store in ("video", "frames"):
        pack(manifest, tmp_path / store, store=store, num_frames=4, image_size=32, progress=False)
        reader = SampleReader(open_dataset(tmp_path / store), "train", 4, 32, shuffle=False)
        samples = {sample.key: sample for sample in map(reader.load, range(3))}
        assert not any(sample.bad for sample in samples.values())
        assert [samples[key].frames.shape for key in "abc"] == [(n, 3, 32, 32) for n in (4, 4, 1)]
