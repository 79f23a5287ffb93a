import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from tests.data.conftest import write_video

from vlmds.data import decode_child, video
from vlmds.data.decode_child import DecodePool, FrameDecoder, Request
from vlmds.errors import SampleError

SPAN = {"num_frames": 3, "image_size": 32, "start": None, "end": None}


def repeated(source: Path, path: Path, times: int) -> Path:
    """The source's packets over and over, in one file."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [p for p in old.demux(stream) if p.size]
        length = sum(p.duration for p in packets)
        first = [(p.pts, p.dts) for p in packets]
        for round_ in range(times):
            for packet, (pts, dts) in zip(packets, first):
                packet.pts, packet.dts = pts + round_ * length, dts + round_ * length
                packet.stream = copy
                new.mux(packet)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("good") / "good.mp4")


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> tuple[Path, Path]:
    """100 frames, and the same 1,000 times over: 100,000."""
    folder = tmp_path_factory.mktemp("long")
    short = write_video(folder / "short.mp4", frames=100, width=16, height=16, bf="0",
                        **{"x264-params": "keyint=50:scenecut=0"})
    return short, repeated(short, folder / "long.mp4", 1000)


@pytest.fixture(scope="module")
def endless(tmp_path_factory, long) -> Path:
    """100,000 frames of which only the first is a keyframe: its last frame needs all of them."""
    folder = tmp_path_factory.mktemp("endless")
    with av.open(str(long[1])) as old, av.open(str(folder / "e.mkv"), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        first = True
        for packet in old.demux(stream):
            if packet.size and (first or not packet.is_keyframe):
                first = False
                packet.stream = copy
                new.mux(packet)
    return folder / "e.mkv"


@pytest.fixture
def decoder():
    decoder = FrameDecoder(60.0)
    yield decoder
    decoder.close()


def expected(path: Path) -> np.ndarray:
    return video.resize_frames(video.decode_frames(path, video.probe(path), 3), 32)


def assert_works(decoder: FrameDecoder, path: Path) -> None:
    frames = decoder.frames(path.read_bytes(), decoder="decord", **SPAN)
    assert frames.dtype == np.uint8 and frames.flags["WRITEABLE"]
    assert np.array_equal(frames, expected(path))


def pid(decoder: FrameDecoder) -> int:
    return decoder._child._process.pid


def cpu_ticks(process: int) -> int:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition, seconds=30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def when_busy(process: int, act) -> threading.Thread:
    """Calls `act` once the process works on something."""
    begin = cpu_ticks(process)

    def watch():
        eventually(lambda: cpu_ticks(process) > begin + 2)
        act()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_frames_of_one_video_after_another_come_from_one_child(decoder, good):
    assert_works(decoder, good)
    first = pid(decoder)
    with pytest.raises(SampleError, match="cannot be read"):
        decoder.frames(b"not a video", decoder="pyav", **SPAN)
    with pytest.raises(SampleError, match="start past the end"):
        decoder.frames(good.read_bytes(), decoder="pyav", **SPAN | {"start": 60.0})
    assert_works(decoder, good)
    assert pid(decoder) == first


def test_a_span_is_that_of_decode_frames(decoder, good):
    span = {"num_frames": 5, "start": 1.0, "end": 2.5}
    frames = decoder.frames(good.read_bytes(), image_size=24, decoder="pyav", **span)
    info = video.probe(good)
    assert np.array_equal(frames, video.resize_frames(video.decode_frames(good, info, **span), 24))


def test_a_hung_decoder_costs_one_sample(good, endless):
    decoder = FrameDecoder(0.05)  # far less than 100,000 frames take
    with pytest.raises(SampleError, match="^decoder hung: stopped after 0.05 s$"):
        decoder.frames(endless.read_bytes(), decoder="pyav", **SPAN)
    decoder.deadline = 60.0
    assert_works(decoder, good)
    decoder.close()


def test_a_stopped_child_is_given_up(good, monkeypatch):
    monkeypatch.setattr(decode_child, "GRACE", 0.1)
    decoder = FrameDecoder(5.0)
    assert_works(decoder, good)
    stopped = pid(decoder)
    os.kill(stopped, signal.SIGSTOP)
    decoder._child._deadline = 0.1
    with pytest.raises(SampleError, match="decoder hung"):
        decoder.frames(good.read_bytes(), decoder="pyav", **SPAN)
    assert not is_running(stopped)
    assert_works(decoder, good)
    decoder.close()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crashed_decoder_costs_one_sample(decoder, good, endless, number):
    assert_works(decoder, good)
    child = pid(decoder)
    thread = when_busy(child, lambda: os.kill(child, number))
    with pytest.raises(SampleError, match=f"^decoder crashed: signal {number:d}$"):
        decoder.frames(endless.read_bytes(), decoder="pyav", **SPAN)
    thread.join()
    assert_works(decoder, good)


def test_a_child_that_died_while_idle_costs_nothing(decoder, good):
    assert_works(decoder, good)
    child = pid(decoder)
    os.kill(child, signal.SIGKILL)
    assert eventually(lambda: not is_running(child))
    assert_works(decoder, good)


def test_an_interrupted_video_does_not_answer_for_the_next(decoder, good, endless):
    class Interrupted(Exception):
        pass

    def raise_(*_):
        raise Interrupted

    assert_works(decoder, good)
    before = signal.signal(signal.SIGUSR1, raise_)
    try:
        thread = when_busy(pid(decoder), lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Interrupted):
            decoder.frames(endless.read_bytes(), decoder="pyav", **SPAN)
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert_works(decoder, good)


def test_a_schedulers_signals_do_not_end_a_child(good):
    # The first are sent while it starts.
    child = decode_child._Child(60.0)
    for _ in range(2):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            os.kill(child._process.pid, number)
        child.send(Request(str(good), None, None, "pixels", 3, 32))
        reply = child.receive()
        assert reply.members["rgb"] == expected(good).tobytes()
    child.kill()


def test_pickled_or_after_a_fork_it_has_a_child_of_its_own(decoder, good):
    assert_works(decoder, good)
    first = pid(decoder)
    other = pickle.loads(pickle.dumps(decoder))
    assert_works(other, good)
    assert pid(other) != first and other.deadline == 60.0
    other.close()
    code = f"""
import os, sys
from vlmds.data.decode_child import FrameDecoder
data = open({str(good)!r}, "rb").read()
decoder = FrameDecoder(60.0)
def frames():
    return decoder.frames(data, decoder="pyav", **{SPAN})
first = frames()
fork = os.fork()
same = (first == frames()).all()
if not fork:
    decoder.close()
    os._exit(0 if same else 1)
code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
assert code == 0 and same and (first == frames()).all()
assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100, check=False).returncode == 0


@pytest.mark.parametrize("state", ["idle", "idle with a fork", "busy"])
def test_no_child_outlives_its_owner(good, endless, state):
    code = f"""
import os, sys, time
from vlmds.data.decode_child import FrameDecoder
decoder = FrameDecoder(3.0)
decoder.frames(open({str(good)!r}, "rb").read(), decoder="pyav", **{SPAN})
fork = os.fork() if {state == "idle with a fork"} else 0  # it keeps the connection open
if {state == "idle with a fork"} and not fork:
    time.sleep(60)
    os._exit(0)
print(decoder._child._process.pid, fork, flush=True)
if {state == "busy"}:
    decoder.frames(open({str(endless)!r}, "rb").read(), decoder="pyav", **{SPAN})
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    fork = 0
    try:
        child, fork = map(int, owner.stdout.readline().split())
        if state == "busy":
            begin = cpu_ticks(child)
            assert eventually(lambda: cpu_ticks(child) > begin + 2)
        owner.kill()
        owner.wait()
        assert eventually(lambda: not is_running(child))
    finally:
        owner.kill()
        if fork:
            os.kill(fork, signal.SIGKILL)
        owner.stdout.close()


def mjpeg_bomb(folder: Path) -> bytes:
    """An AVI of which only the JPEG inside declares 16,000 × 16,000 pixels."""
    path = write_video(folder / "bomb.avi", frames=3, codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    at = data.find(b"\xff\xc0")
    while at >= 0:
        data[at + 5:at + 9] = struct.pack(">HH", 16000, 16000)
        at = data.find(b"\xff\xc0", at + 1)
    return bytes(data)


def container_bomb(folder: Path) -> bytes:
    """The same with the AVI's header too."""
    data = bytearray(mjpeg_bomb(folder))
    at = data.index(b"strf") + 12
    data[at:at + 8] = struct.pack("<ii", 16000, 16000)
    return bytes(data)


def h264_bomb(folder: Path) -> bytes:
    """A raw H.264 stream whose parameter set declares it."""
    def ue(value: int) -> str:  # Exp-Golomb, H.264 9.1
        bits = f"{value + 1:b}"
        return "0" * (len(bits) - 1) + bits

    path = write_video(folder / "bomb.h264", frames=3)
    bits = "".join([f"{66:08b}", f"{0:08b}", f"{62:08b}", ue(0), ue(0), ue(2), ue(1), "0",
                    ue(16000 // 16 - 1), ue(16000 // 16 - 1), "1", "1", "0", "0", "1"])
    bits += "0" * (-len(bits) % 8)
    units = path.read_bytes().split(b"\0\0\1")
    for i, unit in enumerate(units[1:], 1):
        if unit[0] & 31 == 7:
            units[i] = b"\x67" + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\0"
    return b"\0\0\1".join(units)


TOO_LARGE = "frames too large: 16000 × 16000 is over the limit of 67,108,864 pixels"


@pytest.mark.parametrize("bomb, name, reason", [
    (container_bomb, "b.avi", TOO_LARGE), (h264_bomb, "b.h264", TOO_LARGE),
    (mjpeg_bomb, "b.avi", "cannot be decoded")])  # the stream is larger than its file says
def test_a_video_bomb_is_refused(tmp_path, decoder, good, bomb, name, reason):
    data = bomb(tmp_path)
    with pytest.raises(SampleError, match=reason):
        decoder.frames(data, decoder="pyav", **SPAN)
    (tmp_path / name).write_bytes(data)
    with DecodePool(1, 60.0) as pool:
        (reply,) = pool.map([Request(str(tmp_path / name), None, None, "video", 3, 32)])
    assert reply.reason.startswith(reason)
    assert_works(decoder, good)
    peak = Path(f"/proc/{pid(decoder)}/status").read_text().split("VmHWM:")[1].split()[0]
    assert int(peak) < 500 << 10  # KiB; one such frame in RGB has 750 MiB


def test_a_hundred_thousand_frames(decoder, good, long):
    short, path = long
    info = video.probe(path)
    assert info.frames == 100_000 and info.decoder == "decord"
    data = path.read_bytes()
    frames = {name: decoder.frames(data, decoder=name, **SPAN) for name in ("pyav", "decord")}
    with av.open(str(short)) as container:
        all_frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    wanted = np.stack([all_frames[i % 100] for i in video.pick(info, 3)])
    assert np.array_equal(frames["pyav"], video.resize_frames(wanted, 32))
    assert np.array_equal(frames["decord"], frames["pyav"])
    assert_works(decoder, good)


def test_memory_does_not_grow(decoder, good):
    def decode(times: int) -> int:
        data = good.read_bytes()
        for i in range(times):
            decoder.frames(data, decoder=("pyav", "decord")[i % 2], **SPAN)
        status = Path(f"/proc/{pid(decoder)}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) << 10

    settled = decode(60)
    assert decode(300) - settled < 30 << 20  # a leak of one decoded frame a video is 100 MiB or so
