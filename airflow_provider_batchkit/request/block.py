"""Requests that are ready to be sent, singly and as columns. Work is done on columns: per-request calls dominate at a million requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, repeat
from typing import Self, overload

import msgspec

#: the bytes around a request's id and its params
_BEFORE_ID, _BEFORE_PARAMS, _AFTER = b'{"custom_id":"', b'","params":', b"}"
_AROUND = len(_BEFORE_ID) + len(_BEFORE_PARAMS) + len(_AFTER)


class RequestForm:
    """Identifies requests that differ only in their ids and in the texts of one prompt and one system prompt.

    Forms are compared by identity.
    """

    __slots__ = ()


class PreparedRequest(msgspec.Struct, frozen=True, gc=False):
    """A request that has passed every check and is encoded once, ready to be written into an upload body."""

    #: unique in its batch; every result line names it
    custom_id: str
    #: the row's key columns as a JSON array, or for a request without a row its own ``custom_id`` or position
    key: str
    #: the params as canonical JSON
    params: bytes
    form: RequestForm | None = None

    @property
    def body(self) -> bytes:
        """``{"custom_id": …, "params": {…}}`` as JSON: what is uploaded."""
        return RequestBlock.of([self]).join_bodies()


class RequestBlock(Sequence[PreparedRequest]):
    """Prepared requests as columns in the same order."""

    def __init__(
        self, custom_ids: Sequence[str], keys: Sequence[str], params: Sequence[bytes], forms: Sequence[RequestForm | None]
    ) -> None:
        self.custom_ids = custom_ids
        self.keys = keys
        self.params = params
        self.forms = forms

    @classmethod
    def of(cls, requests: Sequence[PreparedRequest]) -> Self:
        """The block of these requests; a block is returned as it is."""
        if isinstance(requests, cls):
            return requests
        return cls([r.custom_id for r in requests], [r.key for r in requests], [r.params for r in requests], [r.form for r in requests])

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each request's body. Ids are ASCII, so their characters are bytes."""
        return [len(custom_id) + len(params) + _AROUND for custom_id, params in zip(self.custom_ids, self.params, strict=True)]

    def join_bodies(self) -> bytes:
        """The bodies with commas between. Joining the pieces of all bodies at once copies each byte only once."""
        ids = ",".join(self.custom_ids).encode().split(b",")
        around = chain([_BEFORE_ID], repeat(_AFTER + b"," + _BEFORE_ID))
        return b"".join([*chain.from_iterable(zip(around, ids, repeat(_BEFORE_PARAMS), self.params, strict=False)), _AFTER])

    def pick(self, places: Sequence[int]) -> RequestBlock:
        """The requests at these places."""
        if len(places) == len(self):
            return self
        columns = (self.custom_ids, self.keys, self.params, self.forms)
        return RequestBlock(*([column[place] for place in places] for column in columns))  # type: ignore[arg-type] # the types stay

    def __len__(self) -> int:
        return len(self.params)

    @overload
    def __getitem__(self, at: int) -> PreparedRequest: ...

    @overload
    def __getitem__(self, at: slice) -> RequestBlock: ...

    def __getitem__(self, at: int | slice) -> PreparedRequest | RequestBlock:
        if isinstance(at, slice):
            if range(len(self))[at] == range(len(self)):
                return self
            return RequestBlock(self.custom_ids[at], self.keys[at], self.params[at], self.forms[at])
        return PreparedRequest(self.custom_ids[at], self.keys[at], self.params[at], self.forms[at])

    def __iter__(self) -> Iterator[PreparedRequest]:
        return map(PreparedRequest, self.custom_ids, self.keys, self.params, self.forms)


def split_body(body: bytes, custom_id: str) -> bytes:
    """The params of a request's body."""
    return body[len(_BEFORE_ID) + len(custom_id) + len(_BEFORE_PARAMS) : -len(_AFTER)]
