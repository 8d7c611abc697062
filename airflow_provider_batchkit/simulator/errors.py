"""Errors in the API's shape."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

#: Error type per HTTP status, from the API's error reference.
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is not 2xx: HTTP ``status``, error ``type`` (by default the status's own), ``message``, further headers."""

    def __init__(self, status: int, message: str, type_: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}
        self.type = type_ or ERROR_TYPES.get(status, "api_error")


def request_id() -> str:
    """A new id for one call, as the ``request-id`` header and error bodies carry it."""
    return "req_" + secrets.token_hex(12)


def error_body(type_: str, message: str, request: str) -> dict[str, Any]:
    """The JSON body of an error; also what an errored result line carries."""
    return {"type": "error", "error": {"type": type_, "message": message}, "request_id": request}
