"""Trains and compares video-captioning models, and captions videos with them.

What a notebook needs is here, each name loaded when it is first used; ``import vlmds`` alone
loads neither PyTorch nor a model. The commands are in :mod:`vlmds.cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmds.console.quiet import drop_accelerator_notice

if TYPE_CHECKING:
    from vlmds.captioning.job import caption_to_file
    from vlmds.captioning.pipeline import caption_records
    from vlmds.data.dataset import open_dataset
    from vlmds.errors import InputError, SampleError
    from vlmds.evaluation.compare import compare
    from vlmds.evaluation.evaluate import evaluate_run
    from vlmds.evaluation.evaluated_runs import load_run
    from vlmds.evaluation.report import write_report
    from vlmds.evaluation.saved import read_evaluation
    from vlmds.experiments.reading import load_experiment
    from vlmds.experiments.schema import Experiment
    from vlmds.inference.options import GenerationOptions
    from vlmds.inference.video_captioner import VideoCaptioner
    from vlmds.packing.pack import pack
    from vlmds.planning.plan import plan_experiment
    from vlmds.video.pool import Clip

__all__ = [
    "Clip",
    "Experiment",
    "GenerationOptions",
    "InputError",
    "SampleError",
    "VideoCaptioner",
    "caption_records",
    "caption_to_file",
    "compare",
    "evaluate_run",
    "load_experiment",
    "load_run",
    "open_dataset",
    "pack",
    "plan_experiment",
    "read_evaluation",
    "write_report",
]
_MODULES = {
    "captioning.pipeline": ("caption_records",),
    "captioning.job": ("caption_to_file",),
    "experiments.reading": ("load_experiment",),
    "experiments.schema": ("Experiment",),
    "data.dataset": ("open_dataset",),
    "video.pool": ("Clip",),
    "packing.pack": ("pack",),
    "errors": ("InputError", "SampleError"),
    "evaluation.compare": ("compare",),
    "evaluation.evaluate": ("evaluate_run",),
    "evaluation.saved": ("read_evaluation",),
    "evaluation.report": ("write_report",),
    "evaluation.evaluated_runs": ("load_run",),
    "inference.options": ("GenerationOptions",),
    "inference.video_captioner": ("VideoCaptioner",),
    "planning.plan": ("plan_experiment",),
}

drop_accelerator_notice()


if not TYPE_CHECKING:  # from which a misspelt name would be hidden

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                value = getattr(import_module(f"vlmds.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
