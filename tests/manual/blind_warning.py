"""After how many steps the early warnings of a stage come, on the demo's data and models, on a CPU.

    python -m tests.manual.blind_warning DIR [STEPS]     (default 300 steps of stage align)

Trains stage align of the demo's experiment three times: with a frozen projector, at 30 times its rate, and as it is.
DIR is a folder of `vlmds demo` (made if it is not there: clips, pre-trained models, shards). Prints a Markdown table.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from vlmds.demo.run import Size, prepare_demo, tiny_form
from vlmds.distributed.ranks import cpu_environment
from vlmds.experiments.reading import load_experiment, override_experiment, to_yaml
from vlmds.files import write
from vlmds.runs.journal import read_metrics
from vlmds.training.ds_config import REPOSITORY
from vlmds.training.sweep import run_command

TOO_HIGH = 30


def runs(folder: Path, steps: int) -> dict[str, list[str]]:
    """Overrides by the name of the run."""
    rate = load_experiment(tiny_form("demo", folder)).stages[0].lr
    common = ["stages.0.epochs=null", f"stages.0.steps={steps}", f"training.validate_every={max(1, steps // 6)}"]
    return {
        "frozen projector": [*common, "stages.0.lr_factors.projector=0"],
        f"{TOO_HIGH} times the rate": [*common, f"stages.0.lr={TOO_HIGH * rate}"],
        "as it is": common,
    }


def train(folder: Path, name: str, overrides: list[str]) -> Path:
    """One run of stage align; returns its folder. A finished one is kept."""
    experiment = override_experiment(load_experiment(tiny_form("demo", folder)), overrides, name)
    output = folder / "blind" / name.replace(" ", "-")
    exp = folder / "blind" / f"{output.name}.yaml"
    write(exp, to_yaml(experiment.model_copy(update={"stages": experiment.stages[:1]})))
    script = str(REPOSITORY / "launch" / "train.py")
    data = str(folder / "shards")
    command = [sys.executable, script, "--exp", str(exp), "--data", data, "--output", str(output)]
    code = run_command(name, command, cpu_environment(1))
    if code:
        print(f"{shlex.join(command)}: exit code {code}", flush=True)
    return output


def row(name: str, lines: list[dict]) -> str:
    """Of the table, from a run's metrics.jsonl."""
    warned = "; ".join(f"step {r['step']}: {r['en'].split(';')[0]}" for r in lines if r["kind"] == "warning") or "none"
    worth = ", ".join(f"{r['step']}: {r['video_worth']:.3f}" for r in lines if "video_worth" in r)
    losses = [(r["step"], r["loss"]) for r in lines if r["kind"] == "val"]
    return f"| {name} | {warned} | {worth or 'not measured'} | {', '.join(f'{s}: {v:.3f}' for s, v in losses)} |"


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shards" / "dataset.json").is_file():
        prepare_demo(folder, Size(), {})
    rows = [
        row(name, read_metrics(train(folder, name, o) / "metrics.jsonl")) for name, o in runs(folder, steps).items()
    ]
    print("| stage align | warnings | worth of the video, nats/token, by step | validation loss by step |")
    print("|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
