"""Manifests as people and other tools write them. Each test makes its own file."""

import json
import os
import shutil
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.clips import write_manifest, write_video
from vlmds.cli import main
from vlmds.data.index import ShardIndex
from vlmds.errors import InputError
from vlmds.packing.convert import convert
from vlmds.packing.manifest import read_manifest
from vlmds.packing.pack import pack

FAST = {"progress": False, "verify": False, "workers": 1}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", frames=4, width=32, height=32)


def copies(clip, folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / name)


def written(path, text):
    path.write_text(text, "utf-8", newline="")
    return path


def captions(manifest):
    return {row.source: row.captions for row in manifest.rows}


def reasons(manifest):
    return {reject.row: reject.reason.split(":")[0] for reject in manifest.rejects}


def samples(out):
    """Each sample's split and description, by id."""
    index = ShardIndex.open(out)
    found = {}
    for split in index.splits:
        for position, shard in enumerate(index.shards(split)):
            for i in range(shard.count):
                described = json.loads(index.read(index.row(split, position, i))["json"])
                found[described["id"]] = (split, described)
    return found


def test_lists_that_pandas_wrote_as_python_text_are_lists(tmp_path):
    path = written(
        tmp_path / "m.csv",
        "video,caption\n"
        "a.mp4,\"['큰 개가 달린다', '개 한 마리']\"\n"
        'b.mp4,"[\'고양이가 잔다\', ""it\'s a cat""]"\n'
        "c.mp4,\"['하나' '둘']\"\n"  # NumPy's
        "d.mp4,\"['하나', nan]\"\n"
        "e.mp4,['아'] 하고 말한다\n"
        "f.mp4,[음악]\n",
    )
    manifest = read_manifest(path)
    assert captions(manifest) == {
        "a.mp4": ["큰 개가 달린다", "개 한 마리"],
        "b.mp4": ["고양이가 잔다", "it's a cat"],
        "e.mp4": ["['아'] 하고 말한다"],
        "f.mp4": ["[음악]"],
    }
    assert reasons(manifest) == {3: "bad caption", 4: "bad caption"}


@pytest.mark.parametrize("tail", ["", 'd.mp4,"다른 인용"\n'])
def test_an_open_quote_in_a_csv_is_refused_with_its_line(tmp_path, tail):
    text = 'video,caption\na.mp4,큰 개\nb.mp4,"안녕 하고 말하는 사람\nc.mp4,고양이가 잔다\n' + tail
    with pytest.raises(InputError, match=r"m.csv: line 3: .*close the quote"):
        read_manifest(written(tmp_path / "m.csv", text))


def test_a_lone_quote_in_a_tsv_is_text(tmp_path):
    path = written(
        tmp_path / "m.tsv",
        'video\tcaption\na.mp4\t"안녕 하고\nb.mp4\t말하는 사람"\nc.mp4\t15" 화면\nd.mp4\t"둘\n\n줄"\r\n'
        'e.mp4\t"안에 ""따옴표"""\nf.mp4\t"앞" 뒤\nh.mp4\t"한\u2028줄"\ng.mp4\t"끝',
    )
    assert captions(read_manifest(path)) == {
        "a.mp4": ['"안녕 하고'],
        "b.mp4": ['말하는 사람"'],
        "c.mp4": ['15" 화면'],
        "d.mp4": ["둘\n\n줄"],
        "e.mp4": ['안에 "따옴표"'],
        "f.mp4": ['"앞" 뒤'],
        "h.mp4": ["한\u2028줄"],
        "g.mp4": ['"끝'],
    }


@pytest.mark.parametrize("extension", ["csv", "tsv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, extension):
    path = tmp_path / f"m.{extension}"
    if extension == "parquet":
        pq.write_table(pa.table([["a.mp4"], ["하나"], ["둘"]], names=["video", "caption", "caption"]), path)
    else:
        path.write_text("video,caption,caption\na.mp4,하나,둘\n".replace(",", "\t" if extension == "tsv" else ","))
    with pytest.raises(InputError, match="several columns are called 'caption'"):
        read_manifest(path)


def test_text_that_is_no_unicode_goes_to_the_ledger(clip, tmp_path):
    copies(clip, tmp_path, "a.mp4", "b.mp4")
    lines = [
        r'{"video":"a.mp4","caption":"개 \ud83d"}',
        r'{"video":"b.mp4","caption":"고양이"}',
        r'{"video":"b\udcff.mp4","id":"\ud83d","caption":"이름"}',  # as Python writes names that are not UTF-8
    ]
    summary = pack(written(tmp_path / "m.jsonl", "\n".join(lines)), tmp_path / "out", **FAST)
    assert summary.packed == 1 and summary.rejected == {"not Unicode": 2}
    ledger = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").read_text("utf-8").splitlines()]
    assert [(entry["row"], entry["video"]) for entry in ledger] == [(1, "a.mp4"), (3, r"b\udcff.mp4")]


def test_values_of_other_types_are_rejected_and_texts_of_missing_values_reported(clip, tmp_path, capsys):
    copies(clip, tmp_path, "a.mp4", "b.mp4")
    rows = [
        '"caption":NaN',
        '"caption":null',
        '"caption":["x",null]',
        '"caption":{"ko":"x"}',
        '"caption":true',
        '"caption":"nan"',
        '"caption":"None","id":"none"',
        '"caption":"x","start":true',
        '"caption":"x","id":{"a":1}',
        '"caption":"x","id":2.0',
    ]
    text = "".join(f'{{"video":"a.mp4",{row}}}\n' for row in rows) + '{"video":["b.mp4"],"caption":"목록"}\n'
    manifest = written(tmp_path / "m.jsonl", text)
    found = read_manifest(manifest)
    assert reasons(found) == {
        1: "no caption",
        2: "no caption",
        3: "bad caption",
        4: "bad caption",
        5: "bad caption",
        8: "bad start or end",
        9: "bad id",
    }
    assert [row.id for row in found.rows] == ["a", "none", "2", "b"]
    assert main(["pack", str(manifest), str(tmp_path / "out"), "--no-report", "--no-verify"]) == 0
    assert "2 captions with the text of a missing value" in capsys.readouterr().out


def test_ids_of_a_column_with_gaps_are_whole_numbers(tmp_path):
    """pandas makes floats of integers where one is missing."""
    table = pa.table({"video": ["a.mp4", "b.mp4", "c.mp4"], "caption": ["하나"] * 3, "id": [1.0, None, 3.0]})
    pq.write_table(table, tmp_path / "m.parquet")
    assert [row.id for row in read_manifest(tmp_path / "m.parquet").rows] == ["1", "b", "3"]


def test_names_in_nfc_and_nfd_find_each_other(clip, tmp_path):
    names = ["강아지 영상.mp4", "모음/고양이.mp4", "섞임/새.mp4"]
    composed, apart = ([unicodedata.normalize(form, name) for name in names] for form in ("NFC", "NFD"))
    folder, name = apart[2].split("/")
    on_disk = [apart[0], composed[1], f"{folder}/{composed[2].split('/')[1]}"]
    copies(clip, tmp_path, *on_disk)
    sources = [composed[0], apart[1], composed[2]]
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": source, "caption": "글"} for source in sources])
    for out, options in (("a", {}), ("b", {"dedup": True, "shard_bytes": 10**9})):
        summary = pack(manifest, tmp_path / out, **FAST, **options)
        assert summary.packed == (3 if out == "a" else 1) and "file not found" not in summary.rejected


CONVERSATION = [
    {"from": "human", "value": "<video>\n설명해줘"},
    {"from": "gpt", "value": "개가 달린다"},
    {"from": "human", "value": "또?"},
    {"from": "gpt", "value": "끝"},
]
LLAVA = [
    {"id": "v1", "video": "a.mp4", "conversations": CONVERSATION},
    {"id": "v2", "image": "b.mp4", "conversations": [{"from": "human", "value": "<image>"}, CONVERSATION[1]]},
    {"id": "v3", "conversations": CONVERSATION},
    {"id": "v4", "video": "a.mp4", "conversations": CONVERSATION[:1]},
]
SWIFT = [
    {
        "videos": ["a.mp4"],
        "messages": [
            {"role": "system", "content": "도우미"},
            {"role": "user", "content": "<video>설명해줘"},
            {"role": "assistant", "content": "개가 달린다"},
        ],
    },
    {
        "images": "b.mp4",
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "무엇?"}]},
            {"role": "assistant", "content": "고양이"},
        ],
    },
    {
        "videos": ["a.mp4", "b.mp4"],
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
    },
]


@pytest.mark.parametrize("kind", ["array.json", "array.jsonl", "lines.json", "lines.jsonl"])
@pytest.mark.parametrize("rows", [LLAVA, SWIFT], ids=["llava", "ms-swift"])
def test_llava_and_ms_swift_files_are_manifests(tmp_path, rows, kind):
    text = json.dumps(rows, indent=1) if kind.startswith("array") else "".join(json.dumps(row) + "\n" for row in rows)
    manifest = read_manifest(written(tmp_path / kind, text))
    found = [(row.source, row.prompt, row.captions) for row in manifest.rows]
    if rows is LLAVA:
        assert found == [("a.mp4", "설명해줘", ["개가 달린다"]), ("b.mp4", None, ["개가 달린다"])]
        assert reasons(manifest) == {3: "no video", 4: "no caption"}
        assert manifest.notes == ["1 conversation with more than one answer: 2 further turns not used"]
    else:
        assert found == [("a.mp4", "설명해줘", ["개가 달린다"]), ("b.mp4", "무엇?", ["고양이"])]
        assert reasons(manifest) == {3: "several videos"}


def test_further_turns_are_reported_by_pack(clip, tmp_path, capsys):
    copies(clip, tmp_path, "a.mp4", "b.mp4")
    manifest = written(tmp_path / "m.json", json.dumps(LLAVA))
    assert main(["pack", str(manifest), str(tmp_path / "out"), "--no-report", "--no-verify"]) == 0
    printed = capsys.readouterr().out
    assert "1 conversation with more than one answer: 2 further turns not used" in printed
    assert samples(tmp_path / "out")["v1"][1]["prompt"] == "설명해줘"


def test_columns_may_have_other_names(clip, tmp_path, capsys):
    copies(clip, tmp_path, "clips/a.mp4")
    manifest = written(tmp_path / "web.csv", "videoid,contentUrl,name,duration\n7,clips/a.mp4,바다,3\n")
    arguments = ["pack", str(manifest), str(tmp_path / "out"), "--no-report", "--no-verify"]
    assert main([*arguments, "--columns", "video=contentUrl,caption=name,id=videoid"]) == 0
    assert "ignored columns: duration" in capsys.readouterr().out
    ((split, described),) = samples(tmp_path / "out").values()
    assert (split, described["id"], described["captions"]) == ("train", "7", ["바다"])
    for columns, message in (
        ("video=url,caption=name", "no column 'url'"),
        ("film=name", "there is no film"),
        ("video", "write video=PATH"),
    ):
        assert main([*arguments, "--columns", columns]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_hugging_face_folder_is_a_manifest(clip, tmp_path, name):
    copies(clip, tmp_path, "clips/a.mp4", "b.mp4")
    rows = [{"file_name": "clips/a.mp4", "text": "하나"}, {"file_name": "b.mp4", "text": "둘"}]
    if name.endswith("csv"):
        written(tmp_path / name, "file_name,text\nclips/a.mp4,하나\nb.mp4,둘\n")
    else:
        write_manifest(tmp_path / name, rows)
    assert pack(tmp_path, tmp_path / "out", **FAST).packed == 2
    assert {described["captions"][0] for _, described in samples(tmp_path / "out").values()} == {"하나", "둘"}
    with pytest.raises(InputError, match="a folder without metadata.jsonl"):
        read_manifest(tmp_path / "clips")


def test_other_names_of_val_mean_val_and_no_train_is_refused(clip, tmp_path, capsys):
    names = ["validation", "Valid", "dev", "eval", "test"]
    copies(clip, tmp_path, *(f"{name}.mp4" for name in names))
    rows = [{"video": f"{name}.mp4", "caption": name, "split": name} for name in names]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    out = tmp_path / "out"
    assert main(["pack", str(manifest), str(out), "--no-report", "--no-verify"]) == 0
    assert "WARNING: no sample is in split train" in capsys.readouterr().out
    assert {key: split for key, (split, _) in samples(out).items()} == dict.fromkeys(names[:4], "val") | {
        "test": "test"
    }
    assert main(["plan", "--exp", "e7", "--data", str(out)]) == 2
    assert "no split 'train'; it has test, val" in capsys.readouterr().err


def test_links_long_names_and_places_that_are_not_utf8(clip, tmp_path, capsys):
    long = "가" * 80 + ".mp4"
    copies(clip, tmp_path, f"real/{long}")
    (tmp_path / "link").symlink_to("real")
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(place)
    manifest = os.path.join(place, "m.jsonl")
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump({"video": f"../link/{long}", "caption": "글"}, file)
    assert main(["pack", manifest, os.path.join(place, "out")]) == 0
    assert "packed 1 sample" in capsys.readouterr().out
    assert list(samples(os.path.join(place, "out"))) == [long.removesuffix(".mp4")]


def test_columns_that_are_kept_travel_with_the_sample(clip, tmp_path, capsys):
    copies(clip, tmp_path, "a.mp4", "b.mp4")
    rows = [
        {"video": "a.mp4", "caption": "하나", "category": "동물", "score": 3, "tags": ["x", "y"]},
        {"video": "b.mp4", "caption": "둘"},
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    plain, out = tmp_path / "plain", tmp_path / "out"
    pack(manifest, plain, **FAST)
    assert "columns" not in samples(plain)["a"][1]
    words = [
        "pack",
        str(manifest),
        str(out),
        "--no-report",
        "--no-verify",
        "--keep-columns",
        "category",
        "score",
        "tags",
    ]
    assert main(words) == 0
    assert "ignored columns" not in capsys.readouterr().out
    kept = {"category": "동물", "score": 3, "tags": ["x", "y"]}
    assert samples(out)["a"][1] == {**samples(plain)["a"][1], "columns": kept}
    convert(out, tmp_path / "frames", store="frames", num_frames=2, image_size=28, progress=False)
    found = samples(tmp_path / "frames")
    assert found["a"][1]["columns"] == kept and found["a"][1]["source"] == "a.mp4"
    assert found["b"][1]["columns"] == {"category": None, "score": None, "tags": None}
    with pytest.raises(InputError, match="no column 'colour'"):
        read_manifest(manifest, keep=["colour"])


def test_a_manifest_is_checked_without_packing(clip, tmp_path, capsys, models):
    copies(clip, tmp_path, "a.mp4", "b.mp4")
    rows = [
        {"video": "a.mp4", "caption": ["강아지가 뛴다", "a dog"], "split": "train", "note": 1},
        {"video": "a.mp4", "id": "again", "caption": "a dog", "split": "val"},
        {"video": "b.mp4", "caption": "강" * 60},
        {"video": "gone.mp4", "caption": "null"},
        {"video": "s3://bucket/c.mp4", "caption": "바다"},
        {"video": "b.mp4", "id": "empty", "caption": ""},
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    before = sorted(tmp_path.iterdir())
    words = ["pack", str(manifest), "--check", "--tokenizer", str(models / "qwen3"), "--max-caption-tokens", "40"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "6 rows: 5 can be packed, 1 cannot",
        "       1  empty caption, such as row 6",
        "splits: train 4, val 1 (3 rows without one)",
        "videos: 4 (1 row with a URL, not checked)",
        "rows whose video is not there: 1, such as row 4",
        "rows of a video that is also in another split: 1, such as row 2",
        "rows with the video and span of an earlier one: 1, such as row 2",
        "captions: 6, of 14 characters on average, 60 at most; Hangul in 50.0% of them, 85.0% of all letters",
        "captions that repeat an earlier one: 1, such as row 2",
        "1 caption with the text of a missing value (nan, none, null, <na>): if that is not meant, leave the cell empty",
        "captions longer than 40 tokens, which training cuts: 1 of 6 (16.7%), such as row 3",
        "ignored columns: note",
    ]
    assert sorted(tmp_path.iterdir()) == before
    assert main(["pack", str(manifest)]) == 2
    assert "OUT: give the folder" in capsys.readouterr().err


def test_captions_that_training_would_cut_are_counted_when_packing(clip, tmp_path, capsys, models):
    copies(clip, tmp_path, "a.mp4", "b.mp4")
    rows = [{"video": "a.mp4", "caption": ["짧다", "길다 " * 300]}, {"video": "b.mp4", "caption": "짧다"}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    words = ["pack", str(manifest), str(tmp_path / "out"), "--no-report", "--no-verify"]
    assert main([*words, "--tokenizer", str(models / "qwen3")]) == 0
    line = "captions longer than 256 tokens, which training cuts: 1 of 3 (33.3%), such as row 1"
    assert line in capsys.readouterr().out.splitlines()
    assert main([*words, "--tokenizer", str(tmp_path / "none")]) == 2
    assert f"--tokenizer {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
