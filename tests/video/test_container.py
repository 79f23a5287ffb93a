"""The opening of video files: accepted formats, and files that name others."""

import http.server
import threading

import pytest

from tests.clips import write_video
from vlmds.errors import SampleError
from vlmds.video.decode import decode_frames
from vlmds.video.decode_work import FramesRequest, read_frames
from vlmds.video.frame_table import DESCRIBED
from vlmds.video.probe import probe

MPEG = {"codec": "mpeg2video", "fps": 25}
VP9 = {"codec": "libvpx-vp9", "cpu-used": "8"}

KINDS = {  # name: how to write it
    "v.mp4": {},
    "v.mov": {},
    "v.m4v": {},
    "v.3gp": {"codec": "mpeg4"},
    "v.mkv": {},
    "v.webm": VP9,
    "v.avi": {"codec": "mpeg4"},
    "v.ts": {},
    "v.mts": {},
    "v.mpg": MPEG,
    "v.vob": MPEG,
    "v.flv": {},
    "v.wmv": {"codec": "wmv2"},
    "v.mxf": MPEG,
    "v.rm": {"codec": "rv10"},
    "v.nut": {"codec": "mpeg4"},
    "v.wtv": MPEG,
    "v.ivf": VP9,
    "v.264": {},
    "v.m2v": MPEG,
    "v.y4m": {"codec": "rawvideo"},
    "v.265": {"codec": "libx265", "x265-params": "log-level=none"},
    "v.swf": {"codec": "flv1"},
    "v.dv": {"codec": "dvvideo", "width": 720, "height": 576, "fps": 25},
    "v.mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "v.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "v.png": {"codec": "png", "pix_fmt": "rgb24", "frames": 1},
    "v.jpg": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "frames": 1},
}
SDP = b"""v=0
o=- 0 0 IN IP4 127.0.0.1
s=x
c=IN IP4 127.0.0.1
t=0 0
m=video 5004 RTP/AVP 96
a=rtpmap:96 H264/90000
"""


def playlist(address: str) -> bytes:
    return (f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{address}\n#EXT-X-ENDLIST\n").encode()


@pytest.mark.parametrize("name", KINDS)
def test_files_of_these_kinds_are_videos(tmp_path, name):
    options = {"frames": 6} | KINDS[name]
    path = write_video(tmp_path / name, **options)
    for source in (path, path.read_bytes()):
        info = probe(source)
        assert info.frames == options["frames"]
        assert decode_frames(source, info, 2).shape == (2, info.height, info.width, 3)


@pytest.mark.parametrize("name", ["v.mp4", "v.m3u8", "v.sdp"])
def test_a_file_that_names_others_is_not_read(tmp_path, name):
    whole = write_video(tmp_path / "whole.ts", frames=6)
    listed = f"ffconcat version 1.0\nfile {whole.name}\n".encode()
    picture = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{whole}" width="9" height="9"/></svg>'.encode()
    for data in (listed, playlist(whole.name), playlist(str(whole)), SDP, picture):
        (tmp_path / name).write_bytes(data)
        for source in (tmp_path / name, data):
            with pytest.raises(SampleError, match="^cannot be read: (not a video|Invalid data)"):
                probe(source)


def test_the_network_is_not_asked_whatever_a_description_says(tmp_path):
    """decord, which has no limits of its own, is not given what is not an MP4 or Matroska file."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    info = probe(write_video(tmp_path / "v.mp4", frames=6))
    facts = {name: getattr(info, name) for name in DESCRIBED if name != "timing"}
    request = FramesRequest(2, 32, None, None, "decord", facts | {"timing": info.timing()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            for path in ("a.ts", "b.mp4"):
                data = playlist(f"http://127.0.0.1:{server.server_port}/{path}")
                with pytest.raises(SampleError, match="^cannot be decoded: "):
                    read_frames(data, request)
        finally:
            server.shutdown()
    assert info.decoder == "decord" and not asked
