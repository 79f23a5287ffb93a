"""tests/manual/full_size.py on tiny models: each of its steps runs, and none twice."""

import json
import subprocess
import sys

from tests.manual.full_size import largest
from tests.training.forked import ROOT, environment


def program(folder, *options):
    done = subprocess.run(
        [sys.executable, "-m", "tests.manual.full_size", str(folder), "--tiny", "--exps", "e7", *options],
        env=environment(),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_largest_size_of_a_line_is_found():
    assert largest("sum                 999 MB     1.20 GB") == 1.2e9
    assert largest("sum               1,000 MB      998 MB") == 1e9
    assert largest("sum                1.20 TB     1.10 GB") == 1.2e12


def test_the_program_on_tiny_models(tmp_path):
    program(tmp_path, "--only", "models", "clips", "plan", "train", "resume")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == ["models", "clips", "e7 plan", "e7 train", "e7 resume"]
    for name in ("e7 train", "e7 resume"):
        row = rows[name]
        assert 0 < row["first_step"] < row["seconds"]
        assert row["memory"] > 100e6  # PyTorch alone has as much
        assert row["predicted"] == rows["e7 plan"]["predicted"] > 0
    run = tmp_path / "runs" / "e7"
    assert rows["e7 resume"]["written"] == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert rows["e7 train"]["remarks"].startswith("killed after ")
    assert rows["e7 resume"]["remarks"].startswith("finetune step 40/40  loss ")
    table = (tmp_path / "full_size.md").read_text()
    assert all(f"| {name} | " in table for name in rows)
    again = program(tmp_path, "--only", "train", "resume")
    assert "e7 train: done before" in again and "e7 resume: done before" in again
