"""The commands as a user runs them: arguments, output, exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests import tiny
from tests.clips import write_manifest, write_video
from tests.console.test_progress import Screen
from vlmds.cli import main, packing
from vlmds.console import progress


def test_pack_counts_every_reject_and_goes_on(tmp_path, capsys):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"video": "a.mp4", "caption": "가"},
            {"video": "bad.mp4", "caption": "나"},
            {"video": "none.mp4", "caption": "다"},
            {"video": "a.mp4", "id": "x", "caption": ""},
            {"video": "a.mp4", "id": "y"},
            {"video": "a.mp4", "caption": "가"},
        ],
    )
    assert main(["pack", str(manifest), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "packed 1 sample (train 1)" in printed and "rejected 5 rows" in printed
    reasons = [
        json.loads(line)["reason"].split(":")[0]
        for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()
    ]
    assert reasons == ["cannot be read", "file not found", "empty caption", "no caption", "duplicate id"]


def test_a_share_too_small_for_the_rows_is_announced(tmp_path, capsys):
    write_video(tmp_path / "a.mp4")
    rows = [{"video": "a.mp4", "caption": "가"}, {"video": "a.mp4", "id": "b", "caption": "나"}]
    for name, warned in (("none", True), ("one", False)):
        manifest = write_manifest(tmp_path / f"{name}.jsonl", rows)
        assert main(["pack", str(manifest), str(tmp_path / name), "--val-fraction", "1e-9"]) == 0
        assert ("WARNING: split val is empty" in capsys.readouterr().out) == warned
        rows[1]["split"] = "val"  # as the manifest says, whatever the share


@pytest.mark.parametrize("command", ["pack", "caption"])
def test_a_closed_pipe_ends_a_command_quietly(tmp_path, command):
    """As `vlmds … | head -1` does, with the exit code that other tools have then."""
    write_video(tmp_path / "a.mp4")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "a.mp4", "caption": "가"}])
    record = tmp_path / "c.jsonl"
    record.write_text('{"id": "a", "video": "a.mp4", "start": 0.0, "end": 1.0, "caption": "가"}\n')
    arguments = {
        "pack": [str(manifest), str(tmp_path / "out")],
        "caption": ["--from", str(record), "--out", str(tmp_path / "c.srt")],
    }[command]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmds.cli", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(60), error) == (128 + signal.SIGPIPE, "")


def test_slow_imports_are_announced(tmp_path, monkeypatch):
    imported, screen = [], Screen(terminal=False, awaited="loading")
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr("vlmds.cli.options.import_module", lambda name: (screen.there.wait(30), imported.append(name)))
    assert main(["evaluate", "--run", str(tmp_path)]) == 2
    assert imported == ["vlmds.evaluation.evaluate"]
    assert screen.getvalue().startswith("vlmds: loading PyTorch and transformers: ")


def test_another_broken_pipe_is_not_hidden(monkeypatch):
    def broken(args):
        raise BrokenPipeError("of a child process")

    monkeypatch.setattr(packing, "pack", broken)
    with pytest.raises(BrokenPipeError):
        main(["pack", "m.jsonl", "out"])


def test_pack_of_nothing_is_bad_input(tmp_path, capsys):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "none.mp4", "caption": "다"}])
    assert main(["pack", str(manifest), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlmds: ") and error.count("\n") == 1 and "nothing was packed" in error


@pytest.mark.parametrize("exp", [f"e{n}" for n in range(1, 9)])
def test_plan_at_full_size_without_weights(exp, capsys):
    assert main(["plan", "--exp", exp]) == 0
    printed = capsys.readouterr().out
    adapter = "43,646,976" if exp in ("e1", "e3", "e5", "e7") else "45,047,808"
    tokens = "4,608" if exp in ("e1", "e2", "e3", "e4") else "64"
    assert adapter in printed and "8,190,735,360" in printed
    assert f"visual tokens per clip: {tokens} " in printed


def test_plan_shows_a_sample_with_its_loss_mask(tmp_path, capsys):
    models = tiny.make_models(tmp_path)
    tokenizer = shutil.copytree(models / "qwen3", tmp_path / "tokenizer", ignore=shutil.ignore_patterns("config.json"))
    assert main(["plan", "--exp", "e7", "--set", f"llm.model={tokenizer}"]) == 2
    assert "config.json" in capsys.readouterr().err  # a tokenizer is not a model
    assert main(["plan", "--exp", "e7", "--set", f"llm.model={models / 'qwen3'}", *tiny.RESAMPLER]) == 0
    printed = capsys.readouterr().out
    assert "'한 남자가 공원에서 강아지와 산책하고 있습니다.<|im_end|>'" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exp", "e9"], "e9: no such experiment file; packaged experiments: demo, e1"),
        (["--exp", "e7", "--set", "projector.widht=1"], "did you mean 'width'"),
        (["--exp", "e7"], "data.path: no data given; pass --data DIR"),
        (["--exp", "e7", "--data", "/nowhere"], "data.path: /nowhere does not exist"),
    ],
)
def test_training_refuses_bad_input_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0"), monkeypatch.delenv("RANK")  # restored whatever training sets
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.iterdir())


def test_gpus_starts_so_many_ranks_of_the_same_command(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", "--gpus", "0", "--exp", "e7"]) == 2
    assert "--gpus 0: must be at least 1" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "vlmds.cli", "train", "--gpus", "2", "--exp", "e9"],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("e9: no such experiment file") == 1
    ranks = [line for line in done.stdout.splitlines() if "exits with return code = 2" in line]
    assert ranks and "'--gpus', '2'" in ranks[0]


@pytest.mark.parametrize("run", ["nowhere", "."])
def test_caption_needs_a_run(run, capsys, tmp_path):
    assert main(["caption", "--run", str(tmp_path / run), "x.mp4"]) == 2
    assert "neither a run folder nor an artifact" in capsys.readouterr().err


def test_pack_converts_a_packed_dataset(tmp_path, capsys):
    models = tiny.make_models(tmp_path / "models")
    write_video(tmp_path / "a.mp4")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "a.mp4", "caption": "가"}])
    video, frames, features = (str(tmp_path / n) for n in ("video", "frames", "features"))
    assert main(["pack", str(manifest), video]) == 0
    assert main(["pack", video, frames, "--store", "frames", "--num-frames", "4", "--image-size", str(tiny.SIDE)]) == 0
    assert (
        main(
            [
                "pack",
                frames,
                features,
                "--store",
                "features",
                "--vision",
                str(models / "clip"),
                "--pool",
                "2",
                "--feature-layer",
                "-2",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.count("packed 1 sample (train 1)") == 3
    meta = json.loads((tmp_path / "features" / "dataset.json").read_text())
    assert (meta["vision"]["pool"], meta["vision"]["feature_layer"]) == (2, -2)
    for arguments, message in (
        ([features, frames], "cannot become a frames store"),
        ([video, features, "--store", "features"], "--vision: "),
        ([video, frames, "--val-fraction", "0.5"], "--val-fraction: a conversion keeps"),
        ([video, frames, "--pool", "2"], "--pool: only --store features"),
        ([video, features, "--store", "features", "--vision", "x", "--pool", "0"], "--pool: 0"),
        ([str(manifest), features, "--store", "features"], "features"),
        ([str(manifest), video, "--vision", "x"], "--vision: features are made from a packed"),
    ):
        assert main(["pack", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error, error
