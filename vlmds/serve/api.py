"""JSON endpoints: captions of videos in the chat format of OpenAI's API.

    POST /caption   also as /v1/chat/completions
    GET  /models    also as /v1/models; /models/NAME is one of them
    GET  /health

The video is a ``video_url`` part of the one user message, as vLLM and SGLang take it, or a picture an
``image_url`` part; its URL is a ``data:`` URL. Or the request is a form with a file ``video`` and the fields'
values.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from vlmds.errors import SampleError
from vlmds.inference.video_captioner import Ending, VideoCaptioner
from vlmds.serve.chat import Answer, Chat, Form, Options, asked, error_body, event, valid
from vlmds.serve.loaded import Busy, Models, RequestError
from vlmds.serve.url_download import fetch

UPLOADS = 4  # bodies read at once; others wait before theirs is
READING = 600.0  # seconds that a body may take to arrive
DRAINING = 5.0  # seconds for which the rest of a refused body is read; the client then gets the answer


@dataclass(frozen=True)
class _Ask:
    """A request: path of the video's file, and the rest. system: a text before the prompt. usage: at the end of a
    stream."""

    video: Path
    prompt: str | None
    options: Options
    system: str | None = None
    usage: bool = False


def add_api(app: FastAPI, models: Models, folder: Path) -> None:
    """Add the endpoints. folder: private, for videos while they are read."""
    router = APIRouter()
    uploads = anyio.Semaphore(UPLOADS)
    started = int(time.time())

    async def caption(request: Request) -> Response:
        file = NamedTemporaryFile(dir=folder, suffix=".video")  # deleted when closed
        with file:
            async with uploads:
                ask = await _read(request, models, file)
            options = ask.options
            captioner = models.get(options.model)
            prompt, generation = models.options(
                _prompt(ask, captioner),
                max_new_tokens=options.max_tokens,
                **options.model_dump(include={"temperature", "top_p", "repetition_penalty", "seed"}),
            )
            stops = options.stops
            await run_sync(models.facts, ask.video)
            frames = await run_sync(models.frames, ask.video, captioner)
        pieces = _pieces(models.stream(captioner, frames, prompt, generation, stops))
        answer = Answer(options.model or models.names[0], ask.usage)
        if options.stream:
            first = await anext(pieces)  # an error until here still has a status of its own
            return StreamingResponse(_events(request, answer, first, pieces), media_type="text/event-stream")
        text = ""
        ending: Ending | None = None
        async for piece, ending in pieces:  # noqa: B007  # the last one is used below
            text += piece
            if await request.is_disconnected():
                await pieces.aclose()
                return Response(status_code=499)  # nobody reads it
        assert ending is not None
        return JSONResponse(answer.whole(text.strip(), ending))

    async def retrieve(name: str) -> dict[str, Any]:
        captioner = models.get(name)
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "vlmds",
            "num_frames": captioner.experiment.data.num_frames,
            "prompt": captioner.builder.prompt,
        }

    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [await retrieve(name) for name in models.names]}

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    for path in ("/caption", "/v1/chat/completions"):
        router.add_api_route(path, caption, methods=["POST"], response_model=None)
    for path in ("/models", "/v1/models"):
        router.add_api_route(path, list_models)
        router.add_api_route(path + "/{name:path}", retrieve)
    router.add_api_route("/health", health)
    app.include_router(router)
    _add_errors(app)


async def _read(request: Request, models: Models, file) -> _Ask:
    """Write the request's video to the file. Raises RequestError."""
    limits = models.limits
    form = request.headers.get("content-type", "").startswith("multipart/form-data")
    # Base64 has four characters for three bytes. Beside the video there is little.
    most = limits.bytes + (1 << 20) if form else limits.bytes * 4 // 3 + (1 << 20)
    too_large = RequestError(f"request too large: this server takes videos of at most {limits.megabytes:g} MB", 413)
    seen = 0

    async def receive():
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise too_large
        return message

    try:
        with anyio.fail_after(READING):
            if int(request.headers.get("content-length") or 0) > most:
                raise too_large
            bounded = Request(request.scope, receive)
            ask = await (_read_form(bounded, file) if form else _read_json(bounded, models, file))
    except TimeoutError:
        raise RequestError("the request did not arrive in time", 408) from None
    except RequestError as error:
        if error is too_large:
            await _drain(request, most)
        raise
    file.flush()
    return ask


async def _drain(request: Request, most: int) -> None:
    """Read on for a while: a client that is still sending would see only a broken connection."""
    with anyio.move_on_after(DRAINING):
        while most > 0:
            message = await request.receive()
            most -= len(message.get("body", b""))
            if not message.get("more_body"):
                return


async def _read_form(request: Request, file) -> _Ask:
    try:
        form = await request.form(max_files=1, max_fields=16, max_part_size=1 << 16)
    except HTTPException as error:  # how Starlette says that it cannot be parsed
        raise RequestError(f"the form cannot be read: {error.detail}") from None
    try:
        fields = dict(form.multi_items())
        video = fields.pop("video", None)
        if video is None or isinstance(video, str):
            raise RequestError("the form has no file: send one as video, such as curl -F video=@clip.mp4")
        ask = valid(Form, fields)
        while block := await video.read(1 << 20):
            file.write(block)
    finally:
        await form.close()
    return _Ask(Path(file.name), ask.prompt, ask)


async def _read_json(request: Request, models: Models, file) -> _Ask:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise RequestError("the request is not JSON") from None
    chat: Chat = valid(Chat, body)
    if chat.max_completion_tokens is not None:  # the newer name
        chat.max_tokens = chat.max_completion_tokens
    ask = asked(chat)
    if ask.url[:5].lower() == "data:":
        file.write(_decode(ask.url))
    elif not models.limits.urls:
        raise RequestError(
            "video_url: this server takes data: URLs only, such as "
            "data:video/mp4;base64,…; it opens neither files nor addresses"
        )
    else:
        await fetch(ask.url, file, models.limits.bytes)
    return _Ask(Path(file.name), ask.prompt, chat, ask.system, chat.stream_options.include_usage)


def _prompt(ask: _Ask, captioner: VideoCaptioner) -> str | None:
    """The text after the video. The model was trained with one user turn and no system turn, so system messages
    stand at the beginning of the user's text, on lines of their own."""
    if ask.system is None:
        return ask.prompt
    own = ask.prompt if ask.prompt and ask.prompt.strip() else captioner.builder.prompt
    return f"{ask.system}\n{own}"


def _decode(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("video_url: not of the form data:video/mp4;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("video_url: its base64 cannot be decoded") from None


_Pieces = AsyncGenerator[tuple[str, Ending | None]]


async def _pieces(written: Generator[str, None, Ending]) -> _Pieces:
    """The pieces, each with None, and at last an empty one with how the caption ended. Closing this ends the
    generation."""

    def step() -> tuple[str, Ending | None]:
        try:
            return next(written), None
        except StopIteration as end:
            return "", end.value

    try:
        ending = None
        while ending is None:
            piece, ending = await run_sync(step)
            yield piece, ending
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(written.close)


async def _events(
    request: Request, answer: Answer, first: tuple[str, Ending | None], rest: _Pieces
) -> AsyncIterator[str]:
    try:
        yield event(answer.piece(*first, role=True))
        ending = first[1]
        async for piece, ending in rest:
            if await request.is_disconnected():
                return
            if piece or ending:
                yield event(answer.piece(piece, ending))
        if answer.usage and ending is not None:
            yield event(answer.last(ending))
        yield "data: [DONE]\n\n"
    except Exception:  # the status is sent already
        logging.getLogger("uvicorn.error").exception("while streaming a caption")
        yield event({"error": error_body("internal error; see the server's log", 500)})
    finally:
        with anyio.CancelScope(shield=True):
            await rest.aclose()


def _add_errors(app: FastAPI) -> None:
    """Make the endpoints' errors JSON in OpenAI's form, without details of the code."""

    def reply(message: str, status: int) -> JSONResponse:
        return JSONResponse({"error": error_body(message, status)}, status)

    async def answer(_, error: Exception) -> JSONResponse:
        if isinstance(error, RequestError):
            return reply(str(error), error.status)
        if isinstance(error, SampleError):
            return reply(f"this video cannot be captioned: {error}", 422)
        if isinstance(error, Busy):
            return reply("too many requests are waiting; try again in a moment", 503)
        if isinstance(error, HTTPException):
            return reply(str(error.detail), error.status_code)
        return reply("internal error; see the server's log", 500)

    for kind in (RequestError, SampleError, Busy, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
