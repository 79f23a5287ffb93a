"""What a stage counts of its samples and steps: those that cost something go into the run's ledger,
and too many of them end the run."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmds.console.text import counted
from vlmds.data.dataset import Dataset
from vlmds.distributed.ranks import gather, is_main, shared_error
from vlmds.experiments.schema import Experiment
from vlmds.runs.folder import RunFolder
from vlmds.training.monitor import Monitor
from vlmds.training.validation import Standing


@dataclass
class Progress:
    """Where a stage stands; a checkpoint holds it.

    step: optimizer steps taken. samples, bad: samples read since the stage's start, and how many
    of them were unreadable. skipped: steps whose loss or gradient was no number. joules: that the
    GPUs took, None where nobody counts. standing: how good it was found to be.
    """

    step: int = 0
    samples: int = 0
    bad: int = 0
    skipped: int = 0
    joules: float | None = 0.0
    standing: Standing = field(default_factory=Standing)

    @classmethod
    def of(cls, state: dict) -> Progress:
        """What ``asdict`` made a dict."""
        return cls(**{**state, "standing": Standing(**state["standing"])})


class Accounts:
    """Of one stage, on this rank; all ranks call its methods alike.

    Args:
        number: of the stage in the schedule, from 0.
        samples: that the stage's training split has.
    """

    def __init__(
        self, experiment: Experiment, number: int, run: RunFolder, dataset: Dataset, samples: int, monitor: Monitor
    ):
        self._experiment, self._number, self._run = experiment, number, run
        self._dataset, self._samples, self._monitor = dataset, samples, monitor
        self._stage = experiment.stages[number].name

    def read(self, progress: Progress, group: list[dict], bad: int) -> None:
        """A global batch was read: count it, and put its unreadable samples into the ledger.

        Args:
            group: this rank's micro-batches of it.
            bad: unreadable samples in it, of all ranks.

        Raises:
            InputError: on every rank, if there are too many.
        """
        progress.samples += self._run.global_batch
        if not bad:
            return
        progress.bad += bad
        last = self.write([record for batch in group for record in batch["bad"]], progress.step + 1)[-1]
        limit = self._experiment.data.max_bad_fraction
        if progress.bad > limit * max(progress.samples, self._samples):
            raise shared_error(
                f"{self._dataset.root}: {progress.bad} of {progress.samples} "
                f"samples read could not be used, more than data.max_bad_fraction {limit} allows; "
                f"the last: {last['key']}, {last['reason']}; see {self._run.path / 'ledger.jsonl'}"
            )

    def skipped(self, progress: Progress, group: list[dict]) -> None:
        """Optimizer step ``progress.step`` was skipped: report its samples.

        Raises:
            InputError: on every rank, if too many steps were.
        """
        progress.skipped += 1
        everyone = gather([key for batch in group for key in batch["keys"]])
        keys = [key for keys in everyone for key in keys]
        reason = "its loss or gradient is not a finite number"
        self.write([{"keys": keys, "reason": f"step skipped: {reason}"}] if is_main() else [], progress.step)
        self._monitor.say(f"WARNING: {self._stage} step {progress.step} skipped: {reason}; samples: {', '.join(keys)}")
        limit = self._experiment.training.max_skipped_steps
        if progress.skipped > limit:
            raise shared_error(
                f"stages.{self._number}: {counted(progress.skipped, 'step')} had a loss or "
                f"gradient that is not a finite number, more than training.max_skipped_steps {limit}; "
                f"lower stages.{self._number}.lr, or check the samples in "
                f"{self._run.path / 'ledger.jsonl'}"
            )

    def write(self, records: list[dict], step: int) -> list[dict]:
        """Add all ranks' records to the ledger; they are returned on every rank."""
        everyone = [{"stage": self._stage, "step": step, **record} for records in gather(records) for record in records]
        if is_main():
            self._run.add_to_ledger(everyone)
        return everyone
