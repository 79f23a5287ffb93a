"""Experiment files: the packaged ones, and refused keys and values."""

import pytest

from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, packaged_experiments, parse_experiment, to_yaml
from vlmds.experiments.schema import DataConfig

MATRIX = {  # name: (projector, adapter, owner, priority)
    "e1": ("linear", "lora", "A", 1),
    "e2": ("linear", "dora", "A", 5),
    "e3": ("mlp", "lora", "A", 2),
    "e4": ("mlp", "dora", "B", 3),
    "e5": ("cabstractor", "lora", "B", 4),
    "e6": ("cabstractor", "dora", "B", 6),
    "e7": ("perceiver", "lora", "C", 7),
    "e8": ("perceiver", "dora", "C", 8),
}


@pytest.mark.parametrize("name", MATRIX)
def test_packaged_matrix(name):
    exp = load_experiment(f"{name}.yaml")
    assert (exp.projector.type, exp.peft.type, exp.owner, exp.priority) == MATRIX[name]
    assert [stage.train for stage in exp.stages] == [["projector"], ["projector", "peft"]]
    assert exp.vision.model == "openai/clip-vit-large-patch14-336"
    assert exp.llm.model == "Qwen/Qwen3-8B" and exp.llm.load_in_4bit
    assert exp.data.num_frames == 8 and exp.data.prompt == "이 영상을 설명해주세요."
    assert (exp.training.micro_batch, exp.training.gradient_accumulation) == (2, 4)


def test_every_packaged_name_is_listed():
    assert set(MATRIX) <= set(packaged_experiments())
    assert "base" not in packaged_experiments()


def test_resolved_yaml_round_trips(tmp_path):
    exp = load_experiment("e7", ["stages.0.lr=5e-4"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(exp), encoding="utf-8")
    assert load_experiment(tmp_path / "resolved.yaml") == exp


def test_overrides_are_typed_and_reach_lists():
    exp = load_experiment("e3", ["training.micro_batch=4", "stages.1.lr=1e-3"])
    assert exp.training.micro_batch == 4
    assert exp.stages[1].lr == 1e-3 and exp.stages[0].lr == 1e-3


def test_changing_the_projector_drops_the_old_types_keys():
    assert load_experiment("e7", ["projector.type=mlp"]).projector.type == "mlp"


def test_other_data_replaces_the_files(tmp_path):
    """As --data does for a run that was trained on a blend; both on one command are a mistake."""
    blend, path = "data.blend=[{path: a}, {path: b}]", "data.path=/data/c"
    mine = tmp_path / "mine.yaml"
    for first, second in ((blend, path), (path, blend)):
        mine.write_text(to_yaml(load_experiment("e3", [first])), encoding="utf-8")
        assert load_experiment(mine, [second]).data == load_experiment("e3", [second]).data
        with pytest.raises(InputError, match="data: give path or blend, not both"):
            load_experiment(mine, [second, first])
    assert load_experiment(mine, ["data.blend=null"]).data.path == "/data/c"


def test_local_file_extends_packaged(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: e8\nname: mine\nprojector: {depth: 3}\n")
    exp = load_experiment(path)
    assert (exp.projector.depth, exp.projector.width, exp.peft.type) == (3, 1664, "dora")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("projector.widht=3", ["projector.widht", "did you mean 'width'"]),
        ("trainig.micro_batch=3", ["trainig", "did you mean 'training'"]),
        ("stages.0.trian=[peft]", ["stages.0.trian", "did you mean 'train'"]),
        ("training.micro_batch=two", ["training.micro_batch", "integer", "'two'"]),
        ("training.micro_batch=true", ["training.micro_batch", "integer"]),
        ("stages.0.lr=abc", ["stages.0.lr", "number", "'abc'"]),
        ("projector.type=percever", ["projector.type", "did you mean 'perceiver'"]),
        ("peft.type=qlora", ["peft.type", "'lora' or 'dora'"]),
        ("stages.0.train=[]", ["stages.0", "trains nothing"]),
        ("stages.0.steps=5", ["stages.0", "exactly one of epochs and steps"]),
        ("stages.5.lr=1", ["stages.5", "0 to 1"]),
        ("projector.num_heads=7", ["num_heads 7 does not divide width 1664"]),
        ("training.micro_batch", ["write key=value"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(override, expected):
    with pytest.raises(InputError) as caught:
        load_experiment("e7", [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_mistake_in_a_file_names_the_file_that_made_it(tmp_path):
    (tmp_path / "parent.yaml").write_text("extends: e1\nllm: {modle: x}\n")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nname: child\n")
    with pytest.raises(InputError, match=r"parent\.yaml: llm\.modle: .*did you mean 'model'"):
        load_experiment(tmp_path / "child.yaml")


def test_unknown_experiment_and_loops(tmp_path):
    with pytest.raises(InputError, match="no such experiment file.*packaged"):
        load_experiment("nope")
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(InputError, match="extends itself"):
        load_experiment(tmp_path / "a.yaml")


def test_missing_key_is_named():
    with pytest.raises(InputError, match="x.yaml: vision: required key is missing"):
        parse_experiment({"name": "x"}, "x.yaml")


def test_a_start_reads_no_shard_unless_asked():
    assert DataConfig().verify == "size"
