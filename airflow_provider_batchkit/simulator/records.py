"""The record that is kept of a request: about 0.4 KB. In place of the prompt it holds the prompt's digest and first 60 characters."""

from __future__ import annotations

import msgspec

from .outcomes import BILLED_CATEGORIES, Outcome


class Record(msgspec.Struct, gc=False):
    """One request of a batch. Its token counts are billed if it succeeds."""

    custom_id: str
    #: the dated name of the model that answers
    model: str = ""
    digest: str = ""
    excerpt: str = ""
    max_tokens: int = 0
    marker: str = ""
    outcome: int = Outcome.SUCCEEDED
    input_tokens: int = 0
    output_tokens: int = 0
    #: tokens up to which the answer's text is filled; 0 leaves it as it is
    filled_to: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    cache_read: int = 0
    searches: int = 0
    inference_geo: str = "global"
    #: JSON Schema of the answer, or of the called tool's input; records with the same schema share one object
    schema: bytes = b""
    #: the tool that the answer calls
    tool: str = ""
    #: whether a thinking block comes before the answer
    thinks: bool = False
    #: the model that declined, so that ``model`` answered in its place
    declined: str = ""
    #: identifiers of the request's cached prefixes, the shortest first; empty without ``cache_control``
    prefixes: tuple[str, ...] = ()
    #: type and message of the error when its params are bad
    error_type: str = ""
    error: str = ""

    @property
    def is_billed(self) -> bool:
        """Whether it is billed: it succeeded, and was not refused before any output in a category that is not billed."""
        if self.outcome != Outcome.SUCCEEDED:
            return False
        if not self.marker:
            return True
        kind, _, category = self.marker.partition("-")
        return kind != "refusal" or category == "partial" or category in BILLED_CATEGORIES
