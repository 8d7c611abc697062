"""Requests → upload bodies on disk, cut by count and bytes exactly at the limit.

Memory: the requests of one piece, and a buffer. Disk: the bodies and, beside each, an index of its keys, in a folder that the caller owns.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.model import MAX_BYTES_PER_BATCH, MAX_REQUESTS_PER_BATCH
from airflow_provider_batchkit.request.block import PreparedRequest, RequestBlock, split_body
from airflow_provider_batchkit.request.exposure import Exposure

_HEAD = b'{"requests":['
_TAIL = b"]}"
_ENVELOPE = len(_HEAD) + len(_TAIL)
_ENCODE = msgspec.json.Encoder()
#: number of copies that are held before they are appended to their shards' files
_COPIES_HELD = 1_000
#: bytes of an index that are read at a time
_PART_BYTES = 1 << 20
#: number of requests whose places are kept for samples; a long job has at least half as many
_PLACES = 128


@dataclass(frozen=True, slots=True)
class Shard:
    """Requests of one batch as an upload body on disk, cut at the API's limits, with an index of their keys beside it."""

    number: int
    requests: int
    #: length of the body in bytes, brackets included
    bytes: int
    body_path: str
    index_path: str
    #: the most that its requests may cost
    exposure: Exposure


class Sample(NamedTuple):
    """One of a job's requests, with the body that is uploaded."""

    key: str
    body: bytes


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
    """Writes requests into shards. Call ``add`` any number of times, then ``close``, which returns the shards.

    A row whose request another row of the job asks already is a copy: :meth:`add_copy` notes it beside that other row's shard.
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
        :param first_alone: whether the first request gets a shard of its own
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
        self._exposure = Exposure()
        self._spread = _Spread()
        self._copies: dict[int, list[bytes]] = {}
        self._copies_held = 0
        self._earlier: set[int] = set()
        #: for each shard, the number of requests in the shards before it
        self._firsts: list[int] = []

    def add(self, requests: Sequence[PreparedRequest]) -> None:
        """Append requests to the open shard as far as they fit, and the rest to new shards.

        :raises RequestError: when a request alone is over the byte limit
        """
        if not requests:
            return
        block = RequestBlock.of(requests)
        if self._fit(block.sizes):
            self._write(block)
        elif len(block) > 1:
            half = len(block) // 2
            self.add(block[:half])
            self.add(block[half:])
        else:
            self._refuse_oversized(block)
            if self._body is not None:
                self._finish()
            self._open()
            self._write(block)

    def _fit(self, sizes: Sequence[int]) -> bool:
        """Whether requests of these sizes have room in the open shard."""
        return (
            self._body is not None
            and self._requests + len(sizes) <= self._room
            # a comma comes before each request; in a new shard, the opening bracket takes its place before the first
            and self._bytes + sum(sizes) + len(sizes) <= self._max_bytes
        )

    def _write(self, block: RequestBlock) -> None:
        assert self._body is not None and self._index is not None
        if self._requests:
            self._body.write(b",")
            self._bytes += 1
        self._spread.see(self._body.name, self._bytes - len(_TAIL), block)
        self._body.write(block.join_bodies())
        self._bytes += sum(block.sizes) + len(block) - 1
        self._requests += len(block)
        self._exposure.add(block)
        self._index.write(_ENCODE.encode_lines(list(zip(block.keys, block.custom_ids, block.sizes, strict=True))))

    def _refuse_oversized(self, block: RequestBlock) -> None:
        size = block.sizes[0] + _ENVELOPE
        if size > self._max_bytes:
            raise RequestError(
                f"key {block.keys[0]}: the request is {size:,} bytes, over the limit of {self._max_bytes:,} for a whole batch. "
                "Nothing was sent."
            )

    def shard_of(self, added: int) -> int:
        """Number of the shard that took a request, by the number of requests that were added before it."""
        return self._first_number - 1 + bisect_right(self._firsts, added)

    def add_copy(self, request: PreparedRequest, number: int) -> None:
        """Note a row that shares a request of shard ``number``. The row is journaled with that shard and not asked again.

        The shard may be one of this writer, or an earlier one; see :meth:`earlier_copies`.
        """
        if number < self._first_number:
            self._earlier.add(number)
        self._copies.setdefault(number, []).append(_ENCODE.encode((request.key, request.custom_id, 0)) + b"\n")
        self._copies_held += 1
        if self._copies_held >= _COPIES_HELD:
            self._write_copies()

    def close(self) -> list[Shard]:
        """Finish the open shard and return all, in order."""
        if self._body is not None:
            self._finish()
        self._write_copies()
        return self._shards

    def samples(self, count: int) -> Iterator[Sample]:
        """``count`` requests, spread evenly, or all where there are fewer. Call it after :meth:`close`, while the bodies are there."""
        places = self._spread.places
        count = min(count, len(places))
        for i in range(count):
            path, start, size, key = places[(2 * i + 1) * len(places) // (2 * count)]
            with Path(path).open("rb") as body:
                body.seek(start)
                yield Sample(key, body.read(size))

    def earlier_copies(self) -> Iterator[tuple[int, bytes]]:
        """Index lines of copies of shards before ``first_number``, each piece with its shard's number. Call it after :meth:`close`."""
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
        self._exposure = Exposure()

    def _finish(self) -> None:
        assert self._body is not None and self._index is not None
        self._body.write(_TAIL)
        if self._body.tell() != self._bytes:
            # the POST announces this length: a wrong one would hang, and leave in doubt what was accepted
            raise AssertionError(f"{self._body.name} has {self._body.tell():,} bytes and was to have {self._bytes:,}. Nothing was sent.")
        self._body.close()
        self._index.close()
        self._shards.append(Shard(self._number, self._requests, self._bytes, self._body.name, self._index.name, self._exposure))
        self._body = self._index = None


class _Spread:
    """Places of a bounded number of requests, evenly spread over all requests."""

    def __init__(self) -> None:
        #: path of the body, offset and size in it, and the request's key
        self.places: list[tuple[str, int, int, str]] = []
        self._every = 1
        self._seen = 0

    def see(self, path: str, start: int, block: RequestBlock) -> None:
        """Note requests whose bodies follow each other from ``start`` on, with commas between."""
        sizes = block.sizes
        first = -self._seen % self._every
        self._seen += len(sizes)
        if first >= len(sizes):
            return
        starts = list(accumulate(sizes, lambda total, size: total + size + 1, initial=start))
        self.places.extend((path, starts[i], sizes[i], block.keys[i]) for i in range(first, len(sizes), self._every))
        while len(self.places) > _PLACES:
            self.places = self.places[::2]
            self._every *= 2


def decode_entries(part: bytes) -> list[IndexEntry]:
    """The entries of a piece of an index."""
    return _ENTRY.decode_lines(part)


def index_parts(shard: Shard) -> Iterator[bytes]:
    """The index of a shard in pieces of about a megabyte and whole lines: its requests in the order of its body, then the copies."""
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
                writer.add([PreparedRequest(entry.custom_id, entry.key, split_body(body.read(entry.size), entry.custom_id))])
                halves[entry.custom_id] = writer.shard_of(len(halves))
                body.seek(1, os.SEEK_CUR)
            else:
                writer.add_copy(PreparedRequest(entry.custom_id, entry.key, b""), halves[entry.custom_id])
    remove_shard_files(shard)
    return writer.close()


def remove_shard_files(shard: Shard) -> None:
    """Remove the files of a shard that is no longer needed."""
    for path in (Path(shard.body_path), Path(shard.index_path), _copies_path(shard)):
        path.unlink(missing_ok=True)


def _copies_path(shard: Shard) -> Path:
    return Path(shard.index_path).with_suffix(".copies")
