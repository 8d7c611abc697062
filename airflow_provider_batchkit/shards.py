"""Requests → upload bodies on disk, cut by count and bytes exactly at the limit.

Memory: one request at a time. Disk: the bodies and, beside each, an index of its keys, in a folder that the caller owns.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.model import MAX_BYTES_PER_BATCH, MAX_REQUESTS_PER_BATCH, PreparedRequest, Shard

_HEAD = b'{"requests":['
_TAIL = b"]}"
_ENVELOPE = len(_HEAD) + len(_TAIL)
_ENCODE = msgspec.json.Encoder()
#: copies are appended to their shards' files this many at a time
_COPIES_HELD = 1_000
#: of an index, read at a time
_PART_BYTES = 1 << 20


class IndexEntry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A line of a shard's index: what the ledger needs of a request."""

    key: str
    custom_id: str
    #: bytes of the request in the body; 0 for a row that shares another row's request and is not asked
    size: int

    @property
    def asked(self) -> bool:
        return self.size > 0


_ENTRY = msgspec.json.Decoder(IndexEntry)


class ShardWriter:
    """Writes requests into shards: ``add`` any number, then ``close``, which returns them.

    A row that asks what another row of the job asks already is a copy: :meth:`add_copy` notes it beside that other row's shard.
    """

    def __init__(
        self,
        folder: str,
        *,
        first_number: int = 0,
        max_requests: int = MAX_REQUESTS_PER_BATCH,
        max_bytes: int = MAX_BYTES_PER_BATCH,
        first_alone: bool = False,
    ) -> None:
        """
        :param first_alone: the first request gets a shard of its own
        :param folder: an existing empty folder
        :param first_number: number of the first shard
        :param max_requests: requests a batch, 1 to 100,000
        :param max_bytes: bytes of a batch's body, brackets included, at most 256,000,000
        :raises BatchInputError: when a limit is out of range
        """
        if not 1 <= max_requests <= MAX_REQUESTS_PER_BATCH:
            raise BatchInputError(f"max_requests_per_batch must be 1 to {MAX_REQUESTS_PER_BATCH:,}, not {max_requests:,}.")
        if not _ENVELOPE < max_bytes <= MAX_BYTES_PER_BATCH:
            raise BatchInputError(f"max_bytes_per_batch must be {_ENVELOPE + 1} to {MAX_BYTES_PER_BATCH:,}, not {max_bytes:,}.")
        self._shards: list[Shard] = []
        self._folder = folder
        self._first_number = first_number
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._first_alone = first_alone
        self._body: IO[bytes] | None = None
        self._index: IO[bytes] | None = None
        self._requests = 0
        self._room = max_requests
        self._bytes = 0
        self._copies: dict[int, list[bytes]] = {}
        self._copies_held = 0
        self._earlier: set[int] = set()
        #: per shard how many requests are in the shards before it
        self._firsts: list[int] = []

    def add(self, request: PreparedRequest) -> None:
        """Append a request to the open shard, or to a new one when it would not fit.

        :raises RequestError: when the request alone is over the byte limit
        """
        size = len(request.body)
        if size + _ENVELOPE > self._max_bytes:
            raise RequestError(
                f"key {request.key}: the request is {size + _ENVELOPE:,} bytes, over the limit of {self._max_bytes:,} for a whole batch. "
                "Nothing was sent."
            )
        if self._body is not None and (self._requests == self._room or self._bytes + 1 + size > self._max_bytes):
            self._finish()
        if self._body is None:
            self._open()
        assert self._body is not None and self._index is not None
        if self._requests:
            self._body.write(b",")
            self._bytes += 1
        self._body.write(request.body)
        self._bytes += size
        self._requests += 1
        self._index.write(_entry_line(request, size))

    def shard_of(self, added: int) -> int:
        """Number of the shard that took the request which was added after ``added`` others."""
        return self._first_number - 1 + bisect_right(self._firsts, added)

    def add_copy(self, request: PreparedRequest, number: int) -> None:
        """Note a row that shares a request of shard ``number``; it is journaled with it and not asked again.

        The shard may be one of this writer, or an earlier one: see :meth:`earlier_copies`.
        """
        if number < self._first_number:
            self._earlier.add(number)
        self._copies.setdefault(number, []).append(_entry_line(request, 0))
        self._copies_held += 1
        if self._copies_held >= _COPIES_HELD:
            self._write_copies()

    def close(self) -> list[Shard]:
        """Finish the open shard and return all, in order."""
        if self._body is not None:
            self._finish()
        self._write_copies()
        return self._shards

    def earlier_copies(self) -> Iterator[tuple[int, bytes]]:
        """After :meth:`close`: the index lines of copies of shards before ``first_number``, each piece with its shard's number."""
        for number in sorted(self._earlier):
            for part in _parts(self._path(number, "copies")):
                yield number, part

    @property
    def _number(self) -> int:
        return self._first_number + len(self._shards)

    def _path(self, number: int, kind: str) -> Path:
        return Path(self._folder, f"shard-{number:05d}.{kind}")

    def _write_copies(self) -> None:
        for number, lines in self._copies.items():
            with self._path(number, "copies").open("ab") as copies:
                copies.writelines(lines)
        self._copies.clear()
        self._copies_held = 0

    def _open(self) -> None:
        self._body = self._path(self._number, "json").open("wb", buffering=1 << 20)
        self._index = self._path(self._number, "index").open("wb", buffering=1 << 18)
        self._body.write(_HEAD)
        self._room = 1 if self._first_alone and not self._shards else self._max_requests
        self._firsts.append(sum(shard.requests for shard in self._shards))
        self._requests = 0
        self._bytes = _ENVELOPE

    def _finish(self) -> None:
        assert self._body is not None and self._index is not None
        self._body.write(_TAIL)
        self._body.close()
        self._index.close()
        self._shards.append(Shard(self._number, self._requests, self._bytes, self._body.name, self._index.name))
        self._body = self._index = None


def _entry_line(request: PreparedRequest, size: int) -> bytes:
    # as IndexEntry decodes it
    return _ENCODE.encode((request.key, request.custom_id, size)) + b"\n"


def decode_entries(part: bytes) -> list[IndexEntry]:
    """The entries of a piece of an index."""
    return _ENTRY.decode_lines(part)


def index_parts(shard: Shard) -> Iterator[bytes]:
    """The index of a shard in pieces of about a megabyte, each of whole lines: its requests in the order of its body, then the copies."""
    for path in (Path(shard.index_path), _copies_path(shard)):
        if path.exists():
            yield from _parts(path)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        while part := lines.read(_PART_BYTES):
            yield part + (b"" if part.endswith(b"\n") else lines.readline())


def read_index(shard: Shard) -> Iterator[IndexEntry]:
    """The entries of a shard: its requests in the order of its body, then the copies."""
    for part in index_parts(shard):
        yield from decode_entries(part)


def read_bodies(shard: Shard) -> Iterator[bytes]:
    """The requests of a shard as they are in its body, in order."""
    with Path(shard.body_path).open("rb", buffering=1 << 18) as body:
        body.seek(len(_HEAD))
        for entry in read_index(shard):
            if entry.asked:
                yield body.read(entry.size)
                body.seek(1, os.SEEK_CUR)


def split_shard(shard: Shard) -> list[Shard]:
    """Two shards of half the requests each, in a folder beside the shard's files; the shard's own files are removed."""
    folder = Path(shard.body_path).with_suffix(".halves")
    folder.mkdir()
    writer = ShardWriter(str(folder), max_requests=(shard.requests + 1) // 2)
    halves: dict[str, int] = {}
    with Path(shard.body_path).open("rb") as body:
        body.seek(len(_HEAD))
        for entry in read_index(shard):
            if entry.asked:
                writer.add(PreparedRequest(entry.custom_id, entry.key, body.read(entry.size)))
                halves[entry.custom_id] = writer.shard_of(len(halves))
                body.seek(1, os.SEEK_CUR)
            else:
                writer.add_copy(PreparedRequest(entry.custom_id, entry.key, b""), halves[entry.custom_id])
    remove_shard_files(shard)
    return writer.close()


def remove_shard_files(shard: Shard) -> None:
    """Free the disk that a shard holds, once nobody needs it again."""
    for path in (Path(shard.body_path), Path(shard.index_path), _copies_path(shard)):
        path.unlink(missing_ok=True)


def _copies_path(shard: Shard) -> Path:
    return Path(shard.index_path).with_suffix(".copies")


def write_shards(
    requests: Iterable[PreparedRequest],
    folder: str,
    *,
    max_requests: int = MAX_REQUESTS_PER_BATCH,
    max_bytes: int = MAX_BYTES_PER_BATCH,
) -> list[Shard]:
    """Write all requests; returns their shards, none for no requests."""
    writer = ShardWriter(folder, max_requests=max_requests, max_bytes=max_bytes)
    for request in requests:
        writer.add(request)
    return writer.close()
