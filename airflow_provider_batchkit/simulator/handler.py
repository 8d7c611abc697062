"""One HTTP call: read it whole, look up its faults, carry it out, answer in the API's shape, or cut the connection."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.client import responses
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from . import validate
from .core import Core, Server
from .errors import ApiError, error_body, request_id
from .faults import CutError, Fault, PageError, Plan, faulty
from .intake import system_bytes, text_bytes
from .models import catalogue, find
from .store import Batch, Spell, rfc3339
from .tokens import OVERHEAD_TOKENS, tokens_of_bytes

READ_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16
#: 4xx statuses after which the same call may succeed a little later.
PASSING = (408, 409, 429)
#: Bodies over the limit are read and thrown away up to this size, so that the client can read the 413; above it, the connection closes.
DRAIN_BYTES = 1_000_000_000
#: Most batches on one page (API documentation).
MAX_PAGE = 1000
#: The ``retry-after`` header, in seconds, that the API sends with a running batch.
RETRY_AFTER = "10"
#: The limit of calls per minute that the API names in its headers. The simulator does not limit calls.
CALLS_A_MINUTE = 4000
ORGANIZATION = "00000000-0000-4000-8000-000000000000"
#: Form of the anthropic-version header. Any date passes, since every SDK may know other dates.
API_VERSION = re.compile(r"20\d\d-\d\d-\d\d")
_ID = r"/(?P<id>[^/]+)"
_ROUTES = tuple(
    (method, re.compile(pattern), endpoint)
    for method, pattern, endpoint in (
        ("POST", r"/v1/messages/batches", "create"),
        ("GET", r"/v1/messages/batches", "list"),
        ("GET", rf"/v1/messages/batches{_ID}", "retrieve"),
        ("DELETE", rf"/v1/messages/batches{_ID}", "delete"),
        ("POST", rf"/v1/messages/batches{_ID}/cancel", "cancel"),
        ("GET", rf"/v1/messages/batches{_ID}/results", "results"),
        ("POST", r"/v1/messages/count_tokens", "count_tokens"),
        ("GET", r"/v1/models", "models"),
        ("GET", rf"/v1/models{_ID}", "model"),
    )
)


class Handler(BaseHTTPRequestHandler):
    """Serves one connection, call after call."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    #: further headers for the answer to the present call
    _extra: dict[str, str]
    #: whether the present call is one of the API's, whose statuses are counted
    _counts: bool

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Writes no access log, because the stats have the counts."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_DELETE = do_PUT = do_PATCH = do_GET  # noqa: N815 - the base class looks for these names

    @property
    def core(self) -> Core:
        return self.server.core

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self._extra, self._counts = {}, not url.path.startswith("/_sim/")
        try:
            if self._counts:
                self._call(url.path, url.query)
            else:
                self._control(url.path.removeprefix("/_sim/"), url.query)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # the API

    def _call(self, path: str, query: str) -> None:
        endpoint, target = self._route(path)
        body, too_large = self._read_body(self.core.store.settings.max_body_bytes)
        plan = self.core.faults.take(endpoint, target) if endpoint else Plan()
        self.core.count(endpoint or "unknown")
        try:
            try:
                plan.strike("cut_before_accept", "status", "html")
                if plan.late_accept is not None:
                    self.core.stopping.wait(plan.late_accept.seconds)
                workspace = self._admit(path, endpoint, target, too_large=too_large)
                answer = self._carry_out(endpoint or "", target or "", workspace, body, parse_qs(query, keep_blank_values=True), plan)
            finally:
                if plan.late is not None:
                    self.core.stopping.wait(plan.late.seconds)
            plan.strike("cut_after_accept", "status_after_accept", "html_after_accept")
            if isinstance(answer, Iterator):
                self._stream(answer, plan.in_results)
            else:
                self._answer(200, answer)
        except ApiError as error:
            self._answer_error(error)
        except PageError as page:
            self._answer_page(page.fault)
        except CutError as cut:
            self._cut(cut)

    def _route(self, path: str) -> tuple[str | None, str | None]:
        """Endpoint and the id in the path; ``(None, "method")`` for a known path with another method."""
        known = None
        for method, pattern, endpoint in _ROUTES:
            found = pattern.fullmatch(path)
            if found:
                if method == self.command:
                    return endpoint, found.groupdict().get("id")
                known = "method"
        return None, known

    def _admit(self, path: str, endpoint: str | None, target: str | None, *, too_large: bool) -> str:
        """The caller's workspace. Raises ApiError for an unknown path or method, bad credentials and a body over the limit."""
        if endpoint is None:
            raise ApiError(405, "Method Not Allowed") if target else ApiError(404, f"Not found: {path}")
        workspace = self._workspace()
        self._extra = {
            "anthropic-organization-id": ORGANIZATION,
            "anthropic-workspace-id": workspace,
            "anthropic-ratelimit-requests-limit": str(CALLS_A_MINUTE),
            "anthropic-ratelimit-requests-remaining": str(CALLS_A_MINUTE - 1),
            "anthropic-ratelimit-requests-reset": rfc3339(self.core.store.now()) or "",
        }
        if too_large:
            raise ApiError(413, f"Request exceeds the maximum size of {self.core.store.settings.max_body_bytes} bytes")
        return workspace

    def _workspace(self) -> str:
        """The workspace of the credentials. Raises ApiError: 401, 400 without a version, 403 for another workspace's id."""
        bearer = self.headers.get("authorization", "")
        key = self.headers.get("x-api-key") or (bearer[7:].strip() if bearer.lower().startswith("bearer ") else "")
        if not key:
            raise ApiError(401, "x-api-key header is required")
        keys = self.core.store.settings.keys
        workspace = keys.get(key) if keys else "default"
        if workspace is None:
            raise ApiError(401, "API key is invalid.")
        version = self.headers.get("anthropic-version")
        if version is None:
            raise ApiError(400, "anthropic-version: header is required")
        if API_VERSION.fullmatch(version) is None:
            raise ApiError(400, f"anthropic-version: {version!r} is not a valid version")
        if self.headers.get("anthropic-workspace-id", workspace) != workspace:
            raise ApiError(403, "anthropic-workspace-id does not match the workspace of the credentials")
        return workspace

    def _carry_out(  # noqa: C901, PLR0911 - one case and one return per endpoint
        self, endpoint: str, target: str, workspace: str, body: bytearray, query: dict[str, list[str]], plan: Plan
    ) -> dict[str, Any] | Iterator[bytes]:
        store, beta = self.core.store, "anthropic-beta" in self.headers
        if plan.vanish and target:
            raise ApiError(404, f"Message Batch {target} not found.")
        match endpoint:
            case "create":
                hidden = Spell() if plan.hide is None else Spell(plan.hide.seconds, plan.hide.calls or 0)
                return self._shown(store.create(body, workspace, beta=beta, hidden=hidden))
            case "retrieve":
                batch = store.look(target, workspace)
                if batch.ended_at is None:
                    self._extra["retry-after"] = RETRY_AFTER
                return self._shown(batch)
            case "list":
                limit, after_id, before_id = _page_query(query)
                page, more = store.page(workspace, limit, after_id, before_id)
                return _list_of([self._shown(batch) for batch in page if not plan.is_gone(batch.id)], more)
            case "cancel":
                return self._shown(store.cancel(target, workspace))
            case "delete":
                store.delete(target, workspace)
                return {"id": target, "type": "message_batch_deleted"}
            case "results":
                return store.results(target, workspace)
        models = catalogue(store.settings.models)
        match endpoint:
            case "count_tokens":
                params = validate.count_params(body, models)
                size = system_bytes(params.system) + sum(text_bytes(turn.content) for turn in params.messages)
                fixed = store.settings.input_tokens
                return {"input_tokens": tokens_of_bytes(size) + OVERHEAD_TOKENS if fixed is None else fixed}
            case "models":
                limit, _, _ = _page_query(query)
                return _list_of(list(models.values())[:limit], len(models) > limit)
            case _:
                model = find(models, target)
                if model is None:
                    raise ApiError(404, f"model: {target}")
                return model

    def _shown(self, batch: Batch) -> dict[str, Any]:
        """The batch as the API shows it to this client."""
        own_address = f"http://{self.headers.get('host') or self.server.netloc}"
        return batch.as_json(self.core.store.settings.results_host or own_address)

    # control

    def _control(self, path: str, query: str) -> None:
        body, _ = self._read_body(READ_BYTES)
        try:
            answer = self.core.control(self.command, path, {name: values[-1] for name, values in parse_qs(query).items()}, bytes(body))
        except ApiError as error:
            self._answer_error(error)
        except (ValueError, msgspec.MsgspecError) as error:
            self._answer_error(ApiError(400, str(error)))
        else:
            self._answer(200, answer)

    # reading a call

    def _read_body(self, limit: int) -> tuple[bytearray, bool]:
        """The body, and whether it is over ``limit`` bytes; a body over the limit is read and thrown away."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            return self._read_chunked(limit)
        size = int(self.headers.get("content-length") or 0)
        if size > limit:
            if size > DRAIN_BYTES:
                self.close_connection = True
                return bytearray(), True
            while size > 0:
                size -= len(self._read(min(size, READ_BYTES)))
            return bytearray(), True
        body = bytearray(size)
        view = memoryview(body)
        got = 0
        while got < size:
            count = self.rfile.readinto(view[got : got + READ_BYTES])
            if not count:
                raise ConnectionResetError("the client closed the connection inside the body")
            got += count
        return body, False

    def _read_chunked(self, limit: int) -> tuple[bytearray, bool]:
        body = bytearray()
        total = 0
        while True:
            size = int(self.rfile.readline(1024).split(b";")[0].strip() or b"x", 16)
            total += size
            left = size
            while left:
                data = self._read(min(left, READ_BYTES))
                left -= len(data)
                if total <= limit:
                    body += data
            if self.rfile.readline(1024) not in (b"\r\n", b"\n"):
                raise ConnectionResetError("broken chunked body")
            if not size:
                return body, total > limit

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if not data:
            raise ConnectionResetError("the client closed the connection inside the body")
        return data

    # sending the answer

    def _head(self, status: int, request: str, *extra: str) -> bytes:
        lines = [
            f"HTTP/1.1 {status} {responses.get(status, 'Error')}",
            f"date: {formatdate(self.core.store.now(), usegmt=True)}",
            f"request-id: {request}",
            *extra,
            *(f"{name}: {value}" for name, value in self._extra.items()),
        ]
        if self.close_connection:
            lines.append("connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _answer(self, status: int, body: dict[str, Any], *extra: str) -> None:
        request = request_id()
        if body.get("type") == "error":
            body["request_id"] = request
        if self._counts:
            self.core.count_status(status)
        data = msgspec.json.encode(body)
        self.wfile.write(self._head(status, request, "content-type: application/json", f"content-length: {len(data)}", *extra) + data)

    def _answer_error(self, error: ApiError) -> None:
        if 400 <= error.status < 500 and error.status not in PASSING:
            self._extra["x-should-retry"] = "false"
        self._extra |= error.headers
        self._answer(error.status, error_body(error.type, error.message, ""))

    def _answer_page(self, fault: Fault) -> None:
        """Answers as a gateway between the client and the API does: without a request id."""
        status = fault.status or 200
        self.core.count_status(status)
        data = fault.body.encode()
        head = [
            f"HTTP/1.1 {status} {responses.get(status, 'Error')}",
            f"content-type: {fault.content_type}",
            f"content-length: {len(data)}",
        ]
        head += [f"{name}: {value}" for name, value in fault.headers.items()]
        self.wfile.write("\r\n".join([*head, "", ""]).encode("latin-1") + data)

    def _stream(self, lines: Iterator[bytes], faults: list[Fault]) -> None:
        """Sends lines in chunks of about 64 KB; with a ``trickle`` fault line by line."""
        self.core.count_status(200)
        self.wfile.write(self._head(200, request_id(), "content-type: application/x-jsonl", "transfer-encoding: chunked"))
        pause = max((fault.seconds for fault in faults if fault.kind == "trickle"), default=0.0)
        pending: list[bytes] = []
        size = 0
        try:
            for line in faulty(lines, faults):
                pending.append(line)
                size += len(line)
                if size >= CHUNK_BYTES or pause:
                    self._chunk(pending)
                    pending, size = [], 0
                if pause and self.core.stopping.wait(pause):
                    raise ConnectionAbortedError("the simulator stops")
        except CutError as cut:
            self._chunk([*pending, cut.last])
            if not cut.fault.clean:
                raise CutError(b"", cut.fault) from cut
            pending = []
        self._chunk(pending)
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, parts: list[bytes]) -> None:
        data = b"".join(parts)
        if data:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _cut(self, cut: CutError) -> None:
        """Closes the connection without an answer."""
        self.close_connection = True
        self.core.count_status(0)
        if cut.fault.reset:
            time.sleep(0.01)  # a reset discards bytes that the client has not read yet, so it gets time to read them
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.server.resets.add(self.connection)


def _page_query(query: dict[str, list[str]]) -> tuple[int, str | None, str | None]:
    """``limit``, ``after_id`` and ``before_id`` of a query. Raises ApiError (400) for a limit that is not an integer from 1 to 1000."""
    text = query.get("limit", ["20"])[-1]
    if not text.isdecimal():
        raise ApiError(400, "limit: Input should be a valid integer, unable to parse string as an integer")
    limit = int(text)
    if limit < 1:
        raise ApiError(400, "limit: Input should be greater than or equal to 1")
    if limit > MAX_PAGE:
        raise ApiError(400, f"limit: Input should be less than or equal to {MAX_PAGE}")
    return limit, query.get("after_id", [""])[-1] or None, query.get("before_id", [""])[-1] or None


def _list_of(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {"data": data, "has_more": more, "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
