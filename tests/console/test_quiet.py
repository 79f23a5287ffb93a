"""Output of the commands and the Python API: their own lines, and messages that a user can act on."""

import json
import os
import re
import subprocess
import sys

from tests import tiny
from tests.clips import write_video
from tests.training.launch import ROOT, environment

# Of the processes of DeepSpeed's launcher, which print before any line of ours runs.
LAUNCHER = re.compile(r"\[[\d :,-]+\] \[(INFO|WARNING)\] \[(runner|launch|real_accelerator)\.py:")


def foreign(lines: list[str]) -> list[str]:
    """Lines that are not vlmds's own progress, which depends on the machine's speed, or its warnings."""
    return [line for line in lines if not line.startswith("vlmds: ")]


def screen(*words: str, module: str = "vlmds.cli", **env: str) -> tuple[list[str], list[str]]:
    """Lines on stdout, and foreign ones on stderr, of `python -m vlmds.cli …`, on a machine without a
    GPU whose user has set no variables."""
    found = environment(CUDA_VISIBLE_DEVICES="", **env)
    for name in ("DS_ACCELERATOR", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONWARNINGS"):
        if name not in env:
            found.pop(name, None)
    start = ["-c", module] if " " in module else ["-m", module]
    done = subprocess.run(
        [sys.executable, *start, *words], env=found, cwd=ROOT, text=True, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), foreign(done.stderr.splitlines())


def test_training_under_deepspeed_prints_its_own_lines(two_ranks):
    out, err = (
        two_ranks.with_name(f"{two_ranks.name}-log{suffix}").read_text().splitlines() for suffix in (".out", ".err")
    )
    assert [line for line in foreign(out) if not LAUNCHER.match(line)] == []
    assert foreign(err) == []


def test_plan_prints_the_plan(models, shards):
    out, err = screen("plan", "--exp", "e3", "--data", str(shards), "--set", *tiny.settings(models))
    assert out[0].startswith("e3: ") and err == []
    assert [line for line in out if LAUNCHER.match(line) or "warning" in line.lower()] == []


def test_caption_prints_captions(two_ranks, tmp_path):
    write_video(tmp_path / "new.mp4")
    out, err = screen("caption", "--run", str(two_ranks), "--json", str(tmp_path / "new.mp4"))
    assert [json.loads(line)["video"] for line in out] == [str(tmp_path / "new.mp4")] and err == []


NOTEBOOK = """
import sys
import vlmds
captioner = vlmds.VideoCaptioner.from_pretrained(sys.argv[1], device="cpu")
print(len(list(captioner.caption([sys.argv[2]]))))
from transformers.utils import logging
print(logging.get_verbosity() == logging.WARNING, logging.is_progress_bar_enabled())
"""


def test_the_python_api_is_quiet_and_restores_the_libraries(two_ranks, tmp_path):
    write_video(tmp_path / "new.mp4")
    out, err = screen(str(two_ranks), str(tmp_path / "new.mp4"), module=NOTEBOOK)
    assert (out, err) == (["1", "True True"], [])


HEARD = """
import logging, os, warnings
from vlmds.console.quiet import quiet_libraries

logging.getLogger("DeepSpeed").addHandler(logging.StreamHandler())
quiet_libraries()

def warn(text, category, module):
    warnings.warn_explicit(text, category, "file.py", 1, module)

def log(level, file, text):
    logger = logging.getLogger("DeepSpeed")
    logger.handle(logger.makeRecord("DeepSpeed", level, file, 1, text, (), None))

warn("old name", FutureWarning, "torch.distributed.c10d_logger")
warn("This DataLoader will create 4 worker processes in total. Our suggested max number of worker in "
     "current system is 2", UserWarning, "torch.utils.data.dataloader")
warn("heard: numbers overflow", RuntimeWarning, "torch.nn")
warn("heard: of unknown origin", FutureWarning, "torchlike")
log(logging.WARNING, "/x/real_accelerator.py", "Setting accelerator to CPU")
log(logging.ERROR, "/x/real_accelerator.py", "heard: no accelerator")
log(logging.WARNING, "/x/engine.py", "heard: something else")
print(os.environ["TRANSFORMERS_VERBOSITY"])
"""


def test_errors_and_warnings_of_unknown_origin_are_printed():
    out, err = screen(module=HEARD)
    assert [line for line in err if "heard" in line] == [
        "file.py:1: RuntimeWarning: heard: numbers overflow",
        "file.py:1: FutureWarning: heard: of unknown origin",
        "heard: no accelerator",
        "heard: something else",
    ]
    assert len(err) == 4 and out == ["error"]
    assert screen(module=HEARD, TRANSFORMERS_VERBOSITY="info")[0] == ["info"]


def test_help_loads_no_library():
    code = (
        "import sys\nfrom vlmds.cli import main\n"
        "try:\n    main(['train', '--help'])\n"
        "except SystemExit:\n    heavy = {'torch', 'transformers', 'deepspeed', 'pydantic'}\n"
        "    print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    out, err = screen(module=code)
    assert out[-1] == "loaded: []" and out[0].startswith("usage: vlmds train") and err == []
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", "--help"],
        text=True,
        capture_output=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.stdout.splitlines() == out[:-1]
