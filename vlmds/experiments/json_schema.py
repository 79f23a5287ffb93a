"""The JSON Schema of experiment files and the table of all their keys, generated from schema.py.

`vlmds schema` prints them. Both are committed, and a test fails if they are out of date:
vlmds/experiments/schema.json, with which editors complete keys of the packaged files, and
docs/configuration.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from vlmds.experiments.reading import PACKAGED
from vlmds.experiments.schema import Experiment

SCHEMA_FILE = PACKAGED / "schema.json"
_WHOLE = ("StageConfig", "BlendPart")  # items of lists: always complete, as lists are not merged
_LIMITS = {"exclusiveMinimum": "> {:g}", "minimum": "≥ {:g}", "exclusiveMaximum": "< {:g}", "maximum": "≤ {:g}"}

Schema = dict[str, Any]


def experiment_schema() -> Schema:
    """The JSON Schema (2020-12) of experiment files. No key is required, as a file may extend another one;
    missing keys are found when the file is read."""
    schema = Experiment.model_json_schema()
    schema["properties"] = {
        "extends": {
            "type": "string",
            "description": "Another experiment file, or the name of a "
            "packaged one. This file's keys are merged over its keys.",
        },
        **schema["properties"],
    }
    for name, section in [("Experiment", schema), *schema["$defs"].items()]:
        if name not in _WHOLE:
            section.pop("required", None)
    projector = schema["properties"]["projector"]
    projector.pop("discriminator")
    projector["anyOf"] = projector.pop("oneOf")  # a projector without its type may match several
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "vlmds experiment"}


def schema_text() -> str:
    """The content of SCHEMA_FILE."""
    return json.dumps(experiment_schema(), indent=2, ensure_ascii=False) + "\n"


def configuration_page() -> str:
    """The content of docs/configuration.md: every key with its type, default and meaning."""
    schema = experiment_schema()
    base = yaml.safe_load((PACKAGED / "base.yaml").read_text(encoding="utf-8"))
    parts = [_INTRODUCTION]
    for title, text, section, defaults in _sections(schema, base):
        parts.append(
            f"## {title}\n\n{text}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
            + "\n".join(_rows(section, schema, defaults))
        )
    return "\n\n".join(parts) + "\n"


def _sections(schema: Schema, base: dict) -> Iterator[tuple[str, str, Schema, dict]]:
    """(heading, first sentence, section, values of base.yaml) of each section, in the order of the schema."""
    yield "Top level", "Keys of the file itself.", schema, {}
    for key, field in schema["properties"].items():
        for section in _models(field, schema):
            kind = section["properties"].get("type", {}).get("const")
            title = f"{key}, type: {kind}" if kind else f"{key}[]" if key == "stages" else key
            yield title, _text(section["description"]), section, base.get(key, {})
            for name, also in (("blend", "[]"), ("lr_factors", ", weight_decay_factors"), ("data", "")):
                for part in _models(section["properties"].get(name, {}), schema):
                    yield f"{title}.{name}{also}", _text(part["description"]), part, {}


def _models(field: Schema, schema: Schema) -> list[Schema]:
    """The sections of which a field's value may be one, or a list."""
    if "$ref" in field:
        return [schema["$defs"][field["$ref"].rpartition("/")[2]]]
    inner = [*field.get("anyOf", ()), *([field["items"]] if "items" in field else ())]
    return [model for choice in inner for model in _models(choice, schema)]


def _rows(section: Schema, schema: Schema, base: Any) -> Iterator[str]:
    fields = section["properties"].items()
    for key, field in sorted(fields, key=lambda item: item[0] != "type"):  # first: it decides the others
        models = _models(field, schema)
        if "default" in field:
            default = "below" if models and field["default"] else _value(field["default"])
        elif isinstance(base, dict) and key in base:
            default = f"{_value(base[key])} (base.yaml)"
        else:
            default = "none" if key == "extends" else "required"
        kind = _type(field, schema).replace("|", "\\|")
        # pydantic omits a field's description if it equals that of its section.
        meaning = _text(field.get("description") or models[0]["description"])
        yield f"| `{key}` | {kind} | {default} | {meaning} |"


def _type(field: Schema, schema: Schema) -> str:
    if "$ref" in field:
        return "section"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(choice, schema) for choice in field["anyOf"]))
    if field["type"] == "array":
        size = f"{field['maxItems']} " if "maxItems" in field else ""
        return f"list of {size}" + re.sub(r"(string|number|section)\b", r"\1s", _type(field["items"], schema), count=1)
    limits = [text.format(field[limit]) for limit, text in _LIMITS.items() if limit in field]
    return " ".join([field["type"], ", ".join(limits)]).strip()


def _value(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _text(description: str) -> str:
    """A docstring as one line of Markdown."""
    return " ".join(description.split()).replace("``", "`").replace("|", "\\|")


_INTRODUCTION = """\
<!-- Generated from vlmds/experiments/schema.py by `vlmds schema --markdown`; do not edit. -->
# Configuration

This page lists every key of an experiment file, with its type, default and meaning. It is generated from the
models that check the files.

An experiment is one YAML file. It extends another file or a packaged experiment, and sets what differs:

```yaml
extends: e7
name: my-e7
data: {num_frames: 16}
training: {global_batch: 64}
```

- `--exp` takes a path or the name of a packaged experiment (`e1` … `e8`, `demo`). `vlmds new my.yaml
  --projector perceiver` writes a commented file to start from.
- Mappings are merged key by key; a list replaces the whole list. Changing the projector's `type` drops the
  keys of the old type, and changing a `model` drops its `revision`.
- `--set training.micro_batch=4 stages.0.lr=5e-4` overrides keys on the command line; list items are
  numbered from 0.
- A mistake is reported in one line, with the file, the key and the nearest valid key: `e7.yaml: projector.widht: unknown key; did
  you mean 'width'?`
- The run folder records the resolved experiment as `experiment.yaml`.
- "(base.yaml)" marks a value set in `base.yaml`, which all packaged experiments extend.

Editors with a YAML language server complete and check keys. The packaged files name the schema in their
first line; for your own files, run `vlmds schema > schema.json` once and start each file with
`# yaml-language-server: $schema=schema.json`."""
