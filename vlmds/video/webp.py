"""Animated WebP as a video file that FFmpeg can read; FFmpeg itself decodes only still WebP.

Safe for untrusted files: Pillow gets the bytes, no path, and may use no reader but that of WebP, a
format that names no other files.
"""

import io
from fractions import Fraction

import av
from PIL import Image

from vlmds.errors import SampleError
from vlmds.video.frame_table import MAX_PIXELS


def is_animated_webp(beginning: bytes) -> bool:
    """beginning: the file's first 21 bytes or more."""
    return beginning[:4] == b"RIFF" and beginning[8:16] == b"WEBPVP8X" and int.from_bytes(beginning[20:21]) & 2 > 0


def webp_to_mov(data: bytes) -> bytes:
    """The same frames and durations, without loss, as PNG in a MOV file. Raises SampleError."""
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image, av.open(buffer, "w", format="mov") as out:
            if image.width * image.height > MAX_PIXELS:
                raise SampleError(f"frame too large: {image.width} x {image.height} pixels")
            stream = out.add_stream("png", rate=1000, options={"compression_level": "1"})
            stream.width, stream.height, stream.pix_fmt = image.width, image.height, "rgb24"
            time = 0
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                frame = av.VideoFrame.from_image(image.convert("RGB"))
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                shown = image.info.get("duration", 0)
                shown = shown if shown > 10 else 100  # milliseconds; as browsers do
                for packet in stream.encode(frame):
                    packet.duration = shown
                    out.mux(packet)
                time += shown
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError("cannot be decoded: damaged animated WebP") from error
    return buffer.getvalue()
