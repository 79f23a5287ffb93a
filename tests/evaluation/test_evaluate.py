"""Evaluation of tiny models: its results, the same however it is run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.evaluation.conftest import SAYINGS, make_run
from tests.training.launch import TIMEOUT, fork, forked, kill_tree
from vlmds.cli import main
from vlmds.data.dataset import Dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader
from vlmds.errors import InputError
from vlmds.evaluation import evaluate, scoring
from vlmds.evaluation.blind import blind_tests
from vlmds.evaluation.evaluate import evaluate_run, evaluate_subset
from vlmds.evaluation.saved import read_evaluation
from vlmds.evaluation.scoring import ClipText, evaluated_positions, frame_orders, read_text, swap_videos
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.files import sha256_of
from vlmds.inference import generation
from vlmds.inference.options import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import weights_sha256

GENERATION = GenerationOptions(max_new_tokens=8)
OPTIONS = dict(generation=GENERATION)


@pytest.fixture(scope="module")
def result(run, tmp_path_factory):
    return evaluate_run(run, output=tmp_path_factory.mktemp("result") / "val", **OPTIONS)


def same(one: Path, other: Path):
    """Equal captions and metrics; log-probabilities within rounding of another batch."""
    (a, lines), (b, others) = read_evaluation(one), read_evaluation(other)
    assert len(lines) == len(others)
    for x, y in zip(lines, others):
        assert (x["key"], x["caption"], x["scores"], x["blind_captions"]) == (
            y["key"],
            y["caption"],
            y["scores"],
            y["blind_captions"],
        )
        for name, value in x["reference_log_probability"].items():
            assert value == pytest.approx(y["reference_log_probability"][name], abs=1e-5)
    assert a["metrics"] == b["metrics"] and a["captions"] == b["captions"]
    for blind, gap in a["looking"]["loss"].items():
        assert gap == pytest.approx(b["looking"]["loss"][blind], abs=1e-5)


def test_captions_and_losses_are_the_models(result, run, shards):
    """Against the captioner and the training loss themselves, clip by clip."""
    metrics, lines = read_evaluation(result)
    assert metrics["clips"] == 11
    assert all(map(str.startswith, [line["caption"] for line in lines], SAYINGS))
    captioner = VideoCaptioner.from_pretrained(run / "artifacts" / "finetune")
    reader = SampleReader(Dataset([ShardIndex.open(shards)]), "val", tiny.FRAMES, tiny.SIDE, shuffle=False)
    for position, line in enumerate(lines):
        sample = reader.load(position)
        assert (line["key"], line["references"]) == (sample.key, sample.captions)
        assert line["caption"] == captioner.caption_frames(sample.frames[None], [sample.prompt], GENERATION)[0]
        for name, order in {"real": range(tiny.FRAMES), **frame_orders(tiny.FRAMES)}.items():
            total = tokens = 0
            for caption in sample.captions:
                batch = captioner.builder.collate_training([captioner.builder.training(caption, sample.prompt)])
                with torch.no_grad():
                    features = captioner.model.tower(torch.from_numpy(sample.frames[None, list(order)]))
                    total += float(captioner.model.captioner(features, **batch))
                tokens += int((batch["labels"] != -100).sum())
            assert -line["reference_log_probability"][name] == pytest.approx(total / tokens, abs=1e-4)


def test_blind_captions_are_what_the_model_says_to_that_video(result, run, shards):
    lines = read_evaluation(result)[1]
    reader = SampleReader(Dataset([ShardIndex.open(shards)]), "val", tiny.FRAMES, tiny.SIDE, shuffle=False)
    swapped = swap_videos([read_text(reader, p) for p in range(len(reader))])
    captioner = VideoCaptioner.from_pretrained(run / "artifacts" / "finetune")
    for line in lines:
        own, other = reader.load(line["position"]), reader.load(swapped[line["position"]])
        black = np.zeros_like(own.frames)
        assert [line["blind_captions"][k] for k in ("shuffled", "blank")] == captioner.caption_frames(
            np.stack([other.frames, black]), [own.prompt] * 2, GENERATION
        )


def test_batch_size_does_not_matter(result, run, tmp_path):
    for size in (1, 3):
        same(result, evaluate_run(run, output=tmp_path / str(size), batch_size=size, **OPTIONS))


def test_progress_is_shown_and_can_be_switched_off(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlmds.console.progress.QUIET_SECONDS", 1e-3)
    for shown in (False, True):
        evaluate_run(run, output=tmp_path / str(shown), clips=4, progress=shown, **OPTIONS)
        error = capsys.readouterr().err
        assert ("vlmds: evaluating: 4 clips in " in error) == shown, error
        assert ("vlmds: " in error) == shown, error


def test_a_run_of_a_blend_is_evaluated_on_one_dataset(result, run, shards, tmp_path):
    artifact = tmp_path / "finetune"
    shutil.copytree(run / "artifacts" / "finetune", artifact)
    path = artifact / "experiment.yaml"
    blend = [{"path": str(shards), "weight": 2.0}, {"path": str(tmp_path / "elsewhere")}]
    path.write_text(to_yaml(load_experiment(path, [f"data.blend={json.dumps(blend)}"])), "utf-8")
    with pytest.raises(InputError, match="data.blend.1.path: .*elsewhere does not exist"):
        evaluate_run(artifact, output=tmp_path / "blend", **OPTIONS)
    options = ["--max-new-tokens", "8", "--device", "cpu"]
    assert (
        main(["evaluate", "--run", str(artifact), "--data", str(shards), "--output", str(tmp_path / "one"), *options])
        == 0
    )
    same(result, tmp_path / "one")


def test_a_model_that_ignores_the_video_is_warned_of(run, tmp_path, result):
    """The projection ignores the video, so the blind scores are exactly as good."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(run / "artifacts" / "finetune", tmp_path / "artifact")
    path = tmp_path / "artifact" / "projector.safetensors"
    save_file({k: v * 0 if k.endswith("weight") else v for k, v in load_file(path).items()}, path)
    meta = json.loads((path.parent / "artifact.json").read_text())
    meta["files"][path.name] = sha256_of(path)
    (path.parent / "artifact.json").write_text(json.dumps(meta))
    folder = evaluate_run(tmp_path / "artifact", **OPTIONS)
    blind = read_evaluation(folder)[0]["looking"]
    assert blind["loss"]["shuffled"]["gap"] == pytest.approx(0, abs=1e-6)
    assert any("loss with other clips' videos is not clearly worse: " in w for w in blind["warnings"])
    assert any("cider_d@morpheme with black frames" in w for w in blind["warnings"])
    seen = read_evaluation(result)[0]["looking"]  # the other model sees: its losses differ
    assert abs(seen["loss"]["shuffled"]["gap"]) > 1e-5 and abs(seen["loss"]["blank"]["gap"]) > 1e-5


def test_a_gap_beyond_noise_gives_no_warning():
    texts = [ClipText(i, str(i), [f"{i}번 영상 {'가나다라마바사'[i % 7]}"], None, 1.0, str(i)) for i in range(30)]
    records = [{"real": [-2.0 - i / 90, 2], "blank": [-6.0, 2]} for i in range(30)]
    captions = [t.captions[0] for t in texts]
    swapped = swap_videos(texts)
    found = blind_tests(
        texts,
        records,
        captions,
        {i: [-5.0, 2] for i in range(30)},
        {i: captions[swapped[i]] for i in range(30)},
        {None: "네"},
    )
    assert not found["warnings"]
    assert found["loss"]["blank"]["gap"] == pytest.approx(3 - np.mean([1 + i / 180 for i in range(30)]))


def test_every_batch_is_reported_to_the_watchdog(run, tmp_path, monkeypatch):
    """Or it would end a rank that evaluates for longer than the timeout."""
    heard = []
    monkeypatch.setattr(generation, "doing", lambda what, keys=(): heard.append(len(keys)) if keys else None)
    evaluate_run(run, output=tmp_path / "val", batch_size=4, **OPTIONS)
    assert heard == [4, 4, 3]


def test_a_caption_with_an_odd_line_separator_is_read_back(result, tmp_path):
    shutil.copytree(result, tmp_path / "val")
    metrics, lines = read_evaluation(result)
    lines[0]["caption"] = "줄\u2028바꿈\u0085끝"
    (tmp_path / "val" / "predictions.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8"
    )
    assert read_evaluation(tmp_path / "val") == (metrics, lines)


class Killed(Exception):
    pass


def test_goes_on_where_it_was_stopped(result, run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "val"
    scored = []
    original = evaluate.ClipScorer.score

    def score(self, texts, batch):
        scored.append([t.position for t in texts])
        if len(scored) == 3:
            raise Killed
        return original(self, texts, batch)

    monkeypatch.setattr(evaluate.ClipScorer, "score", score)
    with pytest.raises(Killed):
        evaluate_run(run, output=output, batch_size=2, **OPTIONS)
    with (output / "parts" / "00000.jsonl").open("a") as file:
        file.write('{"position": 7, "capt')  # what a kill leaves of a line
    assert not (output / "metrics.json").exists()
    scored.clear()
    scored.append("no third call")
    monkeypatch.setattr(evaluate.ClipScorer, "score", original)
    evaluate_run(run, output=output, batch_size=2, **OPTIONS)
    assert "4 of 11 clips are done already" in capsys.readouterr().out
    same(result, output)
    monkeypatch.setattr(evaluate.ClipScorer, "score", None)  # nothing is computed a second time
    evaluate_run(run, output=output, batch_size=2, **OPTIONS)


def lengths(folder):
    return [len(line["caption"].split()) for line in read_evaluation(folder)[1]]


def test_other_settings_stand_beside_a_finished_evaluation_or_replace_it_on_request(models, shards, tmp_path):
    run = make_run(models, shards, tmp_path / "e8", "e8")
    short = GenerationOptions(max_new_tokens=2)
    one = evaluate_run(run, clips=2, generation=short)
    with pytest.raises(InputError, match=r"max_new_tokens 2 -> 8\); choose another place with --as NAME"):
        evaluate_run(run, clips=2, **OPTIONS)
    assert lengths(one) == [2, 2]
    beside = evaluate_run(run, clips=2, name="long", **OPTIONS)
    assert beside == run / "evaluation" / "long" and lengths(beside) == [8, 8] and lengths(one) == [2, 2]
    assert lengths(evaluate_run(run, clips=2, again=True, **OPTIONS)) == [8, 8]
    for bad in (dict(name="a/b"), dict(name=".."), dict(name="x", output=tmp_path / "x")):
        with pytest.raises(InputError, match="--as "):
            evaluate_run(run, **bad)


def test_newer_weights_replace_an_evaluation_and_another_spelling_of_the_path_does_not(
    models, shards, tmp_path, monkeypatch
):
    run = make_run(models, shards, tmp_path / "e8", "e8")
    folder = evaluate_run(run, clips=2, **OPTIONS)
    monkeypatch.chdir(tmp_path)
    before = (folder / "metrics.json").stat().st_mtime_ns
    evaluate_run("e8", clips=2, **OPTIONS)
    assert (folder / "metrics.json").stat().st_mtime_ns == before
    shutil.rmtree(run / "artifacts")
    make_run(models, shards, run, "e8", seed=6)
    evaluate_run(run, clips=2, **OPTIONS)
    settings = read_evaluation(folder)[0]["settings"]
    assert settings["weights_sha256"] == weights_sha256(run / "artifacts" / "finetune")


@pytest.mark.parametrize(("clips", "references"), [(1, None), (4, "빨간 원이 위로 움직입니다.")])
def test_undefined_metrics_are_shown_as_undefined(models, shards, tmp_path, capsys, monkeypatch, clips, references):
    """One clip; or the same references for all."""
    if references:
        monkeypatch.setattr(
            scoring, "read_text", lambda reader, p: replace(read_text(reader, p), captions=[references])
        )
    run = make_run(models, shards, tmp_path / "e8", "e8")
    assert main(["evaluate", "--run", str(run), "--clips", str(clips), "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    table = {line.split()[0]: line for line in printed.splitlines()}
    assert "undefined" in table["cider_d@morpheme"] and "undefined" in table["cider_d@char"]
    assert "nan" not in printed and (clips > 1) == ("…" in printed)
    metrics = read_evaluation(run / "evaluation" / "val")[0]
    assert metrics["undefined"] == ["cider_d@morpheme", "cider_d@char"] and "chrf++@char" in metrics["metrics"]
    out = tmp_path / "report.html"
    code = main(["compare", str(run), "-o", str(out), "--csv", str(tmp_path / "t.csv")])
    if clips == 1:
        assert code == 2 and "only one clip was evaluated" in capsys.readouterr().err
        return
    assert code == 0
    assert "cider_d@morpheme, cider_d@char" in out.read_text("utf-8") and "NaN" not in (tmp_path / "t.csv").read_text()
    assert main(["compare", str(run), "-o", str(out), "--metric", "cider_d@char"]) == 2
    assert "--metric cider_d@char: undefined" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_ranks_equal_one(result, run, tmp_path):
    printed = forked(
        2,
        "-m",
        "vlmds.cli",
        "evaluate",
        "--run",
        str(run),
        "--output",
        str(tmp_path / "val"),
        "--max-new-tokens",
        "8",
        "--batch-size",
        "2",
        log=tmp_path / "log",
    )
    assert printed.count("saved: ") == 1 and "cider_d@morpheme" in printed
    same(result, tmp_path / "val")
    timing = read_evaluation(tmp_path / "val")[0]["timing"]
    assert (timing["ranks"], timing["captioned"], timing["batch_size"], len(timing["devices"])) == (2, 11, 2, 1)
    assert timing["captioning_seconds"] > 0


KILLED = """
import os, signal, sys
from vlmds.cli import main
from vlmds.evaluation.scoring import ClipScorer
if os.environ["RANK"] == "1":
    ClipScorer.batches = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(["evaluate", *sys.argv[1:]]))
"""


@pytest.mark.distributed
def test_a_killed_rank_is_reported_in_one_line(run, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(KILLED)
    process = fork(2, str(script), "--run", str(run), "--output", str(tmp_path / "val"), log=tmp_path / "log")
    try:
        assert process.wait(TIMEOUT) != 0
    finally:
        kill_tree(process)
    printed = (tmp_path / "log.err").read_text()
    assert "vlmds: rank 0: rank 1 died" in printed and "run the same command again to continue" in printed, printed
    assert "Traceback" not in printed, printed


def test_an_unreadable_clip_is_counted_and_not_replaced(run, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "data")
    index = ShardIndex.open(shards)
    row = index.row("val", 0, 1)
    member = next(m for m in row.members if m.ext != "json")
    with (tmp_path / "data" / "val" / f"{row.shard:06d}.tar").open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\0" * 40)
    folder = evaluate_run(run, data=str(tmp_path / "data"), output=tmp_path / "out", **OPTIONS)
    metrics, lines = read_evaluation(folder)
    assert metrics["clips"] == 10 and metrics["unreadable"] == 1
    assert row.key not in [line["key"] for line in lines]
    assert "crc32" in json.loads((folder / "ledger.jsonl").read_text())["unreadable"]


def test_clip_sees_black_frames_once_an_evaluation(run, shards, monkeypatch):
    captioner = VideoCaptioner.from_pretrained(run / "artifacts" / "finetune")
    tower, black = captioner.model.tower, []
    seen = tower.forward
    monkeypatch.setattr(tower, "forward", lambda frames: black.append(not frames.any()) or seen(frames))
    reader = SampleReader(Dataset([ShardIndex.open(shards)]), "val", tiny.FRAMES, tiny.SIDE, shuffle=False)
    for evaluation in (1, 2):
        evaluate_subset(captioner.experiment, captioner.model, reader, clips=11, **OPTIONS)
        assert black.count(True) == evaluation and black.count(False) >= 2 * evaluation


def test_in_training_the_model_is_left_as_it_was(run, result, shards):
    captioner = VideoCaptioner.from_pretrained(run / "artifacts" / "finetune")
    model = captioner.model
    model.captioner.train()
    model.captioner.projector.requires_grad_(True)
    reader = SampleReader(Dataset([ShardIndex.open(shards)]), "val", tiny.FRAMES, tiny.SIDE, shuffle=False)
    state = torch.random.get_rng_state()
    found = evaluate_subset(captioner.experiment, model, reader, clips=11, samples=2, **OPTIONS)
    assert model.captioner.training and torch.equal(state, torch.random.get_rng_state())
    assert all(p.requires_grad for p in model.captioner.projector.parameters())
    metrics, lines = read_evaluation(result)
    assert found["metrics"] == metrics["metrics"] and len(found["samples"]) == 2
    assert found["samples"][0]["caption"] == lines[0]["caption"]


def test_swapped_videos_have_the_same_prompt_and_other_references():
    texts = [
        ClipText(i, str(i), ["가"] if i < 5 else [f"나{i}"], "무엇?" if i in (1, 6) else None, 1, str(i))
        for i in range(9)
    ] + [ClipText(9, "9", ["다"], "홀로", 1, "9")]
    swapped = swap_videos(texts)
    assert set(swapped) == set(range(9))
    for one, other in swapped.items():
        assert texts[one].prompt == texts[other].prompt
        assert not set(texts[one].captions) & set(texts[other].captions)


def test_evenly_spaced_positions():
    assert evaluated_positions(10, 4) == [0, 3, 6, 9]
    assert evaluated_positions(3, 8) == evaluated_positions(3, None) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "/nowhere"], "neither a run folder nor an artifact"),
        (["--split", "test"], "no split 'test'; it has train, val"),
        (["--data", "/nowhere"], "data.path: /nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message, capsys):
    if "--run" not in arguments:
        arguments = ["--run", str(run), *arguments]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_prints_a_table_and_saves_beside_the_run(models, shards, tmp_path, capsys):
    run = make_run(models, shards, tmp_path / "e8", "e8")
    assert main(["evaluate", "--run", str(run), "--clips", "4", "--max-new-tokens", "6"]) == 0
    printed = capsys.readouterr().out
    assert "4 clips, 0 unreadable" in printed and "chrf++@char" in printed
    assert (run / "evaluation" / "val" / "predictions.jsonl").is_file()
    assert len(list((run / "evaluation" / "val" / "thumbnails").iterdir())) == 4
    assert load_experiment(run / "experiment.yaml").name == "e8"
