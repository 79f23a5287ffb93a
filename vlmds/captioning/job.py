"""Caption jobs: a run's captions of videos, printed or collected in a file.

Several ranks share the work; a stopped job goes on with the missing captions, on any number of
ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmds.captioning.outputs import (
    CaptionFile,
    check_one_video,
    find_paths,
    in_order,
    timestamp,
    write_format,
    written_files,
)
from vlmds.captioning.pipeline import DecodeTask, captions_of, decoded, packed, plan_tasks, probe, still_good, streamed
from vlmds.captioning.sources import Selection, select_items
from vlmds.console.progress import phase, silenced
from vlmds.data.features import check_features
from vlmds.data.loader import SampleReader
from vlmds.distributed import ranks
from vlmds.distributed.cores import cores_of_rank
from vlmds.errors import InputError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.experiments.schema import Experiment
from vlmds.inference.generation import ClipInput
from vlmds.inference.options import CAPTION_BATCH_SIZE, GenerationOptions, caption_settings
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import Artifact, artifact_experiment, read_artifact, weights_sha256
from vlmds.runs.folder import final_artifact
from vlmds.runs.rank_jsonl import Record
from vlmds.video.pool import Clip


@dataclass
class CaptionJob:
    """Which videos are captioned, by which run and how; the fields are those of
    :func:`caption_to_file`. The artifact is read once."""

    run: Path
    videos: Sequence[str | Clip] = ()
    data: str | Path | None = None
    split: str | None = None
    window: float | None = None
    generation: GenerationOptions = GenerationOptions()
    prompt: str | None = None
    batch_size: int = CAPTION_BATCH_SIZE
    workers: int | None = None
    deadline: float = DECODE_SECONDS
    device: str | None = None
    overrides: Sequence[str] = ()

    @cached_property
    def artifact(self) -> Artifact:
        """Raises InputError: no artifact."""
        return read_artifact(final_artifact(self.run))

    @cached_property
    def experiment(self) -> Experiment:
        return artifact_experiment(self.artifact, self.overrides)

    def select(self) -> Selection:
        """Raises InputError: nothing to caption, or windows of a packed dataset."""
        for name, value in (
            ("--batch-size", self.batch_size),
            ("--deadline", self.deadline),
            ("--workers", 1 if self.workers is None else self.workers),
        ):
            if value <= 0:
                raise InputError(f"{name} {value}: must be more than 0")
        selection = select_items(self.videos, self.data, self.split)
        if selection.dataset is not None and self.window is not None:
            raise InputError(
                "--window: a packed dataset is captioned clip by clip; leave it out, "
                "or give the videos or their manifest"
            )
        return selection

    def captioner(self) -> VideoCaptioner:
        return VideoCaptioner.from_pretrained(self.artifact, device=self.device, overrides=self.overrides)

    def clips(self, captioner: VideoCaptioner, selection: Selection, tasks: list[DecodeTask]) -> Iterator[ClipInput]:
        """This rank's share of the tasks, with the model's inputs."""
        if selection.dataset is None or selection.split is None:
            return decoded(captioner, ranks.take_turns(tasks), self.workers, self.deadline)
        rank, world = ranks.rank_and_world()
        data = captioner.experiment.data
        check_features(selection.dataset, captioner.experiment, captioner.model.tower)
        reader = SampleReader(
            selection.dataset,
            selection.split,
            data.num_frames,
            captioner.model.image_size,
            shuffle=False,
            decode_seconds=self.deadline,
            fit=data.fit,
        )
        workers = data.num_workers if self.workers is None else self.workers
        return packed(reader, tasks[rank::world], workers, self.batch_size)

    def settings(self, selection: Selection) -> dict[str, Any]:
        """The settings that captions depend on. Raises InputError: no artifact."""
        return {
            "artifact": self.artifact.folder.name,
            "weights_sha256": weights_sha256(self.artifact),
            "data": selection.data,
            "window": self.window,
            **caption_settings(self.experiment, self.generation, self.prompt),
        }


@dataclass(frozen=True)
class CaptionSummary:
    """captions: number in the file now, of the videos asked for. before: number of them that the file
    had already. failed: "video: reason" of each video or window without a caption. skipped: number of
    files in the folder that are not videos. paths: the files written."""

    captions: int
    before: int
    failed: list[str]
    skipped: int
    paths: list[Path]


def caption_to_file(
    run: str | Path,
    out: str | Path,
    *,
    videos: Sequence[str | Clip] = (),
    data: str | Path | None = None,
    split: str | None = None,
    format: str | None = None,
    again: bool = False,
    window: float | None = None,
    generation: GenerationOptions = GenerationOptions(),
    prompt: str | None = None,
    batch_size: int = CAPTION_BATCH_SIZE,
    workers: int | None = None,
    deadline: float = DECODE_SECONDS,
    device: str | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> CaptionSummary:
    """Caption videos into a file, on all ranks that the launcher started. A stopped job, started
    again, goes on; a finished one captions the videos that were added or had failed.

    Args:
        run: run folder or artifact.
        out: .jsonl, .json, .csv or .srt; several videos' .srt go to a folder, with ``format``.
            Beside it lie the .jsonl, in which captions are collected, and the .settings.json.
        videos: paths, URLs or clips; or
        data: a folder, a manifest or a packed dataset. split: of the latter.
        format: of ``out``, if its name has no suffix.
        again: start over.
        window: seconds; one caption for each window. None: one for each video.
        generation: default: greedy search.
        prompt: instead of the experiment's; a video's own prompt takes precedence.
        batch_size: clips captioned at once.
        workers: decoding processes of each rank (default: one per core).
        deadline: seconds that decoding may take, for a video or some windows of it.
        device: default: the first GPU, else the CPU; several ranks use their own.
        overrides: of the experiment, such as ``llm.model=/models/Qwen3-8B``.
        progress: report progress on stderr.

    Raises:
        InputError: no run, nothing to caption, or the file was made with other settings.
    """
    job = CaptionJob(
        Path(run), videos, data, split, window, generation, prompt, batch_size, workers, deadline, device, overrides
    )
    if "RANK" in os.environ:
        job.device = str(ranks.join_ranks(job.experiment))
    with silenced(not progress), CaptionFile(find_paths(out, format)) as file:
        selection = ranks.together(job.select)
        check_one_video(file.paths, {item.video for item in selection.items}, file.paths.jsonl)
        settings = job.settings(selection)
        there = ranks.on_main(lambda: _begin(file, job, selection, settings, again))
        tasks = _plan(job, selection, there)
        if tasks:
            _share(job, job.captioner(), selection, tasks, file)
        ranks.gather(None)
        return ranks.on_main(lambda: _finish(file, selection, sum(map(len, there.values()))))


def caption_to_stdout(job: CaptionJob, show: Callable[[Record], None]) -> list[str]:
    """Call ``show(record)`` for each caption as it comes; returns "video: reason" of the failed."""
    captioner, selection, tasks = _alone(job)
    failed: list[str] = []
    clips = job.clips(captioner, selection, tasks)
    for records in captions_of(captioner, clips, job.generation, job.prompt, job.batch_size):
        for record in records:
            failed += _failures([record])
            if "caption" in record:
                show(record)
    return failed


def stream_to_stdout(job: CaptionJob) -> list[str]:
    """Print each caption while it is written; returns "video: reason" of the failed."""
    if job.generation.num_beams > 1:
        raise InputError("--stream: beam search has a caption only at its end; leave --beams out")
    captioner, selection, tasks = _alone(job)
    if selection.dataset is not None and selection.dataset.store == "features":
        raise InputError("--stream: a features store cannot be streamed; leave it out")
    failed: list[str] = []
    clips = job.clips(captioner, selection, tasks)
    for record, pieces in streamed(captioner, clips, job.generation, job.prompt):
        failed += _failures([record])
        if "error" in record:
            continue
        print(f"{title(record, job.window)}\t", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    return failed


def title(record: Record, window: float | None) -> str:
    """The video, and the times of a window."""
    if window is None:
        return record["video"]
    times = " - ".join(timestamp(record[key]).replace(",", ".") for key in ("start", "end"))
    return f"{record['video']}\t{times}"


def _alone(job: CaptionJob) -> tuple[VideoCaptioner, Selection, list[DecodeTask]]:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--out: several ranks need a file to write to")
    selection = job.select()
    return job.captioner(), selection, _plan(job, selection, {})


def _begin(
    file: CaptionFile, job: CaptionJob, selection: Selection, settings: dict, again: bool
) -> dict[str, list[Record]]:
    """{id: its valid records}, without their captions. The file keeps these records and those of
    other videos."""
    asked, others = in_order(file.begin(settings, again), selection.items)
    by_id: dict[str, list[Record]] = {}
    for record in asked:
        by_id.setdefault(record["id"], []).append(record)
    kept: list[Record] = []
    for item in selection.items:
        records = by_id.get(item.id, [])
        good = still_good(item, records, job.window)
        kept += records if isinstance(good, str) else good
    file.keep([*kept, *others])
    found: dict[str, list[Record]] = {}
    for record in kept:
        found.setdefault(record["id"], []).append({key: value for key, value in record.items() if key != "caption"})
    return found


def _plan(job: CaptionJob, selection: Selection, there: dict[str, list[Record]]) -> list[DecodeTask]:
    """All remaining tasks, in order; the same on every rank."""
    facts: dict[str, dict | str] = {}
    rank, world = ranks.rank_and_world()
    if job.window is not None:
        unknown = [item for item in selection.items if still_good(item, there.get(item.id, []), job.window) != "all"]
        for part in ranks.gather(probe(unknown[rank::world], job.workers, job.deadline)):
            facts |= part
    decoders = sum(ranks.gather(job.workers or cores_of_rank()))
    return plan_tasks(selection.items, there, job.window, job.experiment.data.num_frames, facts, decoders)


def _share(
    job: CaptionJob, captioner: VideoCaptioner, selection: Selection, tasks: list[DecodeTask], file: CaptionFile
) -> None:
    """Caption this rank's share, written batch by batch."""
    rank, world = ranks.rank_and_world()
    total = sum(1 if task.spans is None else len(task.spans) for task in tasks)
    clips = job.clips(captioner, selection, tasks)
    failed = 0
    with file.appender(rank) as appender, phase("captioning", total, "clips", left=True) as shown:
        for records in captions_of(captioner, clips, job.generation, job.prompt, job.batch_size):
            appender.add(records)
            failed += len(_failures(records)) * world
            # The other ranks are about as far.
            shown.done = min(shown.done + len(records) * world, total)
            shown.note = f"{failed:,} failed" if failed else ""


def _finish(file: CaptionFile, selection: Selection, before: int) -> CaptionSummary:
    asked, others = in_order(file.read(), selection.items)
    records = [*asked, *others]
    file.keep(records)
    missing = {item.id for item in selection.items} - {record["id"] for record in asked}
    if missing:  # on a network drive that is slow to show what other machines have written
        raise InputError(
            f"{file.paths.jsonl}: no record of {min(missing)} and {len(missing) - 1} more; "
            "another rank's file is not visible yet; run the same command again"
        )
    write_format(file.paths, records)
    return CaptionSummary(
        sum("caption" in r for r in asked),
        before,
        _failures(asked),
        selection.skipped,
        written_files(file.paths, records),
    )


def _failures(records: Sequence[Record]) -> list[str]:
    """The video, time and reason of each record without a caption."""
    found = []
    for record in records:
        if "error" in record:
            span = "" if not record["start"] else f" at {record['start']:g} s"
            found.append(f"{record['video'] or record['id']}{span}: {record['error']}")
    return found
