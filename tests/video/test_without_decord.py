"""Where decord has no wheel (ARM), PyAV reads everything, and the frames are the same."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from tests.clips import write_manifest, write_video
from vlmds.data.dataset import open_dataset
from vlmds.data.index import ShardIndex
from vlmds.data.loader import Batches, SampleReader
from vlmds.packing.pack import pack
from vlmds.runs.folder import versions

ROOT = Path(__file__).resolve().parents[2]

# Python runs it at its start, so also in the decoding children and the reader processes.
HIDDEN = """
import importlib.metadata as metadata
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "decord":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
from_name = metadata.Distribution.from_name.__func__

def without(cls, name):
    if name == "decord":
        raise metadata.PackageNotFoundError(name)
    return from_name(cls, name)

metadata.Distribution.from_name = classmethod(without)
"""


def hashes(folder):
    """Of the frames of each sample, as a reader process of the training reads them."""
    reader = SampleReader(open_dataset(folder), "train", 4, 28, shuffle=False)

    def collate(samples):
        assert not any(sample.bad for sample in samples), samples
        return {"frames": [sha256(sample.frames.tobytes()).hexdigest() for sample in samples]}

    return [each for batch in Batches(reader, [range(len(reader))], collate, 1) for each in batch["frames"]]


def test_packing_and_reading_need_no_decord(tmp_path):
    pytest.importorskip("decord")
    write_video(tmp_path / "a.mp4", frames=30, **{"x264-params": "keyint=12"})
    write_video(tmp_path / "b.mkv", frames=17)
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"video": "a.mp4", "caption": "가", "start": 0.5, "end": 2.0},
            {"video": "a.mp4", "caption": "나", "id": "whole"},
            {"video": "b.mkv", "caption": "다"},
        ],
    )
    old, new = tmp_path / "with", tmp_path / "without"
    pack(manifest, old, workers=1, progress=False)
    expected = hashes(old)
    assert len(set(expected)) == 3
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDDEN)
    done = subprocess.run(
        [sys.executable, "-m", "tests.video.test_without_decord", manifest, old, new],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{hidden}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected, False]
    decoders = [[ShardIndex.open(place).row("train", 0, i).decoder for i in range(3)] for place in (old, new)]
    assert decoders == [["decord"] * 3, ["pyav"] * 3]


if __name__ == "__main__":
    manifest, old, new = sys.argv[1:]
    pack(manifest, new, workers=1, progress=False)
    print(json.dumps([hashes(old), hashes(new), "decord" in versions()]))
