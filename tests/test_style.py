"""Lint, format and types of the whole repository, and code in strings, which none of these tools reads."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"\bfrom (vlmds[\w.]*) import (\w+(?:, \w+)*)")


@pytest.mark.parametrize("words", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_the_repository_is_clean(words):
    """With the versions of constraints.txt and the settings of pyproject.toml."""
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def programs() -> list[tuple[str, str, str]]:
    """(file and line, module, name) of each import of vlmds in a string: programs that tests start."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for module, names in IMPORT.findall(node.value):
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    found += [(place, module, name) for name in names.split(", ")]
    return found


def test_programs_in_strings_import_what_is_there():
    wrong = []
    for place, module, name in programs():
        if not hasattr(importlib.import_module(module), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                wrong.append(f"{place}: from {module} import {name}")
    assert not wrong, "\n".join(wrong)
    assert len(programs()) > 20
