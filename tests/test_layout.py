"""The rooms of vlmds: each imports only from itself and from rooms above it, and no modules import each other
in a circle. Imports inside functions count too."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "errors", "console", "pages", "files", "permissions", "experiments", "distributed", "video", "models", "runs", "data",
    "packing", "inference", "evaluation", "planning", "captioning", "serve", "review", "judge", "doctor", "training", "export",
    "demo", "bench", "cli",
)  # fmt: skip
"""From the top. docs/architecture.md draws them in this order."""
SHIPPED = "vlmds.export.bundle"  # modules that are copied into an export; there they import each other


def modules() -> dict[str, Path]:
    """Every module of the package by its name, `vlmds` itself excepted, which offers names of all rooms."""
    found = {}
    for path in sorted((ROOT / "vlmds").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    del found["vlmds"]
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> dict[str, int]:
    """The modules of vlmds that a module imports, and the line."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [each if each in known else node.module for each in inner]
        else:
            continue
        found |= {each: node.lineno for each in names if each in known and each != name}
    return found


def graph() -> dict[str, dict[str, int]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items() if not name.startswith(f"{SHIPPED}.")}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_is_a_room_and_every_room_is_there():
    assert {room(name) for name in modules()} == {*ROOMS}


def test_no_import_from_a_room_below():
    upward = [
        f"{name} line {line}: imports {other}"
        for name, others in graph().items()
        for other, line in others.items()
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle():
    edges, done, circles = graph(), set(), []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            circles.append(" -> ".join((*way[way.index(name) :], name)))
        elif name not in done:
            for other in edges.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    assert not circles, "\n".join(circles)


def test_a_circle_and_an_import_from_below_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from vlmds.cli.inference import caption\n")
    assert imports("vlmds.video.a", tmp_path / "a.py", modules()) == {"vlmds.cli.inference": 2}


def test_the_picture_in_the_docs_has_the_rooms_in_this_order():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = page[page.index("<!-- rooms -->") : page.index("<!-- /rooms -->")]
    places = [listed.index(f"`{name}`") for name in ROOMS]
    assert places == sorted(places)


def test_tests_lie_in_the_room_of_what_they_test():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders - {"contracts", "formats", "manual"} <= {*ROOMS}
