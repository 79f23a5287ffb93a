"""Small real videos, made for the tests."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the project, or not there
SHARED_VIDEOS = SHARED / "videos"


def picture(i: int, width: int, height: int) -> np.ndarray:
    """Frame i: a gradient that moves, with a square whose grey level encodes i. uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([(x * 2 + i * 5) % 256, (y * 2) % 256, (x + y) % 256], -1).astype(np.uint8)
    image[: height // 2, : width // 2] = (i * 4) % 256
    return image


def write_video(
    path, frames=40, fps=10, width=64, height=48, codec="libx264", pix_fmt="yuv420p", times=None, aspect=None, **options
) -> Path:
    """Encode a video. times: display times in seconds, in place of a constant rate. aspect: width of a
    pixel / its height."""
    base = Fraction(1, 1000) if times else Fraction(1, fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, width, height), format="rgb24")
            frame.pts, frame.time_base = round(times[i] / base) if times else i, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def scene(seed: int, frames: int = 20, width: int = 160, height: int = 96) -> np.ndarray:
    """A random picture that moves slowly to the left, another for each seed: uint8 [frames, height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 255, (10, 20, 3), np.uint8)
    wide = np.asarray(Image.fromarray(noise).resize((width * 5 // 4, height), Image.Resampling.BICUBIC))
    return np.stack([wide[:, i * width // (4 * frames) :][:, :width] for i in range(frames)])


def write_frames(path: Path, frames: np.ndarray, crf: int = 18) -> Path:
    """Encode uint8 [F, H, W, 3] as H.264, 10 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path)


def cut_video(source: Path, path: Path, start: float) -> Path:
    """Cut by copying packets, as `ffmpeg -ss START -c copy` does: the result has an edit list."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        old.seek(int(start * 1_000_000))
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts -= int(start / stream.time_base)
                packet.dts -= int(start / stream.time_base)
                packet.stream = copy
                new.mux(packet)
    return path


TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""Display matrices (a, b, c, d) of rotations, degrees clockwise."""
MIRRORS = {"vflip": (1, 0, 0, -1), "hflip": (-1, 0, 0, 1), "cclock_flip": (0, 1, 1, 0), "clock_flip": (0, -1, -1, 0)}
"""Display matrices by the names that FFmpeg's filters (the last two: of transpose) have for them."""


def rotate_video(source: Path, path: Path, degrees: int) -> Path:
    """Set the display matrix of an MP4 (degrees clockwise), as a phone does."""
    return orient_video(source, path, TURNS[degrees])


def orient_video(source: Path, path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Set the display matrix (a, b, c, d) of an MP4."""
    a, b, c, d = matrix
    values = (a, b, 0, c, d, 0, 0, 0)
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = b"".join((v * 65536).to_bytes(4, "big", signed=True) for v in values) + (b"\x40\0\0\0")
    path.write_bytes(data)
    return path


def hold_last_frame(source: Path, path: Path, seconds: float) -> Path:
    """Copy packets so that the last frame is shown for `seconds`, as in screen recordings. The source has
    no B-frames."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [packet for packet in old.demux(stream) if packet.size]
        packets[-1].duration = round(seconds / stream.time_base)
        for packet in packets:
            packet.stream = copy
            new.mux(packet)
    return path


def change_size(path: Path, codec: str, **options) -> Path:
    """20 frames of 64 x 48, then 20 of 96 x 80, as in recorded calls; or two transport streams in one."""
    parts = [
        write_video(
            path.with_name(f"{width}-{path.name}"), frames=20, width=width, height=height, codec=codec, **options
        )
        for width, height in ((64, 48), (96, 80))
    ]
    if path.suffix == ".ts":
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        return path
    with av.open(str(path), "w") as new:
        copy = None
        for part, seconds in zip(parts, (0, 2)):
            with av.open(str(part)) as old:
                stream = old.streams.video[0]
                copy = copy or new.add_stream_from_template(stream)
                for packet in old.demux(stream):
                    if packet.size:
                        shift = round(seconds / stream.time_base)
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = copy
                        new.mux(packet)
    return path


def write_animation(path: Path, milliseconds: list[int]) -> Path:
    """An animated WebP (lossless), GIF or APNG of one picture for each of the durations."""
    first, *rest = (Image.fromarray(picture(i, 64, 48)) for i in range(len(milliseconds)))
    options = {"lossless": True} if path.suffix == ".webp" else {}
    form = {".webp": "WEBP", ".gif": "GIF", ".apng": "PNG"}[path.suffix]
    first.save(path, form, save_all=True, append_images=rest, duration=milliseconds, **options)
    return path


def decode_all(path: Path) -> list[np.ndarray]:
    """The reference: every frame, in order, as the file stores it."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path
