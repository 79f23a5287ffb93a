"""The wheel: it contains all that the commands need outside the repository."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.training.launch import ROOT, environment

setuptools = pytest.importorskip("setuptools", minversion="77")


def test_a_wheel_has_the_deepspeed_jsons_and_finds_them(tmp_path):
    source, wheels, place = (tmp_path / name for name in ("source", "wheels", "place"))
    for name in ("vlmds", "ds_configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(wheels)!r})"
    wheels.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        wheel.extractall(place)
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "vlmds").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    jsons = {path.name: path.read_bytes() for path in (ROOT / "ds_configs").iterdir()}
    built = {str(path.relative_to(place)) for path in (place / "vlmds").rglob("*") if path.is_file()}
    assert built == files | {f"vlmds/ds_configs/{name}" for name in jsons}
    assert not (place / "tests").exists() and not (place / "ds_configs").exists()

    code = (
        "from vlmds.training.ds_config import find_ds_config as find\n"
        "for given in (None, 'zero2', 'zero2_offload', 'zero2_offload.json'): print(find(given))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(place)),
    )
    found = done.stdout.splitlines()
    assert found == [
        str(place / "vlmds" / "ds_configs" / f"{name}.json")
        for name in ("zero2_cpu", "zero2", "zero2_offload", "zero2_offload")
    ], done.stderr
    assert (place / "vlmds" / "ds_configs" / "zero2.json").read_bytes() == jsons["zero2.json"]
