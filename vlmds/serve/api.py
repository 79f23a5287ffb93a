"""JSON endpoints: captions of videos in the chat format of OpenAI's API.

    POST /caption   also as /v1/chat/completions
    GET  /models    also as /v1/models
    GET  /health

The video is a ``video_url`` part of the one user message, as vLLM and SGLang take it; its URL is a
``data:`` URL. Or the request is a form with a file ``video`` and the fields' values.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from vlmds.errors import SampleError
from vlmds.inference.options import GenerationOptions
from vlmds.serve.loaded import Busy, Models, RequestError
from vlmds.serve.url_download import fetch

UPLOADS = 4  # bodies read at once; others wait before theirs is
READING = 600.0  # seconds that a body may take to arrive
DRAINING = 5.0  # seconds for which the rest of a refused body is read; the client then gets the answer


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Url(_Strict):
    url: str


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Video(_Strict):
    type: Literal["video_url"]
    video_url: _Url


class _Message(_Strict):
    role: Literal["user"]
    content: list[Annotated[_Text | _Video, Field(discriminator="type")]]


class _Options(_Strict):
    """Fields of a form besides its file, named as in OpenAI's chat completions."""

    model: str | None = None
    max_tokens: int = GenerationOptions.max_new_tokens
    temperature: float = GenerationOptions.temperature
    top_p: float = GenerationOptions.top_p
    repetition_penalty: float = GenerationOptions.repetition_penalty
    seed: int = GenerationOptions.seed
    stream: bool = False


class _Chat(_Options):
    messages: list[_Message] = Field(min_length=1, max_length=1)
    max_completion_tokens: int | None = None
    n: Literal[1] = 1
    user: str | None = None


class _Form(_Options):
    prompt: str | None = None


@dataclass(frozen=True)
class _Ask:
    """A request: path of the video's file, and the rest."""

    video: Path
    prompt: str | None
    options: _Options


def add_api(app: FastAPI, models: Models, folder: Path) -> None:
    """Add the endpoints. folder: private, for videos while they are read."""
    router = APIRouter()
    uploads = anyio.Semaphore(UPLOADS)

    async def caption(request: Request) -> Response:
        file = NamedTemporaryFile(dir=folder, suffix=".video")  # deleted when closed
        with file:
            async with uploads:
                ask = await _read(request, models, file)
            options = ask.options
            captioner = models.get(options.model)
            prompt, generation = models.options(
                ask.prompt,
                max_new_tokens=options.max_tokens,
                **options.model_dump(include={"temperature", "top_p", "repetition_penalty", "seed"}),
            )
            await run_sync(models.facts, ask.video)
            frames = await run_sync(models.frames, ask.video, captioner)
        pieces = _pieces(models.stream(captioner, frames, prompt, generation))
        answer = _Answer(options.model or models.names[0])
        if options.stream:
            first = await anext(pieces)  # an error until here still has a status of its own
            return StreamingResponse(_events(request, answer, first, pieces), media_type="text/event-stream")
        text = ""
        reason: str | None = None
        async for piece, reason in pieces:  # noqa: B007  # the last one is used below
            text += piece
            if await request.is_disconnected():
                await pieces.aclose()
                return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.whole(text.strip(), reason))

    async def list_models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "owned_by": "vlmds",
                    "num_frames": captioner.experiment.data.num_frames,
                    "prompt": captioner.builder.prompt,
                }
                for name, captioner in models.captioners.items()
            ],
        }

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    for path in ("/caption", "/v1/chat/completions"):
        router.add_api_route(path, caption, methods=["POST"], response_model=None)
    for path in ("/models", "/v1/models"):
        router.add_api_route(path, list_models)
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
        ask = _valid(_Form, fields)
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
    ask = _valid(_Chat, body)
    if ask.max_completion_tokens is not None:  # the newer name
        ask.max_tokens = ask.max_completion_tokens
    parts = ask.messages[0].content
    urls = [part.video_url.url for part in parts if isinstance(part, _Video)]
    if len(urls) != 1:
        raise RequestError(f"the message has {len(urls)} parts of type video_url; it must have one")
    if urls[0][:5].lower() == "data:":
        file.write(_decode(urls[0]))
    elif not models.limits.urls:
        raise RequestError(
            "video_url: this server takes data: URLs only, such as "
            "data:video/mp4;base64,…; it opens neither files nor addresses"
        )
    else:
        await fetch(urls[0], file, models.limits.bytes)
    texts = [part.text for part in parts if isinstance(part, _Text)]
    return _Ask(Path(file.name), "\n".join(texts) if texts else None, ask)


def _decode(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("video_url: not of the form data:video/mp4;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("video_url: its base64 cannot be decoded") from None


def _valid(schema: type[_Options], values: Any) -> Any:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"])
        raise RequestError(f"{where}: {first['msg']}" if where else first["msg"]) from None


async def _pieces(written: Generator[str, None, str]) -> AsyncGenerator[tuple[str, str | None]]:
    """The pieces, each with None, and at last an empty one with the reason why the caption ended.
    Closing this ends the generation."""

    def step() -> tuple[str, str | None]:
        try:
            return next(written), None
        except StopIteration as end:
            return "", end.value

    try:
        reason = None
        while reason is None:
            piece, reason = await run_sync(step)
            yield piece, reason
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(written.close)


async def _events(
    request: Request, answer: _Answer, first: tuple[str, str | None], rest: AsyncGenerator[tuple[str, str | None]]
) -> AsyncIterator[str]:
    try:
        yield _event(answer.piece(first[0], first[1], role=True))
        async for piece, reason in rest:
            if await request.is_disconnected():
                return
            if piece or reason:
                yield _event(answer.piece(piece, reason))
        yield "data: [DONE]\n\n"
    except Exception:  # the status is sent already
        logging.getLogger("uvicorn.error").exception("while streaming a caption")
        yield _event({"error": _error("internal error; see the server's log", 500)})
    finally:
        with anyio.CancelScope(shield=True):
            await rest.aclose()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Answer:
    """A ``chat.completion``, whole or in pieces."""

    def __init__(self, model: str):
        self._base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str | None) -> dict[str, Any]:
        return {
            **self._base,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
        }

    def piece(self, text: str, reason: str | None, role: bool = False) -> dict[str, Any]:
        delta = {**({"role": "assistant"} if role else {}), **({"content": text} if text else {})}
        return {
            **self._base,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }


def _error(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": status}


def _add_errors(app: FastAPI) -> None:
    """Make the endpoints' errors JSON in OpenAI's form, without details of the code."""

    def reply(message: str, status: int) -> JSONResponse:
        return JSONResponse({"error": _error(message, status)}, status)

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
