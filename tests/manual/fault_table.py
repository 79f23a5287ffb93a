"""The table of docs/reliability.md: each fault is caused, and its effect observed.

python -m tests.manual.fault_table [NAME …]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.distributed import namespaces
from tests.training import fixtures, launch
from tests.training.launch import FAULTY, SCRIPT, arguments, environment, free_port, metrics
from vlmds.training import checkpoint

train = partial(launch.train, fresh=True)
train_and_kill = partial(launch.train_and_kill, fresh=True)


class Table:
    """One row a fault. Each method named ``fault_…`` causes one and returns what was observed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.models = fixtures.tiny.make_models(folder / "models")
        self.shards = fixtures.make_shards(folder)
        self.calm = self.run("calm")
        self.calm_seconds = self._started(*self.arguments(self.calm))[0]

    def run(self, name: str) -> Path:
        return self.folder / name

    def arguments(self, run: Path, *overrides: str, shards: Path | None = None) -> list[str]:
        return arguments(self.models, shards or self.shards, run, *overrides)

    def strike(self, run_name: str, expect: int | None, *overrides: str, shards=None, **fault) -> str:
        """Train with a fault; what it said last, and seconds from the fault to the exit."""
        run = self.run(run_name)
        struck = self.folder / f"{run_name}-struck"
        done = train(
            2,
            *self.arguments(run, *overrides, shards=shards),
            expect=expect,
            script=FAULTY,
            VLMDS_TEST_FAULT=json.dumps({**fault, "note": str(struck)}),
        )
        seconds = time.monotonic() - float(struck.read_text())
        said = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if "vlmds: " in line and not any(w in line for w in ("samples/s", "finished,"))
        ]
        same = self.same_after_restart(run) if expect in (3, None) else ""
        return f"exit {done.returncode}, {seconds:.1f} s{same}\n    " + "\n    ".join(said[-4:])

    def same_after_restart(self, run: Path) -> str:
        train(2, *self.arguments(run))
        return (
            "; the next start ended bit-identical to an undisturbed run"
            if metrics(run) == metrics(self.calm)
            else "; the next start DIFFERS"
        )

    def fault_rank_killed(self):
        return self.strike("kill", None, kind="kill", rank=1, call=9)

    def fault_exception_on_a_rank(self):
        return self.strike("exception", None, kind="exception", rank=1, call=9)

    def fault_rank_stuck_in_data_timeout_12_s(self):
        return self.strike("stuck", None, "training.timeout_minutes=0.2", kind="stuck", rank=1, call=9)

    def fault_node_gone_without_a_word_during_a_wait_for_a_gpu(self):
        """For training.heartbeat_seconds of 20; the default is 120."""
        try:
            ends = [namespaces.node_gone(self.folder, self.models, self.shards, survivor, 20) for survivor in (0, 1)]
        except namespaces.Unavailable as problem:
            return f"not tried: {problem}"
        return "".join(
            f"\n  node {1 - survivor} gone: exit {code}, {seconds:.1f} s\n    " + "\n    ".join(words[:4])
            for survivor, (code, seconds, words) in enumerate(ends)
        )

    def fault_rank_killed_during_a_wait_for_a_gpu(self):
        return self.strike("alone", None, "training.heartbeat_seconds=20", kind="alone", rank=0, call=9)

    def fault_rank_stopped_for_longer_than_the_heartbeat(self):
        return self._calm_in_spite_of("stop")

    def fault_interpreter_locked_for_longer_than_the_heartbeat(self):
        return self._calm_in_spite_of("lock")

    def _calm_in_spite_of(self, kind: str) -> str:
        seen = [
            self.strike(
                f"{kind}{rank}", 0, "training.heartbeat_seconds=5", kind=kind, rank=rank, call=9, seconds=12
            ).splitlines()[0]
            for rank in (0, 1)
        ]
        same = all(metrics(self.run(f"{kind}{rank}")) == metrics(self.calm) for rank in (0, 1))
        return f"rank 0: {seen[0]}; rank 1: {seen[1]}; same metrics as an undisturbed run: {same}"

    def fault_sigterm(self):
        return self.strike("sigterm", 3, kind="signal", name="SIGTERM", rank=1, call=9)

    def fault_nan_in_one_step(self):
        return self.strike("nan", 0, kind="nan", rank=1, calls=[3])

    def fault_nan_in_more_steps_than_allowed(self):
        return self.strike("nans", 2, "training.max_skipped_steps=1", kind="nan", rank=1, calls=[3, 4])

    def fault_shard_cut_short_during_the_run(self):
        shards = self.folder / "shards-gone"
        shutil.copytree(self.shards, shards)
        return self.strike(
            "gone",
            2,
            "data.max_bad_fraction=0.1",
            shards=shards,
            kind="truncate",
            rank=0,
            call=3,
            path=str(shards / "train" / "000000.tar"),
        )

    def fault_shard_deleted_during_the_run(self):
        """The readers have it open, and so have its bytes."""
        shards = self.folder / "shards-deleted"
        shutil.copytree(self.shards, shards)
        seen = self.strike(
            "deleted",
            0,
            "data.max_bad_fraction=0.1",
            shards=shards,
            kind="delete",
            rank=0,
            call=1,
            path=str(shards / "train" / "000000.tar"),
        )
        same = metrics(self.run("deleted")) == metrics(self.calm)
        return f"{seen}\n    same metrics as an undisturbed run: {same}"

    def fault_shard_gone_before_the_start(self):
        shards = self.folder / "shards-none"
        shutil.copytree(self.shards, shards)
        (shards / "train" / "000000.tar").unlink()
        return self._refused(2, arguments(self.models, shards, self.run("none")))

    def fault_shard_cut_short_before_the_start(self):
        shards = self.folder / "shards-cut"
        shutil.copytree(self.shards, shards)
        os.truncate(shards / "train" / "000000.tar", 1000)
        return self._refused(2, arguments(self.models, shards, self.run("cut-before")))

    def fault_index_cut_short_before_the_start(self):
        shards = self.folder / "shards-index"
        shutil.copytree(self.shards, shards)
        os.truncate(shards / "index.parquet", 1000)
        return self._refused(2, arguments(self.models, shards, self.run("index")))

    def fault_disk_full(self):
        run = self.run("full")
        (run / "checkpoints").mkdir(parents=True)
        place = str(run / "checkpoints")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", place], check=True)
        try:
            seconds, done = self._started(*self.arguments(run))
            left = [checkpoint.check(p) or "whole" for p in (run / "checkpoints").iterdir()]
        finally:
            subprocess.run(["umount", place], check=True)
        said = next(line for line in done.stdout.splitlines() if "not saved" in line)
        return f"exit 0, {self._from_start(seconds)}, checkpoints left: {left}\n    {said}"

    def fault_checkpoint_bit_flipped(self):
        return self._damaged("flipped", lambda folder: self._flip(folder / "rank-00000.safetensors"))

    def fault_checkpoint_json_truncated(self):
        def cut(folder: Path):
            path = folder / "checkpoint.json"
            path.write_bytes(path.read_bytes()[:40])

        return self._damaged("cut", cut)

    def fault_run_json_truncated(self):
        run = self.run("run-json")
        train_and_kill(2, run, 10, *self.arguments(run))
        os.truncate(run / "run.json", 40)
        return self._refused(2, self.arguments(run))

    def fault_world_size_that_does_not_divide_the_global_batch(self):
        return self._refused(3, self.arguments(self.run("three")))

    def fault_base_weights_changed(self):
        models = self.folder / "other"
        shutil.copytree(self.models, models)
        self._flip(models / "qwen3" / "model.safetensors")
        return self._refused(2, arguments(models, self.shards, self.calm))

    def fault_clock_of_one_rank_a_day_behind(self):
        if shutil.which("faketime") is None:
            return "not tried: needs faketime (Debian)"
        wrapper = self.folder / "wrong_clock.sh"
        wrapper.write_text('#!/bin/sh\nif [ "$RANK" = 1 ]; then exec faketime "-1 day" "$@"; fi\nexec "$@"\n')
        wrapper.chmod(0o755)
        run = self.run("clock")
        port = free_port()
        began = time.monotonic()
        done = subprocess.run(
            [
                "torchrun",
                "--nproc_per_node=2",
                f"--master_port={port}",
                "--no-python",
                str(wrapper),
                "python",
                str(SCRIPT),
                *self.arguments(run),
            ],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        seconds = time.monotonic() - began
        same = metrics(run) == metrics(self.calm)
        return f"exit {done.returncode}, {self._from_start(seconds)}, same metrics as an undisturbed run: {same}"

    def _damaged(self, name: str, damage: Callable[[Path], None]) -> str:
        run = self.run(name)
        train_and_kill(2, run, 10, *self.arguments(run), checkpoint="finetune-")
        newest = checkpoint.checkpoints(run / "checkpoints", "finetune")[0]
        damage(newest)
        seconds, done = self._started(*self.arguments(run))
        said = next(line for line in done.stdout.splitlines() if "passed over" in line)
        same = metrics(run) == metrics(self.calm)
        return f"exit 0, {self._from_start(seconds)}, bit-identical to an undisturbed run: {same}\n    {said}"

    @staticmethod
    def _started(*args: str) -> tuple[float, subprocess.CompletedProcess]:
        began = time.monotonic()
        done = train(2, *args)
        return time.monotonic() - began, done

    def _from_start(self, seconds: float) -> str:
        return f"{seconds:.1f} s from the launcher's start ({self.calm_seconds:.1f} undisturbed)"

    @staticmethod
    def _flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)

    @staticmethod
    def _refused(ranks: int, args: list[str]) -> str:
        began = time.monotonic()
        done = train(ranks, *args, expect=2)
        seconds = time.monotonic() - began
        said = [line for line in done.stderr.splitlines() if line.startswith("vlmds: ")][-1]
        return f"exit 2, {seconds:.1f} s from the start of the launcher\n    {said}"


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    table = Table(folder)
    wanted = [f"fault_{name}" for name in sys.argv[1:]]
    for name in wanted or [name for name in dir(Table) if name.startswith("fault_")]:
        began = time.monotonic()
        try:
            seen = getattr(table, name)()
        except (AssertionError, StopIteration) as error:
            seen = f"NOT AS EXPECTED: {error}"
        took = time.monotonic() - began
        print(f"{name[6:].replace('_', ' ')} ({took:.0f} s in all): {seen}", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
