"""Captions from a trained run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextIteratorStreamer

from vlmds.distributed.cores import cores_of_rank
from vlmds.distributed.cuda import check_gpus
from vlmds.errors import InputError, SampleError
from vlmds.experiments.schema import Experiment
from vlmds.inference.generation import GenerationOptions, generate_captions
from vlmds.models.artifact import artifact_experiment, check_artifact_tower, load_artifact, resolve_artifact
from vlmds.models.assemble import Model, load_model
from vlmds.models.sequences import SequenceBuilder
from vlmds.runs.folder import final_artifact
from vlmds.video.pool import Clip, decode_videos


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
        cls, artifact: str | Path, *, device: str | None = None, overrides: Sequence[str] = ()
    ) -> VideoCaptioner:
        """Load an artifact and the pretrained models that it names.

        Args:
            artifact: a folder, or a hub repository: ``owner/name``, or ``owner/name@revision``. A
                run folder stands for the artifact of its last finished stage.
            device: default: the first GPU, else the CPU.
            overrides: of the experiment, such as ``llm.model=/models/Qwen3-8B``.

        Raises:
            InputError: no such artifact, a damaged one, or models that it was not trained with.
        """
        artifact = final_artifact(resolve_artifact(artifact))
        target = choose_device(device)
        experiment = artifact_experiment(artifact, overrides)
        model = load_model(experiment, target)
        load_artifact(artifact, model.captioner)
        check_artifact_tower(artifact, experiment, model.tower)
        model.captioner.to(target)
        return cls(experiment, model, target)

    def caption(
        self,
        videos: Iterable[str | Clip],
        options: GenerationOptions | None = None,
        *,
        prompt: str | None = None,
        batch_size: int = 4,
        workers: int | None = None,
    ) -> Iterator[str | SampleError]:
        """For each video (path, URL or :class:`Clip`), in order, its caption, or why there is none.

        Args:
            options: how captions are written; None is greedy search.
            prompt: instead of the experiment's.
            batch_size: videos captioned at once; the captions do not depend on it.
            workers: decoding processes (default: one per core).
        """
        for batch in batched(self.frames(videos, workers), batch_size):
            frames = [item for item in batch if not isinstance(item, SampleError)]
            captions = iter(self.caption_frames(np.stack(frames), [prompt] * len(frames), options) if frames else [])
            for item in batch:
                yield item if isinstance(item, SampleError) else next(captions)

    def frames(
        self, videos: Iterable[str | Clip], workers: int | None = None, deadline: float = 60.0
    ) -> Iterator[np.ndarray | SampleError]:
        """For each video, in order, the frames that the model sees, uint8 [F, 3, S, S], or why
        there are none. deadline: seconds that decoding one may take."""
        return decode_videos(
            videos,
            self.experiment.data.num_frames,
            self.model.image_size,
            workers=workers or cores_of_rank(),
            deadline=deadline,
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
        self, frames: np.ndarray, prompt: str | None = None, options: GenerationOptions | None = None
    ) -> Generator[str, None, str]:
        """The caption of one video in pieces, as they are written; together they are what
        ``caption_frames`` gives, but for spaces at the ends. Leaving the loop ends the writing.
        A piece is empty where a token does not end a word, and after each second without a token,
        so that one can leave then, too. The generator returns why it ended: "stop", or "length"
        at ``max_new_tokens``.

        Args:
            frames: uint8 [F, 3, S, S].

        Raises:
            InputError: beam search, whose words are known at the end only.
        """
        options = options or GenerationOptions()
        if options.num_beams > 1:
            raise InputError("num_beams: beam search cannot be streamed; use 1")
        return self._stream(frames, prompt, options)

    def _stream(self, frames: np.ndarray, prompt: str | None, options: GenerationOptions) -> Generator[str, None, str]:
        streamer = _Streamer(self.builder.tokenizer, skip_prompt=True, timeout=1.0, skip_special_tokens=True)
        left, failures = threading.Event(), queue.SimpleQueue()

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
                    stopping_criteria=StoppingCriteriaList([_Left(left)]),
                )
            except BaseException as error:  # it belongs to the reader
                failures.put(error)
                streamer.end()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield from streamer.pieces()
        finally:
            left.set()
            thread.join()
        if not failures.empty():
            raise failures.get()
        return "stop" if streamer.last == self.builder.eos_token_id else "length"


class _Streamer(TextIteratorStreamer):
    """last: the last token."""

    last: int | None = None

    def pieces(self) -> Iterator[str]:
        """What comes, and an empty piece whenever the timeout is over."""
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
        super().put(value)


class _Left(StoppingCriteria):
    """Stops once the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def choose_device(device: str | None) -> torch.device:
    """The device of that name; None: the first GPU, else the CPU.

    Raises:
        InputError: None, and there is a GPU, but PyTorch cannot use it.
    """
    if device is None:
        check_gpus()
    return torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))


def batched(items: Iterable, size: int) -> Iterator[list]:
    """The items in lists of ``size``, the last one maybe shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
