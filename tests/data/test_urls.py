"""URLs whose driver is not installed: one line that says what to install."""

import sys

import pytest

from tests.clips import write_manifest, write_video
from vlmds.captioning.sources import select_items
from vlmds.cli import main
from vlmds.data.dataset import open_dataset
from vlmds.errors import InputError, SampleError
from vlmds.files import as_path
from vlmds.video.decode_work import read_file

DRIVERS = {"s3": "s3fs", "gs": "gcsfs"}
ADVICE = {
    scheme: f"{scheme}:// needs the extra {extra}: pip install -c constraints.txt -e '.[{extra}]'"
    for scheme, extra in (("s3", "s3"), ("gs", "gcs"))
}
UNKNOWN = "there is no protocol foo://; give a path, or a URL such as s3://bucket/folder"


@pytest.fixture(autouse=True)
def no_drivers(monkeypatch):
    """As after an installation without extras."""
    for scheme, driver in DRIVERS.items():
        monkeypatch.setitem(sys.modules, driver, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)


@pytest.fixture
def manifest(tmp_path):
    write_video(tmp_path / "a.mp4")
    return write_manifest(tmp_path / "m.jsonl", [{"video": "a.mp4", "caption": "가"}])


def refused(arguments, message, capsys):
    """One line and exit code 2."""
    assert main([str(word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlmds: ") and error.count("\n") == 1 and message in error, error


@pytest.mark.parametrize(
    ("url", "message"),
    [("s3://bucket/data", ADVICE["s3"]), ("gs://bucket/data", ADVICE["gs"]), ("foo://bucket/data", UNKNOWN)],
)
def test_every_command_says_what_a_url_needs(url, message, manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    refused(["pack", f"{url}/m.jsonl", out], message, capsys)
    refused(["pack", manifest, url], message, capsys)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # delenv of a missing one would not restore it at the end,
        monkeypatch.delenv(name)  # and training sets them
    refused(["train", "--exp", "e3", "--data", url], message, capsys)
    blend = f"data.blend=[{{path: {url}, weight: 1}}]"
    refused(["train", "--exp", "e3", "--set", blend, f"data.cache_dir={tmp_path}"], message, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "m.jsonl"]
    for call in (as_path, open_dataset, lambda place: select_items([], place)):
        with pytest.raises(InputError) as caught:
            call(url)
        assert message in str(caught.value)


@pytest.mark.parametrize("store", ["video", "frames"])
def test_rows_are_not_rejected_for_a_driver_that_is_not_installed(store, tmp_path, capsys, manifest):
    rows = [{"video": "a.mp4", "caption": "가"}, {"video": "s3://bucket/b.mp4", "caption": "나"}]
    manifest = write_manifest(manifest, rows)
    refused(["pack", manifest, tmp_path / "out", "--store", store], ADVICE["s3"], capsys)
    assert not (tmp_path / "out").exists()
    rows[1]["video"] = "foo://bucket/b.mp4"  # that is the row's mistake
    assert main(["pack", str(write_manifest(manifest, rows)), str(tmp_path / "out")]) == 0
    assert "rejected 1 row" in capsys.readouterr().out


def test_a_video_to_caption_says_what_it_needs():
    with pytest.raises(SampleError, match=r"file cannot be read: s3:// needs the extra s3: pip"):
        read_file("s3://bucket/a.mp4")
