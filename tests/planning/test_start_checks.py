"""Checks before a start: training, the plan and the doctor refuse the same things with the same messages."""

import json
import shutil

import pytest
import torch

from tests import tiny
from tests.clips import write_manifest, write_video
from tests.training.launch import arguments, train
from vlmds.cli import main
from vlmds.data.dataset import open_dataset
from vlmds.doctor.cluster import findings_within
from vlmds.doctor.node import FAILED, OK, CheckContext, check_dataset
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import meta_models
from vlmds.models.language import load_tokenizer
from vlmds.models.vision import load_vision_tower
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack
from vlmds.planning.plan import plan_experiment
from vlmds.planning.start_checks import sequence_builder, training_reader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(models, shards, tmp_path_factory):
    """Datasets by name: whole, val_only, features of the tower, of a wider one, and of one that
    takes larger pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_video(folder / "a.mp4")
    manifest = write_manifest(folder / "m.jsonl", [{"video": "a.mp4", "caption": "한 명이 걷습니다.", "split": "val"}])
    frames = {"num_frames": tiny.FRAMES, "image_size": tiny.SIDE}
    pack(manifest, folder / "val_only", store="frames", progress=False, **frames)
    vision = load_experiment("e1", tiny.settings(models)).vision
    convert(
        shards,
        folder / "features",
        store="features",
        progress=False,
        tower=load_vision_tower(vision, torch.float32, CPU),
        tower_name="clip",
    )
    meta = json.loads((shutil.copytree(folder / "features", folder / "wider") / "dataset.json").read_text())
    meta["vision"]["width"] = 1024
    (folder / "wider" / "dataset.json").write_text(json.dumps(meta))
    meta = json.loads((shutil.copytree(folder / "features", folder / "larger") / "dataset.json").read_text())
    meta |= {"image_size": 2 * tiny.SIDE, "vision": meta["vision"] | {"patches": 16}}
    (folder / "larger" / "dataset.json").write_text(json.dumps(meta))
    return {"whole": shards, **{name: folder / name for name in ("val_only", "features", "wider", "larger")}}


def blend(*paths) -> str:
    parts = ", ".join(f"{{path: {path}}}" for path in paths)
    return f"data.blend=[{parts}]"


REFUSED = [
    ("val_only", [], "no split 'train'; it has val"),
    ("whole", ["data.num_frames=2"], "packed with num_frames 4, but the experiment needs 2"),
    ("whole", ["training.global_batch=5"], "global_batch: 5 is not a multiple of micro_batch 2"),
    ("features", ["vision.pool=2"], "made with vision.pool 1, but the experiment has 2"),
    ("features", ["vision.feature_layer=-2"], "vision.feature_layer -1, but the experiment has -2"),
    ("wider", [], "its features of clip are 4 x 1024 a frame, but vision.model"),
    ("whole", ["stages.0.lr=1e-3", "stages.0.train=[peft]", "peft.target_modules=[nothing]"], "peft.target_modules"),
    (
        "whole",
        ["training.best_metric=cider", "training.evaluate_every=2"],
        "training.best_metric: 'cider' is no metric here",
    ),
    ("val_only", ["training.early_stopping=2"], "no split 'train'"),
    (
        "whole",
        ["llm.dtype=float32", "llm.attention=flash_attention_2"],
        "llm.attention: flash_attention_2 computes in half precision only; set llm.dtype to bfloat16",
    ),
    ("larger", [], "its features of clip are 16 x 48 a frame, but vision.model"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED)
def test_the_plan_and_the_doctor_refuse_what_training_refuses(models, data, name, overrides, message, capsys, tmp_path):
    settings = [*tiny.settings(models), *overrides]
    assert main(["plan", "--exp", "e3", "--data", str(data[name]), "--set", *settings]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # the others show progress
    assert message in error
    experiment = load_experiment("e3", [*settings, f"data.path={data[name]}"])
    context = CheckContext(experiment, tmp_path, 30, 1, None, CPU)
    (found,) = findings_within(30, lambda: check_dataset(context))
    assert found.level == FAILED and found.text == error.removeprefix("vlmds: ")


@pytest.mark.distributed
def test_training_refuses_it_in_the_same_words(models, data, tmp_path, capsys):
    run = tmp_path / "run"
    for name, overrides, message in (REFUSED[0], REFUSED[5], REFUSED[6]):
        done = train(0, *arguments(models, data[name], run, *overrides), expect=2)
        assert message in done.stderr and not run.exists()
        main(["plan", "--exp", "e3", "--data", str(data[name]), "--set", *tiny.settings(models), *overrides])
        assert capsys.readouterr().err.splitlines()[-1] == done.stderr.splitlines()[-1]


def test_a_part_without_the_split_and_frames_of_another_size(models, data, shards, tmp_path):
    settings = tiny.settings(models)
    with pytest.raises(InputError, match="data.blend: no split 'train' in .*val_only"):
        plan_experiment(load_experiment("e3", [*settings, blend(shards, data["val_only"])]))
    pack(
        write_manifest(tmp_path / "m.jsonl", [{"video": str(write_video(tmp_path / "a.mp4")), "caption": "가"}]),
        tmp_path / "large",
        store="frames",
        num_frames=tiny.FRAMES,
        image_size=56,
        progress=False,
    )
    with pytest.raises(InputError, match="packed with image_size 56, but the experiment needs 28"):
        plan_experiment(load_experiment("e3", [*settings, f"data.path={tmp_path / 'large'}"]))


def test_what_is_sound_passes(models, data, tmp_path):
    for name in ("whole", "features"):
        experiment = load_experiment("e3", tiny.settings(models, data[name]))
        (found,) = check_dataset(CheckContext(experiment, tmp_path, 30, 1, None, CPU))
        assert found.level == OK
        assert plan_experiment(experiment, gpus=2)


def test_charts_at_wandb_need_wandb(models, shards, monkeypatch):
    experiment = load_experiment("e3", [*tiny.settings(models, shards), "logging.wandb_project=p"])
    monkeypatch.setattr("vlmds.planning.start_checks.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb is not installed; pip .* -e '\.\[track\]', or"):
        plan_experiment(experiment)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.num_frames=8192"], "data.num_frames: 32,768 visual tokens, the prompt and"),
        (["data.max_caption_tokens=32768"], "llm.model .* takes 32,768; use fewer frames"),
    ],
)
def test_sequences_longer_than_the_model_takes(models, overrides, message):
    experiment = load_experiment("e3", [*tiny.settings(models), *overrides])
    with pytest.raises(InputError, match=message):
        sequence_builder(experiment, load_tokenizer(experiment.llm), meta_models(experiment).captioner)


def test_the_plan_shows_the_first_sample_that_training_reads(models, data, capsys):
    """Seed 0: position 0 of the shuffled stream; its own prompt and caption, and its times."""
    settings = tiny.settings(models)
    experiment = load_experiment("e3", [*settings, f"data.path={data['whole']}"])
    reader = training_reader(experiment, meta_models(experiment), open_dataset(experiment.data))
    sample, row = reader.load(0), reader.row(0)
    main(["plan", "--exp", "e3", "--data", str(data["whole"]), "--set", *settings])
    printed = capsys.readouterr().out
    assert f"sample: {sample.key}, the first that training reads" in printed
    assert f"'{sample.caption}<|im_end|>'" in printed and "공원" not in printed
    first, last = (row.duration * (i + 0.5) / tiny.FRAMES for i in (0, tiny.FRAMES - 1))
    assert f"  frames at {first:.2f}, " in printed and f", {last:.2f} s" in printed


def test_without_a_tokenizer_the_plan_still_shows_the_users_caption(models, data, tmp_path):
    bare = shutil.copytree(models, tmp_path / "models")
    for file in (bare / "qwen3").iterdir():  # weights, too, which the plan does not need
        if file.name != "config.json":
            file.unlink()
    printed = plan_experiment(load_experiment("e3", tiny.settings(bare, data["whole"])))
    assert "  prompt   '이 영상을 설명해주세요.'" in printed and "  caption  '" in printed
    assert "tokens are not shown" in printed and "번 영상입니다." in printed
