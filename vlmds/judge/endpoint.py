"""Requests to an OpenAI-compatible server: retries, and what to do without for servers that lack something."""

from __future__ import annotations

import email.utils
import importlib.util
import ipaddress
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vlmds.console.text import install_hint
from vlmds.errors import InputError
from vlmds.judge.rubric import SCHEMA

KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # servers on this machine want none, but the client does
TRIES = 8
FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 60.0, 600.0  # seconds; what a server asks for may be longer
ANSWER_TOKENS = 2048  # a limit for models that do not stop; thinking counts too
REFUSALS = ("content_policy", "content policy", "content_filter", "content management policy", "safety")


@dataclass(frozen=True)
class Reply:
    """text: what the model said; None if it refused. tokens_in, tokens_out: as the server counts; 0 if it does not."""

    text: str | None
    tokens_in: int = 0
    tokens_out: int = 0


class Failed(Exception):
    """A request that was not answered after all retries, with the reason; another one may be."""


class Endpoint:
    """A model on a server. Threads may share it.

    Args:
        url: such as http://localhost:8000/v1. seconds: time limit of a request.

    Raises:
        InputError: no such address, or the extra is not installed.
    """

    def __init__(self, url: str, model: str, seconds: float = 120.0):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise InputError(f"--endpoint {shown_url(url)}: not an address such as http://localhost:8000/v1")
        if importlib.util.find_spec("openai") is None:
            raise InputError(f"judging needs more packages: {install_hint('judge')}")
        import openai

        self._openai = openai
        self.stopping = threading.Event()
        """Once set, requests that wait for another try give up."""
        self.url, self.model = url, model
        self._key = os.environ.get(KEY) or NO_KEY
        # Retries are here, not the client's: it does not wait longer than a minute when a server asks for it.
        self._client = openai.OpenAI(base_url=url, api_key=self._key, max_retries=0, timeout=seconds)
        self._options: dict[str, Any] = {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
            },
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
        }
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise InputError if the server cannot be reached, or does not accept the key."""
        try:
            self._client.models.list()
        except self._openai.APIConnectionError as error:
            raise InputError(
                f"--endpoint {shown_url(self.url)}: cannot be reached ({self._plain(error.__cause__ or error)}); start the "
                "server, or check the address (it usually ends with /v1)"
            ) from None
        except self._openai.APIStatusError as error:
            self._refuse_key(error)  # a server without a list of models is fine

    def ask(self, messages: list[dict[str, Any]]) -> Reply:
        """Raises InputError for what will be so for every request, Failed for what may be this one's."""
        attempt = 0
        while True:
            options = self._current()
            request: dict[str, Any] = {"messages": messages, **options}
            try:
                return self._reply(self._client.chat.completions.create(model=self.model, **request))
            except self._openai.APIConnectionError as error:
                reason, asked = self._plain(error.__cause__ or error), None
            except self._openai.APIStatusError as error:
                self._refuse_key(error)
                if error.status_code == 404:
                    raise InputError(
                        f"--model {self.model}: {shown_url(self.url)} answers 404 ({self._plain(error)}){self._models()}"
                    ) from None
                if error.status_code in (400, 422):
                    if self._do_without(options, str(error)):
                        continue
                    if any(word in str(error).lower() for word in REFUSALS):
                        return Reply(None)
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    raise Failed(self._plain(error)) from None
                reason, asked = self._plain(error), retry_after(error.response.headers)
            except (self._openai.APIError, ValueError) as error:  # no JSON, or not of this protocol
                reason, asked = self._plain(error), None
            attempt += 1
            if attempt == TRIES:
                raise Failed(reason)
            backoff = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            if self.stopping.wait(backoff if asked is None else min(asked, LONGEST_ASKED)):
                raise Failed("stopped")

    def _reply(self, found: Any) -> Reply:
        try:
            choice = found.choices[0]
            message, usage = choice.message, found.usage
            refused = bool(getattr(message, "refusal", None)) or choice.finish_reason == "content_filter"
            counts = (getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens"))
            return Reply(None if refused else str(message.content or ""), *counts)
        except (AttributeError, IndexError, TypeError, KeyError):
            return Reply("")  # not of this protocol: counted as malformed

    def _current(self) -> dict[str, Any]:
        with self._lock:
            return dict(self._options)

    def _do_without(self, used: dict[str, Any], message: str) -> bool:
        """Change the options of all further requests by what the server does not accept; False if nothing is left."""
        with self._lock:
            if self._options != used:  # another thread has done it
                return True
            text = message.lower()
            if "max_tokens" in used and "max_completion_tokens" in text:
                self._options["max_completion_tokens"] = self._options.pop("max_tokens")
            elif "temperature" in used and "temperature" in text:
                del self._options["temperature"]
            elif any(word in text for word in REFUSALS):
                return False
            elif used.get("response_format", {}).get("type") == "json_schema":
                self._options["response_format"] = {"type": "json_object"}
            elif "response_format" in used:
                del self._options["response_format"]
            else:
                return False
            return True

    def _refuse_key(self, error: Any) -> None:
        if error.status_code in (401, 403):
            what = "does not accept the key" if self._key != NO_KEY else "wants a key"
            raise InputError(
                f"--endpoint {shown_url(self.url)}: {what} ({error.status_code}); set {KEY} in the environment"
            ) from None

    def _models(self) -> str:
        """The server's models, for a message."""
        with suppress(Exception):
            names = [str(model.id) for model in self._client.models.list().data][:8]
            if names:
                return f"; it has {', '.join(names)}"
        return "; check the name and the address"

    def _plain(self, error: BaseException) -> str:
        """An error in one short line, without the key, which servers repeat."""
        text = " ".join(str(error).replace(self._key, "…").split()) or type(error).__name__
        return text[:200]


def retry_after(headers: Any, now: Callable[[], float] = time.time) -> float | None:
    """The seconds that a server asks to wait for: a number or a date; None if it does not say."""
    with suppress(TypeError, ValueError):
        return max(0.0, float(headers.get("retry-after-ms")) / 1000)
    text = headers.get("retry-after")
    with suppress(TypeError, ValueError):
        return max(0.0, float(text))
    with suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now())
    return None


def shown_url(url: str) -> str:
    """The address without user, password and query, which may be secrets."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def is_local(url: str) -> bool:
    """Whether the server is on this machine or in a private network: its requests cost nothing."""
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_private
    return host == "localhost" or "." not in host or host.endswith((".local", ".internal", ".lan"))
