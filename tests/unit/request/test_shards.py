"""Bodies are cut exactly at the limits and hold what was put in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.request.block import PreparedRequest
from airflow_provider_batchkit.request.shards import Shard, ShardWriter, decode_entries, read_index, remove_shard_files

ENVELOPE = len('{"requests":[]}')


def request(number: int, size: int = 0) -> PreparedRequest:
    """One whose body has ``size`` bytes."""
    plain = PreparedRequest(f"id-{number}", f"[{number}]", json.dumps({"model": "m", "max_tokens": 1, "messages": []}).encode())
    return msgspec.structs.replace(plain, params=plain.params + b" " * max(size - len(plain.body), 0))


def ids(shard: Shard) -> list[str]:
    return [r["custom_id"] for r in json.loads(Path(shard.body_path).read_bytes())["requests"]]


def write(requests: list[PreparedRequest], folder: Path, **limits: Any) -> list[Shard]:
    """All of them as one piece."""
    writer = ShardWriter(str(folder), **limits)
    writer.add(requests)
    return writer.close()


@pytest.mark.parametrize(
    ("count", "limit", "sizes"), [(0, 3, []), (1, 3, [1]), (3, 3, [3]), (4, 3, [3, 1]), (7, 3, [3, 3, 1]), (2, 1, [1, 1])]
)
def test_shards_are_cut_by_count(tmp_path: Path, count: int, limit: int, sizes: list[int]) -> None:
    """Every shard but the last is full, and all requests are there in order."""
    shards = write([request(i) for i in range(count)], tmp_path, max_requests=limit)
    assert [s.requests for s in shards] == sizes
    assert [i for s in shards for i in ids(s)] == [f"id-{i}" for i in range(count)]


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (2, [1, 1]), (5, [1, 3, 1])])
def test_the_first_request_may_have_a_shard_of_its_own(tmp_path: Path, count: int, sizes: list[int]) -> None:
    """The others are cut as ever, and every request knows its shard."""
    writer = ShardWriter(str(tmp_path), max_requests=3, first_alone=True)
    for i in range(count):
        writer.add([request(i)])
    shards = writer.close()
    assert [s.requests for s in shards] == sizes
    assert [i for s in shards for i in ids(s)] == [f"id-{i}" for i in range(count)]
    assert [writer.shard_of(i) for i in range(count)] == [0, 1, 1, 1, 2][:count]


def test_shards_are_cut_by_bytes_exactly_at_the_limit(tmp_path: Path) -> None:
    """Three requests of 100 bytes fit into the envelope plus 300 and two commas; one byte less makes two shards."""
    exact = ENVELOPE + 300 + 2
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = write([request(i, 100) for i in range(3)], tmp_path / "a", max_bytes=exact)
    two = write([request(i, 100) for i in range(3)], tmp_path / "b", max_bytes=exact - 1)
    assert [(s.requests, s.bytes) for s in one] == [(3, exact)]
    assert [(s.requests, s.bytes) for s in two] == [(2, ENVELOPE + 201), (1, ENVELOPE + 100)]


def test_the_stated_size_is_the_files_size(tmp_path: Path) -> None:
    """Content-Length comes from it, so it must be right to the byte."""
    for shard in write([request(i, 50 + i) for i in range(20)], tmp_path, max_requests=7):
        assert Path(shard.body_path).stat().st_size == shard.bytes


def test_a_request_over_the_limit_is_refused_by_key(tmp_path: Path) -> None:
    """A single request that no batch can take is named, with both sizes."""
    with pytest.raises(RequestError, match=r"key \[5\]: the request is 115 bytes, over the limit of 114"):
        write([request(5, 100)], tmp_path, max_bytes=ENVELOPE + 99)


@pytest.mark.parametrize("limits", [{"max_requests": 0}, {"max_requests": 100_001}, {"max_bytes": 256_000_001}, {"max_bytes": ENVELOPE}])
def test_limits_beyond_the_apis_are_refused(tmp_path: Path, limits: dict[str, Any]) -> None:
    """The API's own limits cannot be raised."""
    with pytest.raises(BatchInputError, match="must be"):
        ShardWriter(str(tmp_path), **limits)


@pytest.mark.parametrize("piece", [1, 3, 7, 100])
def test_the_pieces_in_which_requests_come_do_not_matter(tmp_path: Path, piece: int) -> None:
    """The same cuts, by count and by bytes, whether requests come one by one or many at a time."""
    requests = [request(i, 36 + 17 * i % 90) for i in range(100)]
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one, many = (ShardWriter(str(tmp_path / name), max_requests=9, max_bytes=900) for name in ("one", "many"))
    for single in requests:
        one.add([single])
    for start in range(0, len(requests), piece):
        many.add(requests[start : start + piece])
        many.add([])  # of a piece whose rows were all asked before
    whole, parts = one.close(), many.close()
    assert [Path(s.body_path).read_bytes() for s in parts] == [Path(s.body_path).read_bytes() for s in whole]
    assert [list(read_index(s)) for s in parts] == [list(read_index(s)) for s in whole]
    assert [s.bytes for s in parts] == [Path(s.body_path).stat().st_size for s in parts]
    assert max(s.requests for s in parts) == 9 and max(s.bytes for s in parts) > 850  # both limits were met
    assert [many.shard_of(i) for i in range(100)] == [one.shard_of(i) for i in range(100)]


@pytest.mark.parametrize("count", [1, 9, 10, 130, 1000, 4321])
def test_samples_are_whole_requests_spread_evenly(tmp_path: Path, count: int) -> None:
    """Ten of any number, one of each tenth, over all shards."""
    requests = [request(i, 40 + i % 50) for i in range(count)]
    writer = ShardWriter(str(tmp_path), max_requests=300)
    for start in range(0, count, 64):
        writer.add(requests[start : start + 64])
    writer.close()
    places = {(r.key, r.body): i for i, r in enumerate(requests)}
    found = [places[sample] for sample in writer.samples(10)]
    assert found == list(range(count)) if count <= 10 else [position * 10 // count for position in found] == list(range(10))


def test_copies_are_listed_with_the_shard_that_asks_for_them(tmp_path: Path) -> None:
    """A copy is in the index of its question's shard, not in any body, also when that shard is closed or an earlier attempt's."""
    writer = ShardWriter(str(tmp_path), first_number=4, max_requests=2)
    for i in range(3):
        writer.add([request(i)])
    numbers = [writer.shard_of(added) for added in range(3)]
    writer.add_copy(request(9), numbers[0])
    writer.add_copy(request(8), 2)
    first, second = writer.close()
    assert numbers == [4, 4, 5]
    assert [(e.key, e.asked) for e in read_index(first)] == [("[0]", True), ("[1]", True), ("[9]", False)]
    assert [(e.key, e.asked) for e in read_index(second)] == [("[2]", True)]
    assert ids(first) == ["id-0", "id-1"]
    assert [(number, e.key) for number, part in writer.earlier_copies() for e in decode_entries(part)] == [(2, "[8]")]


def test_removing_a_shard_frees_its_files(tmp_path: Path) -> None:
    """Nothing of a sent shard stays on disk."""
    writer = ShardWriter(str(tmp_path))
    writer.add([request(0)])
    writer.add_copy(request(1), writer.shard_of(0))
    (shard,) = writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    remove_shard_files(shard)
    assert list(tmp_path.iterdir()) == []
