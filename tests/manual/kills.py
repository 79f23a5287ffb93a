"""A run on two ranks that is killed repeatedly, at random moments and while it saves, until it is
finished; then compared with an uninterrupted one, bit for bit.

    python -m tests.manual.kills --kills 30
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.training.launch import TIMEOUT, arguments, kill_tree, metrics, running, train
from vlmds.training import checkpoint


def train_with_kills(
    run: Path, args: list[str], kills: int, seconds: float, seed: int, fresh: bool = False, lines: int | None = None
) -> list[str]:
    """Start the run, kill it, and start it again, `kills` times; then let it end.

    Half of the kills strike at a random moment of the first `seconds` of a start, the others as
    soon as a checkpoint is being written. Returns what was seen at each kill. fresh: see
    launch.running. lines: a kill at a random moment strikes after so many more lines of metrics at
    the latest, so that a machine that is suddenly faster does not finish the run before.
    """
    draw = random.Random(seed)
    seen = []
    for number in range(kills):
        log = run.with_name(f"{run.name}-{number}")
        with running(2, *args, log=log, fresh=fresh) as process:
            if number % 2:
                what = _wait_for_save(process, run)
            else:
                after = draw.uniform(0.2, 1.0) * seconds
                what = f"after {after:.1f} s"
                deadline = time.monotonic() + after
                most = len(metrics(run)) + lines if lines else float("inf")
                while time.monotonic() < deadline and process.poll() is None and len(metrics(run)) < most:
                    time.sleep(0.01)
            over = process.poll() is not None
            assert not over or process.returncode == 0, log.with_suffix(".err").read_text()[-3000:]
            kill_tree(process)
        for folder in (run / "checkpoints").glob("[a-z]*"):
            assert checkpoint.check(folder) is None, folder  # a checkpoint that shows is whole
        lines = len(metrics(run)) if run.is_dir() else 0
        seen.append(f"kill {number + 1}: {what}; {lines} lines of metrics" + ("; it had ended before" if over else ""))
        if over:
            break
    train(2, *args, fresh=fresh)
    return seen


def _wait_for_save(process, run: Path) -> str:
    deadline = time.monotonic() + TIMEOUT
    left = set(_being_written(run))  # by the start before, which was killed
    while process.poll() is None and time.monotonic() < deadline:
        found = [path for path, began in set(_being_written(run)) - left]
        if found:
            return f"while {found[0].parent.name} was written"
        time.sleep(0.0005)
    return "not in time"


def _being_written(run: Path) -> Iterator[tuple[Path, int]]:
    try:
        for path in (run / "checkpoints").glob(".*.tmp/*"):
            yield path, path.stat().st_ino
    except OSError:
        pass  # it has its name now


def main() -> None:
    from tests.training import fixtures, test_training

    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=500, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    models = fixtures.tiny.make_models(folder / "models")
    shards = fixtures.make_shards(folder)
    steps = [f"stages.{n}.steps={options.steps}" for n in (0, 1)]
    print("an undisturbed run first", flush=True)
    train(2, *arguments(models, shards, folder / "calm", *steps), fresh=True)
    seconds = 12.0  # a start takes more than half of it
    seen = train_with_kills(
        folder / "killed",
        arguments(models, shards, folder / "killed", *steps),
        options.kills,
        seconds,
        options.seed,
        fresh=True,
    )
    print("\n".join(seen))
    assert metrics(folder / "killed") == metrics(folder / "calm")
    test_training.assert_same_weights(test_training.weights(folder / "killed"), test_training.weights(folder / "calm"))
    print(f"{len(seen)} kills; metrics and final weights are bit-identical to the undisturbed run")


if __name__ == "__main__":
    main()
