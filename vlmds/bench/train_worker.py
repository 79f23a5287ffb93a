"""The measured process of `vlmds bench train`: `python -m vlmds.bench.train_worker FOLDER VARIANT
NAME STEPS`. Rank 0 writes FOLDER/NAME.json."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlmds.bench.clock import StepClock
from vlmds.bench.footprint import StepMemory, resident_parts
from vlmds.bench.workload import Workload
from vlmds.console.quiet import quiet_libraries
from vlmds.data.dataset import open_dataset
from vlmds.distributed.cuda import use_expandable_segments
from vlmds.distributed.ranks import init_distributed, is_main, leave
from vlmds.distributed.stop_request import StopRequest
from vlmds.experiments.schedule import Schedule
from vlmds.files import write
from vlmds.models.assemble import load_model
from vlmds.training.context import StageContext
from vlmds.training.ds_config import default_ds_config
from vlmds.training.monitor import peak_memory
from vlmds.training.stages import prepare_stage
from vlmds.training.trainer import StageTrainer

PHASES = ("data wait", "CLIP", "forward", "backward", "communication", "optimizer")


@dataclass
class StepRecorder:
    """A replacement of the run's :class:`~vlmds.training.monitor.Monitor`: records the end of every
    step and its time by phase.

    The first steps are timed whole, the others split into phases; the last one runs under `memory`.
    """

    work: Workload
    clock: StepClock
    memory: StepMemory
    steps: list[dict] = field(default_factory=list)
    peak_bytes: int = 0

    def start(self) -> None:
        self._began = time.perf_counter()

    def step(self, step: int, *, loss, positions: float = 0, waited: float = 0.0, **_) -> None:
        if self.clock.device.type == "cuda":
            torch.cuda.synchronize(self.clock.device)
        now = time.perf_counter()
        split = self.clock.split
        self.steps.append(
            {
                "seconds": now - self._began,
                "data wait": waited,
                "positions": positions,
                "loss": float(loss),
                "split": split,
                **self.clock.lap(),
            }
        )
        if step + 1 == self.work.total_steps - 1:
            self.peak_bytes = peak_memory()
            self.memory.start()
        elif step + 1 == self.work.total_steps:
            self.memory.stop()
        # On a CPU nothing overlaps: every step can be split.
        self.clock.split = self.clock.device.type == "cpu" or self.work.is_split(len(self.steps))
        self.clock.lap()
        self._began = time.perf_counter()

    def say(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def energy(self, step: int, joules: float | None) -> None:
        pass

    def result(self) -> dict:
        timed = self.steps[self.work.WARM_UP : -1]
        whole = [step for step in timed if not step["split"]] or timed
        best = min(whole, key=lambda step: step["seconds"])
        split = min((step for step in timed if step["split"]), key=lambda step: step["seconds"])
        return {
            "losses": [step["loss"] for step in self.steps],
            "step_seconds": best["seconds"],
            "positions": best["positions"],
            "all_seconds": [step["seconds"] for step in self.steps],
            "phases": {name: split.get(name, 0.0) for name in PHASES},
            "split_step_seconds": split["seconds"],
            "sent": best["sent"],
            "host": best["host"],
            "peak_bytes": self.peak_bytes,
        }


def measure_vlmds(work: Workload, recorder: StepRecorder, device: torch.device) -> dict:
    """Train the real stage: :class:`StageTrainer` on the packed data, its calls in a step timed."""
    experiment, number, clock = work.experiment, work.stage, recorder.clock
    model = load_model(experiment, device)
    run = work.run(dist.get_world_size())
    every = prepare_stage(model, experiment, number, run, device)
    dataset = open_dataset(experiment.data)
    schedule = Schedule.of(
        experiment, dist.get_world_size(), run.global_batch, [dataset.count("train")] * len(experiment.stages)
    )
    monitor: Any = recorder  # it records what a Monitor reports
    stage = StageContext(experiment, number, run, schedule, device, monitor, StopRequest())
    trainer = StageTrainer(stage, model, dataset, default_ds_config())
    engine = trainer.engine
    model.features = clock.timed("CLIP", model.features)  # type: ignore[method-assign]  # a hook
    engine.forward = clock.timed("forward", engine.forward)
    engine.backward = clock.timed("backward", engine.backward)
    engine.step = clock.timed("optimizer", engine.step)
    recorder.start()
    trainer.train()
    return {"resident": resident_parts(model, engine), "recomputed_every": every}


def measure(variant: str, work: Workload) -> dict:
    """Measure one variant in this process.

    Args:
        variant: "vlmds", or the name of a baseline.
    """
    if variant == "vlmds":
        run = measure_vlmds
    elif variant == "reference":
        from vlmds.bench.baselines import measure_reference as run
    else:
        from vlmds.bench.baseline_hf import measure_hf as run
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    clock = StepClock(device)
    clock.watch_collectives()
    if variant != "hf":  # whose Trainer sets up its own ranks
        clock.device = device = init_distributed(timeout_minutes=10)
    libraries = peak_memory()  # after the imports only
    recorder = StepRecorder(work, clock, StepMemory(device))
    more = run(work, recorder, device)
    return {
        "variant": variant,
        "device": _device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "libraries_bytes": libraries,
        **recorder.result(),
        **more,
        **recorder.memory.result(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main(folder: str, variant: str, name: str, steps: str) -> None:
    quiet_libraries()
    use_expandable_segments()  # as in training
    result = measure(variant, Workload(Path(folder), int(steps)))
    if is_main():
        write(Path(folder) / f"{name}.json", json.dumps(result))
    leave()
    os._exit(0)  # without waiting for reader processes and watchdog threads


if __name__ == "__main__":
    main(*sys.argv[1:])
