"""Every backend against a full sequential PyAV decode, over codecs, containers and damage.

`python -m tests.data.backend_table` prints the table. A cell is "exact", a PSNR where packing had
to encode anew, "refused", or WRONG; "-" where the backend is never used.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np

from tests.data.conftest import SHARED, cut_video, rotate_video, write_video
from vlmds.data import video
from vlmds.data.decode_child import DecodePool, FrameDecoder, Request
from vlmds.data.repair import MIN_PSNR
from vlmds.errors import SampleError

BACKENDS = ("pyav", "decord", "child", "stored", "stored cut")
SIZE = 48
GOPS = "keyint=12:scenecut=0"
X265 = f"log-level=none:{GOPS}"
VFR = [float(t) for t in np.cumsum(np.random.default_rng(0).integers(20, 300, 40)) / 1000]


@dataclass(frozen=True)
class Row:
    """make: writes the file into a folder. refused: why it must be refused, or may be where it
    begins with "?"."""

    name: str
    make: Callable[[Path], Path]
    refused: str | None = None
    encoder: str | None = None


def written(name: str, codec: str = "libx264", **options) -> Row:
    return Row(name, lambda folder: write_video(folder / name, codec=codec, **options),
               encoder=codec)


def cut(name: str, source: Row, start: float = 2.25) -> Row:
    return Row(name, lambda folder: cut_video(source.make(folder), folder / name, start),
               encoder=source.encoder)


def turned(name: str, degrees: int, source: Row) -> Row:
    return Row(name, lambda folder: rotate_video(source.make(folder), folder / name, degrees),
               encoder=source.encoder)


def damaged(name: str, source: Row, change: Callable[[bytearray], bytes], refused: str) -> Row:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(change(bytearray(source.make(folder).read_bytes())))
        return path
    return Row(name, make, refused, source.encoder)


def flipped(data: bytearray) -> bytes:
    """One bit in each of 40 places of the middle half."""
    places = np.random.default_rng(1).integers(len(data) // 4, 3 * len(data) // 4, 40)
    for place in places:
        data[place] ^= 1 << place % 8
    return data


def zeroed(data: bytearray) -> bytes:
    middle = len(data) // 2
    data[middle:middle + 400] = bytes(400)
    return data


def half(data: bytearray) -> bytes:
    return data[:len(data) // 2]


BIG = {"width": 320, "height": 240}
H264 = written("h264-gops.mp4", **{"x264-params": f"{GOPS}:bframes=3:b-pyramid=strict"})
OPEN264 = written("h264-open.mp4", **{
    "x264-params": f"{GOPS}:open-gop=1:bframes=3:repeat-headers=1"})
OPEN265 = written("h265-open.mp4", "libx265", **{"x265-params": X265})
CLOSED265 = written("h265-closed.mp4", "libx265", **{"x265-params": f"{X265}:open-gop=0"})
MPEG4 = written("mpeg4.mp4", "mpeg4", bf="2", g="12")
PLAIN = written("h264.mp4")
TS = written("h264.ts", **{"x264-params": GOPS})
ROWS = [
    PLAIN, H264, OPEN264, OPEN265, CLOSED265, MPEG4, TS,
    written("h264-no-b.mp4", bf="0"),
    written("h264.mkv", **{"x264-params": GOPS}),
    written("h264.mov", **{"x264-params": GOPS}),
    written("h264.avi", **{"x264-params": GOPS}),
    written("h264.flv", **{"x264-params": GOPS}),
    written("h264-refresh.mp4", **{"x264-params": "keyint=12:intra-refresh=1"}),
    written("h264-interlaced.mp4", **{"x264-params": "interlaced=1"}),
    written("h264-vfr.mp4", times=VFR, **{"x264-params": GOPS}),
    written("h264-vfr.mkv", times=VFR, **{"x264-params": GOPS}),
    written("h264-vfr.ts", times=VFR, **{"x264-params": GOPS}),
    written("h264-late.mp4", times=[5 + i / 10 for i in range(40)]),
    written("h264-29.97.mp4", fps=30),
    written("h264-full-range.mp4", pix_fmt="yuvj420p"),
    written("h264-10bit.mp4", pix_fmt="yuv420p10le"),
    written("h264-422.mp4", pix_fmt="yuv422p"),
    written("h264-444.mp4", pix_fmt="yuv444p"),
    written("h264-odd.mp4", pix_fmt="yuv444p", width=67, height=51),
    written("h264-odd.ts", pix_fmt="yuv444p", width=67, height=51),
    written("h264-72px.mp4", width=72),
    written("h264-1-frame.mp4", frames=1),
    written("h264-1-frame.ts", frames=1),
    written("h264-2-frames.mp4", frames=2),
    written("h265.mkv", "libx265", **{"x265-params": X265}),
    written("h265.ts", "libx265", **{"x265-params": X265}),
    written("h265-10bit.mp4", "libx265", pix_fmt="yuv420p10le", **{"x265-params": X265}),
    written("h265-vfr.mp4", "libx265", times=VFR, **{"x265-params": X265}),
    written("vp8.webm", "libvpx", **{"auto-alt-ref": "1", "lag-in-frames": "16"}),
    written("vp9.webm", "libvpx-vp9", **{"cpu-used": "8", "g": "12"}),
    written("vp9.mp4", "libvpx-vp9", **{"cpu-used": "8", "g": "12"}),
    written("vp9-odd.webm", "libvpx-vp9", width=67, height=51, **{"cpu-used": "8", "g": "12"}),
    written("vp9-vfr.webm", "libvpx-vp9", times=VFR, **{"cpu-used": "8", "g": "12"}),
    written("av1.mkv", "libsvtav1", preset="12"),
    written("av1.mp4", "libsvtav1", preset="12", g="12"),
    written("av1-vfr.mp4", "libsvtav1", times=VFR, preset="12"),
    written("mpeg4.avi", "mpeg4", bf="2", g="12"),
    written("mpeg4.mkv", "mpeg4", g="12"),
    written("mpeg2.ts", "mpeg2video", fps=25, g="12", bf="2"),
    written("mpeg2.mpg", "mpeg2video", fps=25, g="12", bf="2"),
    written("mjpeg.avi", "mjpeg", pix_fmt="yuvj420p"),
    written("prores.mov", "prores_ks", pix_fmt="yuv422p10le"),
    *(turned(f"h264-{degrees}.mp4", degrees, H264) for degrees in (90, 180, 270)),
    turned("h264-odd-90.mp4", 90, written(
        "odd.mp4", pix_fmt="yuv444p", width=67, height=51, **{"x264-params": GOPS})),
    cut("cut-h264.mp4", H264), cut("cut-h264.mkv", H264), cut("cut-h264.ts", OPEN264),
    cut("cut-h264-open.mp4", OPEN264), cut("cut-h264-at-key.mp4", H264, 2.4),
    cut("cut-h265-open.mp4", OPEN265), cut("cut-h265-open.mkv", OPEN265),
    cut("cut-h265-closed.mp4", CLOSED265), cut("cut-h265.ts", OPEN265),
    cut("cut-h264-vfr.mp4", written("vfr.mp4", times=VFR, **{"x264-params": GOPS})),
    cut("cut-h264-10bit.mp4", written(
        "10bit.mp4", pix_fmt="yuv420p10le", **{"x264-params": GOPS})),
    cut("cut-mpeg4.mp4", MPEG4),
    cut("cut-h264-odd.mp4", written(
        "odd.mp4", pix_fmt="yuv444p", width=67, height=51, **{"x264-params": GOPS})),
    cut("cut-h264-full-range.mp4", written(
        "full.mp4", pix_fmt="yuvj420p", **{"x264-params": GOPS})),
    cut("cut-h264-709.mp4", written(
        "709.mp4", **{"x264-params": f"{GOPS}:colormatrix=bt709:colorprim=bt709:transfer=bt709"})),
    cut("cut-vp9.mp4", written("v9.mp4", "libvpx-vp9", **{"cpu-used": "8", "g": "12"})),
    turned("cut-h264-90.mp4", 90, cut("c.mp4", H264)),
    damaged("half.mp4", PLAIN, half, "cannot be read"),
    damaged("half-moov-first.mp4", written("m.mp4", **BIG, movflags="faststart"), half, "?"),
    damaged("half.mkv", written("w.mkv", **BIG), half, "?"),
    damaged("half.ts", written("w.ts", **BIG), half, "?"),
    damaged("flipped.mp4", written("f.mp4", **BIG), flipped, "cannot be"),
    damaged("flipped.mkv", written("f.mkv", **BIG), flipped, "?"),
    damaged("flipped.ts", written("f.ts", **BIG), flipped, "?"),
    damaged("flipped-h265.mp4", written("g.mp4", "libx265", **BIG, **{"x265-params": X265}),
            flipped, "?"),
    damaged("flipped-vp9.webm", written("g.webm", "libvpx-vp9", **BIG, **{"cpu-used": "8"}),
            flipped, "?"),
    damaged("zeroed.mp4", written("z.mp4", **BIG), zeroed, "cannot be"),
    damaged("empty.mp4", PLAIN, lambda data: b"", "?"),
    damaged("text.mp4", PLAIN, lambda data: b"not a video" * 1000, "cannot be read"),
]


def shared_rows() -> list[Row]:
    return [Row(f"{path.parent.name}/{path.name}", lambda folder, path=path: path,
                "cannot be decoded" if path.name == "corrupted.mp4" else None)
            for path in sorted(SHARED.glob("*/*.*"))]


def missing_encoder(row: Row) -> str | None:
    """Why a row cannot be made here."""
    if row.encoder is not None:
        try:
            av.Codec(row.encoder, "w")
        except av.codec.codec.UnknownCodecError:
            return f"no {row.encoder} encoder in this FFmpeg"
    return None


class Reference:
    """Frames by display time, from decoding all of the file in order, with nothing of `probe`.

    times: seconds from the first frame. error: what ended the decoding of a damaged file.
    """

    def __init__(self, path: Path):
        self.times, self.error, self.rate, self._frames = [], None, 1.0, []
        try:
            with av.open(str(path), metadata_errors="ignore") as container:
                stream = container.streams.best("video")
                stream.thread_type = "NONE"
                stream.codec_context.options = {"err_detect": "explode"}
                self.rate = float(stream.average_rate or 25)
                for frame in container.decode(stream):
                    image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    self._frames.append(video.resize_frames(image[None], SIZE)[0])
                    self.times.append(frame.time)
        except (av.FFmpegError, OSError) as error:
            self.error = error
        if None in self.times:  # a file without times: its rate is all there is
            self.times = [i / self.rate for i in range(len(self.times))]
        self.times.sort()  # AVI has none for B-frames; decoders give frames in order of display
        self.times = [t - self.times[0] for t in self.times]

    @property
    def duration(self) -> float:
        steps = len(self.times) - 1
        return self.times[-1] + (self.times[-1] / steps if steps else 1 / self.rate)

    def frames(self, num_frames: int, start: float | None, end: float | None) -> np.ndarray:
        """uint8 [num_frames, 3, SIZE, SIZE]. Raises IndexError if nothing could be decoded."""
        start, end = start or 0.0, self.duration if end is None else end
        wanted = [start + (i + 0.5) * (end - start) / num_frames for i in range(num_frames)]
        return np.stack([
            self._frames[max(sum(t <= w + 1e-6 for t in self.times) - 1, 0)] for w in wanted])


class Checker:
    """Compares the backends on one file after another, in child processes where they may hang."""

    def __init__(self):
        self.decoder = FrameDecoder(60.0)
        self.pool = DecodePool(1, 60.0)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.decoder.close()
        self.pool.__exit__()

    def check(self, path: Path) -> dict[str, str]:
        """A cell for each backend."""
        self.reference = Reference(path)
        try:
            info = video.probe(path)
        except SampleError as error:
            cells = dict.fromkeys(("pyav", "child"), f"refused: {error}") | {"decord": "-"}
        else:
            length = info.duration
            spans = [(8, None, None), (4, 0.55 * length, 0.8 * length), (3, None, 0.3 * length)]
            cells = {
                "pyav": self._compare(spans, lambda *span: video.resize_frames(
                    video.decode_frames(path, replace(info, decoder="pyav"), *span), SIZE)),
                "decord": self._compare(spans, self._child(path, "decord"))
                if info.decoder == "decord" else "-",
                "child": self._compare(spans, self._child(path, "pyav"))}
            if self.reference.error is None and len(self.reference.times) != info.frames:
                cells["pyav"] = f"WRONG: {info.frames} frames, not {len(self.reference.times)}"
        cells["stored"] = self._stored(path, None, None)
        length = self.reference.duration if self.reference.times else 4.0
        if cells["stored"].startswith("refused"):
            cells["decord"] = "-"  # it hides damage, and packing lets no damage through
        cells["stored cut"] = self._stored(path, 0.55 * length, 0.8 * length)
        return cells

    def _child(self, path: Path, decoder: str):
        data = path.read_bytes()
        return lambda num_frames, start, end: self.decoder.frames(
            data, num_frames=num_frames, image_size=SIZE, start=start, end=end, decoder=decoder)

    def _compare(self, spans, decode) -> str:
        for span in spans:
            try:
                frames = decode(*span)
            except SampleError as error:
                return f"refused: {error}"
            try:
                expected = self.reference.frames(*span)
            except IndexError:
                return "WRONG: given frames that cannot be decoded"
            if not np.array_equal(frames, expected):
                return f"WRONG: span {span}"
        return "exact"

    def _stored(self, path: Path, start: float | None, end: float | None) -> str:
        """Packs the file into a video store and reads what is stored with each decoder."""
        (reply,) = self.pool.map([Request(str(path), start, end, "video", 4, SIZE)])
        if reply.reason is not None:
            return f"refused: {reply.reason}"
        (data,) = reply.members.values()
        record = reply.facts.get("repair", {})
        if not record and data != path.read_bytes():
            return "WRONG: other bytes and no record"
        worst = np.inf
        decoders = {reply.facts["decoder"], "pyav"}
        if "reason" in record and "420" in video.probe(data).pix_fmt:
            decoders.add("decord")  # any reader must do
        counts = (4,) if self.reference.error else (4, 7)  # decord hides damage that was not found
        for num_frames in counts:  # training may take another number than packing checked
            expected = self.reference.frames(num_frames, start, end)
            for decoder in sorted(decoders):
                frames = self.decoder.frames(
                    data, num_frames=num_frames, image_size=SIZE, start=reply.facts["start"],
                    end=reply.facts["end"], decoder=decoder)
                error = np.mean((frames.astype(float) - expected) ** 2, axis=(1, 2, 3)).max()
                worst = min(worst, 10 * np.log10(255**2 / error) if error else np.inf)
        if not record:
            return "exact" if worst == np.inf else "WRONG"
        if record["method"] == "copied":
            return "exact, copied" if worst == np.inf else "WRONG: copied"
        return f"{worst:.0f} dB, encoded" if worst >= MIN_PSNR else f"WRONG: {worst:.0f} dB"


def problems(row: Row, cells: dict[str, str]) -> list[str]:
    """What is wrong with a row's cells."""
    found = [f"{backend}: {cell}" for backend, cell in cells.items() if cell.startswith("WRONG")]
    for backend, cell in cells.items():
        if row.refused is None:
            if cell.startswith("refused"):
                found.append(f"{backend}: {cell}")
        # A span may be free of the damage.
        elif cell != "-" and row.refused not in ("?", cell[9:9 + len(row.refused)]):
            if backend != "stored cut" or cell.startswith("refused"):
                found.append(f"{backend}: {cell}, not refused: {row.refused}")
    return found


def main() -> int:
    wrong = 0
    print(f"{'file':28}", *(f"{backend:14}" for backend in BACKENDS))
    with Checker() as checker:
        for row in ROWS + shared_rows():
            if reason := missing_encoder(row):
                print(f"{row.name:28} skipped: {reason}")
                continue
            with tempfile.TemporaryDirectory() as folder:
                cells = checker.check(row.make(Path(folder)))
            shown = [cells[b] if cells[b].startswith("WRONG") else cells[b].split(":")[0]
                     for b in BACKENDS]
            reasons = sorted({c.split(": ", 1)[1] for c in cells.values() if "refused: " in c})
            print(f"{row.name:28}", *(f"{cell:14}" for cell in shown), "; ".join(reasons))
            for problem in problems(row, cells):
                wrong += 1
                print(f"    {problem}")
    print(f"{wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
