"""Packing shared by processes, machines and starts: the result is the same to the byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest

from tests.clips import write_manifest, write_video
from tests.manual.pack_kills import contents, pack_with_kills
from vlmds.cli import main
from vlmds.console.progress import Phase
from vlmds.data.index import ShardIndex
from vlmds.errors import InputError
from vlmds.packing.pack import pack

SMALL = dict(shard_size=2, progress=False, workers=1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Nine clips, two of them the same; one row whose video is missing, one without a caption."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(8):
        write_video(folder / f"v{i}.mp4", frames=8 + i)
        rows.append({"video": f"v{i}.mp4", "caption": f"{i}번", "split": "val" if i > 5 else "train"})
    shutil.copy(folder / "v1.mp4", folder / "again.mp4")
    rows.insert(3, {"video": "again.mp4", "caption": "다시", "split": "train"})
    rows += [
        {"video": "gone.mp4", "caption": "없음", "split": "train"},
        {"video": "v2.mp4", "id": "silent", "caption": ""},
    ]
    write_manifest(folder / "manifest.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def clean(videos, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("clean") / "out"
    pack(videos / "manifest.jsonl", out, **SMALL)
    return contents(out)


def test_tasks_and_finish_make_what_one_run_makes(videos, clean, tmp_path):
    for task in (2, 0):
        summary = pack(videos / "manifest.jsonl", tmp_path, task=(task, 3), **SMALL)
        assert not summary.finished and not (tmp_path / "dataset.json").exists()
    with pytest.raises(InputError, match=r"not packed yet: 2 of 5 shards \(train/000001"):
        pack(videos / "manifest.jsonl", tmp_path, finish=True, **SMALL)
    pack(videos / "manifest.jsonl", tmp_path, task=(1, 3), **SMALL)
    summary = pack(videos / "manifest.jsonl", tmp_path, merge=True, **SMALL)  # the former name
    assert summary.kept_shards == summary.shards == 5
    assert contents(tmp_path) == clean


@pytest.mark.parametrize(
    "options, message",
    [
        (["--task-index", "3", "--num-tasks", "3"], "--task-index 3 --num-tasks 3"),
        (["--task-index", "0"], "--task-index 0 --num-tasks None"),
        (["--finish", "--task-index", "0", "--num-tasks", "2"], "--finish: joins"),
        (["--merge", "--task-index", "0", "--num-tasks", "2"], "--finish: joins"),
        (["--shard-bytes", "many"], "--shard-bytes many"),
        (["--append"], "dataset.json: not there"),
    ],
)
def test_options_that_make_no_sense_are_refused(videos, tmp_path, options, message, capsys):
    assert main(["pack", str(videos / "manifest.jsonl"), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_new_rows_are_appended_and_nothing_else_is_read(videos, clean, tmp_path):
    """In two steps, against one: same samples; the old videos are gone when the new come."""
    folder = shutil.copytree(videos, tmp_path / "in")
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(lines[:5] + lines[-2:]), encoding="utf-8")
    out = tmp_path / "out"
    pack(folder / "manifest.jsonl", out, **SMALL)
    before = contents(out)
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    for i in range(4):
        (folder / f"v{i}.mp4").unlink()
    with pytest.raises(InputError, match="was packed with shard_size 2, not 3"):
        pack(folder / "manifest.jsonl", out, append=True, **{**SMALL, "shard_size": 3})
    for _ in range(2):  # the second time there is nothing new
        summary = pack(folder / "manifest.jsonl", out, append=True, **SMALL)
        after = contents(out)
        assert all(after[name] == data for name, data in before.items() if name.endswith(".tar") or "/0" in name)
        before = after
    assert summary.counts == {"train": 7, "val": 2} and summary.known == 10
    keys = {row.key for row in rows(out)}
    assert keys == {"v0", "v1", "v2", "again", "v3", "v4", "v5", "v6", "v7"}
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert sorted(r["reason"].split(":")[0] for r in ledger) == ["empty caption", "file not found"]
    ShardIndex.open(out).verify_index()


@pytest.mark.parametrize("last", ["ledger.jsonl", "duplicates.jsonl", "index.parquet", "train/000002.json"])
def test_an_appending_that_was_killed_goes_on(videos, tmp_path, last):
    """A SIGKILL right after each of the files that come before dataset.json."""
    lines = (videos / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    old = videos / "old.jsonl"
    old.write_text("".join(lines[:4]), encoding="utf-8")
    code = (
        "import os, signal, sys\nfrom vlmds.packing import finish, pack, shards\n"
        "def watched(module, name):\n"
        "    real = getattr(module, name)\n"
        "    def act(path, *rest):\n"
        "        real(path, *rest)\n"
        "        if str(path).endswith(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    setattr(module, name, act)\n"
        "watched(finish, 'write'); watched(shards, 'write')\n"
        "from pathlib import Path\n"
        "replace = Path.replace\n"
        "def act(self, target):\n"
        "    replace(self, target)\n"
        "    if str(target).endswith(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.replace = act\n"
        "pack.pack(sys.argv[1], sys.argv[2], append=True, shard_size=2, workers=1, "
        "progress=False)\n"
    )
    found = []
    for name in ("calm", "killed"):
        out = tmp_path / name
        pack(old, out, **SMALL)
        if name == "killed":
            done = subprocess.run(
                [sys.executable, "-c", code, str(videos / "manifest.jsonl"), str(out), last], timeout=120
            )
            assert done.returncode == -signal.SIGKILL
        pack(videos / "manifest.jsonl", out, append=True, **SMALL)
        found.append(contents(out))
    assert found[0] == found[1]
    ShardIndex.open(tmp_path / "killed").verify_index()


def test_rows_that_are_corrected_in_the_manifest_are_appended_beside_bad_files(videos, tmp_path):
    """Files that could not be packed are for --retry."""
    good = [json.loads(line) for line in (videos / "manifest.jsonl").read_text().splitlines()][:3]
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for row in good:
        row["video"] = str(videos / row["video"])
    bad = {"video": str(tmp_path / "bad.mp4"), "caption": "x", "split": "train"}
    old = write_manifest(tmp_path / "old.jsonl", [good[0], {**good[1], "caption": ""}, bad])
    pack(old, tmp_path / "out", **SMALL)
    new = write_manifest(tmp_path / "new.jsonl", [*good[:2], bad])
    assert pack(new, tmp_path / "out", append=True, **SMALL).known == 2
    assert {row.key for row in rows(tmp_path / "out")} == {"v0", "v1"}
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out/ledger.jsonl").read_text().splitlines()]
    assert len(reasons) == 1 and reasons[0].startswith("cannot be read")


def test_appending_drops_copies_of_what_is_packed(videos, tmp_path):
    lines = (videos / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    old = videos / "old.jsonl"
    old.write_text("".join(lines[:3]), encoding="utf-8")  # v0, v1, v2
    pack(old, tmp_path / "out", **SMALL)
    with pytest.raises(InputError, match="was packed with verify True, not False"):
        pack(videos / "manifest.jsonl", tmp_path / "out", append=True, verify=False, **SMALL)
    pack(videos / "manifest.jsonl", tmp_path / "out", append=True, dedup=True, **SMALL)
    assert "again" not in {row.key for row in rows(tmp_path / "out")}
    assert "duplicate content: the same as 'v1'" in (tmp_path / "out/ledger.jsonl").read_text()


def rows(out):
    index = ShardIndex.open(out)
    return [
        index.row(split, position, i)
        for split in index.splits
        for position, shard in enumerate(index.shards(split))
        for i in range(shard.count)
    ]


def test_the_same_content_is_reported_and_dropped_on_request(videos, tmp_path, capsys):
    arguments = ["pack", str(videos / "manifest.jsonl")]
    assert main([*arguments, str(tmp_path / "a"), "--no-report"]) == 0
    assert "groups of samples with the same content: 1," in capsys.readouterr().out
    assert (tmp_path / "a" / "duplicates.jsonl").read_text() == '["v1", "again"]\n'
    assert main([*arguments, str(tmp_path / "b"), "--dedup", "--no-report"]) == 0
    assert "duplicate content" in capsys.readouterr().out
    assert {row.key for row in rows(tmp_path / "a")} - {row.key for row in rows(tmp_path / "b")} == {"again"}
    (record,) = [
        r for r in map(json.loads, (tmp_path / "b/ledger.jsonl").read_text().splitlines()) if "duplicate" in r["reason"]
    ]
    assert record["id"] == "again" and record["reason"].endswith("the same as 'v1'")
    for task in (0, 1):
        pack(videos / "manifest.jsonl", tmp_path / "c", task=(task, 2), dedup=True, workers=1, progress=False)
    pack(videos / "manifest.jsonl", tmp_path / "c", finish=True, dedup=True, progress=False)
    assert contents(tmp_path / "c") == contents(tmp_path / "b")


def test_shards_are_cut_by_bytes_too(videos, tmp_path):
    limit = 4_500
    pack(videos / "manifest.jsonl", tmp_path / "out", shard_bytes=limit, **{**SMALL, "shard_size": 4})
    index = ShardIndex.open(tmp_path / "out")
    sizes = {p.stem: p.stat().st_size for p in videos.glob("*.mp4")}
    groups = {}
    for row in rows(tmp_path / "out"):
        groups.setdefault((row.split, row.shard), []).append(sizes[row.key])
    assert len(groups) > 3
    assert all(len(group) <= 4 and (sum(group) <= limit or len(group) == 1) for group in groups.values())
    assert index.count("train") == 7


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_in_and_out_may_be_urls(videos, clean, tmp_path, scheme):
    if scheme == "memory":
        fs = fsspec.filesystem("memory")
        for path in videos.iterdir():
            fs.pipe(f"/in/{path.name}", path.read_bytes())
        # Decoding processes cannot see this process's memory: the videos lie on disk.
        source, out = str(videos / "manifest.jsonl"), "memory://out"
    else:
        source, out = (videos / "manifest.jsonl").as_uri(), (tmp_path / "out").as_uri()
    try:
        pack(source, out, **SMALL)
        assert pack(source, out, **SMALL).kept_shards == 5
        index = ShardIndex.open(out)
        index.verify_index()
        index.verify(index.shards("train"), "sha256")
        if scheme == "memory":
            found = {path.removeprefix("/out/"): fs.cat(path) for path in fs.find("/out")}
        else:
            found = contents(tmp_path / "out")
        assert {k: v for k, v in found.items() if not k.endswith("ledger.jsonl")} == {
            k: v for k, v in clean.items() if not k.endswith("ledger.jsonl")
        }
    finally:
        if scheme == "memory":
            for place in ("/in", "/out"):
                if fs.exists(place):
                    fs.rm(place, recursive=True)


def test_killed_at_random_and_started_again(videos, clean, tmp_path):
    """tests/manual/pack_kills.py does it with more clips, more kills, two tasks at once and Ray."""
    killed = pack_with_kills(videos / "manifest.jsonl", tmp_path / "out", SMALL, kills=5, seed=0, seconds=1.0)
    assert killed >= 1
    assert contents(tmp_path / "out") == clean


def test_a_kill_between_a_tar_and_its_marker_leaves_no_broken_shard(tmp_path):
    """Packing a shard again; tars are padded: the new one is as large as the old."""
    for i in range(4):
        write_video(tmp_path / f"v{i}.mp4", frames=4, width=32, height=32)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": f"v{i}.mp4", "caption": "글"} for i in range(4)])
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(manifest, whole, **{**SMALL, "shard_size": 4})
    (tmp_path / "v0.mp4").rename(tmp_path / "aside")
    pack(manifest, out, **{**SMALL, "shard_size": 4})
    (tmp_path / "aside").rename(tmp_path / "v0.mp4")
    assert (out / "train/000000.tar").stat().st_size == (whole / "train/000000.tar").stat().st_size
    code = (
        "import os, signal, sys\nfrom vlmds.packing import pack, shards\n"
        "shards.write = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack.pack(sys.argv[1], sys.argv[2], retry=True, shard_size=4, workers=1, "
        "progress=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(manifest), str(out)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert pack(manifest, out, **{**SMALL, "shard_size": 4}).kept_shards == 0
    assert contents(out) == contents(whole)


def test_a_ray_cluster_packs_the_same_also_when_a_worker_is_killed(videos, clean, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.manual.pack_ray", str(videos / "manifest.jsonl"), str(out), json.dumps(SMALL)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    try:
        output, _ = run.communicate(timeout=150)
    finally:
        try:
            os.killpg(run.pid, signal.SIGKILL)  # whatever of Ray is left
        except ProcessLookupError:
            pass
    assert run.returncode == 0, output
    assert "killed the worker" in output
    assert contents(out) == clean


def test_a_network_error_does_not_change_the_plan(monkeypatch):
    from vlmds.packing import video_facts

    calls = []

    def flaky(times, error=OSError("reset by peer")):
        calls.append(1)
        if len(calls) <= times:
            raise error
        return 7

    monkeypatch.setattr(video_facts.time, "sleep", lambda seconds: None)
    assert video_facts._ask("v.mp4", 0, lambda: flaky(2)) == 7 and len(calls) == 3
    calls.clear()
    with pytest.raises(InputError, match="v.mp4: cannot be read to plan .* reset by peer"):
        video_facts._ask("v.mp4", 0, lambda: flaky(99))
    calls.clear()
    assert video_facts._ask("v.mp4", 0, lambda: flaky(99, FileNotFoundError())) == 0 and len(calls) == 1


@pytest.mark.parametrize("options", [{"shard_bytes": 4_500}, {"dedup": True}])
def test_a_repaired_file_goes_into_its_place_in_the_plan(videos, tmp_path, options, monkeypatch):
    """Videos are read once, by the first start; later ones only read its plan."""
    from vlmds.packing import video_facts

    folder = shutil.copytree(videos, tmp_path / "in")
    manifest, out, options = folder / "manifest.jsonl", tmp_path / "out", SMALL | options
    (folder / "again.mp4").rename(tmp_path / "aside")
    pack(manifest, out, task=(0, 2), **options)
    (plan,) = out.glob("plan-*.jsonl")
    assert [json.loads(line)[0] for line in plan.read_bytes().splitlines()].count(0) == 2
    monkeypatch.setattr(video_facts, "_size", None)
    monkeypatch.setattr(video_facts, "_digest", None)
    pack(manifest, out, task=(1, 2), **options)
    pack(manifest, out, finish=True, **options)
    before = contents(out)
    (tmp_path / "aside").rename(folder / "again.mp4")
    again = pack(manifest, out, **options)
    assert again.kept_shards == again.shards and contents(out) == before
    retried = pack(manifest, out, retry=True, **options)
    assert retried.kept_shards < retried.shards
    assert "again" in {row.key for row in rows(out)}
    after = contents(out)
    assert {name for name in before if name.endswith(".tar")} <= {*after}
    assert after[plan.name] == before[plan.name]


def test_reading_the_videos_to_plan_says_how_far_it_is(videos, tmp_path, monkeypatch):
    from vlmds.packing import video_facts

    shown = []

    def recorded(what, total, unit, **how):
        shown.append(Phase(what, total, unit, **how))
        return nullcontext(shown[-1])

    monkeypatch.setattr(video_facts, "phase", recorded)
    monkeypatch.setattr(video_facts, "BATCH", 4)  # less than the videos
    pack(videos / "manifest.jsonl", tmp_path, dedup=True, **SMALL)
    assert [(p.what, p.done, p.total, p.unit) for p in shown] == [
        ("reading the videos' sizes", 10, 10, "videos"),
        ("comparing videos of one size", 2, 2, "videos"),
    ]


def test_tasks_that_start_together_have_one_plan(videos, tmp_path, monkeypatch):
    """The plan that another task wrote meanwhile counts."""
    from vlmds.packing import video_facts

    options = SMALL | {"shard_bytes": 4_500}
    pack(videos / "manifest.jsonl", tmp_path / "first", **options)
    (plan,) = (tmp_path / "first").glob("plan-*.jsonl")

    def slow(videos, *rest):
        (tmp_path / "out").mkdir()
        shutil.copy(plan, tmp_path / "out")
        return [(1, None)] * len(videos)

    monkeypatch.setattr(video_facts, "_look_up", slow)
    pack(videos / "manifest.jsonl", tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "first")
    (tmp_path / "out" / plan.name).write_text("[1, null]\n")
    with pytest.raises(InputError, match="plan-.*damaged; delete it"):
        pack(videos / "manifest.jsonl", tmp_path / "out", **options)


def test_a_start_that_packs_nothing_leaves_no_plan(videos, tmp_path):
    """Such as when the folder of videos was not mounted."""
    manifest = shutil.copy(videos / "manifest.jsonl", tmp_path)
    options = SMALL | {"shard_bytes": 4_500}
    with pytest.raises(InputError, match="nothing was packed"):
        pack(manifest, tmp_path / "out", **options)
    for path in videos.glob("*.mp4"):
        shutil.copy(path, tmp_path)
    pack(manifest, tmp_path / "out", **options)
    pack(videos / "manifest.jsonl", tmp_path / "clean", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def append(folder, out, table, **options):
    return pack(write_manifest(folder / "m.jsonl", table), out, append=True, **SMALL | options)


def ids_of(out):
    """Where the rows' videos came from, by id."""
    return {row[0]: row[2] for path in sorted(out.glob("*/*.json")) for row in json.loads(path.read_bytes())["inputs"]}


def test_another_video_of_the_same_name_is_appended(videos, tmp_path):
    """Also where the manifest lists the newest first; one with a given id is rejected."""
    for name, source in (("old", "v0"), ("new", "v1")):
        (tmp_path / name).mkdir()
        shutil.copy(videos / f"{source}.mp4", tmp_path / name / "clip.mp4")
    old, new = ({"video": f"{name}/clip.mp4", "caption": "글"} for name in ("old", "new"))
    out = tmp_path / "out"
    pack(write_manifest(tmp_path / "m.jsonl", [old, old | {"id": "mine"}]), out, **SMALL)
    summary = append(tmp_path, out, [new, old, old | {"end": 0.3}, new | {"id": "mine"}])
    assert summary.known == 1 and summary.rejected == {"duplicate id": 1}
    found = {"clip": "old/clip.mp4", "mine": "old/clip.mp4", "clip-2": "new/clip.mp4", "clip-3": "old/clip.mp4"}
    assert ids_of(out) == found
    assert append(tmp_path, out, [old | {"end": 0.3}, new, old]).known == 3
    assert ids_of(out) == found and {row.key for row in rows(out)} == set(found)


def test_rows_corrected_in_the_manifest_are_appended(videos, tmp_path):
    for path in videos.glob("*.mp4"):
        shutil.copy(path, tmp_path)
    table = [
        {"video": "v0.mp4", "caption": "글"},
        {"video": "v1.mp4", "caption": ""},
        {"video": "v2.mp4", "caption": "글", "split": "../x"},
        {"video": "gone.mp4", "caption": "글", "id": "moved"},
        {"caption": "글", "id": "bare"},
        {"video": "v4.mp4", "caption": ""},
    ]
    out = tmp_path / "out"
    pack(write_manifest(tmp_path / "m.jsonl", table), out, **SMALL)
    table[1]["caption"], table[2]["split"], table[3]["video"] = "글", "val", "v3.mp4"
    table[4]["video"] = "v5.mp4"
    summary = append(tmp_path, out, table[:5])
    assert {row.key for row in rows(out)} == {"v0", "v1", "v2", "moved", "bare"}
    assert summary.rejected == {"file not found": 1, "empty caption": 1}
    again = append(tmp_path, out, table[:5])
    assert again.known == 5 and again.rejected == summary.rejected


def test_copies_that_were_left_out_stay_out(videos, tmp_path):
    for name in ("v1", "again"):
        shutil.copy(videos / f"{name}.mp4", tmp_path)
    table = [{"video": "v1.mp4", "caption": "글"}, {"video": "again.mp4", "caption": "글"}]
    out = tmp_path / "out"
    pack(write_manifest(tmp_path / "m.jsonl", table), out, dedup=True, **SMALL)
    summary = append(tmp_path, out, table)
    assert summary.known == 2 and summary.rejected == {"duplicate content": 1}
    assert [row.key for row in rows(out)] == ["v1"]


def test_a_new_key_is_not_one_that_is_packed(videos, tmp_path):
    shutil.copy(videos / "v0.mp4", tmp_path)
    row = {"video": "v0.mp4", "caption": "글"}
    out = tmp_path / "out"
    pack(write_manifest(tmp_path / "m.jsonl", [row | {"id": "a.b"}]), out, **SMALL)
    (key,) = (found.key for found in rows(out))
    assert append(tmp_path, out, [row | {"id": key}]).packed == 2


def test_what_an_older_vlmds_packed_is_known_by_its_ids(videos, tmp_path):
    """Its markers do not record the rows' inputs."""
    for name in ("v0", "v1"):
        shutil.copy(videos / f"{name}.mp4", tmp_path)
    table = [{"video": "v0.mp4", "caption": "글"}, {"video": "gone.mp4", "caption": "글"}]
    out = tmp_path / "out"
    pack(write_manifest(tmp_path / "m.jsonl", table), out, **SMALL)
    for path in out.glob("*/*.json"):
        marker = json.loads(path.read_bytes())
        del marker["inputs"]
        path.write_text(json.dumps(marker))
    summary = append(tmp_path, out, [*table, {"video": "v1.mp4", "caption": "글"}])
    assert summary.known == 2 and summary.packed == 2
