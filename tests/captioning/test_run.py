"""`vlmds caption`: the same output however it is run, stopped and resumed."""

import json
import os
import re
import signal
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.captioning.conftest import SAYINGS
from tests.clips import change_size, hold_last_frame, picture, write_animation, write_manifest, write_video
from tests.training.launch import fork, forked, kill_tree
from vlmds.captioning import pipeline
from vlmds.captioning.job import caption_to_file
from vlmds.captioning.outputs import CaptionFile, find_paths
from vlmds.captioning.pipeline import ahead, caption_records, plan_tasks
from vlmds.captioning.sources import Item
from vlmds.cli import main
from vlmds.data.dataset import Dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import SampleReader, visual_inputs
from vlmds.errors import InputError, SampleError
from vlmds.inference import generation
from vlmds.inference.generation import GenerationOptions, generate_captions
from vlmds.packing.convert import convert_from_options
from vlmds.video.pool import Clip, decode_videos, decode_windows, video_facts

ROOT = Path(__file__).resolve().parents[2]
GENERATION = GenerationOptions(max_new_tokens=8)
OPTIONS = {"generation": GENERATION, "workers": 1}
WINDOW = {**OPTIONS, "window": 1.0}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def command(artifact, *arguments) -> list[str]:
    return ["caption", "--run", str(artifact), "--max-new-tokens", "8", "--workers", "1", *map(str, arguments)]


@pytest.fixture
def generated(monkeypatch):
    """Sizes of the batches that the model captions."""
    sizes = []
    original = generation.generate_batch

    def counting(model, builder, features, *rest, **more):
        sizes.append(len(features))
        return original(model, builder, features, *rest, **more)

    monkeypatch.setattr(generation, "generate_batch", counting)
    return sizes


def test_frames_of_windows_decoded_together_are_those_decoded_alone(tmp_path):
    video = str(write_video(tmp_path / "v.mp4", frames=47, fps=10))
    together = [(Clip(video, 0.3, 4.5), 3), (Clip(video), 1)]
    (three, facts), (whole, _) = decode_windows(together, 4, 28, workers=1)
    alone = [Clip(video, 0.3 + i * 1.4, 0.3 + (i + 1) * 1.4) for i in range(3)]
    assert np.array_equal(three, np.stack(list(decode_videos(alone, 4, 28, workers=1))))
    assert np.array_equal(whole[0], next(decode_videos([video], 4, 28, workers=1)))
    found, bad = video_facts([video, str(tmp_path / "none.mp4")], workers=1)
    assert found == facts and (facts["frames"], facts["width"], facts["height"]) == (47, 64, 48)
    assert facts["duration"] == pytest.approx(4.7) and isinstance(bad, SampleError)


def test_each_window_has_the_caption_of_its_clip(captioner, folder, generated):
    video = str(folder / "c" / "a.mkv")
    found = list(caption_records(captioner, [video], GENERATION, window=1.0, workers=1))
    assert [(r["start"], r["end"]) for r in found] == [(0, 1), (1, 2), (2, 3), (3, 3.1)]
    assert generated == [4]
    clips = [Clip(video, r["start"], r["end"]) for r in found]
    expected = list(captioner.caption(clips, GENERATION, workers=1))
    assert [r["caption"] for r in found] == expected
    assert all(map(str.startswith, expected[:3], SAYINGS))


def test_one_bad_frame_costs_one_window(captioner, tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=40, g="1")  # each frame stands alone
    with av.open(str(path)) as container:
        places = [p.pos for p in container.demux(video=0) if p.size][15:25]
    data = bytearray(path.read_bytes())
    for place in places:
        data[place + 8 : place + 60] = b"\xff" * 52
    path.write_bytes(data)
    found = list(caption_records(captioner, [str(path)], GENERATION, window=1.0, workers=1))
    assert [r["start"] for r in found] == [0, 1, 2, 3]
    assert ["caption" in r for r in found] == [True, False, False, True]
    assert "cannot be decoded" in found[1]["error"]


def test_animations_pictures_and_a_change_of_size_are_captioned(captioner, artifact, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.webp", "b.gif", "c.apng"):
        write_animation(folder / name, [100, 300, 600])
    Image.fromarray(picture(1, 64, 48)).save(folder / "d.jpg")
    Image.fromarray(picture(1, 64, 48)).save(folder / "e.png")
    change_size(tmp_path / "f.webm", "libvpx").rename(folder / "f.webm")
    out = tmp_path / "captions.jsonl"
    assert main(command(artifact, "--data", folder, "--out", out)) == 0
    assert "6 captions" in capsys.readouterr().out
    rows = lines(out)
    assert [(row["video"], row["end"]) for row in rows] == [
        ("a.webp", 1.0),
        ("b.gif", 1.0),
        ("c.apng", 1.0),
        ("d.jpg", 0.04),
        ("e.png", 0.04),
        ("f.webm", 4.0),
    ]
    named = list(caption_records(captioner, [str(folder / "a.webp")], GENERATION, workers=1))
    assert [row["caption"] for row in named] == [rows[0]["caption"]]


def test_windows_end_where_the_video_ends_with_a_held_frame(captioner, tmp_path):
    source = write_video(tmp_path / "v.mp4", frames=10, bf="0")
    path = hold_last_frame(source, tmp_path / "held.mp4", 9.1)
    found = list(caption_records(captioner, [str(path)], GENERATION, window=4.0, workers=1))
    assert [(r["start"], r["end"], "caption" in r) for r in found] == [(0, 4, True), (4, 8, True), (8, 10, True)]


def test_a_folder_is_captioned_and_what_failed_is_tried_again(artifact, captioner, folder, tmp_path, capsys, generated):
    out = tmp_path / "captions.jsonl"
    assert main(command(artifact, "--data", folder, "--out", out)) == 2
    printed = capsys.readouterr()
    assert "3 captions, 1 failed, 2 other files skipped" in printed.out
    assert "bad.mp4: cannot be read" in printed.err
    rows = lines(out)
    assert [row["id"] for row in rows] == ["a.mp4", "b.mp4", "bad.mp4", "c/a.mkv"]
    assert [row["end"] for row in rows] == [4.0, 2.0, None, 3.1]
    good = [folder / row["video"] for row in rows if "caption" in row]
    assert [row["caption"] for row in rows if "caption" in row] == list(
        captioner.caption(map(str, good), GENERATION, workers=1)
    )

    generated.clear()
    write_video(folder / "bad.mp4", frames=12)
    write_video(folder / "0.mp4", frames=8)
    assert main(command(artifact, "--data", folder, "--out", out)) == 0
    assert "5 captions (3 there before)" in capsys.readouterr().out and sum(generated) == 2
    after = lines(out)
    assert [row["id"] for row in after] == ["0.mp4", "a.mp4", "b.mp4", "bad.mp4", "c/a.mkv"]
    assert [row for row in after if row["id"] not in ("0.mp4", "bad.mp4")] == [row for row in rows if "caption" in row]


def test_one_long_video_keeps_all_decoders_busy_and_little_memory():
    item = Item("v", "v", Clip("v"))

    def sizes(decoders, width=640, items=(item,)):
        facts = {i.id: {"duration": 100.5, "width": width, "height": 360} for i in items}
        return [len(w.spans) for w in plan_tasks(items, {}, 1.0, 8, facts, decoders)]

    assert sizes(1) == [32, 32, 32, 4, 1]
    assert sizes(8) == [*[13] * 7, 9, 1]
    assert sizes(500) == sizes(1, width=64_000) == [1] * 101
    both = (item, Item("w", "w", Clip("w")))
    assert max(sizes(8, items=both)) == 26


def test_every_batch_is_reported_to_the_watchdog(artifact, folder, tmp_path, monkeypatch):
    """Or it would end a rank that captions for longer than the timeout."""
    heard = []
    for module in (generation, pipeline):
        monkeypatch.setattr(module, "doing", lambda what, keys=(): heard.append((what, len(keys))))
    caption_to_file(artifact, tmp_path / "x.jsonl", data=str(folder), batch_size=4, **WINDOW)
    assert [n for what, n in heard if what == "captioning"] == [4, 4, 3]
    assert [n for what, n in heard if what == "probing"] == [1] * 4


def test_progress_is_shown_and_can_be_switched_off(artifact, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlmds.console.progress.QUIET_SECONDS", 1e-3)
    for shown in (False, True):
        caption_to_file(artifact, tmp_path / f"{shown}.jsonl", data=str(folder), progress=shown, **WINDOW)
        error = capsys.readouterr().err
        assert ("vlmds: probing the videos: 4 videos in " in error) == shown, error
        assert bool(re.search(r"vlmds: captioning: 11 clips in .*, 1 failed", error)) == shown
        assert ("vlmds: " in error) == shown, error


class Killed(Exception):
    pass


def test_a_stopped_command_goes_on(artifact, folder, tmp_path, monkeypatch):
    options = {**WINDOW, "data": str(folder), "batch_size": 3}
    caption_to_file(artifact, tmp_path / "whole.jsonl", **options)
    original, calls = generation.generate_batch, []

    def stopping(*arguments, **more):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise Killed
        return original(*arguments, **more)

    monkeypatch.setattr(generation, "generate_batch", stopping)
    out = tmp_path / "stopped.jsonl"
    with pytest.raises(Killed):
        caption_to_file(artifact, out, **options)
    assert sum("caption" in row for row in lines(out)) == 6
    with out.open("a") as file:
        file.write('{"id": "c/a.mkv", "vid')  # what a kill leaves of a line
    summary = caption_to_file(artifact, out, **options)
    assert (summary.captions, summary.before) == (10, 6) and sum(calls[3:]) == 4
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_signal_stops_it_with_3_and_nothing_is_lost(artifact, folder, tmp_path):
    out = tmp_path / "stopped.jsonl"
    arguments = command(
        artifact, "--data", folder, "--out", out, "--window", "0.2s", "--max-new-tokens", "40", "--batch-size", "1"
    )
    process = fork(0, "-m", "vlmds.cli", *arguments, log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not out.is_file() or len(lines(out)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        code = process.wait(120)
    finally:
        kill_tree(process)
    error = (tmp_path / "log.err").read_text()
    assert code == 3 and "stopped; the same command goes on" in error, error
    done = lines(out)
    assert 3 <= len(done) < 40
    assert main(arguments) == 2  # bad.mp4
    assert lines(out)[: len(done)] == done and len(lines(out)) == 47


def test_other_settings_are_refused_by_name_and_again_starts_over(artifact, folder, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    video = folder / "a.mp4"
    assert main(command(artifact, video, "--out", out)) == 0
    before = lines(out)
    capsys.readouterr()
    other = command(artifact, video, "--out", out, "--window", "2s", "--beams", "2")
    assert main(other) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "generation.num_beams 1 -> 2; window None -> 2.0" in error and lines(out) == before
    assert main([*other, "--again"]) == 0
    assert [row["end"] for row in lines(out)] == [2.0, 4.0]


def test_files_of_others_are_not_touched(artifact, folder, tmp_path, capsys):
    for name in ("captions.jsonl", "captions.csv", "sub.srt"):
        (tmp_path / name).write_text("mine")
        out = tmp_path if name == "sub.srt" else tmp_path / name
        more = ["--format", "srt"] if name == "sub.srt" else []
        assert main(command(artifact, folder / "a.mp4", "--out", out, *more, "--again")) == 2
        assert f"{tmp_path / name}: was not made by vlmds caption" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_a_second_command_is_kept_off(artifact, folder, tmp_path, capsys):
    out = tmp_path / "captions.jsonl"
    arguments = command(artifact, folder / "a.mp4", "--out", out)
    assert main(arguments) == 0
    settings = json.loads((tmp_path / "captions.settings.json").read_text())
    with CaptionFile(find_paths(out)) as file:
        file.begin(settings, again=False)
        for more in ([], ["--again"]):
            assert main([*arguments, *more]) == 2
            assert "another vlmds caption is writing to it" in capsys.readouterr().err
    assert main(arguments) == 0 and "(1 there before)" in capsys.readouterr().out


def test_captions_of_other_videos_stay_and_those_of_another_span_go(artifact, folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    a, b = str(folder / "a.mp4"), str(folder / "b.mp4")
    caption_to_file(artifact, out, videos=[a], **OPTIONS)
    caption_to_file(artifact, out, videos=[b], **OPTIONS)
    assert [row["id"] for row in lines(out)] == [b, a]
    manifest = tmp_path / "m.jsonl"
    for end in (1.0, 2.0):
        write_manifest(manifest, [{"id": "x", "video": a, "start": 0.5, "end": end}])
        summary = caption_to_file(artifact, tmp_path / "m-out.jsonl", data=str(manifest), **OPTIONS)
        assert [(r["start"], r["end"]) for r in lines(tmp_path / "m-out.jsonl")] == [(0.5, end)]
        assert (summary.captions, summary.before) == (1, 0)


def test_prompts_of_a_manifest_are_the_models(artifact, captioner, folder, tmp_path):
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"id": str(i), "video": str(folder / "a.mp4"), **({"prompt": p} if p else {})}
            for i, p in enumerate((None, "무엇이 보입니까?"))
        ],
    )
    caption_to_file(artifact, tmp_path / "x.jsonl", data=str(manifest), prompt="누구?", **OPTIONS)
    video = [str(folder / "a.mp4")]
    expected = [
        next(captioner.caption(video, GENERATION, prompt=prompt, workers=1)) for prompt in ("누구?", "무엇이 보입니까?")
    ]
    rows = lines(tmp_path / "x.jsonl")
    assert [row["caption"] for row in rows] == expected
    assert all(map(str.startswith, expected, SAYINGS))
    assert [row.get("prompt") for row in rows] == [None, "무엇이 보입니까?"]


@pytest.mark.parametrize("store", ["frames", "features"])
def test_a_packed_dataset_is_captioned_sample_by_sample(artifact, captioner, models, folder, tmp_path, store):
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"video": str(folder / "a.mp4"), "caption": "가", "prompt": "무엇?"},
            {"video": str(folder / "b.mp4"), "caption": "나", "id": "bb"},
        ],
    )
    data = tmp_path / "frames"
    tiny.pack_frames(manifest, data)
    if store == "features":
        convert_from_options(
            data,
            tmp_path / "features",
            "features",
            vision=str(models / "clip"),
            feature_layer=-1,
            pool=1,
            progress=False,
        )
        data = tmp_path / "features"
    reader = SampleReader(Dataset([ShardIndex.open(data)]), "train", tiny.FRAMES, tiny.SIDE, shuffle=False)
    samples = [reader.load(i) for i in range(2)]
    caption_to_file(artifact, tmp_path / "x.jsonl", data=str(data), **OPTIONS)
    rows = lines(tmp_path / "x.jsonl")
    assert [row["caption"] for row in rows] == [
        generate_captions(
            captioner.model,
            captioner.builder,
            captioner.model.features(visual_inputs([sample])),
            [sample.prompt],
            GENERATION,
        )[0]
        for sample in samples
    ]
    assert [(row["id"], row["end"], row.get("prompt")) for row in rows] == [("a", 4.0, "무엇?"), ("bb", 2.0, None)]
    assert caption_to_file(artifact, tmp_path / "x.jsonl", data=str(data), **OPTIONS).before == 2
    with pytest.raises(InputError, match="--window: a packed dataset"):
        caption_to_file(artifact, tmp_path / "y.jsonl", data=str(data), **WINDOW)


def test_printed_and_streamed_captions_are_the_same(artifact, folder, capsys):
    videos = [folder / "a.mp4", folder / "bad.mp4", folder / "b.mp4"]
    arguments = command(artifact, *videos, "--window", "2s")
    assert main(arguments) == main([*arguments, "--stream"]) == main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    printed = out.splitlines()
    assert len(printed) == 9 and err.count("bad.mp4: cannot be read") == 3
    assert [line.split() for line in printed[:3]] == [line.split() for line in printed[3:6]]
    assert printed[1].split("\t")[:2] == [str(folder / "a.mp4"), "00:00:02.000 - 00:00:04.000"]
    rows = [json.loads(line) for line in printed[6:]]
    assert [line.split("\t")[2] for line in printed[:3]] == [row["caption"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either videos or --data"),
        (["x.mp4", "--window", "soon"], "--window soon: write a length such as 30s"),
        (["x.mp4", "--again"], "--again: needs --out"),
        (["x.mp4", "--stream", "--json"], "--stream: prints text"),
        (["x.mp4", "--stream", "--beams", "2"], "--stream: beam search"),
        (["x.mp4", "--batch-size", "0"], "--batch-size 0: must be more than 0"),
        (["x.mp4", "--out", "/proc/x.jsonl"], "--out /proc/x.jsonl: cannot be written"),
    ],
)
def test_bad_options_are_one_line(artifact, arguments, message, capsys):
    assert main(command(artifact, *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.distributed
def test_two_ranks_go_on_with_what_one_has_done(artifact, folder, tmp_path):
    options = {**WINDOW, "data": str(folder), "batch_size": 2}
    whole, out = tmp_path / "whole.csv", tmp_path / "ranks.csv"
    caption_to_file(artifact, whole, **options)
    caption_to_file(artifact, out, **options)
    jsonl = out.with_suffix(".jsonl")
    rows = jsonl.read_text("utf-8").splitlines(keepends=True)
    jsonl.write_text("".join(rows[:3]), "utf-8")  # as after a kill
    out.unlink()
    printed = forked(
        2,
        "-m",
        "vlmds.cli",
        *command(artifact, "--data", folder, "--out", out, "--window", "1s"),
        log=tmp_path / "log",
        expect=2,
    )  # bad.mp4
    assert printed.count("10 captions (3 there before), 1 failed") == 1, printed[-3000:]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.glob("ranks*")) == ["ranks.csv", "ranks.jsonl", "ranks.settings.json"]


def test_what_is_prepared_ahead_comes_in_order_and_its_errors_too():
    closed = []

    def numbers():
        try:
            yield from range(5)
            raise ValueError("six")
        finally:
            closed.append(True)

    found = []
    with pytest.raises(ValueError, match="six"):
        found.extend(ahead(numbers(), 2))
    assert closed == [True]
    assert list(ahead(range(5), 2)) == [0, 1, 2, 3, 4]
