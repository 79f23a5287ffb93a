"""The files of the review page."""

from __future__ import annotations

from vlmds.evaluation.reviews import MARKS
from vlmds.pages.render import json_text, source
from vlmds.review.texts import TEXTS

SCRIPT = source("vlmds.review", "page.js")
STYLE = source("vlmds.pages", "base.css") + source("vlmds.review", "page.css")


def page_html() -> str:
    """The page, with its texts; nothing in it depends on the reviews."""
    return source("vlmds.review", "page.html").replace("{{given}}", json_text({"texts": TEXTS, "marks": MARKS}))
