"""Reading of manifests: formats, columns, rejected rows, ids and keys."""

import csv
import hashlib
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.clips import write_manifest
from vlmds.errors import InputError
from vlmds.packing.manifest import MAX_KEY, read_manifest


def rows_of(tmp_path, rows, **options):
    return read_manifest(write_manifest(tmp_path / "m.jsonl", rows), **options)


def reasons(manifest):
    return {reject.row: reject.reason for reject in manifest.rejects}


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, extension):
    rows = [
        {"video": "가/한 영상.mp4", "caption": "강아지가, 뛴다", "start": 1.5, "end": 3.0, "split": "val"},
        {"video": "/abs/b.mkv", "caption": "둘", "start": None, "end": None, "split": None},
        {"video": "s3://bucket/c.webm", "caption": "셋", "start": None, "end": None, "split": None},
    ]
    path = tmp_path / f"m.{extension}"
    if extension == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif extension == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + write_manifest(path, rows).read_bytes())
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if extension == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)

    manifest = read_manifest(path)

    assert not manifest.rejects
    first, second, third = manifest.rows
    assert first.video == str(tmp_path / "가/한 영상.mp4") and first.source == "가/한 영상.mp4"
    assert (first.captions, first.start, first.end, first.split) == (["강아지가, 뛴다"], 1.5, 3.0, "val")
    assert (second.video, second.start, second.split) == ("/abs/b.mkv", None, "train")
    assert third.video == "s3://bucket/c.webm" and third.id == "c"


def test_captions_may_be_a_list_also_in_a_csv_cell(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text('video,caption\na.mp4,"[""하나"", ""둘""]"\nb.mp4,[음악] 노래\n', "utf-8")
    assert [row.captions for row in read_manifest(path).rows] == [["하나", "둘"], ["[음악] 노래"]]


def test_bad_rows_are_rejected_with_a_reason_and_the_rest_kept(tmp_path):
    good = {"video": "a.mp4", "caption": "좋다"}
    manifest = rows_of(
        tmp_path,
        [
            good,
            {"video": "b.mp4", "caption": "  "},
            {"video": "b.mp4", "caption": []},
            {"video": "b.mp4", "caption": ["좋다", ""]},
            {"video": "b.mp4"},
            {"caption": "좋다"},
            {"video": "b.mp4", "caption": 3},
            good | {"start": 3, "end": 3},
            good | {"start": -1},
            good | {"end": "1:30"},
            good | {"split": "../x"},
            good,
        ],
    )
    assert [row.row for row in manifest.rows] == [1]
    found = reasons(manifest)
    assert [found[i].split(":")[0] for i in range(2, 13)] == [
        "empty caption",
        "empty caption",
        "empty caption",
        "no caption",
        "no video",
        "bad caption",
        "bad start or end",
        "bad start or end",
        "bad start or end",
        "bad split",
        "duplicate id",
    ]
    assert found[12] == ("duplicate id: 'a' is row 1's; list several captions in one row, or give ids")
    assert manifest.rejects[0].video == "b.mp4"


def test_default_ids_are_made_unique_and_never_take_a_given_one(tmp_path):
    def row(video, **more):
        return {"video": video, "caption": "글"} | more

    manifest = rows_of(
        tmp_path,
        [
            row("x/a.mp4"),
            row("y/a.mp4"),
            row("x/a.mp4", start=1),
            row("b.mp4", id="a-2"),
            row("x/a.mp4", start=1),
            row("c.mp4", id="a-2"),
        ],
    )
    assert [r.id for r in manifest.rows] == ["a", "a-3", "a-4", "a-2"]
    assert list(reasons(manifest)) == [5, 6]


def test_keys_are_safe_short_and_unique(tmp_path):
    ids = ["plain-1_A", "a.b", "a/b", "../../x", "가나다", "라마바", "x" * 200, "x" * 201]
    manifest = rows_of(tmp_path, [{"video": "v.mp4", "caption": "글", "id": i} for i in ids])
    keys = [row.key for row in manifest.rows]
    assert keys[0] == "plain-1_A" and keys[1] == "a_b-" + hashlib.sha1(b"a.b").hexdigest()[:8]
    assert all(re.fullmatch(r"[0-9A-Za-z_-]+", key) and len(key) <= MAX_KEY for key in keys)
    assert len(set(keys)) == len(ids)


def test_unknown_columns_are_named(tmp_path):
    manifest = rows_of(tmp_path, [{"video": "a.mp4", "caption": "글", "captions": "x", "fps": 3}])
    assert manifest.ignored_columns == ["captions", "fps"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.txt", b"", "unknown extension"),
        ("m.jsonl", b'{"video": "a", "caption": "b"}\n\n{"video"\n', "line 3: not JSON"),
        ("m.jsonl", b"[1]\n", "entry 1: not a JSON object"),
        ("m.jsonl", b"", "no column 'video'"),
        ("m.csv", b"video,text\na,b\n", "no column 'caption'; it has video, text"),
        ("m.csv", "video,caption\na,가\n".encode("cp949"), "not UTF-8"),
        ("m.parquet", b"PAR1 no", "not a Parquet file"),
    ],
)
def test_unusable_manifests_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(name)) as error:
        read_manifest(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_manifest_is_refused(tmp_path):
    with pytest.raises(InputError, match="none.csv: No such file"):
        read_manifest(tmp_path / "none.csv")


def test_csv_row_with_too_many_cells_is_rejected(tmp_path):
    (tmp_path / "m.csv").write_text("video,caption\na.mp4,하나, 둘\n", "utf-8")
    assert "too many cells" in read_manifest(tmp_path / "m.csv").rejects[0].reason
