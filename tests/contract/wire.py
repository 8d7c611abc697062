"""Calls as they are on the wire. Nothing of the SDK and of the package stands between the API's answer and the check."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

CALL_SECONDS = 60.0
VERSION = "2023-06-01"
BATCHES = "/v1/messages/batches"


class NoAnswerError(Exception):
    """A call ended without an answer: whether the API carried it out is unknown."""


@dataclass(frozen=True)
class Answer:
    """The answer to one call. ``headers`` have lower-case names; ``at`` is the Unix time of its arrival, ``took_s`` the seconds it took."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    at: float
    took_s: float

    @property
    def json(self) -> dict[str, Any]:
        """The body as an object; empty where it is none."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def error(self) -> tuple[str, str]:
        """Type and message of an error."""
        found = self.json.get("error")
        return (str(found.get("type")), str(found.get("message"))) if isinstance(found, dict) else ("", "")

    @property
    def is_passing(self) -> bool:
        """Throttled, or a fault of the server: it says nothing of the call."""
        return self.status == 429 or self.status >= 500

    def __str__(self) -> str:
        kind, words = self.error
        return f'{self.status} {kind} "{words}"' if kind else f"{self.status} {self.body[:120].decode(errors='replace')}"


class _NoRedirect(HTTPRedirectHandler):
    """The key goes to the one address that the user has named."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Api:
    """One address of the API and a key for it."""

    def __init__(self, base_url: str, key: str) -> None:
        self.base_url = base_url.rstrip("/")
        self._key = key
        on_loopback = urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
        self._opener = build_opener(_NoRedirect, *([ProxyHandler({})] if on_loopback else []))

    def call(
        self, method: str, path: str, body: object = None, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One call, without retries. ``body``: bytes as they are, anything else as JSON.

        :raises NoAnswerError: when the connection breaks or nothing comes within a minute
        """
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"x-api-key": self._key if key is None else key, "anthropic-version": VERSION, "content-type": "application/json"}
        request = Request(self.base_url + path, data, {**given, **(headers or {})}, method=method)
        began = time.monotonic()
        try:
            try:
                with self._opener.open(request, timeout=CALL_SECONDS) as response:
                    return self._answer(response.status, response.headers.items(), response.read(), began)
            except HTTPError as refused:
                with refused:
                    return self._answer(refused.code, refused.headers.items(), refused.read(), began)
        except (URLError, HTTPException, OSError) as e:
            raise NoAnswerError(f"{method} {path} had no answer: {type(e).__name__}: {e}") from e

    @staticmethod
    def _answer(status: int, headers: Any, body: bytes, began: float) -> Answer:
        return Answer(status, {name.lower(): value for name, value in headers}, body, time.time(), time.monotonic() - began)
