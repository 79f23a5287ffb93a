"""A stage's own data: align on pictures (and a few clips), finetune on clips."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.clips import picture, write_manifest, write_video
from tests.training.launch import arguments, metrics, train, train_and_kill
from tests.training.test_training import assert_same_weights, weights
from vlmds.cli import main
from vlmds.data.dataset import open_dataset, open_stages
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader, training_collate
from vlmds.data.stored import read_description
from vlmds.doctor.node import OK, CheckContext, check_dataset
from vlmds.errors import InputError
from vlmds.evaluation.evaluate import evaluate_run
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.inference.generation import generate_captions
from vlmds.inference.options import GenerationOptions
from vlmds.models.artifact import artifact_experiment
from vlmds.models.assemble import load_model
from vlmds.models.captioner import VISUAL
from vlmds.models.sequences import SequenceBuilder
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack
from vlmds.planning.plan import plan_experiment
from vlmds.runs.folder import RunFolder
from vlmds.runs.lineage import inheritance
from vlmds.training import sweep

CPU = torch.device("cpu")
PROMPT = "무엇이 보이나요?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten pictures and four clips for training, two pictures and a clip for validation: a video store."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i in range(12):
        name = f"p{i}.{('jpg', 'png', 'webp')[i % 3]}"
        Image.fromarray(picture(i, 64, 48)).save(folder / name)
        rows.append({"video": name, "caption": f"{i}번 사진입니다.", "split": "train" if i < 10 else "val"})
    for i in range(5):
        write_video(folder / f"c{i}.mp4", frames=9 + i)
        rows.insert(3 * i, {"video": f"c{i}.mp4", "caption": f"{i}번.", "split": "train" if i < 4 else "val"})
    pack(write_manifest(folder / "m.jsonl", rows), folder / "out", num_frames=tiny.FRAMES, progress=False)
    return folder / "out"


def own(pictures: Path) -> list[str]:
    return [
        f"stages.0.data.path={pictures}",
        f"stages.0.data.prompt={PROMPT}",
        "stages.0.steps=null",
        "stages.0.epochs=2",
    ]


@pytest.fixture(scope="module")
def calm(models, shards, pictures, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "calm"
    train(2, *arguments(models, shards, run, *own(pictures)))
    return run


@pytest.mark.distributed
def test_each_stage_reads_its_own_data_and_resumes_in_it(models, shards, pictures, calm, tmp_path):
    """Killed in each stage; both have micro-batches of their own data only, those of align mixed."""
    steps = [r["stage"] for r in metrics(calm) if r["kind"] == "train"]
    assert (steps.count("align"), steps.count("finetune")) == (7, 6)  # ceil(2 x 14 / 4), and as given
    record = json.loads((calm / "run.json").read_text())
    assert record["stage_data"] == {
        "align": open_dataset(pictures).fingerprint,
        "finetune": open_dataset(shards).fingerprint,
    }
    assert record["data_fingerprint"] == record["stage_data"]["finetune"]
    for stage, fingerprint in record["stage_data"].items():
        meta = json.loads((calm / "artifacts" / stage / "artifact.json").read_text())
        assert meta["lineage"]["data_fingerprint"] == fingerprint
    run = tmp_path / "killed"
    args = arguments(models, shards, run, *own(pictures))
    train_and_kill(2, run, 4, *args, checkpoint="align-")
    train_and_kill(2, run, 11, *args, checkpoint="finetune-")
    train(2, *args)
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 3
    assert metrics(run) == metrics(calm)
    assert_same_weights(weights(run), weights(calm))
    done = train(0, *arguments(models, shards, run, *own(shards)), expect=2)
    assert f"stages.0.data: {shards} is not the data that" in done.stderr and "Traceback" not in done.stderr


def test_llava_and_ms_swift_files_are_trained_on_as_they_are(models, tmp_path):
    """Pictures of a LLaVA file for align, videos of an ms-swift file for finetune: a JSON array, and lines."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(picture(i, 64, 48)).save(tmp_path / "images" / f"{i}.jpg")
        write_video(tmp_path / f"{i}.mp4", frames=9)
    llava = [
        {"id": f"llava-{i}", "image": f"images/{i}.jpg",
         "conversations": [{"from": "human", "value": f"<image>\n{PROMPT}"}, {"from": "gpt", "value": f"{i}번 사진입니다."}]}
        for i in range(6)
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(llava), encoding="utf-8")
    swift = [
        {"messages": [{"role": "user", "content": "<video>설명해 주세요."}, {"role": "assistant", "content": f"{i}번 영상입니다."}],
         "videos": [f"{i}.mp4"]}
        for i in range(6)
    ]  # fmt: skip
    write_manifest(tmp_path / "swift.jsonl", swift)
    data = {name: tmp_path / name for name in ("pictures", "clips")}
    for manifest, out in zip(("llava.json", "swift.jsonl"), data.values(), strict=True):
        assert main(["pack", str(tmp_path / manifest), str(out)]) == 0
    found = [
        read_description(index.read(index.row("train", 0, i)))
        for index in map(ShardIndex.open, data.values())
        for i in range(index.count("train"))
    ]
    assert {each["prompt"] for each in found} == {PROMPT, "설명해 주세요."}
    run = tmp_path / "run"
    steps = ("stages.0.steps=2", "stages.1.steps=2")
    train(0, *arguments(models, data["clips"], run, f"stages.0.data.path={data['pictures']}", *steps))
    lines = [line for line in metrics(run) if line["kind"] == "train"]
    assert [line["stage"] for line in lines] == ["align"] * 2 + ["finetune"] * 2
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.distributed
def test_a_run_without_the_key_records_what_it_did_before(two_ranks):
    record = json.loads((two_ranks / "run.json").read_text())
    assert [*record] == ["id", "global_batch", "data_fingerprint", "sampling", "weights", "revisions", "starts"]


@pytest.mark.distributed
def test_an_artifact_is_evaluated_on_its_stages_data(calm, pictures, shards, tmp_path):
    align, finetune = (artifact_experiment(calm / "artifacts" / name).data for name in ("align", "finetune"))
    assert (align.path, align.prompt) == (str(pictures), PROMPT)
    assert (finetune.path, finetune.prompt) == (str(shards), "이 영상을 설명해주세요.")
    other = artifact_experiment(calm / "artifacts" / "align", [f"data.path={shards}"]).data
    assert (other.path, other.prompt) == (str(shards), PROMPT)
    options = GenerationOptions(max_new_tokens=4)
    evaluate_run(calm / "artifacts" / "align", output=tmp_path / "align", generation=options, progress=False)
    found = json.loads((tmp_path / "align" / "metrics.json").read_text())
    assert (found["clips"], found["unreadable"], found["settings"]["prompt"]) == (3, 0, PROMPT)


@pytest.mark.distributed
def test_a_stage_of_other_data_is_not_inherited(models, calm, pictures, shards, tmp_path):
    record = json.loads((calm / "run.json").read_text())
    experiment = load_experiment("e3", [*tiny.settings(models, shards), *own(pictures)])
    assert [*inheritance(calm, experiment, RunFolder(tmp_path, record))] == ["align"]
    other = record | {"stage_data": record["stage_data"] | {"align": "0"}}
    with pytest.raises(InputError, match="its stage align was not trained on the data of stages.0"):
        inheritance(calm, experiment, RunFolder(tmp_path, other))
    asked = load_experiment("e3", [*tiny.settings(models, shards), f"stages.0.data.path={pictures}"])
    with pytest.raises(InputError, match="data.prompt"):
        inheritance(calm, asked, RunFolder(tmp_path, record))


def mixed(model, path: Path, prompt: str = PROMPT):
    """(reader, collate) of a packed dataset, as training makes them."""
    projector = model.captioner.projector
    builder = SequenceBuilder(model.tokenizer, prompt, projector.num_tokens)
    reader = SampleReader(open_dataset(path), "train", tiny.FRAMES, tiny.SIDE, shuffle=False)
    return reader, training_collate(builder, projector.tokens_of(projector.patches)), builder


@pytest.mark.parametrize("exp", ["e1", "e3", "e5", "e7"])
def test_a_picture_is_one_frame_for_every_projector(models, pictures, exp):
    """The loss of a mixed batch is the sum of those of its samples, and so are captions the same."""
    extra = tiny.RESAMPLER if exp in ("e5", "e7") else []
    model = load_model(load_experiment(exp, [*tiny.settings(models), *extra]), CPU)
    model.captioner.eval()
    reader, collate, builder = mixed(model, pictures)
    samples = [reader.load(position) for position in range(6)]
    assert {sample.still for sample in samples} == {True, False}
    assert [len(sample.frames) for sample in samples] == [1 if s.still else tiny.FRAMES for s in samples]
    batch = collate(samples)
    patches, counts = model.captioner.projector.patches, (batch["input_ids"] == VISUAL).sum(1).tolist()
    if extra:
        assert set(counts) == {4}
    else:
        assert counts == [patches if s.still else tiny.FRAMES * patches for s in samples]
    with torch.no_grad():
        together = model.captioner(model.features(batch), batch["input_ids"], batch["labels"])
        alone = [collate([sample]) for sample in samples]
        each = sum(model.captioner(model.features(b), b["input_ids"], b["labels"]) for b in alone)
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-4)
    options, prompts = GenerationOptions(max_new_tokens=5), [None] * len(samples)
    captions = generate_captions(model, builder, model.features(batch), prompts, options)
    assert captions == [generate_captions(model, builder, model.features(b), [None], options)[0] for b in alone]


def test_a_resampler_distinguishes_a_picture_from_its_copies(models):
    """A picture has the time of the first frame, and its copies have those of all frames."""
    model = load_model(load_experiment("e7", [*tiny.settings(models), *tiny.RESAMPLER]), CPU)
    projector = model.captioner.projector
    features = torch.randn(projector.patches, projector.vision_dim)
    with torch.no_grad():
        one, copies = projector(features), projector(features.repeat(tiny.FRAMES, 1))
        projector.frame_time[1:] += 1
        assert torch.equal(projector(features), one)
    assert not torch.allclose(one, copies)


@pytest.mark.parametrize("store", ["frames", "features"])
def test_every_store_shows_a_picture_once(models, pictures, tmp_path, store):
    model = load_model(load_experiment("e3", tiny.settings(models)), CPU)
    options = {"tower": model.tower, "tower_name": "clip"} if store == "features" else {"image_size": tiny.SIDE}
    source = pictures
    if store == "features":
        convert(pictures, tmp_path / "features", store=store, num_frames=tiny.FRAMES, progress=False, **options)
    else:
        convert(pictures, tmp_path / store, store=store, num_frames=tiny.FRAMES, progress=False, **options)
    (old, collate, _), (new, _, _) = mixed(model, source), mixed(model, tmp_path / store)
    a, b = (collate([reader.load(position) for position in range(6)]) for reader in (old, new))
    assert a["keys"] == b["keys"] and torch.equal(a["input_ids"], b["input_ids"])
    for before, after in zip(model.features(a), model.features(b), strict=True):
        torch.testing.assert_close(before, after, rtol=0.05, atol=0.05 if store == "features" else 0.5)


def test_the_plan_and_the_doctor_check_each_stages_data(models, shards, pictures, tmp_path):
    experiment = load_experiment("e3", [*tiny.settings(models, shards), *own(pictures)])
    printed = plan_experiment(experiment)
    assert "2 epochs of 14 samples = 7 steps" in printed and "stage finetune: " in printed
    assert f"stages.0.data: {pictures} (video store; train 14, val 3)" in printed
    assert f"\ndata: {shards} (frames store; train 10, val 3)" in printed
    assert "stores of stages.0.data at" in printed and "\nstores at" in printed
    assert "the first that stage align reads" in printed and "the first that stage finetune reads" in printed
    found = check_dataset(CheckContext(experiment, tmp_path, 30, 1, None, CPU))
    assert [finding.level for finding in found] == [OK, OK] and found[0].text.startswith("stages.0.data: ")


def test_the_longest_prompt_of_a_stage_counts_in_the_plan(models):
    plain = plan_experiment(load_experiment("e3", tiny.settings(models)))
    long = plan_experiment(load_experiment("e3", [*tiny.settings(models), f"stages.1.data.prompt={'가' * 2000}"]))
    assert plain.partition("memory of")[2] != long.partition("memory of")[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.0.data.paht=x"], "--set stages.0.data.paht=x: stages.0.data.paht: unknown key; did you mean 'path'?"),
        (["stages.0.data.num_frames=2"], "stages.0.data.num_frames: unknown key; valid: path, blend, prompt"),
        (["stages.0.data.blend=[{paht: x}]"], "stages.0.data.blend.0.paht: unknown key; did you mean 'path'?"),
        (["stages.0.data.path=a", "stages.0.data.blend=[{path: b}]"], "stages.0.data: give path or blend, not both"),
        (["stages.0.data=x"], "stages.0.data: "),
    ],
)
def test_mistakes_in_a_stages_data_are_one_line(overrides, message):
    with pytest.raises(InputError) as caught:
        load_experiment("e3", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_stages_data_replaces_the_experiments(tmp_path):
    experiment = load_experiment("e3", ["data.path=d", "stages.0.data.blend=[{path: a}, {path: b, weight: 2}]"])
    data = experiment.for_stage("align").data
    assert data.path is None and [part.path for part in data.blend] == ["a", "b"]
    assert data.prompt == experiment.data.prompt and experiment.for_stage("finetune") is experiment
    (tmp_path / "e.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    assert load_experiment(tmp_path / "e.yaml") == experiment
    again = load_experiment(tmp_path / "e.yaml", ["stages.0.data.path=c", "stages.1.data.prompt=x"])
    assert again.for_stage("align").data.path == "c"
    assert (again.for_stage("finetune").data.path, again.for_stage("finetune").data.prompt) == ("d", "x")


def test_missing_data_of_a_stage_is_named(models, shards, tmp_path, capsys):
    missing = load_experiment("e3", [f"data.path={shards}", f"stages.1.data.path={tmp_path / 'x'}"])
    with pytest.raises(InputError, match="stages.1.data.path: .*x does not exist; make it with vlmds pack"):
        open_stages(missing)
    with pytest.raises(InputError, match="data.path: no data given"):
        open_stages(load_experiment("e3", [f"stages.0.data.path={shards}"]))
    assert main(["plan", "--exp", "e3", "--set", f"stages.1.data.path={tmp_path / 'x'}"]) == 2
    assert "stages.1.data.path: " in capsys.readouterr().err


def test_a_sweep_evaluates_the_last_stages_data(tmp_path):
    for overrides, named in ((), True), (("stages.0.data.path=p",), True), (("stages.1.data.path=p",), False):
        (job,) = sweep.plan_jobs(["e1"], tmp_path, overrides=overrides)
        assert ("--data" in sweep.evaluate_command(job, "d", "deepspeed")) is named
        assert "--data" in sweep.train_command(job, "d", "deepspeed")
    (job,) = sweep.plan_jobs(["e1"], tmp_path, overrides=("stages.0.data.path=p", "stages.1.data.path=p"))
    assert "--data" not in sweep.train_command(job, None, "deepspeed")
