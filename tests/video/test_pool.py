"""Decoding processes: deadlines, crashes, replacement."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clips import picture, write_video
from vlmds.errors import SampleError
from vlmds.video import pool as pool_module
from vlmds.video.decode import decode_frames
from vlmds.video.decode_work import VideoRequest
from vlmds.video.fit import resize_frames
from vlmds.video.pool import DecodePool, FrameDecoder
from vlmds.video.probe import probe

ASK = {"num_frames": 2, "image_size": 32}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    return write_video(tmp_path_factory.mktemp("v") / "small.mp4", frames=8).read_bytes()


@pytest.fixture
def decoder():
    decoder = FrameDecoder(60.0)
    yield decoder
    decoder.close()


def ended(pid: int) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def long_video(path: Path, frames: int, every_key: bool) -> bytes:
    """A video of very many frames, by repeating packets of a still one."""
    packets = []
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=30, options={"g": "1" if every_key else "600"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        still = picture(0, 320, 240)
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(still, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            packets += stream.encode(frame)
        contents = [bytes(p) for p in packets]
        for i in range(frames):
            packet = av.Packet(contents[min(i, 2)])
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = Fraction(1, 30), stream
            packet.is_keyframe = every_key or i == 0
            out.mux(packet)
    return path.read_bytes()


def test_frames_are_those_of_this_process(decoder, small):
    frames = decoder.frames(small, **ASK)
    info = probe(small)
    assert np.array_equal(frames, resize_frames(decode_frames(small, info, 2), 32))
    assert frames.flags["WRITEABLE"]
    span = decoder.frames(small, start=0.4, end=0.6, decoder="pyav", **ASK)
    expected = decode_frames(small, info, 2, 0.4, 0.6)
    assert np.array_equal(span, resize_frames(expected, 32))
    with pytest.raises(SampleError, match="start past the end"):
        decoder.frames(small, start=9.0, **ASK)


def test_a_copy_and_a_fork_have_children_of_their_own(decoder, small):
    want = decoder.frames(small, **ASK)
    copy = pickle.loads(pickle.dumps(decoder))
    assert copy.pid is None and np.array_equal(copy.frames(small, **ASK), want)
    assert copy.pid != decoder.pid
    copy.close()
    forked = os.fork()
    if forked == 0:
        try:
            own = decoder.pid is None and np.array_equal(decoder.frames(small, **ASK), want)
        finally:
            os._exit(0 if own else 1)
    assert os.waitpid(forked, 0)[1] == 0
    before = decoder.pid
    assert np.array_equal(decoder.frames(small, **ASK), want) and decoder.pid == before


def test_a_child_is_replaced_after_many_videos(decoder, small, monkeypatch):
    """The decoders leak a little; one in packing and one in reading."""
    monkeypatch.setattr(pool_module, "LIFETIME", 2)
    seen, frames = [], []
    for _ in range(5):
        frames.append(decoder.frames(small, **ASK))
        seen.append(decoder.pid)
    assert seen[1] is seen[3] is None and len({seen[0], seen[2], seen[4]}) == 3
    assert all(np.array_equal(frames[0], other) for other in frames)


def test_a_crash_costs_one_sample(decoder, small):
    want = decoder.frames(small, **ASK)
    os.kill(decoder.pid, signal.SIGSEGV)
    with pytest.raises(SampleError, match="decoder crashed: signal 11"):
        decoder.frames(small, **ASK)
    assert np.array_equal(decoder.frames(small, **ASK), want)


def test_a_long_file_is_decoded_and_one_that_takes_too_long_is_ended(tmp_path, decoder, small):
    keys = long_video(tmp_path / "keys.mp4", 100_000, every_key=True)
    assert decoder.frames(keys, **ASK).shape == (2, 3, 32, 32)
    chain = long_video(tmp_path / "chain.mp4", 100_000, every_key=False)
    hasty = FrameDecoder(1.0)
    with pytest.raises(SampleError, match="decoder hung: stopped after 1 s"):
        hasty.frames(chain, **ASK)
    assert hasty.frames(small, **ASK).shape == (2, 3, 32, 32)
    hasty.close()


def test_a_child_that_neither_answers_nor_ends_is_given_up(tmp_path, small, monkeypatch):
    """A stopped process stands for one at a drive that hangs: the alarm does not end it either."""
    path = tmp_path / "v.mp4"
    path.write_bytes(small)
    stopped = []

    def requests():
        request = VideoRequest(str(path), None, None, "facts", 0, 0)
        yield request
        (child,) = pool._idle
        stopped.append(child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        monkeypatch.setattr(pool_module, "GRACE", -59.5)  # of the deadline of 60 s, 0.5 s are left
        yield request
        monkeypatch.undo()
        yield request

    with DecodePool(1, deadline=60.0) as pool:
        replies = pool.map(requests())
        facts = next(replies).facts
        watch = threading.Timer(20, lambda: os.kill(*stopped, signal.SIGKILL))  # for the test's sake
        watch.start()
        assert next(replies).reason == "decoder hung: stopped after 60 s"
        watch.cancel()
        assert ended(*stopped)
        assert next(replies).facts == facts


def test_a_repair_has_a_time_and_a_reason_of_its_own(tmp_path, monkeypatch):
    """With a child in which it takes too long, and which notes when its alarm will strike."""
    (tmp_path / "sitecustomize.py").write_text(f"""import signal, time
from pathlib import Path
from vlmds.video import repair

def write(*_):
    Path({str(tmp_path)!r}, "new").write_text(str(signal.getitimer(signal.ITIMER_REAL)[0]))
    Path({str(tmp_path)!r}, "new").rename(Path({str(tmp_path)!r}, "left"))
    time.sleep(600)

repair._write, repair.FRAME_SECONDS, repair.MEGAPIXEL_SECONDS = write, 100.0, 1e5
""")
    here = Path(pool_module.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{here}", prepend=os.pathsep)
    path = write_video(tmp_path / "v.ts", frames=10)
    child = pool_module._Child(60.0)
    try:
        child.send(VideoRequest(str(path), None, None, "video", 2, 32))
        assert child.receive() is None and child.due < time.monotonic() + 60 + pool_module.GRACE
        assert child.receive() is None and child.due > time.monotonic() + 4000
        end = time.monotonic() + 60
        while not (tmp_path / "left").exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert 4000 < float((tmp_path / "left").read_text()) <= 4132
        os.kill(child.pid, signal.SIGALRM)
        # 60 s, and for each of 10 frames of 64 x 48 100 s and 307.2 s.
        assert child.receive().reason == "repair took too long: stopped after 4132 s"
    finally:
        child.kill()


def test_a_child_that_does_not_start_is_no_fault_of_the_video(decoder, small, monkeypatch):
    monkeypatch.setattr(pool_module, "START", 0.0)
    with pytest.raises(RuntimeError, match="the decoding process did not start within 0 s"):
        decoder.frames(small, **ASK)
    with pytest.raises(RuntimeError, match="did not start"), DecodePool(2, deadline=60.0) as pool:
        list(pool.map([VideoRequest("v.mp4", None, None, "facts", 0, 0)]))


def test_a_frame_larger_than_memory_is_refused(tmp_path, decoder, small):
    path = write_video(tmp_path / "v.webm", frames=3, codec="libvpx")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x9d\x01\x2a") + 3  # VP8's key frame header: width, height
    data[at : at + 4] = (16000).to_bytes(2, "little") * 2
    with pytest.raises(SampleError, match="cannot be|too large|out of memory"):
        decoder.frames(bytes(data), **ASK)
    assert decoder.frames(small, **ASK).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_owner(tmp_path, small, how):
    (tmp_path / "v.mp4").write_bytes(small)
    code = f"""import sys, time
from vlmds.video.pool import FrameDecoder
decoder = FrameDecoder(5.0)
decoder.frames(open({str(tmp_path / "v.mp4")!r}, 'rb').read(), num_frames=2, image_size=32)
print(decoder.pid, flush=True)
time.sleep(60)"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child = int(owner.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        owner.send_signal(how)
        owner.wait(timeout=60)
        assert ended(child)
    finally:
        owner.kill()
        owner.wait(timeout=60)
        owner.stdout.close()


def test_the_child_imports_no_torch():
    code = "import sys, vlmds.video.child, decord; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
