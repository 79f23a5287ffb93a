"""Requests and answers in the chat format of OpenAI's API: their fields, limits and wire forms."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlmds.inference.options import GenerationOptions
from vlmds.inference.video_captioner import Ending
from vlmds.serve.loaded import RequestError

STOPS = 4  # stop texts of a request, as OpenAI's API takes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Url(_Strict):
    url: str
    detail: str | None = None  # of pictures, in OpenAI's API


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Video(_Strict):
    type: Literal["video_url"]
    video_url: _Url


class _Picture(_Strict):
    type: Literal["image_url"]
    image_url: _Url


class _User(_Strict):
    role: Literal["user"]
    content: str | list[Annotated[_Text | _Video | _Picture, Field(discriminator="type")]]
    name: str | None = None


class _System(_Strict):
    role: Literal["system", "developer"]
    content: str | list[_Text]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # of OpenAI's own servers; there is nothing to do for it


class Options(_Strict):
    """Fields of a form besides its file, named as in OpenAI's chat completions."""

    model: str | None = None
    max_tokens: int = GenerationOptions.max_new_tokens
    temperature: float = GenerationOptions.temperature
    top_p: float = GenerationOptions.top_p
    repetition_penalty: float = GenerationOptions.repetition_penalty
    seed: int = GenerationOptions.seed
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False

    @property
    def stops(self) -> list[str]:
        """Raises RequestError: too many, or an empty one."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > STOPS:
            raise RequestError(f"stop: {len(stops)} texts; this server takes at most {STOPS}")
        if "" in stops:
            raise RequestError("stop: a text is empty; leave it out")
        return stops


class Chat(Options):
    """A request in JSON."""

    messages: list[Annotated[_User | _System, Field(discriminator="role")]] = Field(min_length=1, max_length=16)
    max_completion_tokens: int | None = None
    n: int = 1
    user: str | None = None
    stream_options: _StreamOptions = Field(default_factory=_StreamOptions)


class Form(Options):
    """A request as a form."""

    prompt: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a JSON request asks. url: of the video or picture. system: None, or a text that stands before the
    prompt."""

    url: str
    prompt: str | None
    system: str | None


def valid(schema: type[Options], values: Any) -> Any:
    """The request's fields. None stands for a field that is left out. Raises RequestError."""
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if value is not None}
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        # Of a field that is a string or a list, the longest path leads to what is wrong in the form that was sent.
        found = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        where = ".".join(str(part)[:60] for part in found["loc"] if part != "str" and "[" not in str(part))
        raise RequestError(f"{where}: {found['msg']}" if where else found["msg"]) from None


def asked(chat: Chat) -> Asked:
    """Raises RequestError: not one user message with one video or picture, or an option that cannot be met."""
    if chat.n != 1:
        raise RequestError(f"n {chat.n}: this server writes one caption for a request; leave n out")
    if "stream_options" in chat.model_fields_set and not chat.stream:
        raise RequestError("stream_options: only with stream: true")
    users = [message for message in chat.messages if isinstance(message, _User)]
    if len(users) != 1 or chat.messages[-1] is not users[0]:
        raise RequestError(
            f"messages: {len(users)} of role user; a request has one, at the end: the model answers a single turn"
        )
    content = users[0].content
    parts = [_Text(type="text", text=content)] if isinstance(content, str) else content
    urls = [part.video_url.url for part in parts if isinstance(part, _Video)]
    urls += [part.image_url.url for part in parts if isinstance(part, _Picture)]
    if len(urls) != 1:
        raise RequestError(f"the message has {len(urls)} parts of type video_url or image_url; it must have one")
    texts = [part.text for part in parts if isinstance(part, _Text)]
    systems = [message.text for message in chat.messages if isinstance(message, _System) and message.text.strip()]
    return Asked(urls[0], "\n".join(texts) if texts else None, "\n".join(systems) or None)


@dataclass
class Answer:
    """A ``chat.completion``, whole or in pieces. usage: whether pieces report the numbers of tokens."""

    model: str
    usage: bool = False
    _base: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self._base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}

    def whole(self, text: str, ending: Ending) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {
            **self._base,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": ending.reason}],
            "usage": _usage(ending),
        }

    def piece(self, text: str, ending: Ending | None, role: bool = False) -> dict[str, Any]:
        delta = {**({"role": "assistant"} if role else {}), **({"content": text} if text or role else {})}
        return {
            **self._base,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": ending.reason if ending else None}],
            **({"usage": None} if self.usage else {}),
        }

    def last(self, ending: Ending) -> dict[str, Any]:
        """The piece after the caption's last, which has the numbers of tokens."""
        return {**self._base, "object": "chat.completion.chunk", "choices": [], "usage": _usage(ending)}


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_body(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": status}


def _usage(ending: Ending) -> dict[str, int]:
    return {
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.new_tokens,
        "total_tokens": ending.prompt_tokens + ending.new_tokens,
    }
