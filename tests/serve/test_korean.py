"""Korean messages for videos that cannot be captioned."""

import re

import pytest

from tests.clips import write_video
from vlmds.serve.korean import in_korean
from vlmds.video.pool import video_facts


@pytest.mark.parametrize("damage", ["no video", "cut short", "frames damaged", "empty", "missing"])
def test_why_a_damaged_video_is_refused_is_korean(tmp_path, damage):
    """The messages are those that reading such a file gives, whatever they are."""
    path = write_video(tmp_path / "v.mkv", frames=20)
    if damage == "no video":
        path.write_bytes(b"no video" * 100)
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:40])
    elif damage == "frames damaged":
        path.write_bytes(path.read_bytes()[:600] + b"\xff" * 400)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    [problem] = video_facts([str(path)], workers=1)
    korean = in_korean(str(problem))
    assert korean != str(problem) and re.search("[가-힣]", korean) and not re.search("[a-z]", korean)


def test_limits_keep_their_numbers():
    assert in_korean("video too long: 1,200 s; this server takes at most 600 s") == (
        "영상이 너무 깁니다(1,200초). 이 서버는 최대 600초까지 받습니다."
    )
    assert in_korean("decoder crashed: signal 11") == "디코더가 비정상 종료되었습니다(signal 11)."
    assert in_korean("cannot be decoded: no frame at 1.500 s") == "1.500초 위치의 프레임을 디코딩할 수 없습니다."
    assert in_korean("something else: why") == "something else: why"
