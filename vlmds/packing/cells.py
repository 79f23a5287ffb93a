"""The values of a manifest's cells: texts, captions, conversations and seconds, or why a row is rejected."""

import ast
import io
import json
import math
import re
import tokenize
from typing import Any

from vlmds.packing.tables import Record

MEDIA = ("video", "image", "videos", "images")
USERS, ASSISTANTS = ("human", "user"), ("gpt", "assistant")  # of a turn's "from" or "role"


class BadRow(Exception):
    """Why one row is rejected."""


def is_missing(value: Any) -> bool:
    return value is None or value == "" or isinstance(value, float) and math.isnan(value)


def plain(value: Any) -> str:
    """A cell as text. Other tools write whole numbers of a column with gaps as floats: 1.0 is "1"."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def shown(value: Any) -> str | None:
    """A cell for the ledger, whatever is in it; what is no Unicode as an escape."""
    return None if is_missing(value) else plain(value).encode("utf-8", "backslashreplace").decode() or None


def text_of(record: Record, column: str) -> str | None:
    value = record.get(column)
    if is_missing(value):
        return None
    if isinstance(value, bool | list | dict):
        raise BadRow(f"bad {column}: {json.dumps(value, ensure_ascii=False, default=str)[:40]} is not a text")
    return _unicode(plain(value), column) or None


def _unicode(text: str, column: str) -> str:
    """The text, if it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"not Unicode: {column} contains half a character, {text[error.start]!r}") from None
    return text


def media_of(record: Record) -> str:
    """The video's (or picture's) path or URL, as the row writes it."""
    column = next((name for name in MEDIA if not is_missing(record.get(name))), "video")
    value = record.get(column)
    if isinstance(value, list):
        if len(value) > 1:
            raise BadRow(f"several videos: {len(value)} in column {column}; a sample has one")
        value = value[0] if value else None
    source = text_of({column: value}, column)
    if source is None:
        raise BadRow("no video")
    return source


def first_turns(turns: Any) -> tuple[str, str, int]:
    """The first question of a conversation (LLaVA's or ms-swift's) without the mark of its video or
    picture, its answer, and the number of turns after those; a system turn is not one."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError:
            pass
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("bad conversation: not a list of turns")
    said: list[tuple[bool, str]] = []  # whether it is an answer, and the text
    for turn in turns:
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):  # of parts, of which some are texts
            text = "\n".join(str(part["text"]) for part in text if isinstance(part, dict) and "text" in part)
        if role in USERS or role in ASSISTANTS:
            if not isinstance(text, str):
                raise BadRow("bad conversation: a turn without a text")
            said.append((role in ASSISTANTS, text))
    first = next((i for i, (answers, _) in enumerate(said) if answers), None)
    if first is None:
        raise BadRow("no caption: the conversation has no answer")
    question = "\n".join(text for _, text in said[:first])
    question = re.sub(r"[ \t]*<(?:video|image)>[ \t]*\n?", "", question).strip()
    return _unicode(question, "prompt"), said[first][1], len(said) - first - 1


def captions_of(value: Any) -> list[str]:
    """Captions from a string, a list, or a list as text (JSON, or as pandas writes it into a CSV)."""
    if is_missing(value) and value != "":
        raise BadRow("no caption")
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _list_text(value.strip())
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise BadRow("bad caption: not a string or a list of strings")
    captions = [_unicode(caption.strip(), "caption") for caption in captions]
    if not captions or not all(captions):
        raise BadRow("empty caption")
    return captions


def _list_text(text: str) -> Any:
    """The list that the text writes down in JSON or Python; another text, such as "[음악] 노래", as
    it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not re.fullmatch(r"""\[\s*["'].*\]""", text, re.DOTALL):
        return text
    try:
        found = ast.literal_eval(text)
        words = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
        strings = sum(token.type == tokenize.STRING for token in words)
    except (ValueError, SyntaxError, RecursionError, tokenize.TokenError):
        found, strings = None, 0
    if not isinstance(found, list) or strings != len(found):  # NumPy writes no commas: ['a' 'b'] would become 'ab'
        raise BadRow('bad caption: a list, but not one in JSON; write ["one", "two"]')
    return found


def keepable(value: Any, column: str) -> Any:
    """A value of a column that travels: as JSON has it."""
    if is_missing(value):
        return None
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | dict):
        return json.loads(_unicode(json.dumps(value, ensure_ascii=False, default=str), column))
    return _unicode(str(value), column)


def seconds_of(record: Record, column: str) -> float | None:
    value = record.get(column)
    if value is None or is_missing(value):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise BadRow(f"bad start or end: {column} is {value!r}, not seconds")
    return seconds
