"""The JSON Schema and docs/configuration.md, which are generated from the models of schema.py."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from vlmds.cli import main
from vlmds.experiments.json_schema import SCHEMA_FILE, experiment_schema
from vlmds.experiments.reading import PACKAGED, load_experiment

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(PACKAGED.glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(experiment_schema())


@pytest.mark.parametrize(
    ("options", "path"),
    [([], SCHEMA_FILE), (["--markdown"], ROOT / "docs" / "configuration.md")],
    ids=["schema.json", "configuration.md"],
)
def test_the_committed_file_is_what_the_command_prints(options, path, capsys):
    assert main(["schema", *options]) == 0
    printed = capsys.readouterr().out
    name = path.relative_to(ROOT)
    assert printed == path.read_text(encoding="utf-8"), f"{name} is stale: vlmds schema {' '.join(options)} > {name}"


def test_every_key_has_a_meaning():
    schema = experiment_schema()
    for name, section in [("Experiment", schema), *schema["$defs"].items()]:
        for key, field in section["properties"].items():
            described = schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
            assert field.get("description") or described.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_packaged_files_name_the_schema_and_follow_it(path):
    text = path.read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert (path.parent / first.rpartition("=")[2]).is_file()
    VALIDATOR.validate(yaml.safe_load(text))


def test_a_resolved_experiment_follows_it():
    for name in ("e1", "e4", "e6", "e8"):
        VALIDATOR.validate(json.loads(load_experiment(name).model_dump_json()))


@pytest.mark.parametrize(
    "text",
    [
        "projector: {widht: 3}",
        "projector: {type: mlp, depth: 2}",
        "projector: {type: qformer}",
        "training: {micro_batch: 0}",
        "stages: [{name: a, train: [projector]}]",
        "peft: {dropout: 1}",
        "data: {blend: [{weight: 2}]}",
        "extends: [e7]",
        "vison: {pool: 2}",
    ],
)
def test_a_mistake_is_refused(text):
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(yaml.safe_load(text))


def test_a_file_that_extends_another_may_be_partial():
    VALIDATOR.validate(
        yaml.safe_load("extends: e7\nname: mine\nprojector: {depth: 3}\npeft: {r: 8}\nvision: {pool: 2}\n")
    )
