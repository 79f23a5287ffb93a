"""The options of caption generation. The command line's come from here; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vlmds.errors import InputError

if TYPE_CHECKING:
    from vlmds.experiments.schema import Experiment


BATCH_SIZE = 8
"""Clips per batch of an evaluation."""
CAPTION_BATCH_SIZE = 4
"""Clips per batch of `vlmds caption` and the Python API."""


def _option(default: float, help: str, name: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "name": name})


@dataclass(frozen=True)
class GenerationOptions:
    """The default is greedy search.

    Args:
        max_new_tokens: maximum length of a caption.
        num_beams: more than 1 is beam search.
        temperature: more than 0 is sampling, from logits divided by it.
        top_p: sampling takes from the fewest tokens whose probability reaches it (Holtzman et al.,
            arXiv:1904.09751).
        repetition_penalty: logits of tokens that the caption already has are divided by it, or
            multiplied where negative (Keskar et al., arXiv:1909.05858); 1 is none.
        seed: of sampling.

    Raises:
        InputError: a value out of its range, or beam search with sampling.
    """

    max_new_tokens: int = _option(128, "maximum tokens of a caption (default: 128)")
    num_beams: int = _option(1, "beams of beam search (default: 1, greedy)", "beams")
    temperature: float = _option(0.0, "temperature of sampling (default: 0, no sampling)")
    top_p: float = _option(1.0, "nucleus of sampling (default: 1, all tokens)")
    repetition_penalty: float = _option(1.0, "penalty of repeated tokens (default: 1, none)")
    seed: int = _option(0, "seed of sampling (default: 0)")

    def __post_init__(self):
        for name, good, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", 0 <= self.seed < 1 << 62, "0 or more"),
        ):
            if not good:
                raise InputError(f"{name} {getattr(self, name)}: must be {what}")
        if self.num_beams > 1 and self.temperature:
            raise InputError(
                f"num_beams {self.num_beams} with temperature {self.temperature:g}: "
                "beam search does not sample; leave one of them out"
            )
        if self.top_p < 1 and not self.temperature:
            raise InputError(f"top_p {self.top_p:g}: applies to sampling only; set temperature too")

    @classmethod
    def command_line(cls) -> dict[str, tuple[str, type, Any, str]]:
        """{field: (its name on the command line, type, default, help)}"""
        return {
            f.name: (f.metadata["name"] or f.name, type(f.default), f.default, f.metadata["help"]) for f in fields(cls)
        }


def caption_settings(experiment: Experiment, options: GenerationOptions, prompt: str | None = None) -> dict[str, Any]:
    """The settings that captions depend on besides the weights, as caption files and evaluations
    record them. prompt: instead of the experiment's."""
    return {
        "prompt": prompt or experiment.data.prompt,
        "num_frames": experiment.data.num_frames,
        "generation": asdict(options),
        "vision": experiment.vision.model,
        "llm": experiment.llm.model,
        "llm_precision": "nf4" if experiment.llm.load_in_4bit else experiment.llm.dtype,
    }
