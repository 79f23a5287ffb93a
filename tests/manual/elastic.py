"""`python -m tests.manual.elastic FOLDER`: a run that resumes with another number of ranks at every
start, beside an uninterrupted one; prints a table of their losses."""

import argparse
from pathlib import Path

from tests import tiny
from tests.training.fixtures import make_shards
from tests.training.launch import arguments, metrics, train, train_and_kill

RANKS = (1, 2, 4, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True)
    models, shards = tiny.make_models(folder / "models"), make_shards(folder / "data")
    settings = (
        "training.micro_batch=1",
        "training.checkpoint_every=1",
        "stages.0.steps=10",
        "stages.1.steps=10",
        "training.validate_every=1000",
    )
    train(2, *arguments(models, shards, folder / "whole", *settings), fresh=True)
    run = folder / "elastic"
    args = arguments(models, shards, run, *settings)
    starts = {0: RANKS[0]}  # lines of metrics before each start
    for number, ranks in enumerate(RANKS[:-1], 1):
        train_and_kill(
            ranks, run, 4 * number + number // 3, *args, checkpoint="finetune-" if number > 2 else "align-", fresh=True
        )
        starts[len(metrics(run))] = RANKS[number]
    train(RANKS[-1], *args, fresh=True)
    whole, elastic = ([r for r in metrics(path) if r["kind"] == "train"] for path in (folder / "whole", run))
    print("| stage, step | loss on 2 ranks | loss of the elastic run | relative difference |")
    print("|---|---|---|---|")
    largest = 0.0
    for a, b in zip(whole, elastic, strict=True):
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        difference = abs(a["loss"] - b["loss"]) / a["loss"]
        largest = max(largest, difference)
        print(f"| {a['stage']} {a['step']} | {a['loss']:.6f} | {b['loss']:.6f} | {difference:.1e} |")
    print(
        f"\nranks {' -> '.join(map(str, RANKS))}, killed each time (lines of metrics at the starts: "
        f"{starts}); largest difference {largest:.1e}"
    )


if __name__ == "__main__":
    main()
