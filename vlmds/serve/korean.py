"""Korean forms of the messages that refuse a video or a request, for the web page.

Messages are raised in English, and the API sends them unchanged. This module translates those that
a visitor of the page can get.
"""

from __future__ import annotations

import re

# Pattern of a whole message, or of its beginning, and its Korean form. {0}, {1} …: the pattern's
# groups; {detail}: the rest of the message, in brackets.
_MESSAGES = (
    (r"file too large: this server takes at most (.+)", "파일이 너무 큽니다. 이 서버는 최대 {0}까지 받습니다."),
    (
        r"video too long: (.+) s; this server takes at most (.+) s",
        "영상이 너무 깁니다({0}초). 이 서버는 최대 {1}초까지 받습니다.",
    ),
    (
        r"frame too large: (\d+) x (\d+) pixels; the limit is (\d+) megapixels",
        "화면이 너무 큽니다({0} × {1} 픽셀). 최대 {2}메가픽셀까지 읽습니다.",
    ),
    (
        r"the prompt has (.+) characters; this server takes at most (.+)",
        "프롬프트가 너무 깁니다({0}자). 이 서버는 최대 {1}자까지 받습니다.",
    ),
    (
        r"(.+) tokens are too many; this server writes at most (.+)",
        "최대 토큰 수 {0}개는 너무 많습니다. 이 서버는 최대 {1}개까지 생성합니다.",
    ),
    (r"cannot be read: not a video file of a known format", "지원하는 형식의 영상 파일이 아닙니다."),
    (r"no video stream", "파일에 영상이 없습니다."),
    (r"no frames", "영상에 프레임이 없습니다."),
    (r"file not found", "파일이 더 이상 없습니다. 다시 올려 주세요."),
    (r"file is empty", "빈 파일입니다."),
    (r"decoder hung: stopped after (.+) s", "디코딩이 {0}초 안에 끝나지 않아 중단했습니다."),
    (r"out of memory: decoding needs more than (.+) GiB", "디코딩에 필요한 메모리가 {0} GiB를 넘습니다."),
    (r"decoder crashed", "디코더가 비정상 종료되었습니다{detail}."),
    (r"(?:file )?cannot be read", "파일을 읽을 수 없습니다{detail}."),
    (r"cannot be decoded: no frame at (.+) s", "{0}초 위치의 프레임을 디코딩할 수 없습니다."),
    (r"cannot be decoded", "디코딩할 수 없습니다{detail}."),
)
_DETAILS = {
    "Invalid data found when processing input": "데이터가 손상되었거나 올바르지 않습니다",
    "End of file": "파일이 중간에서 끊겼습니다",
}


def in_korean(message: str) -> str:
    """The message in Korean; an unknown message is returned unchanged."""
    for pattern, korean in _MESSAGES:
        found = re.match(pattern, message)
        rest = message[found.end() :].removeprefix(": ") if found else ""
        if found and (not rest or "{detail}" in korean):
            detail = f"({_DETAILS.get(rest, rest)})" if rest else ""
            return korean.format(*found.groups(), detail=detail)
    return message
