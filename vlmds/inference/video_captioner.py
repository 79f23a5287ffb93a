"""`VideoCaptioner`, the Python API for captions from a trained run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer

from vlmds.distributed.cores import cores_of_rank
from vlmds.distributed.cuda import check_gpus
from vlmds.errors import InputError, SampleError
from vlmds.experiments.defaults import DECODE_SECONDS
from vlmds.experiments.schema import Experiment
from vlmds.inference.generation import ClipInput, caption_batches, generate_captions
from vlmds.inference.options import CAPTION_BATCH_SIZE, GenerationOptions
from vlmds.models.artifact import (
    Artifact,
    artifact_experiment,
    check_artifact_tower,
    load_artifact,
    read_artifact,
    resolve_artifact,
)
from vlmds.models.assemble import Model, load_model
from vlmds.models.sequences import SequenceBuilder
from vlmds.runs.folder import final_artifact
from vlmds.video.pool import Clip, decode_videos


class Ending(NamedTuple):
    """How a streamed caption ended. reason: "stop" (end of turn, or a stop text), or "length". prompt_tokens:
    visual tokens included. new_tokens: the end of turn included."""

    reason: str
    prompt_tokens: int
    new_tokens: int


class VideoCaptioner:
    """A trained model that captions videos.

    Args:
        experiment: the artifact's. model: with the artifact's weights loaded.
    """

    def __init__(self, experiment: Experiment, model: Model, device: torch.device):
        self.experiment, self.model, self.device = experiment, model, device
        model.captioner.eval().requires_grad_(False)
        self.builder = SequenceBuilder(model.tokenizer, experiment.data.prompt, model.captioner.projector.num_tokens)

    @classmethod
    def from_pretrained(
        cls, artifact: str | Path | Artifact, *, device: str | None = None, overrides: Sequence[str] = ()
    ) -> VideoCaptioner:
        """Load an artifact and the pretrained models that it names.

        Args:
            artifact: a folder, or a hub repository: ``owner/name``, or ``owner/name@revision``. A
                run folder stands for the artifact of its last finished stage. Or an artifact
                that has been read.
            device: default: the first GPU, else the CPU.
            overrides: of the experiment, such as ``llm.model=/models/Qwen3-8B``.

        Raises:
            InputError: no such artifact, a damaged one, or models that it was not trained with.
        """
        if not isinstance(artifact, Artifact):
            artifact = read_artifact(final_artifact(resolve_artifact(artifact)))
        target = choose_device(device)
        experiment = artifact_experiment(artifact, overrides)
        model = load_model(experiment, target)
        load_artifact(artifact, model.captioner)
        assert model.tower is not None  # None only where features are stored
        check_artifact_tower(artifact, experiment, model.tower)
        model.captioner.to(target)
        return cls(experiment, model, target)

    def caption(
        self,
        videos: Iterable[str | Clip],
        options: GenerationOptions | None = None,
        *,
        prompt: str | None = None,
        batch_size: int = CAPTION_BATCH_SIZE,
        workers: int | None = None,
    ) -> Iterator[str | SampleError]:
        """The caption of each video (path, URL or :class:`Clip`), in order, or the error.

        Args:
            options: of generation; None is greedy search.
            prompt: instead of the experiment's.
            batch_size: videos captioned at once; the captions do not depend on it.
            workers: decoding processes (default: one per core).
        """
        clips = (
            ClipInput(f"video {number}", None, about=item)
            if isinstance(item, SampleError)
            else ClipInput(f"video {number}", {"frames": torch.from_numpy(item)}, prompt)
            for number, item in enumerate(self.frames(videos, workers), 1)
        )
        batches = batched(clips, batch_size)
        for batch in caption_batches(self.model, self.builder, batches, options or GenerationOptions()):
            for clip, caption in zip(batch.clips, batch.captions, strict=True):
                yield clip.about if caption is None else caption

    def frames(
        self, videos: Iterable[str | Clip], workers: int | None = None, deadline: float = DECODE_SECONDS
    ) -> Iterator[np.ndarray | SampleError]:
        """The model's frames of each video, in order, uint8 [F, 3, S, S] (F is 1 for a still picture), or the
        error. deadline: seconds for decoding one video."""
        return decode_videos(
            videos,
            self.experiment.data.num_frames,
            self.model.image_size,
            workers=workers or cores_of_rank(),
            deadline=deadline,
            fit=self.experiment.data.fit,
        )

    @torch.no_grad()
    def caption_frames(
        self, frames: np.ndarray, prompts: Sequence[str | None] | None = None, options: GenerationOptions | None = None
    ) -> list[str]:
        """Captions of one batch: frames uint8 [B, F, 3, S, S], a prompt (or None) for each."""
        features = self.model.features({"frames": torch.from_numpy(frames)})
        return generate_captions(
            self.model, self.builder, features, prompts or [None] * len(frames), options or GenerationOptions()
        )

    def stream(
        self,
        frames: np.ndarray,
        prompt: str | None = None,
        options: GenerationOptions | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[str, None, Ending]:
        """The caption of one video in pieces, as they are generated. Together they are the result of
        ``caption_frames``, except for spaces at the ends. Closing the generator ends the generation.
        A piece is empty if a token does not end a word, and after each second without a token (a
        chance to close it). The generator returns its :class:`Ending`.

        Args:
            frames: uint8 [F, 3, S, S].
            stop: texts that end the caption; it ends before the first of them.

        Raises:
            InputError: beam search, which has no words before the end.
        """
        options = options or GenerationOptions()
        if options.num_beams > 1:
            raise InputError("num_beams: beam search cannot be streamed; use 1")
        return self._stream(frames, prompt, options, stop)

    def _stream(
        self, frames: np.ndarray, prompt: str | None, options: GenerationOptions, stop: Sequence[str]
    ) -> Generator[str, None, Ending]:
        streamer = _Streamer(self.builder.tokenizer, skip_prompt=True, timeout=1.0, skip_special_tokens=True)
        left = threading.Event()
        failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

        def write() -> None:
            try:
                with torch.no_grad():
                    features = self.model.features({"frames": torch.from_numpy(frames[None])})
                generate_captions(
                    self.model,
                    self.builder,
                    features,
                    [prompt],
                    options,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Left(left), _Said(self.builder, stop)]),
                )
            except BaseException as error:  # raised below, in the caller's thread
                failures.put(error)
                streamer.end()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            stopped = yield from until_stop(streamer.pieces(), stop)
        finally:
            left.set()
            thread.join()
        if not failures.empty():
            raise failures.get()
        projector = self.model.captioner.projector
        asked = self.builder.prompt_ids(prompt, projector.tokens_of(len(frames) * projector.patches))
        ended = stopped or streamer.last == self.builder.eos_token_id
        return Ending("stop" if ended else "length", len(asked), streamer.tokens)


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Generator[str, None, bool]:
    """The pieces up to where the first of the stop texts begins; what may be the beginning of one waits for
    the next piece. All pieces are read. Returns whether there was one."""
    waiting, found = "", False
    for piece in pieces:
        if found:
            continue
        waiting += piece
        begins = [waiting.find(text) for text in stop if text in waiting]
        if begins:
            found = True
            yield waiting[: min(begins)]
            continue
        keep = max((n for text in stop for n in range(1, len(text)) if waiting.endswith(text[:n])), default=0)
        yield waiting[: len(waiting) - keep]
        waiting = waiting[len(waiting) - keep :]
    if not found and waiting:
        yield waiting
    return found


class _Streamer(TextIteratorStreamer):
    """last: the last token. tokens: number of tokens."""

    last: int | None = None
    tokens = 0

    def pieces(self) -> Iterator[str]:
        """The pieces, and an empty one after each timeout."""
        while True:
            try:
                yield next(self)
            except StopIteration:
                return
            except queue.Empty:
                yield ""

    def put(self, value: torch.Tensor) -> None:
        if value.numel():  # the prompt, given as embeddings, has no tokens
            self.last = int(value.flatten()[-1])
            self.tokens += value.numel()
        super().put(value)


class _Left(StoppingCriteria):
    """Stops when the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _Said(StoppingCriteria):
    """Stops as soon as the text contains one of the stop texts, so that the number of tokens does not depend on
    when a reader sees it."""

    def __init__(self, builder: SequenceBuilder, stop: Sequence[str]):
        self.builder, self.stop = builder, stop

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        text = self.builder.tokenizer.decode(input_ids[0], skip_special_tokens=True) if self.stop else ""
        return torch.full((len(input_ids),), any(stop in text for stop in self.stop), device=input_ids.device)


def choose_device(device: str | None) -> torch.device:
    """The device of that name; None: the first GPU, else the CPU.

    Raises:
        InputError: no device was given, and there is a GPU that PyTorch cannot use.
    """
    if device is None:
        check_gpus()
    return torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))


def batched(items: Iterable, size: int) -> Iterator[list]:
    """The items in lists of ``size``; the last one may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
