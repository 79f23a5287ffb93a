"""Differences between two experiments, key by key."""

from __future__ import annotations

from typing import Any

from vlmds.experiments.schema import Experiment


def differing_keys(
    old: Experiment, new: Experiment, *, only: tuple[str, ...] = ("",), but: tuple[str, ...] = ()
) -> list[str]:
    """ "key old -> new" for each key that differs.

    Args:
        only, but: keys to compare and keys to leave out; a section stands for all keys below it.
    """

    def under(key: str, names: tuple[str, ...]) -> bool:
        return any(name in ("", key) or key.startswith(f"{name}.") for name in names)

    changed = changed_settings(old.model_dump(), new.model_dump())
    return [text for key, text in changed.items() if under(key, only) and not under(key, but)]


def changed_settings(old: dict, new: dict) -> dict[str, str]:
    """{dotted key: "key old -> new"} of each setting that differs."""
    a, b = flat_settings(old), flat_settings(new)
    return {
        key: f"{key} {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    }


def flat_settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The dotted keys and values of nested mappings and lists of mappings."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}.{key}" if prefix else key)
    return flat
