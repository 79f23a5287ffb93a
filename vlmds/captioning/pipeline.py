"""From items to captions on one rank: decode, batch, generate."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmds.captioning.sources import Item
from vlmds.captioning.windows import Span, grouped, spans
from vlmds.console.progress import phase
from vlmds.data.exact_reader import Unreadable, read_exactly
from vlmds.data.loader import SampleReader, visual_inputs
from vlmds.distributed.cores import cores_of_rank
from vlmds.distributed.watchdog import doing
from vlmds.errors import SampleError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.inference.generation import ClipInput, caption_batches
from vlmds.inference.options import CAPTION_BATCH_SIZE, GenerationOptions
from vlmds.inference.video_captioner import VideoCaptioner, batched
from vlmds.runs.rank_jsonl import Record
from vlmds.video.pool import Clip, decode_windows, video_facts

GROUP_BYTES = 512 << 20  # memory of a decoding process for frames at the video's resolution
GROUP_WINDOWS = 32
BATCHES_AHEAD = 2  # decoded while captions are generated


@dataclass(frozen=True)
class DecodeTask:
    """Spans of one item whose frames are decoded together; None: the whole item, whose end is not
    known yet. problem: why it cannot be captioned."""

    item: Item
    spans: list[Span] | None = None
    problem: str | None = None


def caption_records(
    captioner: VideoCaptioner,
    videos: Iterable[str | Clip],
    options: GenerationOptions | None = None,
    *,
    window: float | None = None,
    prompt: str | None = None,
    batch_size: int = CAPTION_BATCH_SIZE,
    workers: int | None = None,
    deadline: float = DECODE_SECONDS,
) -> Iterator[Record]:
    """Captions with their times, for notebooks: for each video in order, or each window of it, a
    dict with video, start, end, duration (seconds) and caption, or error in its place.

    Args:
        window: seconds; None: one caption for each video.
        deadline: seconds that decoding may take. The others: see :meth:`VideoCaptioner.caption`.
    """
    items = [
        Item(clip.video, clip.video, clip)
        for clip in (video if isinstance(video, Clip) else Clip(str(video)) for video in videos)
    ]
    tasks = plan_tasks(
        items,
        {},
        window,
        captioner.experiment.data.num_frames,
        probe(items, workers, deadline) if window else {},
        workers or cores_of_rank(),
    )
    clips = decoded(captioner, tasks, workers, deadline)
    for records in captions_of(captioner, clips, options, prompt, batch_size):
        for record in records:
            yield {key: value for key, value in record.items() if key != "id"}


def probe(items: Sequence[Item], workers: int | None, deadline: float) -> dict[str, dict | str]:
    """{id: facts about the video, or why it cannot be read}"""
    items = [item for item in items if item.problem is None]
    videos = [_clip(item).video for item in items]
    found = video_facts(videos, workers=workers or cores_of_rank(), deadline=deadline)
    facts_by_id: dict[str, dict | str] = {}
    with phase("probing the videos", len(items), "videos", left=True) as shown:
        for item, facts in zip(items, found, strict=True):
            doing("probing", [item.id])
            facts_by_id[item.id] = str(facts) if isinstance(facts, SampleError) else facts
            shown.advance()
    return facts_by_id


def plan_tasks(
    items: Sequence[Item],
    done: dict[str, list[Record]],
    window: float | None,
    num_frames: int,
    facts: dict[str, dict | str],
    decoders: int = 1,
) -> list[DecodeTask]:
    """The remaining tasks, in order.

    Args:
        done: records by id. facts: see :func:`probe`; only windows need them. decoders: decoding
            processes, which a single long video must keep busy too.
    """
    tasks: list[DecodeTask] = []
    each = max(1, decoders // max(1, len(facts)))
    for item in items:
        if item.problem is not None:
            tasks.append(DecodeTask(item, problem=item.problem))
        elif still_good(item, done.get(item.id, []), window) == "all":
            continue
        elif window is None or item.position is not None:
            tasks.append(DecodeTask(item))
        else:
            tasks += _windows(item, done.get(item.id, []), window, num_frames, facts[item.id], each)
    return tasks


def still_good(item: Item, records: Sequence[Record], window: float | None) -> str | list[Record]:
    """The records of an item that are still valid: "all" that there can be, or a list."""
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
) -> Iterator[DecodeTask]:
    if isinstance(facts, str):
        yield DecodeTask(item, problem=facts)
        return
    try:
        wanted = spans(_clip(item), facts["duration"], window)
    except SampleError as error:
        yield DecodeTask(item, problem=str(error))
        return
    kept = still_good(item, records, window)
    good = {*wanted} if isinstance(kept, str) else {(r["start"], r["end"]) for r in kept}
    todo = [span for span in wanted if span not in good]
    size = 3 * facts["width"] * facts["height"] * num_frames
    most = max(1, min(GROUP_WINDOWS, GROUP_BYTES // size, -(-len(todo) // parts)))
    for group in grouped(todo, window, most):
        yield DecodeTask(item, group)


def decoded(
    captioner: VideoCaptioner, tasks: Iterable[DecodeTask], workers: int | None, deadline: float
) -> Iterator[ClipInput]:
    """The spans of videos with their frames, in order, each with its record, which still lacks the
    caption or has the error. No more `tasks` are taken than there are decoding processes."""
    taken: deque[DecodeTask] = deque()

    def requests() -> Iterator[tuple[Clip, int]]:
        for task in tasks:
            taken.append(task)
            if task.problem is None:
                yield _request(task)

    def problems() -> Iterator[ClipInput]:
        while taken and taken[0].problem is not None:
            task = taken.popleft()
            yield _clip_input(_record(task.item, None, None) | {"error": task.problem})

    for result in decode_windows(
        requests(),
        captioner.experiment.data.num_frames,
        captioner.model.image_size,
        workers=workers or cores_of_rank(),
        deadline=deadline,
        fit=captioner.experiment.data.fit,
    ):
        yield from problems()
        task = taken.popleft()
        if isinstance(result, SampleError) and task.spans is not None and len(task.spans) > 1:
            # One bad frame, or the deadline, must not cost the other windows.
            alone = [DecodeTask(task.item, [span]) for span in task.spans]
            yield from decoded(captioner, alone, 2, deadline)
        else:
            yield from _spans_of(task, result)
    yield from problems()


def _spans_of(task: DecodeTask, result: tuple[np.ndarray, dict[str, Any]] | SampleError) -> Iterator[ClipInput]:
    if isinstance(result, SampleError):
        span = task.spans[0] if task.spans else None
        yield _clip_input(_record(task.item, span, None) | {"error": str(result)})
        return
    frames, facts = result
    found = task.spans or spans(_clip(task.item), facts["duration"], None)
    for window, span in zip(frames, found, strict=True):
        yield _clip_input(_record(task.item, span, facts["duration"]), {"frames": torch.from_numpy(window)})


def _request(task: DecodeTask) -> tuple[Clip, int]:
    clip = _clip(task.item)
    if task.spans is None:
        return clip, 1
    return Clip(clip.video, task.spans[0][0], task.spans[-1][1]), len(task.spans)


def packed(reader: SampleReader, tasks: Sequence[DecodeTask], workers: int, batch_size: int) -> Iterator[ClipInput]:
    """The samples of a packed dataset, as :func:`decoded` gives them; reader: unshuffled."""
    items = {task.item.position: task.item for task in tasks if task.item.position is not None}
    for batch in read_exactly(reader, list(items), batch_size, workers):
        for sample in batch:
            item, row = items[sample.position], reader.row(sample.position)
            record = _record(item, row.span, row.duration)
            if isinstance(sample, Unreadable):
                yield _clip_input(record | {"error": sample.reason})
                continue
            if sample.prompt is not None:
                record["prompt"] = sample.prompt
            yield _clip_input(record, {name: clips[0] for name, clips in visual_inputs([sample]).items()})


def captions_of(
    captioner: VideoCaptioner,
    clips: Iterable[ClipInput],
    options: GenerationOptions | None,
    prompt: str | None,
    batch_size: int,
) -> Iterator[list[Record]]:
    """The finished records, in order, batch by batch. prompt: for clips that have none."""
    with_prompts = (replace(clip, prompt=prompt if clip.prompt is None else clip.prompt) for clip in clips)
    batches = ahead(batched(with_prompts, batch_size), BATCHES_AHEAD)
    for batch in caption_batches(captioner.model, captioner.builder, batches, options or GenerationOptions()):
        for clip, caption in zip(batch.clips, batch.captions, strict=True):
            if caption is not None:
                clip.about["caption"] = caption
        yield [clip.about for clip in batch.clips]


def streamed(
    captioner: VideoCaptioner, clips: Iterable[ClipInput], options: GenerationOptions, prompt: str | None
) -> Iterator[tuple[Record, Iterator[str]]]:
    """Each span's record and its caption in pieces, which must be read before the next."""
    for clip in clips:
        pieces: Iterator[str] = iter(())
        if clip.inputs is not None:
            pieces = captioner.stream(
                clip.inputs["frames"].numpy(), prompt if clip.prompt is None else clip.prompt, options
            )
        yield clip.about, pieces


def ahead(items: Iterable, count: int) -> Iterator:
    """The items; a thread prepares `count` of them ahead. Its errors are raised here."""
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
        except BaseException as error:  # raised below
            put((end, error))
        finally:
            getattr(iterator, "close", lambda: None)()

    # Not joined: it may be waiting for a video that nobody needs any more.
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


def _clip(item: Item) -> Clip:
    assert item.clip is not None  # items with a position are read by `packed`
    return item.clip


def _clip_input(record: Record, inputs: dict[str, Tensor] | None = None) -> ClipInput:
    return ClipInput(record["id"], inputs, record.get("prompt"), record)


def _record(item: Item, span: Span | None, duration: float | None) -> Record:
    start, end = (round(seconds, 6) for seconds in span) if span else (None, None)
    record = {"id": item.id, "video": item.video, "start": start, "end": end, "duration": duration}
    return record if item.prompt is None else record | {"prompt": item.prompt}
