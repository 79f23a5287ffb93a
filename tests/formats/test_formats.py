"""Files of earlier versions, which today's code reads with the same content."""

import json
import shutil
from pathlib import Path

import pytest

from tests.formats import make, values
from tests.training.launch import metrics, train

FOLDERS = [path.parent for path in sorted(Path(__file__).parent.glob("*/values.json"))]
READERS = {
    **{name: lambda folder, name=name: values.store(folder / name) for name in ("video", "frames", "features")},
    **{read.__name__: read for read in (values.artifact, values.checkpoints, values.run, values.captions)},
}
pytestmark = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def assert_alike(found, recorded, where: str) -> None:
    """Equal, floats to a thousandth: another CPU or codec rounds differently."""
    if isinstance(recorded, float):
        assert found == pytest.approx(recorded, rel=1e-3, abs=1e-3), where
    elif isinstance(recorded, dict):
        assert list(found) == list(recorded), where
        for key in recorded:
            assert_alike(found[key], recorded[key], f"{where}.{key}")
    elif isinstance(recorded, list):
        assert len(found) == len(recorded), where
        for number, (one, other) in enumerate(zip(found, recorded)):
            assert_alike(one, other, f"{where}.{number}")
    else:
        assert found == recorded, where


@pytest.mark.parametrize("name", READERS)
def test_it_reads_as_it_was_written(folder, name):
    recorded = json.loads((folder / "values.json").read_text(encoding="utf-8"))
    assert set(recorded) == set(READERS)
    found = json.loads(json.dumps(READERS[name](folder)))
    assert_alike(found, recorded[name], name)


def test_a_run_goes_on_from_its_checkpoint(folder, tmp_path):
    """Its last step is taken again, from the checkpoint before it, and gives the recorded loss."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    recorded = metrics(run)
    shutil.rmtree(run / "artifacts" / "finetune")
    shutil.rmtree(run / "checkpoints" / "finetune-0000003")
    arguments = ["--exp", str(run / "experiment.yaml"), "--output", str(run), "--data", str(folder / "frames")]
    done = train(0, *arguments, "--set", *values.models(folder))
    assert "finetune: going on from" in done.stdout
    assert_alike(metrics(run), recorded, "metrics")


def test_it_is_small(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 300_000


def test_a_folder_that_is_there_is_never_changed(folder):
    with pytest.raises(SystemExit, match="stays as it is"):
        make.main(folder)
