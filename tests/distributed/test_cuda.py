"""GPUs that are there but cannot be used, and what is set before CUDA starts. Nothing here needs a
GPU, but for the marked tests."""

import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from tests import tiny
from tests.training.launch import PROGRESS, ROOT, arguments, environment
from vlmds.cli import main
from vlmds.distributed import cuda
from vlmds.distributed.cuda import driver_version, free_memory_from_cuda, unusable_gpus
from vlmds.distributed.ranks import join
from vlmds.errors import InputError
from vlmds.inference.video_captioner import choose_device

VERSIONS = {  # as NVIDIA's modules write them, the proprietary and the open one
    "535.104.05": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC "
    "2023\nGCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n",
    "570.124.06": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  "
    "(root@host)  Wed Feb 26 02:08:28 UTC 2025\nGCC version:  gcc version 13.3.0\n",
}
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU that can be used")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One whose device files and driver lie in a folder; the first driver of VERSIONS."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda, "DEVICES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(cuda, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text(VERSIONS["535.104.05"])
    (tmp_path / "nvidiactl").touch()  # there without a GPU, too
    return tmp_path


@pytest.mark.parametrize("version", VERSIONS)
def test_the_drivers_version(machine, version):
    (machine / "version").write_text(VERSIONS[version])
    assert driver_version() == version
    (machine / "version").unlink()
    assert driver_version() == "unknown"


@needs_none
def test_unusable_gpus_are_named_with_both_versions(machine, monkeypatch):
    assert unusable_gpus() is None
    for number in (0, 1):
        (machine / f"nvidia{number}").touch()
    text, fix = unusable_gpus()
    assert text.startswith(
        f"{machine / 'nvidia0'} is there, but PyTorch cannot use it: driver 535.104.05, torch {torch.__version__} "
    )
    assert torch.version.cuda or "built without CUDA" in text
    assert "DS_ACCELERATOR=cpu" in fix and "\n" not in text + fix
    with pytest.raises(InputError, match=r"cannot use it: driver 535\.104\.05.*; install a driver"):
        choose_device(None)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides every GPU" in unusable_gpus()[0]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert unusable_gpus() is None


BROKEN = """
import sys
from pathlib import Path
from vlmds.distributed import cuda
cuda.DEVICES, cuda.DRIVER = sys.argv.pop(1), Path(sys.argv.pop(1))
from vlmds.cli import main
sys.exit(main())
"""


def on_broken_machine(machine, *words, **more):
    variables = {
        name: value
        for name, value in environment(**more).items()
        if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
    }
    (machine / "nvidia0").touch()
    return subprocess.run(
        [sys.executable, "-c", BROKEN, cuda.DEVICES, str(cuda.DRIVER), *words],
        cwd=ROOT,
        env=variables,
        text=True,
        capture_output=True,
        timeout=200,
    )


@needs_none
def test_training_is_refused_there(machine, models, shards):
    run = machine / "run"
    done = on_broken_machine(machine, "train", *arguments(models, shards, run))
    said = [line for line in PROGRESS.sub("", done.stderr).splitlines() if line.startswith("vlmds: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "driver 535.104.05, torch " in said[0] and not run.exists()


@needs_none
def test_the_doctor_says_the_same(machine, models):
    done = on_broken_machine(
        machine, "doctor", "--output", str(machine), "--seconds", "20", "--set", *tiny.settings(models), *tiny.RESAMPLER
    )
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"^FAILED   accelerator: \S+nvidia0 is there, but PyTorch cannot use it: driver "
        r"535\.104\.05, torch .*; install a driver",
        done.stdout,
        re.M,
    ), done.stdout


@pytest.mark.parametrize(
    "visible", ["GPU-8dd1cb53-6a2a-4d2c-9a5c-5c9e7a3d5c11", "MIG-8dd1cb53-6a2a-5d2c-9a5c-5c9e7a3d5c11", "1,0"]
)
def test_free_memory_does_not_depend_on_how_gpus_are_named(monkeypatch, visible):
    """What DeepSpeed asks while it builds its ZeRO optimizer."""
    asked = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("deepspeed.accelerator.cuda_accelerator.pynvml", object())  # is installed
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (7, 9))
    accelerator = CUDA_Accelerator()
    free_memory_from_cuda(accelerator)
    assert (accelerator.available_memory(), accelerator.available_memory(1)) == (7, 7)
    assert asked == [None, 1]


@pytest.mark.gpu
def test_free_memory_is_that_of_the_gpu():
    accelerator = CUDA_Accelerator()
    free_memory_from_cuda(accelerator)
    assert 0 < accelerator.available_memory() <= torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_process_group_is_bound_to_the_ranks_gpu(monkeypatch, launcher, ranks):
    """Under either launcher; only the call that needs eight GPUs is not made. One rank needs none."""
    calls = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **named: calls.append(named))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in (
        ("RANK", ranks - 1),
        ("WORLD_SIZE", ranks),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", store.port),
        ("TORCHELASTIC_USE_AGENT_STORE", launcher == "torchrun"),
    ):
        monkeypatch.setenv(name, str(value))
    join("nccl", timedelta(seconds=9), torch.device("cuda:3"))
    join("nccl", timedelta(seconds=9), None)
    assert [call["device_id"] for call in calls] == [torch.device("cuda:3") if ranks > 1 else None, None]
    assert all(("store" in call) == (launcher == "torchrun") for call in calls)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--exp", "none"],
        ["evaluate", "--run", "none"],
        ["caption", "--run", "none", "none.mp4"],
        ["serve", "--run", "none"],
    ],
)
def test_segments_grow_unless_the_user_chose(monkeypatch, words):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for chosen in (None, *names):
        for name in names:
            monkeypatch.setenv(name, "")  # so that it is as it was after the test
            monkeypatch.delenv(name)
        if chosen:
            monkeypatch.setenv(chosen, "max_split_size_mb:64")
        assert main(words) == 2  # there is no such experiment, no such run
        expected = (chosen, "max_split_size_mb:64") if chosen else (names[0], "expandable_segments:True")
        assert [(n, os.environ[n]) for n in names if n in os.environ] == [expected]
