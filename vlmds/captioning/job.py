"""`vlmds caption`: a run's captions of videos, printed or collected in a file.

Over several ranks each does its share; a stopped command goes on with what is missing, whatever
the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmds.captioning.outputs import (
    CaptionFile,
    Record,
    check_one_video,
    find_target,
    in_order,
    srt_files,
    timestamp,
    write_format,
)
from vlmds.captioning.pipeline import (
    Clipped,
    Work,
    captions_of,
    decoded,
    packed,
    plan_work,
    probe,
    still_good,
    streamed,
)
from vlmds.captioning.sources import Source, find_source
from vlmds.console.progress import phase, silenced
from vlmds.data.features import check_features
from vlmds.data.loader import SampleReader
from vlmds.distributed import ranks
from vlmds.distributed.cores import cores_of_rank
from vlmds.errors import InputError
from vlmds.inference.generation import GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner
from vlmds.models.artifact import artifact_experiment, weights_sha256
from vlmds.runs.folder import final_artifact
from vlmds.video.pool import Clip


@dataclass(frozen=True)
class CaptionJob:
    """What is to be captioned, by what and how; see :func:`caption_to_file` for the fields."""

    run: Path
    videos: Sequence[str | Clip] = ()
    data: str | Path | None = None
    split: str | None = None
    window: float | None = None
    generation: GenerationOptions = GenerationOptions()
    prompt: str | None = None
    batch_size: int = 4
    workers: int | None = None
    deadline: float = 60.0
    device: str | None = None
    overrides: Sequence[str] = ()

    def source(self) -> Source:
        """Raises InputError: nothing to caption, or windows of a packed dataset."""
        for name, value in (
            ("--batch-size", self.batch_size),
            ("--deadline", self.deadline),
            ("--workers", 1 if self.workers is None else self.workers),
        ):
            if value <= 0:
                raise InputError(f"{name} {value}: must be more than 0")
        source = find_source(self.videos, self.data, self.split)
        if source.dataset is not None and self.window is not None:
            raise InputError(
                "--window: a packed dataset is captioned clip by clip; leave it out, "
                "or give the videos or their manifest"
            )
        return source

    def captioner(self) -> VideoCaptioner:
        return VideoCaptioner.from_pretrained(final_artifact(self.run), device=self.device, overrides=self.overrides)

    def clips(self, captioner: VideoCaptioner, source: Source, work: list[Work]) -> Iterator[Clipped]:
        """This rank's share of `work`, with what the model sees."""
        if source.dataset is None:
            return decoded(captioner, ranks.take_turns(work), self.workers, self.deadline)
        rank, world = ranks.place()
        data = captioner.experiment.data
        check_features(source.dataset, captioner.experiment, captioner.model.tower)
        reader = SampleReader(
            source.dataset,
            source.split,
            data.num_frames,
            captioner.model.image_size,
            shuffle=False,
            decode_seconds=self.deadline,
        )
        workers = data.num_workers if self.workers is None else self.workers
        return packed(reader, work[rank::world], workers, self.batch_size)

    def settings(self, source: Source) -> dict[str, Any]:
        """What captions depend on. Raises InputError: no artifact."""
        artifact = final_artifact(self.run)
        experiment = artifact_experiment(artifact, self.overrides)
        return {
            "artifact": artifact.name,
            "weights_sha256": weights_sha256(artifact),
            "vision": experiment.vision.model,
            "llm": experiment.llm.model,
            "llm_precision": "nf4" if experiment.llm.load_in_4bit else experiment.llm.dtype,
            "num_frames": experiment.data.num_frames,
            "prompt": self.prompt or experiment.data.prompt,
            "data": source.data,
            "window": self.window,
            "generation": asdict(self.generation),
        }


@dataclass(frozen=True)
class CaptionSummary:
    """captions: in the file now, of what was asked for; before: of them, those that were there
    already. failed: "video: reason" of each that has none. skipped: files of the folder that are
    no videos. paths: the files written."""

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
    batch_size: int = 4,
    workers: int | None = None,
    deadline: float = 60.0,
    device: str | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> CaptionSummary:
    """Caption videos into a file, on all ranks that the launcher started; a stopped job, started
    again, goes on, and one that is finished captions what has been added or has failed.

    Args:
        run: run folder or artifact.
        out: .jsonl, .json, .csv or .srt; several videos' .srt go to a folder, with ``format``.
            Beside it lie the .jsonl, in which captions are collected, and the .settings.json.
        videos: paths, URLs or clips; or
        data: a folder, a manifest or a packed dataset. split: of the latter.
        format: of ``out``, where its name does not tell.
        again: start anew.
        window: seconds that get a caption each; None: one for a video.
        generation: how captions are written; default: greedy search.
        prompt: instead of the experiment's; a video's own comes first.
        batch_size: clips captioned at once.
        workers: decoding processes of each rank (default: one per core).
        deadline: seconds that decoding may take, for a video or some windows of it.
        device: default: the first GPU, else the CPU; of ranks, each one's own.
        overrides: of the experiment, such as ``llm.model=/models/Qwen3-8B``.
        progress: say on stderr how far it is.

    Raises:
        InputError: no run, nothing to caption, or captions of other settings are there.
    """
    if "RANK" in os.environ:
        device = str(ranks.init_distributed())
    job = CaptionJob(
        Path(run), videos, data, split, window, generation, prompt, batch_size, workers, deadline, device, overrides
    )
    with silenced(not progress), CaptionFile(find_target(out, format)) as file:
        return _caption(job, file, again)


def _caption(job: CaptionJob, file: CaptionFile, again: bool) -> CaptionSummary:
    source = ranks.together(job.source)
    check_one_video(file.target, {item.video for item in source.items}, file.target.jsonl)
    settings = job.settings(source)
    there = ranks.on_main(lambda: _begin(file, job, source, settings, again))
    work = _plan(job, source, there)
    if work:
        _share(job, job.captioner(), source, work, file)
    ranks.gather(None)
    return ranks.on_main(lambda: _finish(file, source, sum(map(len, there.values()))))


def caption_to_stdout(job: CaptionJob, show: Callable[[Record], None]) -> list[str]:
    """Call ``show(record)`` for each caption as it comes; returns "video: reason" of the failed."""
    captioner, source, work = _alone(job)
    failed = []
    clips = job.clips(captioner, source, work)
    for records in captions_of(captioner, clips, job.generation, job.prompt, job.batch_size):
        for record in records:
            failed += _failures([record])
            if "caption" in record:
                show(record)
    return failed


def stream_to_stdout(job: CaptionJob) -> list[str]:
    """Print each caption while it is written; returns "video: reason" of the failed."""
    if job.generation.num_beams > 1:
        raise InputError("--stream: beam search knows its words at the end only; leave --beams out")
    captioner, source, work = _alone(job)
    if source.dataset is not None and source.dataset.store == "features":
        raise InputError("--stream: not of a features store; leave it out")
    failed = []
    clips = job.clips(captioner, source, work)
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
    """The video, and where it has several captions, the time."""
    if window is None:
        return record["video"]
    times = " - ".join(timestamp(record[key]).replace(",", ".") for key in ("start", "end"))
    return f"{record['video']}\t{times}"


def _alone(job: CaptionJob) -> tuple[VideoCaptioner, Source, list[Work]]:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--out: several ranks need a file to write to")
    source = job.source()
    return job.captioner(), source, _plan(job, source, {})


def _begin(file: CaptionFile, job: CaptionJob, source: Source, settings: dict, again: bool) -> dict[str, list[Record]]:
    """{id: the records that need not be made again}, without their captions; of the rest, the file
    keeps those of other videos."""
    asked, others = in_order(file.begin(settings, again), source.items)
    by_id: dict[str, list[Record]] = {}
    for record in asked:
        by_id.setdefault(record["id"], []).append(record)
    kept = []
    for item in source.items:
        records = by_id.get(item.id, [])
        good = still_good(item, records, job.window)
        kept += records if good == "all" else good
    file.keep([*kept, *others])
    found: dict[str, list[Record]] = {}
    for record in kept:
        found.setdefault(record["id"], []).append({key: value for key, value in record.items() if key != "caption"})
    return found


def _plan(job: CaptionJob, source: Source, there: dict[str, list[Record]]) -> list[Work]:
    """All that is left, in order; the same on every rank."""
    experiment = artifact_experiment(final_artifact(job.run), job.overrides)
    facts = {}
    rank, world = ranks.place()
    if job.window is not None:
        unknown = [item for item in source.items if still_good(item, there.get(item.id, []), job.window) != "all"]
        for part in ranks.gather(probe(unknown[rank::world], job.workers, job.deadline)):
            facts |= part
    decoders = sum(ranks.gather(job.workers or cores_of_rank()))
    return plan_work(source.items, there, job.window, experiment.data.num_frames, facts, decoders)


def _share(job: CaptionJob, captioner: VideoCaptioner, source: Source, work: list[Work], file: CaptionFile) -> None:
    """This rank's share, written batch by batch."""
    rank, world = ranks.place()
    total = sum(len(part.spans or [None]) for part in work)
    clips = job.clips(captioner, source, work)
    failed = 0
    with file.appender(rank) as appender, phase("captioning", total, "clips", left=True) as shown:
        for records in captions_of(captioner, clips, job.generation, job.prompt, job.batch_size):
            appender.add(records)
            failed += len(_failures(records)) * world
            # The other ranks are about as far.
            shown.done = min(shown.done + len(records) * world, total)
            shown.note = f"{failed:,} failed" if failed else ""


def _finish(file: CaptionFile, source: Source, before: int) -> CaptionSummary:
    target = file.target
    asked, others = in_order(file.read(), source.items)
    file.keep([*asked, *others])
    missing = {item.id for item in source.items} - {record["id"] for record in asked}
    if missing:  # on a network drive that is slow to show what other machines have written
        raise InputError(
            f"{target.jsonl}: nothing of {min(missing)} and {len(missing) - 1} more; "
            "another rank's file is not to be seen yet; the same command goes on"
        )
    paths = [target.path]
    if target.format != "jsonl":
        write_format(target, [*asked, *others])
    if target.folder:
        paths = [target.path / name for name in srt_files([*asked, *others])]
    return CaptionSummary(sum("caption" in r for r in asked), before, _failures(asked), source.skipped, paths)


def _failures(records: Sequence[Record]) -> list[str]:
    """Where it was and why, of each that has no caption."""
    found = []
    for record in records:
        if "error" in record:
            span = "" if not record["start"] else f" at {record['start']:g} s"
            found.append(f"{record['video'] or record['id']}{span}: {record['error']}")
    return found
