"""The assignment of source videos to train or val."""

import shutil

from tests.clips import write_manifest, write_video
from tests.packing.test_inputs import FAST, samples
from tests.packing.test_pack import contents
from vlmds.packing.manifest import read_manifest
from vlmds.packing.pack import pack
from vlmds.packing.split import with_val


def split_of(out):
    return {name: split for name, (split, _) in samples(out).items()}


def test_spans_and_copies_of_a_video_are_in_one_split(tmp_path):
    """Whatever their ids, with --append, and for any tasks."""
    rows = []
    for i in range(8):
        video = write_video(tmp_path / f"v{i}.mp4", frames=10 + i, width=32, height=32)
        shutil.copy(video, tmp_path / f"copy{i}.mp4")
        rows += [{"video": f"v{i}.mp4", "id": f"{i}-{part}", "caption": "글", "start": part / 10} for part in range(3)]
        rows.append({"video": f"copy{i}.mp4", "id": f"{i}-copy", "caption": "글"})
    rows[4]["split"] = "val"  # one span of v1, which its others follow
    manifest, out = write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out"
    options = FAST | {"val_fraction": 0.5, "shard_size": 4}
    summary = pack(manifest, out, **options)
    assert any("chose among 16 source videos, identified by content" in note for note in summary.notes)
    found = split_of(out)
    assert len(found) == 32 and found["1-0"] == "val"
    for i in range(8):
        assert len({split for name, split in found.items() if name.startswith(f"{i}-")}) == 1

    for task in (1, 0):
        pack(manifest, tmp_path / "tasks", task=(task, 2), **options)
    pack(manifest, tmp_path / "tasks", finish=True, **options)
    assert contents(tmp_path / "tasks") == contents(out)

    # The other order, and the videos under other names.
    for i in range(8):
        (tmp_path / f"v{i}.mp4").rename(tmp_path / f"w{i}.mp4")
    renamed = [row | {"video": row["video"].replace("v", "w")} for row in reversed(rows)]
    pack(write_manifest(tmp_path / "r.jsonl", renamed), tmp_path / "renamed", **options)
    assert split_of(tmp_path / "renamed") == found

    first = [row for row in renamed if row["id"][-1] in "01"]
    pack(write_manifest(tmp_path / "r.jsonl", first), tmp_path / "grown", **options)
    pack(write_manifest(tmp_path / "r.jsonl", renamed), tmp_path / "grown", append=True, **options)
    assert split_of(tmp_path / "grown") == found


def test_a_share_of_the_videos_goes_to_val(tmp_path):
    """Of names, where no file is there: rows of one name stay together."""
    rows = [{"video": f"{i // 2}.mp4", "id": str(i), "caption": "글"} for i in range(1000)]
    rows[0]["split"] = rows[1]["split"] = "test"
    splits = []
    for order in (rows, rows[::-1]):
        table = read_manifest(write_manifest(tmp_path / "m.jsonl", order))
        decided, notes = with_val(tmp_path / str(len(splits)), table.rows, table.undecided, 0.2, {})
        assert "500 of them by name" in notes[0]
        splits.append({row.id: row.split for row in decided})
    assert splits[0] == splits[1] and splits[0]["0"] == splits[0]["1"] == "test"
    assert all(splits[0][str(i)] == splits[0][str(i + 1)] for i in range(0, 1000, 2))
    assert 140 < list(splits[0].values()).count("val") < 260
