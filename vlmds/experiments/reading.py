"""Reading of experiment files.

``load_experiment("e7.yaml", ["training.micro_batch=4"])`` follows ``extends``, applies the
overrides, and returns an :class:`~vlmds.experiments.schema.Experiment`. Every mistake raises an
:class:`InputError` of one line with the file, the key and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vlmds.errors import InputError
from vlmds.experiments.schema import PROJECTORS, BlendPart, Experiment, Section, StageConfig

PACKAGED = Path(__file__).parent
_PRETRAINED = ("vision.", "llm.")  # sections with a model and its revision
_SOURCES = {"path": "blend", "blend": "path"}  # keys of data; each replaces the other
_LISTS: dict[str, type[Section]] = {"stages": StageConfig, "blend": BlendPart}  # keys whose values are lists


def packaged_experiments() -> list[str]:
    """Names of the packaged experiments: demo, e1 ... e8."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml") if path.stem != "base")


def load_experiment(exp: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """Read, resolve and validate an experiment.

    Args:
        exp: path of a YAML file, or the name of a packaged experiment (``e7`` or ``e7.yaml``).
        overrides: ``key=value`` pairs; keys are dotted, list items by number
            (``stages.0.lr=5e-4``), values are YAML.

    Raises:
        InputError: one line that names the file or override, the key, and the fix.
    """
    path = find_experiment(exp)
    origins: dict[str, str] = {}
    tree = _read_layers(path, origins, seen=())
    return _with_overrides(tree, overrides, path.name, origins)


def override_experiment(experiment: Experiment, overrides: list[str] | tuple[str, ...], source: str) -> Experiment:
    """The experiment with ``key=value`` pairs applied. source: file name for messages. Raises InputError as
    :func:`load_experiment`."""
    return _with_overrides(experiment.model_dump(), overrides, source, {})


def _with_overrides(
    tree: dict, overrides: list[str] | tuple[str, ...], source: str, origins: dict[str, str]
) -> Experiment:
    # A model resets its revision and a type the projector's keys, so these overrides come first.
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith((".model", ".type"))):
        _apply_override(tree, override, origins)
    return parse_experiment(tree, source, origins)


def parse_experiment(tree: dict, source: str, origins: dict[str, str] | None = None) -> Experiment:
    """Validate a resolved mapping of keys, such as one that a run folder records.

    Args:
        source: file name for messages. origins: of each dotted key, the file or override that set it.

    Raises:
        InputError: as :func:`load_experiment`.
    """
    origins = origins or {}

    def fail(key: str, problem: str) -> NoReturn:
        raise InputError(f"{_origin(origins, key) or source}: {key}: {problem}")

    _check_keys(tree, Experiment, "", fail)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # The discriminator's tag is part of pydantic's location but not of the file's keys.
        loc = [str(part) for part in first["loc"]]
        if loc[:1] == ["projector"] and loc[1:2] and loc[1] in PROJECTORS:
            del loc[1]
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            problem = "required key is missing"
        elif first["type"] != "value_error":
            problem = f"{problem[0].lower()}{problem[1:]}, not {first['input']!r}"
        more = error.error_count() - 1
        fail(".".join(loc) or "experiment", problem + (f" (and {more} more)" if more else ""))


def find_experiment(exp: str | Path, relative_to: Path | None = None) -> Path:
    """The file of ``exp``: a path, or the name of a packaged experiment. Raises InputError."""
    for candidate in [(relative_to or Path()) / exp, Path(exp).expanduser()]:
        if candidate.is_file():
            return candidate
    if Path(exp).name == str(exp):
        packaged = PACKAGED / f"{Path(exp).stem}.yaml"
        if packaged.is_file():
            return packaged
    known = packaged_experiments()
    near = difflib.get_close_matches(Path(exp).stem, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"packaged experiments: {', '.join(known)}"
    raise InputError(f"{exp}: no such experiment file; {hint}")


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML that :func:`load_experiment` reads back."""
    return yaml.safe_dump(experiment.model_dump(), allow_unicode=True, sort_keys=False)


def _read_layers(path: Path, origins: dict[str, str], seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        raise InputError(f"{path.name}: extends: the file extends itself")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: an experiment is a mapping of keys, not {type(tree).__name__}")
    recorded = any((path.parent / name).is_file() for name in ("run.json", "artifact.json"))
    if recorded and path.name == "experiment.yaml":
        _complete(tree)
    parent = tree.pop("extends", None)
    merged: dict = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise InputError(f"{path.name}: extends: must be one file name, not {parent!r}")
        parent_path = find_experiment(parent, relative_to=path.parent)
        merged = _read_layers(parent_path, origins, (*seen, path.resolve()))
    return _merge(merged, tree, path.name, origins, "")


def _complete(tree: dict) -> None:
    """Add the keys that the experiment of a run or an artifact lacks if an older version wrote it, with
    the values that stood for them then."""
    data = tree.setdefault("data", {})
    if isinstance(data, dict):
        data.setdefault("fit", "crop")


def _merge(base: dict, over: dict, source: str, origins: dict[str, str], prefix: str) -> dict:
    """``over`` merged into ``base``; lists are replaced. When the projector's ``type`` changes, the keys
    of the old type are dropped, and when a model changes, its ``revision``."""
    if prefix == "projector." and over.get("type", base.get("type")) != base.get("type"):
        base = {}
    merged = dict(base)
    if prefix in _PRETRAINED and over.get("model", base.get("model")) != base.get("model"):
        merged.pop("revision", None)
    for key, value in over.items():
        dotted = f"{prefix}{key}"
        origins[dotted] = source
        if isinstance(value, dict) and isinstance(base.get(key, {}), dict):
            value = _merge(base.get(key) or {}, value, source, origins, f"{dotted}.")
        merged[key] = value
    return merged


def _apply_override(tree: dict, override: str, origins: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write key=value, such as training.micro_batch=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not valid YAML") from None
    *parents, leaf = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_list_index(node, part, where, override)]
        else:
            if node.get(part) is None:  # missing, or null, such as a stage's data
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise InputError(f"--set {override}: {where} is a value, it has no keys")
    if isinstance(node, list):
        node[_list_index(node, leaf, key, override)] = value
    else:
        if key == "projector.type" and node.get("type") != value:
            node.clear()  # as in _merge: the new type has other keys
        if leaf == "model" and f"{'.'.join(parents)}." in _PRETRAINED and node.get("model") != value:
            node.pop("revision", None)
        if parents[-1:] == ["data"] and leaf in _SOURCES and value is not None:
            other = f"{'.'.join(parents)}.{_SOURCES[leaf]}"
            if not origins.get(other, "").startswith("--set"):  # two overrides are a mistake
                node.pop(_SOURCES[leaf], None)  # the override replaces the file's data
        node[leaf] = value
    for depth in range(1, len(parents) + 1):
        origins.setdefault(".".join(parents[:depth]), f"--set {override}")
    origins[key] = f"--set {override}"


def _list_index(items: list, part: str, where: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise InputError(f"--set {override}: {where}: give a number from 0 to {len(items) - 1}")
    return int(part)


def _check_keys(tree: Any, model: type[BaseModel], prefix: str, fail: Callable[[str, str], NoReturn]) -> None:
    """Refuse unknown keys, naming the nearest valid one. pydantic checks the values."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        field = model.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), list(model.model_fields), n=1)
            hint = f"did you mean '{near[0]}'?" if near else "valid: " + ", ".join(model.model_fields)
            fail(dotted, f"unknown key; {hint}")
        if key == "projector" and isinstance(value, dict):
            kind = value.get("type")
            if kind not in PROJECTORS:
                near = difflib.get_close_matches(str(kind), list(PROJECTORS), n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                fail(f"{dotted}.type", f"unknown projector {kind!r}; {hint}valid: " + ", ".join(PROJECTORS))
            _check_keys(value, PROJECTORS[kind], f"{dotted}.", fail)
        elif key in _LISTS and isinstance(value, list):
            for number, item in enumerate(value):
                _check_keys(item, _LISTS[key], f"{dotted}.{number}.", fail)
        else:
            for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a section or null
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    _check_keys(value, kind, f"{dotted}.", fail)


def _origin(origins: dict[str, str], key: str) -> str | None:
    """The file or override that set ``key``, or else its nearest parent."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return None
