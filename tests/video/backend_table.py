"""A table of the ways to decode a video, each against a full decode in order with FFmpeg (PyAV).

    python -m tests.video.backend_table

prints a row per file: what the probe found, and for each way "equal" (the sampled frames are bit
for bit those of the full sequential decode), the PSNR of what was encoded again, or the reason for
refusal. "WRONG" anywhere is a failure; tests/video/test_backends.py asserts on the same rows.
"""

import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.clips import (
    MIRRORS,
    SHARED_VIDEOS,
    change_size,
    cut_video,
    hold_last_frame,
    orient_video,
    rotate_video,
    write_video,
)
from vlmds.errors import SampleError
from vlmds.video.decode import decode_decord, decode_frames
from vlmds.video.decode_work import VideoRequest, prepare_video
from vlmds.video.fit import resize_frames
from vlmds.video.pool import FrameDecoder
from vlmds.video.probe import VideoInfo, probe
from vlmds.video.sampling import pick

NUM_FRAMES = 6
SIZE = 48
VFR = list(np.cumsum(np.random.default_rng(1).integers(20, 250, 30)) / 1000)
X265 = "log-level=none:keyint=10"

WRITTEN = {  # name: options of write_video
    "h264-cfr.mp4": {"x264-params": "keyint=10:bframes=3"},
    "h264-vfr.mkv": {"times": VFR, "x264-params": "keyint=10"},
    "h264-vfr.mp4": {"times": VFR},
    "h264-open-gop.mp4": {"x264-params": "keyint=10:open-gop=1:bframes=3"},
    "h264-10-bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264-odd-size.mp4": {"pix_fmt": "yuv444p", "width": 67, "height": 51},
    "h264-72-wide.mp4": {"width": 72},
    "h264-1-frame.mp4": {"frames": 1},
    "h264.ts": {"x264-params": "keyint=10:bframes=3"},
    "h265-open-gop.mp4": {"codec": "libx265", "x265-params": X265},
    "h265-closed.mkv": {"codec": "libx265", "x265-params": X265 + ":open-gop=0"},
    "h265.ts": {"codec": "libx265", "x265-params": X265 + ":repeat-headers=1"},
    "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8", "g": "10"},
    "vp9-vfr.webm": {"codec": "libvpx-vp9", "cpu-used": "8", "times": VFR},
    "vp8.webm": {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "av1-svt.mkv": {"codec": "libsvtav1", "preset": "12"},
    "mpeg4-bframes.mp4": {"codec": "mpeg4", "bf": "2", "g": "10"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2", "g": "10"},
    "mpeg2.ts": {"codec": "mpeg2video", "bf": "2", "g": "10"},
    "h264.avi": {"bf": "2"},
    "sar-2.mp4": {"aspect": Fraction(2)},
    "sar-8-9.mkv": {"aspect": Fraction(8, 9)},
    "sar-of-rounding.mp4": {"aspect": Fraction(1280, 1281)},
    "animated.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "animated.apng": {"codec": "apng", "pix_fmt": "rgb24"},
}
SIZES: dict[str, tuple[str, dict[str, str]]] = {  # name: a file that needs the same codec, options of change_size
    "sizes.webm": ("vp8.webm", {"codec": "libvpx"}),
    "sizes-vp9.webm": ("vp9.webm", {"codec": "libvpx-vp9", "cpu-used": "8"}),
    "sizes.mp4": ("h264-cfr.mp4", {"codec": "libx264", "bf": "0", "x264-params": "repeat-headers=1"}),
    "sizes.ts": ("h264.ts", {"codec": "libx264"}),
}
DERIVED: dict[str, tuple[str, Callable[[Path, Path], object]]] = {  # name: source, how
    **{f"rotated-{d}.mp4": ("h264-cfr.mp4", lambda a, b, d=d: rotate_video(a, b, d)) for d in (90, 180, 270)},
    **{
        f"cut-{name}": (name, lambda a, b: cut_video(a, b, 1.25))
        for name in (
            "h264-cfr.mp4",
            "h264-open-gop.mp4",
            "h265-open-gop.mp4",
            "h264.ts",
            "h265.ts",
            "vp9.webm",
            "mpeg4-bframes.mp4",
        )
    },
    **{f"{name}.mp4": ("h264-cfr.mp4", lambda a, b, m=m: orient_video(a, b, m)) for name, m in MIRRORS.items()},
    "sar-turned.mp4": ("sar-2.mp4", lambda a, b: rotate_video(a, b, 90)),
    "cut-vflip.mp4": ("cut-h264-cfr.mp4", lambda a, b: orient_video(a, b, MIRRORS["vflip"])),
    "held.mp4": ("h264-vfr.mp4", lambda a, b: hold_last_frame(a, b, 20.0)),
    **{name: (source, lambda a, b, o=o: change_size(b, **o)) for name, (source, o) in SIZES.items()},
    "truncated.mkv": ("h264-vfr.mkv", lambda a, b: b.write_bytes(a.read_bytes()[: a.stat().st_size // 2])),
    "truncated.mp4": ("h264-cfr.mp4", lambda a, b: b.write_bytes(a.read_bytes()[: a.stat().st_size // 2])),
    "flipped.mp4": ("h264-cfr.mp4", lambda a, b: b.write_bytes(_flipped(a.read_bytes()))),
    "flipped-vp9.webm": ("vp9.webm", lambda a, b: b.write_bytes(_flipped(a.read_bytes()))),
}
# FFmpeg's filters that make of each frame what a player shows.
FILTERS: dict[str, list[tuple[str, str | None]]] = {
    "vflip.mp4": [("vflip", None)],
    "cut-vflip.mp4": [("vflip", None)],
    "hflip.mp4": [("hflip", None)],
    "cclock_flip.mp4": [("transpose", "cclock_flip")],
    "clock_flip.mp4": [("transpose", "clock_flip")],
    "sar-2.mp4": [("scale", "128:48")],
    "sar-8-9.mkv": [("scale", "57:48")],
    "sar-turned.mp4": [("scale", "128:48"), ("format", "rgb24"), ("transpose", "clock")],
    **dict.fromkeys(SIZES, [("scale", "64:48")]),
}


def _flipped(data: bytes) -> bytes:
    """A few bits of the frames' data turned; in an MP4 not of the table behind it, because that can make
    another sound video of it."""
    damaged = bytearray(data)
    begin, end = 0, len(data)
    if (at := data.find(b"mdat")) >= 0:
        begin, end = at + 4, at - 4 + int.from_bytes(data[at - 4 : at], "big")
    size = end - begin
    for at in range(begin + size // 2, begin + 5 * size // 6, max(size // 15, 1)):
        damaged[at] ^= 0x55
    return bytes(damaged)


@dataclass(frozen=True)
class Row:
    """One file. The cells are "equal", a PSNR, "-" (does not apply) or "refused: …"."""

    name: str
    probe: str
    pyav: str
    decord: str
    child: str
    packed: str
    packed_pyav: str
    packed_decord: str

    @property
    def wrong(self) -> bool:
        return any("WRONG" in cell for cell in vars(self).values())


def files(folder: Path) -> dict[str, Path | str]:
    """The files to try, written to `folder`; a text where one cannot be had."""
    found: dict[str, Path | str] = {}
    for name, options in WRITTEN.items():
        try:
            found[name] = write_video(folder / name, **({"frames": 30} | options))
        except (av.FFmpegError, ValueError) as error:
            found[name] = f"skipped: {error}"
    for name, (source, make) in DERIVED.items():
        if isinstance(found[source], str):
            found[name] = found[source]
        else:
            make(found[source], folder / name)
            found[name] = folder / name
    if SHARED_VIDEOS.is_dir():
        found |= {p.name: p for p in sorted(SHARED_VIDEOS.glob("*/*"))}
    return found


def row(path: Path, decoder: FrameDecoder) -> Row:
    """Try every way to decode a file."""
    data = path.read_bytes()
    try:
        info = probe(data)
    except SampleError as error:
        child = _child(decoder, data, None)
        return Row(path.name, f"refused: {error}", "-", "-", child, _refusal(path, data), "-", "-")
    about = f"{info.codec} {info.frames} frames, {info.duration:g} s, {info.width} x {info.height}, "
    about += f"{info.rotation}°{' mirrored' * info.mirrored}, {info.discarded} hidden"
    try:
        expected = _sequential(data, info, pick(info, NUM_FRAMES), FILTERS.get(path.name))
    except SampleError as error:
        pyav = _compare(lambda: decode_frames(data, replace(info, decoder="pyav"), NUM_FRAMES), None)
        return Row(
            path.name,
            about,
            pyav,
            "-",
            _child(decoder, data, None, "pyav"),
            _refusal(path, data),
            "-",
            f"sequential: {error}",
        )
    pyav = _compare(lambda: decode_frames(data, replace(info, decoder="pyav"), NUM_FRAMES), expected)
    cleared = "not cleared"
    if info.decoder == "decord":
        cleared = _compare(lambda: decode_frames(data, info, NUM_FRAMES), expected)
    child = _child(decoder, data, expected)
    return Row(path.name, about, pyav, cleared, child, *_packed(path, data, expected))


def _sequential(
    data: bytes, info: VideoInfo, picks: np.ndarray, filters: list[tuple[str, str | None]] | None
) -> np.ndarray:
    """The reference: decode all, in order, with no option set; frames by their number, upright by
    FFmpeg's filters, or by the rotation alone."""
    wanted, found = {int(i) for i in picks}, {}
    try:
        with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            stream.codec_context.options = {"err_detect": "explode"}
            for i, frame in enumerate(container.decode(stream)):
                if i not in wanted:
                    continue
                if filters is None:
                    found[i] = np.rot90(frame.to_ndarray(format="rgb24"), -info.rotation // 90)
                else:
                    found[i] = filtered(frame, filters)
    except av.FFmpegError as error:
        raise SampleError(f"cannot be decoded: {error.strerror}") from error
    if wanted - set(found):
        raise SampleError(f"cannot be decoded: {len(wanted - set(found))} frames are missing")
    return np.stack([found[int(i)] for i in picks])


def filtered(frame: av.VideoFrame, filters: list[tuple[str, str | None]]) -> np.ndarray:
    """FFmpeg's own output for a frame: uint8 [H, W, 3]."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    nodes = [graph.add(name, options) for name, options in [*filters, ("format", "rgb24")]]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull().to_ndarray(format="rgb24")


def _compare(decode: Callable[[], np.ndarray], expected: np.ndarray | None) -> str:
    try:
        frames = decode()
    except SampleError as error:
        return f"refused: {error}"
    if expected is None:
        return "decodes what is asked for"  # the damage lies elsewhere
    return "equal" if np.array_equal(frames, expected) else "WRONG"


def _child(decoder: FrameDecoder, data: bytes, expected: np.ndarray | None, which: str = "decord") -> str:
    resized = None if expected is None else resize_frames(expected, SIZE)
    return _compare(lambda: decoder.frames(data, num_frames=NUM_FRAMES, image_size=SIZE, decoder=which), resized)


def _prepare(path: Path, data: bytes):
    return prepare_video(VideoRequest(str(path), None, None, "video", NUM_FRAMES, SIZE), data)


def _refusal(path: Path, data: bytes) -> str:
    try:
        _prepare(path, data)
    except SampleError as error:
        return f"refused: {error}"
    return "kept"


def _packed(path: Path, data: bytes, expected: np.ndarray) -> tuple[str, str, str]:
    """How packing keeps the file; its frames by sequential PyAV and by plain decord."""
    try:
        reply = _prepare(path, data)
    except SampleError as error:
        return f"refused: {error}", "-", "-"
    (packed,) = reply.members.values()
    how = reply.facts.get("repair", {}).get("method", "kept")
    if how == "kept" and packed != data:
        how = "WRONG: other bytes"
    info = probe(packed)
    picks = pick(info, NUM_FRAMES)
    frames = _sequential(packed, info, picks, None if how == "encode" else FILTERS.get(path.name))
    cell = _like(frames, expected, how == "encode")
    decord = "not cleared"
    if info.decoder == "decord":
        try:
            decord = _like(decode_decord(packed, info, picks), frames, False)
        except SampleError:
            decord = "decord fails"  # loudly: PyAV is used
    return how, cell, decord


def _like(frames: np.ndarray, expected: np.ndarray, encoded: bool) -> str:
    if frames.shape != expected.shape:
        return f"WRONG shape {frames.shape}"
    if np.array_equal(frames, expected):
        return "equal"
    if not encoded:
        return "WRONG"
    error = np.square(frames.astype(np.float32) - expected).mean(axis=(1, 2, 3)).max()
    psnr = 20 * np.log10(255) - 10 * np.log10(error)
    return f"{psnr:.0f} dB" if psnr > 25 else f"WRONG: {psnr:.0f} dB"


def main() -> int:
    decoder = FrameDecoder(30.0)
    wrong = 0
    print("| file | probe | PyAV | decord | child | packed | then PyAV | then decord |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files(Path(folder)).items():
            if isinstance(path, str):
                print(f"| {name} | {path} |")
                continue
            found = row(path, decoder)
            wrong += found.wrong
            print("| " + " | ".join(vars(found).values()) + " |", flush=True)
    decoder.close()
    print(f"{wrong} rows wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
