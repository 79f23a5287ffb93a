"""Frame of the HTML reports: templates, colours, and the switches of language and light or dark."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined

Text = tuple[str, str]
"""In English and in Korean."""


def render(package: str, template: str, **values: Any) -> str:
    """The page of a template, which extends "pages/base.html.j2" and lies in the folder of a package."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PrefixLoader({"pages": PackageLoader("vlmds.pages", ".")})]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def source(package: str, name: str) -> str:
    """The text of a file of a package, such as a script of a page."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def policy(*scripts: str) -> str:
    """Content-Security-Policy that loads nothing from anywhere and runs these inline scripts alone, whatever
    captions contain."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}"


def json_text(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
