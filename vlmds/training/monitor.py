"""The reports of a run: a progress line, metrics.jsonl, TensorBoard and, if configured, W&B.

Every optimizer step has its line in metrics.jsonl. Steps are written in groups of ``logging.every``,
because the host waits for the GPU to read a loss. The first step after a start is written at once: it
shows that training works, and its warm-up does not count in another group's speed.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from vlmds.console.progress import duration, log_line
from vlmds.console.text import counted
from vlmds.distributed.ranks import gather
from vlmds.experiments.schema import Experiment
from vlmds.runs.journal import Journal, read_metrics
from vlmds.training.blind_check import VideoWorth, stalled


class Monitor:
    """Records on rank 0; the other ranks make the same calls, and contribute their peak memory.

    Args:
        folder: the run's.
        first_step: optimizer steps of the whole run before this one, for the x-axis of charts.
        identity: of the run among all of the W&B project; default: the experiment's name.
    """

    def __init__(
        self, folder: Path, experiment: Experiment, active: bool, first_step: int = 0, identity: str | None = None
    ):
        self.active = active
        self.every = experiment.logging.every
        self.blind_check = experiment.training.blind_check
        self._metrics, self._samples = (Journal(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
        self._pending: list[dict] = []
        self._charts = self._wandb = None
        if not active:
            return
        if experiment.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Steps after a crash are taken again: purge what the crashed process wrote of them.
            self._charts = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if experiment.logging.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=experiment.logging.wandb_project,
                name=folder.name,
                dir=str(folder),
                id=identity or experiment.name,
                resume="allow",
                config=experiment.model_dump(),
            )

    def start_stage(self, stage: str, first: int, total: int, steps_before: int) -> None:
        """Steps [first, total) of a stage follow; earlier stages had ``steps_before`` steps."""
        self.stage, self.total, self.steps_before = stage, total, steps_before
        self._window_start = self._stage_start = time.perf_counter()
        self._stage_first = first
        self._waited = 0.0
        get_accelerator().reset_peak_memory_stats()

    def step(
        self,
        step: int,
        *,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | float,
        lr: float,
        samples: int,
        positions: float,
        supervised: float,
        waited: float,
        skipped: bool,
    ) -> None:
        """Record optimizer step ``step`` (from 0).

        Args:
            loss: mean cross-entropy per supervised token, 0-d tensor.
            positions: of the language model's input over all ranks, padding not counted.
            supervised: tokens with loss, over all ranks.
            waited: seconds that this rank waited for data.
            skipped: the weights stayed as they were, because a gradient was not finite.
        """
        self._waited += waited
        self._pending.append(
            {
                "kind": "train",
                "stage": self.stage,
                "step": step + 1,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "samples": samples,
                "positions": int(positions),
                "supervised_tokens": int(supervised),
                **({"skipped": True} if skipped else {}),
            }
        )
        # The first step of a start shows at once that it works, and how long it will take.
        if step == self._stage_first or (step + 1) % self.every == 0 or step + 1 == self.total:
            self.flush()

    def flush(self) -> None:
        """Write the pending steps. All ranks call it."""
        records, self._pending = self._pending, []
        if not records:
            return
        memory = gather(peak_memory())
        if not self.active:  # only who writes the numbers waits for them
            return
        for record in records:
            for name in ("loss", "grad_norm"):
                value = float(record[name])
                record[name] = value if math.isfinite(value) else None  # JSON has no NaN
        now = time.perf_counter()
        seconds = now - self._window_start
        wait = self._waited / seconds
        self._window_start, self._waited = now, 0.0
        speed = {
            "samples_per_s": sum(r["samples"] for r in records) / seconds,
            "tokens_per_s": sum(r["positions"] for r in records) / seconds,
            "data_wait": wait,
            "memory_gib": max(memory) / 2**30,
        }
        records[-1] |= {key: round(value, 4) for key, value in speed.items()} | {"ranks": len(memory)}
        self._write(records)
        last = records[-1]
        self._show(last)
        checked = math.ceil((self.blind_check or 0) * self.total)
        if checked in [record["step"] for record in records]:
            stall = stalled(read_metrics(self._metrics.path), self.stage, checked, self.total)
            if stall:
                self.warn(checked, stall)

    def validation(self, step: int, loss: float, samples: int, worth: VideoWorth | None = None) -> None:
        """Record the validation loss after ``step`` optimizer steps of the stage, and what the video is worth."""
        self.flush()
        record = {"kind": "val", "stage": self.stage, "step": step, "loss": loss, "samples": samples}
        shown = f"{self.stage} step {step}/{self.total}  validation loss {loss:.4f} ({counted(samples, 'sample')})"
        if worth:
            record |= {"video_worth": worth.value, "video_worth_error": worth.error, "video_worth_clips": worth.clips}
            shown += f"  the video is worth {worth.value:.3f} ± {worth.error:.3f} nats/token ({worth.clips} clips)"
        self._write([record])
        self.say(shown)
        # Training throughput counts training only.
        self._window_start, self._waited = time.perf_counter(), 0.0

    def evaluation(self, step: int, found: dict) -> None:
        """Record the evaluation of captions after ``step`` optimizer steps of the stage; found: see
        :func:`vlmds.evaluation.evaluate.evaluate_subset`."""
        self.flush()
        values = {name: metric["value"] for name, metric in found["metrics"].items()}
        gaps = {f"loss_gap_{blind}": gap["gap"] for blind, gap in found["looking"]["loss"].items()}
        facts = {
            name: found["captions"][name]
            for name in ("mean_tokens", "distinct_2", "repetition", "empty", "most_frequent")
        }
        where = {"stage": self.stage, "step": step}
        self._write([{"kind": "eval", **where, "clips": found["clips"], **values, **gaps, **facts}])
        self._write_samples([{**where, **sample} for sample in found["samples"]])
        name = next(iter(values))
        self.say(
            f"{self.stage} step {step}/{self.total}  {name} {values[name]:.2f}  "
            + "  ".join(f"{gap} {value:.3f}" for gap, value in gaps.items())
            + f" ({counted(found['clips'], 'clip')})"
        )
        self._window_start, self._waited = time.perf_counter(), 0.0

    def energy(self, step: int, joules: float | None) -> None:
        """Record the energy of the stage in joules, if it was measured."""
        if joules is not None:
            self._write([{"kind": "energy", "stage": self.stage, "step": step, "joules": joules}])

    def warn(self, step: int, texts: dict[str, str]) -> None:
        """Log a warning about the stage, and record it for the report. texts: "en" and "ko"."""
        self.say(f"WARNING: {self.stage} step {step}/{self.total}: {texts['en']}")
        if self.active:
            self._metrics.add([{"kind": "warning", "stage": self.stage, "step": step, **texts}])
            self._chart("add_text", "warnings", f"{self.stage}: {texts['en']}", self.steps_before + step)

    def say(self, text: str) -> None:
        if self.active:
            log_line(f"vlmds: {text}")

    def close(self) -> None:
        self._metrics.add([])  # what a full disk would not take yet
        self._samples.add([])
        if self._charts:
            self._charts.close()
        if self._wandb:
            self._wandb.finish()

    def _write(self, records: list[dict]) -> None:
        if not self.active:
            return
        self._metrics.add(records)
        for record in records:
            numbers = {
                f"{record['kind']}/{k}": v
                for k, v in record.items()
                if k not in ("kind", "stage", "step") and v is not None
            }
            x = self.steps_before + record["step"]
            for name, value in numbers.items():
                self._chart("add_scalar", name, value, x)
            if self._wandb:
                self._wandb.log(numbers, step=x)

    def _write_samples(self, samples: list[dict]) -> None:
        if not self.active:
            return
        self._samples.add(samples)
        rows = [f"| {s['key']} | {' / '.join(s['references'])} | {s['caption']} |" for s in samples]
        self._chart(
            "add_text",
            "captions",
            "\n".join(["| clip | references | caption |", "|---|---|---|", *rows]),
            self.steps_before + samples[0]["step"],
        )

    def _chart(self, call: str, *arguments) -> None:
        """Write to TensorBoard; an error, which its writer thread may raise later, ends only the charts."""
        if self._charts is None:
            return
        try:
            getattr(self._charts, call)(*arguments)
        except Exception as error:
            self.say(f"WARNING: no more TensorBoard: {error}")
            self._charts = None

    def _show(self, record: dict) -> None:
        done = record["step"] - self._stage_first
        pace = (time.perf_counter() - self._stage_start) / max(done, 1)
        self.say(
            f"{self.stage} step {record['step']}/{self.total}  "
            f"loss {number(record['loss'], '.4f')}  "
            f"lr {record['lr']:.2e}  grad {number(record['grad_norm'], '.2f')}  "
            f"{record['samples_per_s']:.1f} samples/s  {record['tokens_per_s']:,.0f} tokens/s  "
            f"data wait {record['data_wait']:.1%}  {record['memory_gib']:.2f} GiB  "
            f"ETA {duration((self.total - record['step']) * pace)}"
        )


def peak_memory() -> int:
    """Bytes at most allocated on the accelerator, or resident in memory on a CPU."""
    if get_accelerator().device_name() != "cpu":
        return get_accelerator().max_memory_allocated()
    try:
        # Of this program alone: getrusage starts from the memory of the process that started it.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:  # no Linux
        found = None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
