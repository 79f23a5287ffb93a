"""`vlmds bench scaling`: the predicted efficiency of training on many GPUs.

A step is the work of :mod:`vlmds.planning.propose` (operations at an assumed share of the card's peak,
or the host's time where that is longer), then communication. Gradients are reduced and weights
gathered once an optimizer step, by rings: a rank sends 2·bytes·(W−1)/W of the trainables, which is
the least possible and what `vlmds bench train --ranks 2` measures; or 3·bytes·(W−1)/W with so many
ranks that gradients are all-reduced (:func:`vlmds.training.engine.reduces_to_owners`). Assumed: a
ring passes each node's link once, shared by its GPUs; NVLink within a node is no limit; nothing
overlaps; each hop between nodes takes LATENCY.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmds.bench.measure import save, table
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import meta_models
from vlmds.models.trainable import freeze
from vlmds.planning.cards import find_card
from vlmds.planning.propose import predicted_rate
from vlmds.training.activations import fewest_that_fits
from vlmds.training.ds_config import reduces_to_owners

GPUS, PER_NODE = (8, 64, 512), 8
LINKS = (200, 400)  # Gb/s for each node
LATENCY = 5e-6  # seconds for a hop between nodes
USABLE = 0.85  # share of a link's rate that a ring reaches
EXPERIMENTS = tuple(f"e{n}" for n in range(1, 9))


def sent_bytes(trained_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends in an optimizer step."""
    reduction = 1 if reduces_to_owners(ranks) else 2
    return (reduction + 1) * trained_bytes * (ranks - 1) / ranks


def communication_seconds(trained_bytes: float, gpus: int, gigabits: float) -> float:
    """Seconds of communication in an optimizer step; 0 within one node."""
    nodes = gpus // PER_NODE
    if nodes <= 1:
        return 0.0
    rings = gpus + 1 if reduces_to_owners(gpus) else 3
    return sent_bytes(trained_bytes, gpus) / (gigabits * 1e9 / 8 * USABLE) + rings * (nodes - 1) * LATENCY


def bench_scaling(output: Path, gpu: str, overrides: Sequence[str] = ()) -> dict:
    """Print the table, write scaling.json and scaling.png to ``output``. Raises InputError."""
    card = find_card(gpu)
    rows: list[dict[str, str]] = []
    curves: dict[tuple[str, int], list[float]] = {}
    for exp in EXPERIMENTS:
        experiment = load_experiment(exp, list(overrides))
        stage, model = experiment.stages[-1], meta_models(experiment)
        every = fewest_that_fits(experiment, stage, False, card.memory, PER_NODE)
        freeze(model.captioner, stage)
        rate = predicted_rate(experiment, model, card, every, False)
        training = experiment.training
        work = training.micro_batch * training.gradient_accumulation / rate
        size = 2 * sum(p.numel() for p in model.captioner.parameters() if p.requires_grad)
        row = {"experiment": exp, "step, s": f"{work:.2f}", "trainables, MB": f"{size / 1e6:.0f}"}
        for link in LINKS:
            for gpus in GPUS:
                efficiency = work / (work + communication_seconds(size, gpus, link))
                row[f"{gpus} GPUs, {link} Gb/s"] = f"{efficiency:.1%}"
                curves.setdefault((exp, link), []).append(efficiency)
        rows.append(row)
    print(
        f"predicted on {card.name}, {PER_NODE} a node, with the experiments' micro-batch and accumulation; no overlap"
    )
    print(table(rows))
    output.mkdir(parents=True, exist_ok=True)
    _draw(output / "scaling.png", curves, card.name)
    print(f"\nsaved: {save(output, 'scaling', {'gpu': card.name, 'rows': rows})}, scaling.png")
    return {"rows": rows}


def _draw(path: Path, curves: dict[tuple[str, int], list[float]], card: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LINKS), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, link in zip(axes, LINKS, strict=True):
        for exp in EXPERIMENTS:
            axis.plot(GPUS, [100 * e for e in curves[exp, link]], marker="o", label=exp)
        axis.set(
            xscale="log",
            xticks=GPUS,
            xticklabels=GPUS,
            xlabel="GPUs",
            title=f"{link} Gb/s a node, predicted for {card}",
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency, %")
    axes[0].legend(ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
