"""A company's gateway in front of the simulator: it has another address and its own path, and may change the answers."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

#: (method, path below the gateway's prefix, status, body) → the body that the client gets
Change = Callable[[str, str, int, bytes], bytes]


class Gateway:
    """Forwards ``<base_url>/…`` to an API; without a target it answers 404 and only records the calls.

    ``calls`` are method and path of each call, ``headers`` their headers with lower-case names, ``bodies`` their bodies.
    """

    def __init__(self, target: str | None = None, *, prefix: str = "", change: Change | None = None, repeat_posts: int = 1) -> None:
        """:param repeat_posts: how often it forwards each POST"""
        self.calls: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.change = change
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """No log."""

            def do_GET(self) -> None:
                path, body = self.path.removeprefix(prefix), self._body()
                gateway.calls.append((self.command, path))
                gateway.headers.append({name.lower(): value for name, value in self.headers.items()})
                gateway.bodies.append(body)
                if target is None or not self.path.startswith(prefix):
                    self._answer(404, b"nothing here", "text/plain")
                    return
                kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "transfer-encoding")}
                for _ in range(repeat_posts if self.command == "POST" else 1):
                    upstream = http.client.HTTPConnection(urlsplit(target).netloc)
                    upstream.request(self.command, path, body, kept)
                    answer = upstream.getresponse()
                    content = answer.read()
                    upstream.close()
                if gateway.change is not None:
                    content = gateway.change(self.command, path, answer.status, content)
                self._answer(answer.status, content, answer.headers.get("content-type", ""))

            do_POST = do_DELETE = do_GET  # noqa: N815 - the base class looks for these names

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("content-length") or 0))

            def _answer(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("content-type", content_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}{prefix}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
