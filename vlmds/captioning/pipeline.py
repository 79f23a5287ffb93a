"""From items to captions on one rank: decode, batch, generate."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmds.captioning.outputs import Record
from vlmds.captioning.sources import Item, Span, grouped, spans
from vlmds.console.progress import phase
from vlmds.data.loader import Batches, SampleReader, visual_inputs
from vlmds.distributed.cores import cores_of_rank
from vlmds.distributed.watchdog import doing
from vlmds.errors import InputError, SampleError
from vlmds.evaluation.scoring import ClipReader, Unreadable
from vlmds.inference.generation import GenerationOptions, generate_captions
from vlmds.inference.video_captioner import VideoCaptioner, batched
from vlmds.video.pool import Clip, decode_windows, video_facts

GROUP_BYTES = 512 << 20  # of frames as the video has them, which a decoding process holds
GROUP_WINDOWS = 32
BATCHES_AHEAD = 2  # decoded while the model writes


@dataclass(frozen=True)
class Work:
    """Spans of one item whose frames are decoded together; None: the whole item, whose end is not
    known yet. problem: why it cannot be captioned."""

    item: Item
    spans: list[Span] | None = None
    problem: str | None = None


@dataclass
class Clipped:
    """One span: its record, which still lacks the caption or has the error, and what the model
    sees: uint8 [F, 3, S, S], or of a features store bfloat16 [F·P, width]."""

    record: Record
    inputs: dict[str, Tensor] | None = None


def caption_records(
    captioner: VideoCaptioner,
    videos: Iterable[str | Clip],
    options: GenerationOptions | None = None,
    *,
    window: float | None = None,
    prompt: str | None = None,
    batch_size: int = 4,
    workers: int | None = None,
    deadline: float = 60.0,
) -> Iterator[Record]:
    """Captions with their times, for notebooks: for each video in order, or each window of it, a
    dict with video, start, end, duration (seconds) and caption, or error in its place.

    Args:
        window: seconds; None: one caption for each video. The rest as
            :meth:`VideoCaptioner.caption`; deadline: seconds that decoding may take.
    """
    items = [
        Item(clip.video, clip.video, clip)
        for clip in (video if isinstance(video, Clip) else Clip(str(video)) for video in videos)
    ]
    work = plan_work(
        items,
        {},
        window,
        captioner.experiment.data.num_frames,
        probe(items, workers, deadline) if window else {},
        workers or cores_of_rank(),
    )
    clips = decoded(captioner, work, workers, deadline)
    for records in captions_of(captioner, clips, options, prompt, batch_size):
        for record in records:
            yield {key: value for key, value in record.items() if key != "id"}


def probe(items: Sequence[Item], workers: int | None, deadline: float) -> dict[str, dict | str]:
    """{id: facts about the video, or why it cannot be read}"""
    items = [item for item in items if item.problem is None]
    found = video_facts([item.clip.video for item in items], workers=workers or cores_of_rank(), deadline=deadline)
    facts_by_id = {}
    with phase("looking at the videos", len(items), "videos", left=True) as shown:
        for item, facts in zip(items, found, strict=True):
            doing("probing", [item.id])
            facts_by_id[item.id] = str(facts) if isinstance(facts, SampleError) else facts
            shown.advance()
    return facts_by_id


def plan_work(
    items: Sequence[Item],
    done: dict[str, list[Record]],
    window: float | None,
    num_frames: int,
    facts: dict[str, dict | str],
    decoders: int = 1,
) -> list[Work]:
    """What is left to do, in order.

    Args:
        done: records by id. facts: see :func:`probe`; only windows need them. decoders: processes
            that one long video is to keep busy, too.
    """
    work = []
    each = max(1, decoders // max(1, len(facts)))
    for item in items:
        if item.problem is not None:
            work.append(Work(item, problem=item.problem))
        elif still_good(item, done.get(item.id, []), window) == "all":
            continue
        elif window is None or item.position is not None:
            work.append(Work(item))
        else:
            work += _windows(item, done.get(item.id, []), window, num_frames, facts[item.id], each)
    return work


def still_good(item: Item, records: Sequence[Record], window: float | None) -> str | list[Record]:
    """Which of the records of an item's id are still what is asked for: "all" that there can be, or
    a list."""
    if item.position is not None:
        return "all" if records else []
    records = [r for r in records if r.get("prompt") == item.prompt]
    if not records or item.clip is None:
        return []
    try:
        wanted = {*spans(item.clip, records[-1]["duration"], window)}
    except SampleError:
        return []
    good = [r for r in records if (r["start"], r["end"]) in wanted]
    return "all" if {(r["start"], r["end"]) for r in good} == wanted else good


def _windows(
    item: Item, records: Sequence[Record], window: float, num_frames: int, facts: dict | str, parts: int
) -> Iterator[Work]:
    if isinstance(facts, str):
        yield Work(item, problem=facts)
        return
    try:
        wanted = spans(item.clip, facts["duration"], window)
    except SampleError as error:
        yield Work(item, problem=str(error))
        return
    good = {(r["start"], r["end"]) for r in still_good(item, records, window)}
    todo = [span for span in wanted if span not in good]
    size = 3 * facts["width"] * facts["height"] * num_frames
    most = max(1, min(GROUP_WINDOWS, GROUP_BYTES // size, -(-len(todo) // parts)))
    for group in grouped(todo, window, most):
        yield Work(item, group)


def decoded(captioner: VideoCaptioner, work: Iterable[Work], workers: int | None, deadline: float) -> Iterator[Clipped]:
    """The spans of videos with their frames, in order; of `work`, no more is taken than there are
    decoding processes for."""
    taken: deque[Work] = deque()

    def requests() -> Iterator[tuple[Clip, int]]:
        for job in work:
            taken.append(job)
            if job.problem is None:
                yield _request(job)

    def problems() -> Iterator[Clipped]:
        while taken and taken[0].problem is not None:
            job = taken.popleft()
            yield Clipped(_record(job.item, None, None) | {"error": job.problem})

    for result in decode_windows(
        requests(),
        captioner.experiment.data.num_frames,
        captioner.model.image_size,
        workers=workers or cores_of_rank(),
        deadline=deadline,
    ):
        yield from problems()
        job = taken.popleft()
        if isinstance(result, SampleError) and len(job.spans or ()) > 1:
            # One bad frame, or the deadline, must not cost the other windows.
            alone = [Work(job.item, [span]) for span in job.spans]
            yield from decoded(captioner, alone, 2, deadline)
        else:
            yield from _clipped(job, result)
    yield from problems()


def _clipped(job: Work, result: tuple[np.ndarray, dict[str, Any]] | SampleError) -> Iterator[Clipped]:
    if isinstance(result, SampleError):
        span = job.spans[0] if job.spans else None
        yield Clipped(_record(job.item, span, None) | {"error": str(result)})
        return
    frames, facts = result
    found = job.spans or spans(job.item.clip, facts["duration"], None)
    for window, span in zip(frames, found, strict=True):
        yield Clipped(_record(job.item, span, facts["duration"]), {"frames": torch.from_numpy(window)})


def _request(job: Work) -> tuple[Clip, int]:
    if job.spans is None:
        return job.item.clip, 1
    return Clip(job.item.clip.video, job.spans[0][0], job.spans[-1][1]), len(job.spans)


def packed(reader: SampleReader, work: Sequence[Work], workers: int, batch_size: int) -> Iterator[Clipped]:
    """The samples of a packed dataset; reader: unshuffled."""
    items = {job.item.position: job.item for job in work}
    positions = list(items)
    chunks = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    for samples in Batches(ClipReader(reader), chunks, list, workers):
        if isinstance(samples, dict):
            raise InputError(samples["failure"])
        for sample in samples:
            item, row = items[sample.position], reader.row(sample.position)
            record = _record(item, row.span, row.duration)
            if isinstance(sample, Unreadable):
                yield Clipped(record | {"error": sample.reason})
                continue
            if sample.prompt is not None:
                record["prompt"] = sample.prompt
            inputs = visual_inputs([sample])
            yield Clipped(record, {name: tensor[0] for name, tensor in inputs.items()})


def captions_of(
    captioner: VideoCaptioner,
    clips: Iterable[Clipped],
    options: GenerationOptions | None,
    prompt: str | None,
    batch_size: int,
) -> Iterator[list[Record]]:
    """The finished records, in order, batch by batch."""
    for batch in ahead(batched(clips, batch_size), BATCHES_AHEAD):
        doing("captioning", [clip.record["id"] for clip in batch])
        good = [clip for clip in batch if clip.inputs is not None]
        if good:
            names = good[0].inputs
            features = captioner.model.features(
                {name: torch.stack([clip.inputs[name] for clip in good]) for name in names}
            )
            prompts = [clip.record.get("prompt", prompt) for clip in good]
            captions = generate_captions(
                captioner.model, captioner.builder, features, prompts, options or GenerationOptions()
            )
            for clip, caption in zip(good, captions, strict=True):
                clip.record["caption"] = caption
        yield [clip.record for clip in batch]
        doing("waiting for videos to be decoded")


def streamed(
    captioner: VideoCaptioner, clips: Iterable[Clipped], options: GenerationOptions, prompt: str | None
) -> Iterator[tuple[Record, Iterator[str]]]:
    """Each span's record and its caption in pieces, which are to be read before the next."""
    for clip in clips:
        pieces = iter(())
        if clip.inputs is not None:
            pieces = captioner.stream(clip.inputs["frames"].numpy(), clip.record.get("prompt", prompt), options)
        yield clip.record, pieces


def ahead(items: Iterable, count: int) -> Iterator:
    """The items, of which a thread prepares `count` ahead. What it raises is raised here."""
    waiting: queue.Queue = queue.Queue(count)
    left = threading.Event()
    end = object()

    def put(entry: Any) -> None:
        while not left.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                pass

    def fill() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                put((item, None))
                if left.is_set():
                    break
            put((end, None))
        except BaseException as error:  # it belongs to the reader
            put((end, error))
        finally:
            getattr(iterator, "close", lambda: None)()

    # Not joined: it may be waiting for a video to be decoded, and nobody waits for that any more.
    threading.Thread(target=fill, daemon=True).start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        left.set()


def _record(item: Item, span: Span | None, duration: float | None) -> Record:
    start, end = (round(seconds, 6) for seconds in span) if span else (None, None)
    record = {"id": item.id, "video": item.video, "start": start, "end": end, "duration": duration}
    return record if item.prompt is None else record | {"prompt": item.prompt}
