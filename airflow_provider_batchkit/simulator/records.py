"""The little that is kept of a request: about 0.4 KB whatever the prompt's size, its digest and first 60 characters in place of it."""

from __future__ import annotations

import msgspec

from .outcomes import BILLED_CATEGORIES, Outcome


class Record(msgspec.Struct, gc=False):
    """One request of a batch. Token counts are what it is billed if it succeeds."""

    custom_id: str
    #: the model that answers, by its dated name
    model: str = ""
    digest: str = ""
    excerpt: str = ""
    max_tokens: int = 0
    marker: str = ""
    outcome: int = Outcome.SUCCEEDED
    input_tokens: int = 0
    output_tokens: int = 0
    #: tokens up to which its text is filled; 0: as short as it is
    filled_to: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    cache_read: int = 0
    searches: int = 0
    inference_geo: str = "global"
    #: JSON Schema of the answer, or of the called tool's input; shared by all records that ask for the same one
    schema: bytes = b""
    #: the tool that the answer calls
    tool: str = ""
    #: whether a thinking block comes before the answer
    thinks: bool = False
    #: the model that declined before ``model`` answered in its place
    declined: str = ""
    #: what the request's cached prefixes are known by, the shortest first; empty without a marker
    prefixes: tuple[str, ...] = ()
    #: type and message of the error when its params are bad
    error_type: str = ""
    error: str = ""

    @property
    def is_billed(self) -> bool:
        """Whether it costs anything: it succeeded, and was not refused before any output for a reason that is not billed."""
        if self.outcome != Outcome.SUCCEEDED:
            return False
        if not self.marker:
            return True
        kind, _, category = self.marker.partition("-")
        return kind != "refusal" or category == "partial" or category in BILLED_CATEGORIES
