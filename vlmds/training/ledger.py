"""The ledger of a stage: unreadable samples, cut captions and skipped steps, counted and recorded in
the run's ledger.jsonl. Too many of them end the run."""

from __future__ import annotations

from vlmds.console.text import counted
from vlmds.data.dataset import Dataset
from vlmds.distributed.ranks import gather, is_main, shared_error
from vlmds.training.context import StageContext
from vlmds.training.stage_progress import StageProgress

SKIPPED = "step skipped"
"""How the ledger's reason of a skipped step begins."""


class SampleLedger:
    """The ledger of one stage, on this rank; all ranks call its methods alike."""

    def __init__(self, stage: StageContext, dataset: Dataset):
        self._stage, self._root = stage, dataset.root
        self._samples = dataset.count("train")
        self._path = stage.run.path / "ledger.jsonl"
        self._cut: set[str] = set()  # keys recorded since this start

    def read(self, progress: StageProgress, group: list[dict], bad: int, cut: int) -> None:
        """A global batch was read: count it, and record its unreadable samples and cut captions.

        Args:
            group: this rank's micro-batches of it.
            bad, cut: unreadable samples and cut captions in it, of all ranks.

        Raises:
            InputError: on every rank, if there are too many.
        """
        progress.samples += self._stage.schedule.global_batch
        if bad:
            self._add_bad(progress, group, bad)
        if cut:
            self._add_cut(progress, group, cut)

    def _add_bad(self, progress: StageProgress, group: list[dict], bad: int) -> None:
        progress.bad += bad
        last = self.write([record for batch in group for record in batch["bad"]], progress.step + 1)[-1]
        limit = self._stage.experiment.data.max_bad_fraction
        if progress.bad > limit * max(progress.samples, self._samples):
            raise shared_error(
                f"{self._root}: {progress.bad} of {progress.samples} "
                f"samples read could not be used, more than data.max_bad_fraction {limit} allows; "
                f"the last: {last['key']}, {last['reason']}; see {self._path}"
            )

    def _add_cut(self, progress: StageProgress, group: list[dict], cut: int) -> None:
        progress.cut += cut
        data = self._stage.experiment.data
        new = sorted({key for batch in group for key in batch["cut"]} - self._cut)
        reason = f"caption cut to data.max_caption_tokens {data.max_caption_tokens}, without its end-of-turn token"
        records = self.write([{"key": key, "reason": reason} for key in new], progress.step + 1)
        self._cut |= {record["key"] for record in records}
        limit = data.max_cut_fraction
        if limit is not None and progress.cut > limit * max(progress.samples, self._samples):
            raise shared_error(
                f"{self._root}: {progress.cut} of {progress.samples} captions read are longer than "
                f"data.max_caption_tokens {data.max_caption_tokens}, more than data.max_cut_fraction {limit} allows; "
                f"raise one of the two, or shorten the captions that {self._path} names"
            )

    def skipped(self, progress: StageProgress, group: list[dict]) -> None:
        """Optimizer step ``progress.step`` was skipped: record and log its samples.

        Raises:
            InputError: on every rank, if too many steps were.
        """
        progress.skipped += 1
        everyone = gather([key for batch in group for key in batch["keys"]])
        keys = [key for keys in everyone for key in keys]
        reason = "its loss or gradient is not a finite number"
        self.write([{"keys": keys, "reason": f"{SKIPPED}: {reason}"}] if is_main() else [], progress.step)
        stage, number = self._stage, self._stage.number
        stage.monitor.say(f"WARNING: {stage.name} step {progress.step} skipped: {reason}; samples: {', '.join(keys)}")
        limit = stage.experiment.training.max_skipped_steps
        if progress.skipped > limit:
            raise shared_error(
                f"stages.{number}: {counted(progress.skipped, 'step')} had a loss or "
                f"gradient that is not a finite number, more than training.max_skipped_steps {limit}; "
                f"lower stages.{number}.lr, or check the samples in {self._path}"
            )

    def summarise(self, progress: StageProgress) -> None:
        """Log at the stage's end how many captions were cut, if any."""
        if progress.cut:
            limit = self._stage.experiment.data.max_caption_tokens
            self._stage.monitor.say(
                f"WARNING: {self._stage.name}: {progress.cut:,} of {progress.samples:,} captions read were cut to "
                f"data.max_caption_tokens {limit}, without an end-of-turn token; {self._path} names the samples"
            )

    def write(self, records: list[dict], step: int) -> list[dict]:
        """Add all ranks' records to ledger.jsonl; they are returned on every rank."""
        stage = {"stage": self._stage.name, "step": step}
        everyone = [{**stage, **record} for records in gather(records) for record in records]
        if is_main():
            self._stage.run.add_to_ledger(everyone)
        return everyone
