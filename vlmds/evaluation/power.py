"""`vlmds power`: how many clips and seeds find a difference of a given size."""

from __future__ import annotations

from collections.abc import Iterable

from vlmds.errors import InputError
from vlmds.evaluation.statistics import FEW_SOURCES, Estimates, Spread, clips_needed, spread


def needed(
    parts: Spread, difference: float, seeds: Iterable[int], *, methods: int = 2, power: float = 0.8
) -> list[dict[str, int | None]]:
    """For each number of seeds {"seeds", "clips"}: the clips with which a true difference is found, and equal
    methods are shown to be within it; None if no number of clips is enough. At least 50, below which no winner is
    named.

    Args:
        difference: in the units of ``parts``. methods: compared with one another.
    """
    rows: list[dict[str, int | None]] = []
    for number in seeds:
        clips = clips_needed(parts, difference, number, methods=methods, power=power) if difference > 0 else None
        rows.append({"seeds": number, "clips": None if clips is None else max(clips, FEW_SOURCES)})
    return rows


def measured(found: Estimates) -> Spread:
    """The spread of existing evaluations, as shares of the best value.

    Raises:
        InputError: of one experiment alone, or of value 0.
    """
    best = abs(float(found.values.max()))
    if len(found.values) < 2 or not best:
        raise InputError("RUN: give the runs of two experiments or more, or assume --clip-sd and --seed-sd")
    parts = spread(found)
    return Spread(parts.clip_sd / best, None if parts.seed_sd is None else parts.seed_sd / best)


def power_table(parts: Spread, difference: float, seeds: Iterable[int], methods: int, power: float) -> str:
    """The table of the command, for the terminal.

    Args:
        parts: as shares of the value, as ``difference``.
    """
    columns = sorted({2, methods})
    found = {count: needed(parts, difference, seeds, methods=count, power=power) for count in columns}
    seed_sd = "not known, taken as 0" if parts.seed_sd is None else f"{parts.seed_sd:.1%}"
    lines = [
        f"standard deviation of the difference of one clip {parts.clip_sd:.1%}, of an experiment's value over its seeds "
        f"{seed_sd} (of the value)",
        f"clips that find a difference of {100 * difference:g}% with a probability of {100 * power:g}%:",
        "seeds" + "".join(f"{f'{count} experiments':>20}" for count in columns),
    ]
    for place, row in enumerate(found[columns[0]][: 1 if parts.seed_sd is None else None]):
        cells = [found[count][place]["clips"] for count in columns]
        shown = "".join(f"{'too few seeds' if cell is None else f'{cell:,}':>20}" for cell in cells)
        lines.append(f"{row['seeds']:>5}{shown}" + ("   of these checkpoints only" if row["seeds"] == 1 else ""))
    if parts.seed_sd is None:
        lines.append("Runs of one seed each do not show how much seeds matter: assume --seed-sd, such as 2%")
    return "\n".join(lines)
