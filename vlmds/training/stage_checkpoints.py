"""The checkpoints of a stage: when one is due, what it records, and the way back from one."""

from __future__ import annotations

from pathlib import Path

from vlmds.distributed.ranks import on_main, together
from vlmds.runs.lineage import check_parent, stage_lineage
from vlmds.training import checkpoint
from vlmds.training.context import StageContext
from vlmds.training.ema import WeightAverage
from vlmds.training.engine import Engine
from vlmds.training.saver import Saver
from vlmds.training.stage_progress import StageProgress


class StageCheckpoints:
    """Checkpoints of one stage, on this rank; all ranks call its methods alike.

    saver: writes them in the background. lineage: what the stage is trained from.
    """

    def __init__(self, stage: StageContext, engine: Engine, average: WeightAverage | None):
        self._stage, self._engine, self._average = stage, engine, average
        keep = stage.experiment.training.keep_checkpoints
        self.saver = Saver(stage.run.checkpoints, stage.name, keep, stage.monitor.say)
        self.lineage = stage_lineage(stage.run, stage.experiment, stage.number)

    def due(self, progress: StageProgress) -> bool:
        """At even distances, at the end, and where the model is the best so far."""
        step = progress.step
        return (
            step == self._stage.total
            or step % self._stage.experiment.training.checkpoint_every == 0
            or step == progress.validation.best_step
        )

    def save(self, progress: StageProgress) -> None:
        """Start to write a checkpoint; the saver reports if that fails, and training goes on."""
        validation = progress.validation
        self._stage.monitor.flush()
        state = {
            "stage": self._stage.name,
            "progress": progress.state(),
            "lineage": self.lineage,
            "score": validation.score if validation.scored == progress.step else None,
        }
        self.saver.begin(self._engine, self._average, progress.step, state)

    def resume(self, folder: Path, state: dict) -> StageProgress:
        """Load the checkpoint ``folder`` into the engine. Returns how far the stage had come.

        Args:
            state: of the checkpoint, see :func:`vlmds.training.checkpoint.read_state`.

        Raises:
            InputError: on every rank, if the checkpoint is of another stage before or incomplete.
        """
        together(lambda: check_parent(self.lineage, state["lineage"], folder))
        checkpoint.load_checkpoint(folder, self._engine, self._average)
        self._stage.monitor.say(f"{self._stage.name}: going on from {folder}")
        return StageProgress.from_state(state["progress"])

    def take_best(self, progress: StageProgress) -> None:
        """With ``training.keep: best``, load the weights of the best checkpoint in place of the last
        ones; ``progress.step`` then is its step."""
        stage, step = self._stage, progress.validation.best_step
        if stage.experiment.training.keep == "last" or step == progress.step:
            return
        best = stage.run.checkpoints / checkpoint.checkpoint_name(stage.name, step)
        problem = on_main(lambda: checkpoint.check(best))
        if problem:
            stage.monitor.say(
                f"WARNING: {best}, the best checkpoint, cannot be used ({problem}); the artifact gets the last weights"
            )
            return
        checkpoint.load_checkpoint(best, self._engine, self._average)
        progress.step = step
        stage.monitor.say(f"{stage.name}: the artifact gets the weights of step {step}, the best")
