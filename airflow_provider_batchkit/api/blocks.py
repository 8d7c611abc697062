"""Results that are read together, as columns. A batch has up to 100,000 results, and steps for each single result would dominate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from operator import itemgetter
from typing import Any, Self

import msgspec

from airflow_provider_batchkit.model import COUNTERS, BatchItem, RequestStatus, Usage, counts_of

_NOTHING = Usage()


class BilledPart(msgspec.Struct, frozen=True, gc=False):
    """Usage of a request that is billed by itself, at its own model."""

    model: str | None
    usage: Usage
    #: category of a refusal before any output: ``""`` where it has none, None for any other result. It decides whether the part is billed
    refusal: str | None = None


@dataclass(slots=True, kw_only=True)
class ResultBlock:
    """The fields of :class:`BatchItem` for many results: columns in the same order."""

    custom_ids: Sequence[str]
    #: values of ``RequestStatus``
    statuses: Sequence[str]
    texts: Sequence[str | None]
    stop_reasons: Sequence[str | None]
    error_types: Sequence[str | None]
    error_messages: Sequence[str | None]
    models: Sequence[str | None]
    #: whether the API counts anything for the result
    billed: Sequence[bool]
    #: the fields of ``Usage``; zeros where nothing is counted
    input_tokens: Sequence[int]
    output_tokens: Sequence[int]
    cache_write_5m_tokens: Sequence[int]
    cache_write_1h_tokens: Sequence[int]
    cache_read_tokens: Sequence[int]
    web_searches: Sequence[int]
    inference_geos: Sequence[str | None]
    speeds: Sequence[str | None]
    #: the API's ids of the messages, and of requests that failed
    message_ids: Sequence[str | None]
    request_ids: Sequence[str | None]
    #: blocks, as JSON, of an answer that is more than one block of plain text. This column and the next three are None without any value
    contents: Sequence[str | None] | None = None
    #: the messages' ``stop_details`` as JSON
    stop_details: Sequence[str | None] | None = None
    #: the billed parts of a result whose bill is not simply its counts above at its model above
    bills: Sequence[tuple[BilledPart, ...] | None] | None = None
    #: whole messages as JSON, where they are kept
    messages: Sequence[bytes | None] | None = None
    #: keys of the rows that pay for the results, where they are known
    keys: Sequence[str] | None = None
    _cached: bool | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.custom_ids)

    @property
    def counts(self) -> list[Sequence[int]]:
        """``Usage.counts`` by column."""
        return list(counts_of(self))

    @property
    def cached(self) -> bool:
        """Whether any of the prompts was written to the cache or read from it."""
        if self._cached is None:
            self._cached = any(self.cache_write_5m_tokens) or any(self.cache_write_1h_tokens) or any(self.cache_read_tokens)
        return self._cached

    @property
    def prompt_tokens(self) -> Sequence[int]:
        """``Usage.prompt_tokens`` of each result."""
        if not self.cached:
            return self.input_tokens
        parts = (self.input_tokens, self.cache_write_5m_tokens, self.cache_write_1h_tokens, self.cache_read_tokens)
        return list(map(sum, zip(*parts, strict=True)))

    def rows(self, places: Sequence[int]) -> Self:
        """The results at these places; a place may come more than once."""
        return type(self)(**{one.name: _at(places, getattr(self, one.name)) for one in fields(self) if one.init})

    @classmethod
    def of(cls, items: Sequence[BatchItem]) -> Self:
        """The items as a block."""
        usages = [_NOTHING if item.usage is None else item.usage for item in items]
        counts: dict[str, Any] = {name: [getattr(usage, name) for usage in usages] for name in COUNTERS}
        return cls(
            custom_ids=[item.custom_id for item in items],
            statuses=[item.status.value for item in items],
            texts=[item.text for item in items],
            stop_reasons=[item.stop_reason for item in items],
            error_types=[item.error_type for item in items],
            error_messages=[item.error_message for item in items],
            models=[item.model for item in items],
            billed=[item.usage is not None for item in items],
            **counts,
            inference_geos=[usage.inference_geo for usage in usages],
            speeds=[usage.speed for usage in usages],
            message_ids=[item.message_id for item in items],
            request_ids=[item.request_id for item in items],
        )

    @classmethod
    def billing(cls, parts: Sequence[BilledPart]) -> Self:
        """A block whose results are billed as these parts."""
        return cls.of([BatchItem("", RequestStatus.SUCCEEDED, model=part.model, usage=part.usage) for part in parts])

    def items(self) -> Iterator[BatchItem]:
        """The results one by one."""
        nothing: list[Any] = [None] * len(self)
        usages = zip(*self.counts, self.inference_geos, self.speeds, strict=True)
        return map(
            BatchItem,
            self.custom_ids,
            map(RequestStatus, self.statuses),
            self.texts,
            self.stop_reasons,
            self.models,
            [Usage(*usage) if billed else None for usage, billed in zip(usages, self.billed, strict=True)],
            self.error_types,
            self.error_messages,
            self.messages or nothing,
            self.message_ids,
            self.request_ids,
            self.stop_details or nothing,
        )


def _at(places: Sequence[int], column: Sequence[Any] | None) -> Any:
    if column is None:
        return None
    if len(places) < 2:  # itemgetter returns no tuple for one place, and needs at least one
        return [column[place] for place in places]
    return list(itemgetter(*places)(column))
