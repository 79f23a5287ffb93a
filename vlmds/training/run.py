"""The run folder: what one run of one experiment records, and where a restart goes on.

    experiment.yaml   the resolved experiment
    run.json          global batch, data fingerprint, and for each start: versions, git commit,
                      world size, command line
    metrics.jsonl     one line per optimizer step and per validation
    ledger.jsonl      every sample that could not be read, and when
    tensorboard/  checkpoints/  artifacts/{stage}/
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from vlmds.config import Experiment, load_experiment, to_yaml
from vlmds.errors import InputError
from vlmds.files import write
from vlmds.models.artifact import is_artifact

PACKAGES = ("vlmds", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "webdataset",
            "decord", "av")

# Keys that may differ when a run is resumed: they do not change what is learned. The size of a
# micro-batch may, too: the global batch is the run's.
HARMLESS = ("owner", "priority", "logging", "data.path", "data.num_workers", "data.verify",
            "data.max_bad_fraction", "vision.frames_per_call", "training.micro_batch",
            "training.gradient_accumulation", "training.global_batch",
            "training.activation_checkpointing", "training.validate_every",
            "training.checkpoint_every", "training.keep_checkpoints", "training.timeout_minutes",
            "training.max_skipped_steps", "data.cache_dir", "data.cache_gb", "data.decode_seconds")


@dataclass
class RunFolder:
    """An opened run. global_batch: samples per optimizer step, fixed at the run's first start."""

    path: Path
    global_batch: int

    def artifact(self, stage: str) -> Path:
        return self.path / "artifacts" / stage

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def add_to_ledger(self, records: list[dict]) -> None:
        with (self.path / "ledger.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)

    def rewind(self, stages: list[str], stage: int, step: int) -> None:
        """Drop the metrics and ledger lines of steps that will be taken (again) from here on:
        ``step`` optimizer steps of stage number ``stage`` stand."""
        for name in ("metrics.jsonl", "ledger.jsonl"):
            path = self.path / name
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a process that was killed
                if (stages.index(record["stage"]), record["step"]) <= (stage, step):
                    kept.append(line)
            write(path, "".join(kept))


def open_run(
    path: Path, experiment: Experiment, resume: str, *, fingerprint: str, world_size: int,
    command: list[str],
) -> RunFolder:
    """Create a run folder, or open the one there to go on with it; one process calls it.

    Args:
        resume: "auto" goes on with what is there, "never" wants a new folder.
        fingerprint: of the data.

    Raises:
        InputError: ``never``, but the folder holds a run; or the run there is of another
            experiment or other data.
    """
    training = experiment.training
    record_path = path / "run.json"
    if not record_path.is_file():
        wanted = training.global_batch or (
            training.micro_batch * training.gradient_accumulation * world_size)
        record = {"global_batch": wanted, "data_fingerprint": fingerprint, "starts": []}
    elif resume == "never":
        raise InputError(f"--output {path}: holds a run already and --resume is never; "
                         "choose another folder")
    else:
        record = _read_record(record_path)
        check_same_experiment(path, experiment)
        if record["data_fingerprint"] != fingerprint:
            raise InputError(f"data.path: {experiment.data.path} is not the data that {path} was "
                             "started on; give that data, or another --output")
        if training.global_batch not in (None, record["global_batch"]):
            raise InputError(f"training.global_batch: {training.global_batch}, but {path} was "
                             f"started with {record['global_batch']}; choose another --output")
    record["starts"].append({
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command,
        "world_size": world_size, "versions": versions(), "git": git_commit(),
        "host": platform.node()})
    write(path / "experiment.yaml", to_yaml(experiment))
    write(record_path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return RunFolder(path, record["global_batch"])


def final_artifact(path: Path) -> Path:
    """The artifact that ``--run path`` means: the folder itself, or the run's last finished stage.

    Raises:
        InputError: there is none.
    """
    if is_artifact(path):
        return path
    if not (path / "run.json").is_file():
        raise InputError(f"--run {path}: neither a run folder nor an artifact")
    for stage in reversed(load_experiment(path / "experiment.yaml").stages):
        if is_artifact(path / "artifacts" / stage.name):
            return path / "artifacts" / stage.name
    raise InputError(f"--run {path}: no stage of this run is finished yet")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def git_commit() -> str | None:
    """Commit of the source that runs, "-dirty" appended if it was changed; None outside git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _read_record(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: damaged; choose another --output") from None


def check_same_experiment(path: Path, experiment: Experiment) -> None:
    """Raise :class:`InputError`, naming the keys, if the run at ``path`` is of an experiment that
    would learn something else."""
    old = flat_settings(load_experiment(path / "experiment.yaml").model_dump())
    new = flat_settings(experiment.model_dump())
    changed = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in HARMLESS)
    ]
    if changed:
        raise InputError(f"{path}: was started as another experiment ({'; '.join(changed)}); "
                         "undo the change or choose another --output")


def flat_settings(tree, prefix: str = "") -> dict:
    """Nested mappings and lists of mappings -> dotted keys."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = {str(number): item for number, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}.{key}" if prefix else key)
    return flat
