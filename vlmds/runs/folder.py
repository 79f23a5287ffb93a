"""The run folder: the record of one run of an experiment, from which a restart resumes.

experiment.yaml   the resolved experiment
run.json          an id, the global batch, what it is trained from (data fingerprints, hashes of
                  the base weights, sampling of frames, the checkpoint, run or projector it started from),
                  how its learning rates were chosen, if vlmds sweep --tune lr did it (vlmds.runs.tuning),
                  and for each start: versions, git commit, world size, command line, hardware
                  and the implementation of attention
metrics.jsonl     one line per optimizer step, per validation, per evaluation and per warning about a stage
samples.jsonl     captions made in training, if training.evaluate_every is set
ledger.jsonl      every sample that could not be read or whose caption was cut, every skipped step
tensorboard/  checkpoints/  artifacts/{stage}/
init/             the projector that the run started from, if projector.init is set
"""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from vlmds.errors import InputError
from vlmds.experiments.differences import differing_keys
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.experiments.schema import Experiment
from vlmds.files import write
from vlmds.models.artifact import is_artifact
from vlmds.permissions import check_writable
from vlmds.runs.journal import Journal

PACKAGES = ("vlmds", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "webdataset", "decord", "av")

WRITTEN = (
    "metrics.jsonl",
    "samples.jsonl",
    "ledger.jsonl",
    "tensorboard",
    "checkpoints",
    "artifacts",
)  # appended to during the run; files that are replaced need a writable folder only

# Keys that may differ when a run is resumed, as they do not change what is learned. The micro-batch may
# differ because the run's global batch is fixed. Data and models may be moved: their content is compared
# by fingerprints.
HARMLESS = (
    "owner",
    "priority",
    "logging",
    "data.path",
    "vision.model",
    "vision.revision",
    "llm.model",
    "llm.revision",
    "llm.attention",
    "data.num_workers",
    "data.verify",
    "data.max_bad_fraction",
    "data.max_cut_fraction",
    "vision.frames_per_call",
    "training.micro_batch",
    "training.gradient_accumulation",
    "training.global_batch",
    "training.activation_checkpointing",
    "training.validate_every",
    "training.blind_check",
    "training.evaluate_every",
    "training.evaluate_clips",
    "training.evaluate_tokens",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.timeout_minutes",
    "training.heartbeat_seconds",
    "training.max_skipped_steps",
    "data.cache_dir",
    "data.cache_gb",
    "data.decode_seconds",
)


@dataclass
class RunFolder:
    """An opened run. record: the content of run.json."""

    path: Path
    record: dict

    def __post_init__(self):
        self._ledger = Journal(self.path / "ledger.jsonl")

    @classmethod
    def read(cls, path: Path) -> dict:
        """The record of the run at ``path``. Raises InputError if there is none."""
        try:
            return json.loads((path / "run.json").read_text(encoding="utf-8"))
        except OSError:
            raise InputError(f"{path}: not a run folder (no run.json in it)") from None
        except ValueError:
            raise InputError(f"{path / 'run.json'}: damaged; choose another --output") from None

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, fixed at the run's first start."""
        return self.record["global_batch"]

    def update(self, **values) -> None:
        """Change the record and write it."""
        self.record |= values
        write(self.path / "run.json", json.dumps(self.record, indent=2, ensure_ascii=False) + "\n")

    def begin(self, experiment: Experiment) -> None:
        """Write the experiment and the record at the start."""
        write(self.path / "experiment.yaml", to_yaml(experiment))
        self.update()

    def note(self, **values) -> None:
        """Add to the record of this start."""
        self.record["starts"][-1] |= values
        self.update()

    def artifact(self, stage: str) -> Path:
        return self.path / "artifacts" / stage

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def add_to_ledger(self, records: list[dict]) -> None:
        self._ledger.add(records)

    def rewind(self, stages: list[str], stage: int, step: int) -> None:
        """Remove the metrics, samples and ledger lines of steps after ``step`` of stage number ``stage``, which
        will be repeated."""
        for name in ("metrics.jsonl", "samples.jsonl", "ledger.jsonl"):
            path = self.path / name
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # an incomplete last line of a process that was killed
                if (stages.index(record["stage"]), record["step"]) <= (stage, step):
                    kept.append(line)
            write(path, "".join(kept))


def check_run_folder(path: Path) -> None:
    """Raise :class:`InputError` unless this user can write a run there, or resume the one there."""
    check_writable(path, "--output", WRITTEN)


def open_run(
    path: Path, experiment: Experiment, resume: str, *, origin: dict, world_size: int, command: list[str]
) -> RunFolder:
    """A new run, or the existing one in the folder, to resume it. One process calls it. Nothing is written
    before :meth:`RunFolder.begin`, so a refused start leaves no run behind.

    Args:
        resume: "auto" resumes an existing run, "never" requires a new folder.
        origin: what the run is trained from, recorded at its first start: ``data_fingerprint``,
            ``stage_data`` (if stages have data of their own), ``sampling``, ``weights`` and ``revisions``, and with
            ``projector.init`` ``init``, and ``tuned`` if pilots chose the learning rates.

    Raises:
        InputError: ``never``, but the folder has a run; or that run is of another experiment, other data
            or other base weights.
    """
    training = experiment.training
    record_path = path / "run.json"
    if not record_path.is_file():
        wanted = training.global_batch or (training.micro_batch * training.gradient_accumulation * world_size)
        record = {"id": secrets.token_hex(4), "global_batch": wanted, **origin, "starts": []}
    elif resume == "never":
        raise InputError(f"--output {path}: already has a run, and --resume is never; choose another folder")
    else:
        record = RunFolder.read(path)
        check_same_experiment(path, experiment)
        for number, stage in enumerate(experiment.stages):
            if stage_fingerprint(record, stage.name) != stage_fingerprint(origin, stage.name):
                key = "data" if stage.data is None else f"stages.{number}.data"
                raise InputError(
                    f"{key}: {experiment.for_stage(stage.name).data.path or 'the blend'} is not the data that {path} "
                    "was started with; give that data, or choose another --output"
                )
        check_base_weights(record["weights"], origin["weights"], experiment, path)
        if training.global_batch not in (None, record["global_batch"]):
            raise InputError(
                f"training.global_batch: {training.global_batch}, but {path} was "
                f"started with {record['global_batch']}; choose another --output"
            )
    record["starts"].append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "world_size": world_size,
            "versions": versions(),
            "git": git_commit(),
            "host": platform.node(),
        }
    )
    return RunFolder(path, record)


def stage_fingerprint(record: dict, stage: str) -> str:
    """The fingerprint of a stage's data. record: run.json."""
    return record.get("stage_data", {}).get(stage, record["data_fingerprint"])


def final_artifact(path: Path) -> Path:
    """The artifact of ``--run path``: the folder itself, or that of the run's last finished stage.

    Raises:
        InputError: there is no artifact.
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
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """Git commit of this source code, with "-dirty" if it has uncommitted changes; None outside git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_same_experiment(path: Path, experiment: Experiment) -> None:
    """Raise :class:`InputError`, naming the keys, if the run at ``path`` is of an experiment that learns
    something else: one that differs in other keys than HARMLESS."""
    paths = tuple(f"stages.{number}.data.path" for number in range(len(experiment.stages)))
    changed = differing_keys(load_experiment(path / "experiment.yaml"), experiment, but=HARMLESS + paths)
    if changed:
        raise InputError(
            f"{path}: was started with other settings ({'; '.join(changed)}); "
            "undo the change or choose another --output"
        )


def check_base_weights(old: dict[str, str], new: dict[str, str], experiment: Experiment, run: Path) -> None:
    """Raise :class:`InputError`, naming the file, if the weights that ``run`` was trained from (``old``)
    differ from the current ones (``new``)."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            part, file = name.split("/")
            raise InputError(
                f"{part}.model: {file} of {getattr(experiment, part).model} is not the one that "
                f"{run} was trained from; restore it, or choose another --output"
            )
