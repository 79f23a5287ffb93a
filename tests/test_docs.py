"""README, docs/, CONTRIBUTING and launch/README.md: their links, paths and commands exist, and the site builds."""

import argparse
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmds.cli import _parser
from vlmds.experiments.json_schema import experiment_schema

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.ko.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=IDS)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((action.choices for action in actions), {})


def anchors(page: Path) -> set[str]:
    """The headings as GitHub and mkdocs both name them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def fenced_commands(page: Path) -> list[list[str]]:
    """The arguments of every vlmds command in a bash block: the subcommand first."""
    found = []
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "bash":
            continue
        block = re.sub(r"<<JSON\n.*?^JSON$", "", block, flags=re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line.replace("$(", "(")):
                words = shlex.split(part, comments=True)
                if ">" in words:
                    words = words[: words.index(">")]
                for number, word in enumerate(words):
                    if word in ("vlmds", "vlmds.cli") or word.endswith("/vlmds"):
                        found.append(words[number + 1 :])
                        break
                    if word in ("launch/train.py", "launch/slurm.sbatch"):
                        found.append(["train", *words[number + 1 :]])
                        break
    return found


@pages
def test_links_lead_to_a_file_and_a_heading(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{target}: no such file"
        if page.parent == ROOT / "docs":
            assert other.parent == page.parent, f"{target}: mkdocs has no files outside of docs/"
        assert not anchor or anchor in anchors(other), f"{target}: no such heading"


FOLDERS = ("vlmds", "tests", "launch", "docs", "ds_configs")


def named_paths(text: str) -> list[str]:
    """Repository paths in code spans. A bare name such as `loss.py` belongs to the folder of the last
    path before it in the same line."""
    found = []
    for line in FENCE.sub("", text).splitlines():
        folder = None
        for code in re.findall(r"`([^` ]+)`", line):
            if code.startswith(tuple(f"{top}/" for top in FOLDERS)):
                found.append(code)
                folder = code if code.endswith("/") else code.rpartition("/")[0] + "/"
            elif folder and re.fullmatch(r"[\w/]+\.(py|j2|html\.j2)|\w+/", code):
                found.append(folder + code)
    return found


@pages
def test_paths_of_the_repository_exist(page):
    for path in named_paths(page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))), f"{path}: no such file"


def test_the_table_of_what_to_change_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Where to change what")[2].partition("\n## ")[0]
    rooms = {path.name for path in (ROOT / "vlmds").iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert {path.split("/")[1] for path in named_paths(table) if path.startswith("vlmds/")} >= rooms


@pages
def test_commands_in_blocks_are_accepted(page):
    for arguments in fenced_commands(page):
        try:
            _parser().parse_args(arguments)
        except SystemExit as end:
            assert end.code == 0, f"vlmds {' '.join(arguments)}"


def test_there_are_commands_to_try():
    found = {words[0] for page in PAGES for words in fenced_commands(page) if words}
    assert found >= {
        "pack",
        "plan",
        "train",
        "evaluate",
        "caption",
        "compare",
        "sweep",
        "export",
        "serve",
        "fetch",
        "new",
        "demo",
        "schema",
    }


@pages
def test_commands_in_a_line_name_what_there_is(page):
    known = subcommands(_parser())
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`(?:vlmds) ([^`]+)`", text):
        words = code.split()
        if words[0] in ("…", "COMMAND", "[...]"):
            continue
        assert words[0] in known, f"vlmds {code}"
        parser = known[words[0]]
        if len(words) > 1 and words[1] in subcommands(parser):
            parser = subcommands(parser)[words[1]]
        for word in words:
            if word.startswith("--"):
                assert word in parser._option_string_actions, f"vlmds {code}"


def options(parser: argparse.ArgumentParser) -> Iterator[set[str]]:
    """The names of each documented option of the command and of its subcommands."""
    for action in parser._actions:
        if action.option_strings and argparse.SUPPRESS not in (action.help, action.default):
            yield set(action.option_strings)
    for command in subcommands(parser).values():
        yield from options(command)


def test_every_option_is_in_the_docs():
    named = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", "\n".join(page.read_text(encoding="utf-8") for page in PAGES)))
    for name, command in subcommands(_parser()).items():
        for names in options(command):
            assert names & named, f"vlmds {name} {max(names, key=len)} is in no page"


OTHER_TOOLS = {
    *("--strict", "--module", "--hostfile", "--num_gpus", "--quiet", "--nproc-per-node", "--nnodes", "--node_rank"),
    *("--max-restarts", "--rdzv-backend", "--rdzv-conf", "--local-addr", "--shutdown-timeout"),
}


@pages
def test_options_in_a_line_exist(page):
    known = set().union(*options(_parser())) | OTHER_TOOLS
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in known, f"{option} in `{code}`"


def test_every_extra_is_in_the_docs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in ("docs/getting-started.md", "README.ko.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for extra in extras:
            assert f"'.[{extra}]'" in text or f"`{extra}`" in text, f"{page}: extra {extra}"


def schema_keys(schema: dict, section: dict, prefix: str = "") -> set[str]:
    """The keys of an experiment file, such as stages.data.path."""
    found = set()
    for name, value in section["properties"].items():
        found.add(prefix + name)
        for other in re.findall(r"#/\$defs/(\w+)", str(value)):
            found |= schema_keys(schema, schema["$defs"][other], f"{prefix}{name}.")
    return found


@pages
def test_keys_in_a_line_exist(page):
    schema = experiment_schema()
    known = schema_keys(schema, schema)
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        for key in re.findall(rf"(?<![\w./])(?:{sections})(?:\[\])?(?:\.\w+)+", code):
            plain = re.sub(r"\[\]|\.(?:\d+|N)(?=\.)", "", key)
            assert plain in known or plain.endswith((".md", ".py", ".json", ".safetensors")), f"{key}: no such key"


def test_both_readmes_have_the_same_shape_and_are_short():
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    assert max(len(english.splitlines()), len(korean.splitlines())) <= 150
    shape = [
        [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE)] for text in (english, korean)
    ]
    assert shape[0] == shape[1]
    blocks = [
        [re.sub(r"\s*#.*", "", block) for language, block in FENCE.findall(text) if language == "bash"]
        for text in (english, korean)
    ]
    assert blocks[0] == blocks[1], "the commands differ"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "configuration" / "index.html").is_file()
