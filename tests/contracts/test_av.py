"""PyAV and decord: what the video room relies on."""

import io

import av
import av.logging
import pytest
from av.stream import Disposition

from tests.clips import write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("av") / "a.mp4", frames=5)


def test_formats_and_protocols_can_be_limited(clip, tmp_path):
    """video/container.opened: a playlist is an ArgumentError, or opens what it names."""
    playlist = tmp_path / "list.txt"
    playlist.write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    options = {"format_whitelist": "mov", "protocol_whitelist": "file"}
    with av.open(str(clip), metadata_errors="ignore", options=options) as container:
        assert container.streams.best("video").frames == 5
    with pytest.raises(av.ArgumentError):
        av.open(str(playlist), options=options)
    with av.open(io.BytesIO(clip.read_bytes()), options=options | {"protocol_whitelist": ""}) as container:
        assert len(list(container.decode(video=0))) == 5


def test_frames_need_not_be_decoded_at_opening(clip):
    """video/container._NO_FRAMES: stream_options, more of them than the file has streams."""
    with av.open(str(clip), stream_options=[{"skip_frame": "all", "threads": "1"}] * 8) as container:
        assert container.streams.best("video").width == 64


def test_a_stream_can_be_made_strict(clip):
    """video/container.video_stream: disposition, thread_type, options of the codec before it opens."""
    with av.open(str(clip)) as container:
        stream = container.streams.best("video")
        assert not stream.disposition & Disposition.attached_pic
        stream.thread_type = "NONE"
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": "100"}
        with pytest.raises(av.FFmpegError):
            list(container.decode(stream))


def test_errors_have_a_reason_without_the_files_name(tmp_path):
    """video/container.reading: strerror."""
    (tmp_path / "secret.mp4").write_bytes(b"no video")
    with pytest.raises(av.FFmpegError) as caught:
        av.open(str(tmp_path / "secret.mp4"))
    assert caught.value.strerror and "secret" not in caught.value.strerror


def test_ffmpegs_own_messages_can_be_switched_off():
    """video/child.main."""
    before = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)
    assert av.logging.get_level() == av.logging.PANIC
    av.logging.set_level(before)


def test_decords_errors_and_messages(tmp_path):
    """video/decode.decode_decord: DECORDError, logging.QUIET, VideoReader of bytes."""
    decord = pytest.importorskip("decord")
    decord.logging.set_level(decord.logging.QUIET)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises((decord.DECORDError, RuntimeError)):
        decord.VideoReader(str(tmp_path / "bad.mp4"), num_threads=1)
    clip = write_video(tmp_path / "a.mp4", frames=5)
    reader = decord.VideoReader(io.BytesIO(clip.read_bytes()), num_threads=1)
    assert len(reader) == 5 and reader.get_batch([0, 4]).asnumpy().shape == (2, 48, 64, 3)
