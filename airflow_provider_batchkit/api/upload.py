"""The body of a create call on its way out, and what the end of the call proves.

The API never accepts a body that is not complete. So whatever ends the call before the last bytes have left proves that nothing was
accepted, and nothing has to be looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from airflow_provider_batchkit.exceptions import BatchKitError, SubmitThrottledError, SubmitUncertainError
from airflow_provider_batchkit.request.shards import Shard

_CHUNK = 1 << 18
#: The closing brackets of a body go out only after a fresh look at clock and lease.
_LAST_BYTES = 2


class NotTaken(Exception):
    """Nothing was accepted, and another try may succeed: the API refused for now, or there was no connection."""

    def __init__(self, what: str, retry_after: float | None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class Upload:
    """A shard's body in chunks. ``fence`` is called when only the last two bytes are left, which go out right after it."""

    def __init__(self, shard: Shard, fence: Callable[[], None], seconds: float) -> None:
        """:param seconds: time for the whole body; the client's own timeout bounds each write, not their sum"""
        self._shard = shard
        self._fence = fence
        self._seconds = seconds
        #: whether the last bytes may have left
        self.is_whole = False

    def __iter__(self) -> Iterator[bytes]:
        """:raises SubmitThrottledError: the time is over before the last bytes, so that the body is not complete"""
        started = time.monotonic()
        left = self._shard.bytes - _LAST_BYTES
        with Path(self._shard.body_path).open("rb") as body:
            while left:
                chunk = body.read(min(_CHUNK, left))
                left -= len(chunk)
                yield chunk
                self._refuse_late(started)
            self._fence()
            self._refuse_late(started)
            last = body.read()
        self.is_whole = True
        yield last

    def _refuse_late(self, started: float) -> None:
        took = time.monotonic() - started
        if took > self._seconds:
            raise SubmitThrottledError(
                f"An upload had taken {took:.0f} s and was not complete, and {self._seconds:.0f} s are allowed, so it was broken off. "
                "Nothing of its shard was accepted or billed. A slow connection needs a larger settle_seconds or a smaller "
                "max_bytes_per_batch."
            )

    def unseen_end(self, what: str) -> BatchKitError | NotTaken:
        """The error for a call that ended without an answer of the API's own."""
        what = what.removesuffix(".")
        if not self.is_whole:
            return NotTaken(f"{what}, before its upload was complete", None)
        return SubmitUncertainError(
            f"Shard {self._shard.number} ({self._shard.requests:,} requests) was sent, and {what}. It may have been accepted, then "
            "it runs and is billed once. It is not sent again before its batch has been looked for."
        )

    def broken(self, why: BaseException) -> BatchKitError | NotTaken:
        """The error for a connection that could not be made, or that broke."""
        import httpx2

        if isinstance(why, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout):
            return NotTaken(f"no connection ({why})", None)
        if isinstance(why, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError) and not self.is_whole:
            return self.not_made(why)
        return self.unseen_end(f"the connection broke: {why}")

    def not_made(self, why: BaseException) -> SubmitThrottledError:
        """The error for a request that cannot be made with this connection, also not after a pause."""
        return SubmitThrottledError(
            f"Shard {self._shard.number} ({self._shard.requests:,} requests) could not be sent with this connection: {type(why).__name__}: "
            f"{str(why).removesuffix('.')}. Nothing of it was accepted or billed."
        )
