"""The names that `import vlmds` offers, and the documentation's worked example as it is written."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlmds
from tests.clips import write_video
from tests.evaluation.conftest import make_run, models, run, shards  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", vlmds.__all__)
def test_every_name_is_there_and_says_what_it_is(name):
    found = getattr(vlmds, name)
    text = inspect.getdoc(found)
    inherited = [inspect.getdoc(base) for base in getattr(found, "__mro__", ())[1:]]
    assert text and text not in inherited and not text.startswith(f"{name}(")
    assert name in dir(vlmds)


def test_functions_are_typed_throughout():
    assert (Path(vlmds.__file__).parent / "py.typed").is_file()
    for name in vlmds.__all__:
        found = getattr(vlmds, name)
        if inspect.isfunction(found):
            signature = inspect.signature(found)
            assert signature.return_annotation is not inspect.Signature.empty, name
            for parameter in signature.parameters.values():
                assert parameter.annotation is not inspect.Parameter.empty, (name, parameter)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'vlmds' has no attribute 'captoin'"):
        vlmds.captoin  # noqa: B018


def test_importing_and_help_load_no_pytorch():
    code = (
        "import sys, vlmds, vlmds.cli; vlmds.cli._parser(); vlmds.InputError; dir(vlmds); "
        "sys.exit(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documented_example_runs_as_written(models, run, shards, tmp_path, monkeypatch, capsys):  # noqa: F811
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- notebook-example -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found, "python-api.md has no <!-- notebook-example --> followed by a python block"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/e3")
    make_run(models, shards, tmp_path / "runs" / "e7", "e7")
    for number in (1, 2):
        write_video(tmp_path / f"new{number}.mp4", frames=30)
    (tmp_path / "videos").mkdir()
    shutil.copy("new1.mp4", "videos")
    exec(compile(found[1], "python-api.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "1 captions; 0 failed" in printed and "failed:" not in printed
    assert (tmp_path / "captions.csv").is_file()
    assert "e7" in (tmp_path / "report.html").read_text(encoding="utf-8")
