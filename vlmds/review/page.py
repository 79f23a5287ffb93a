"""The files of the review page."""

from __future__ import annotations

import json
from pathlib import Path

from vlmds.evaluation.reviews import MARKS
from vlmds.review.texts import TEXTS

_FOLDER = Path(__file__).parent
SCRIPT = (_FOLDER / "page.js").read_text(encoding="utf-8")
STYLE = (_FOLDER / "page.css").read_text(encoding="utf-8")


def page_html() -> str:
    """The page, with its texts; nothing in it depends on the reviews."""
    page = (_FOLDER / "page.html").read_text(encoding="utf-8")
    given = json.dumps({"texts": TEXTS, "marks": MARKS}, ensure_ascii=False).replace("<", "\\u003c")
    return page.replace("{{given}}", given)
