"""Scripted outcomes of requests. A marker in the prompt decides first, then the rates of the settings.

A marker is ``[[sim:NAME]]`` anywhere in the last user message. ``[[sim:NAME-once]]`` strikes only the first time that this prompt text is
seen in its workspace, so that a request which is asked again succeeds.

- ``errored``, ``overloaded``, ``rate-limit``, ``api-error``: an ``errored`` line. ``credit``, ``usage-limit``, ``billing``, ``disabled``:
  an ``errored`` line because of the account. ``file-url``, ``image``: an ``errored`` line of a request that fails while it runs.
- ``expired``, ``canceled``: no answer.
- ``max_tokens``: half of the answer, cut. ``context-window``: the same for ``model_context_window_exceeded``. ``thinking``: a thinking
  block before the answer. ``thinking-only``: thinking uses up ``max_tokens``, and there is no text.
- ``refusal``, ``refusal-CATEGORY`` (``cyber``, ``bio``, ``frontier_llm``, ``reasoning_extraction``, ``general_harms``): refused before any
  output. ``refusal-partial``: refused in the middle of the text, which is billed.
- ``tool``: a call of the request's first tool that has an ``input_schema``, also when no ``tool_choice`` forces it; ``tool-twice``: two.
- ``pause-turn``: a server tool's turn that is paused. ``citations``: a text in blocks, one of which cites.
- ``search``: a web search, also without the tool. ``search-error``: a web search that fails, without cost.
- ``compaction``, ``advisor``, ``fallback``: ``usage.iterations``, with the content blocks of the beta API.
- ``invalid-output``: prose, even when a schema was asked for.
- A change of ``odd_lines.CHANGES``, with ``-`` for ``_``: a result line of an undocumented shape.
"""

from __future__ import annotations

import hashlib
import re
from enum import IntEnum
from typing import NamedTuple

from . import odd_lines
from .errors import ApiError


class Outcome(IntEnum):
    """The outcome of a request when its batch ends."""

    SUCCEEDED = 0
    ERRORED = 1
    EXPIRED = 2
    CANCELED = 3


class Script(NamedTuple):
    """The script of a marker: an outcome and, for an errored one, the error in its result line."""

    outcome: Outcome = Outcome.SUCCEEDED
    #: type and message of the error
    type: str = ""
    message: str = ""
    #: whether ``details`` marks the error as visible to the user; otherwise ``details`` is null
    details: bool = False
    #: whether the line has the member ``request_id``, which names the request (``workerreq_…``)
    named: bool = True


#: The categories of refusals in the SDK's types.
CATEGORIES = ("cyber", "bio", "frontier_llm", "reasoning_extraction", "general_harms")
#: Categories whose refusals are billed, since 24 September 2026, although nothing was answered.
BILLED_CATEGORIES = frozenset(("bio", "frontier_llm", "reasoning_extraction"))
_E = Outcome.ERRORED
_INVALID = "invalid_request_error"
_ODD_OUTCOMES = {"new_type": _E, "flat_error": _E}
#: marker → script. The texts of credit, file-url and image were recorded. Those of usage-limit, billing and disabled are invented after
#: reports of such errors.
MARKERS: dict[str, Script] = {
    "errored": Script(_E, _INVALID, "The simulator was told to fail this request.", details=True),
    "overloaded": Script(_E, "overloaded_error", "Overloaded"),
    "rate-limit": Script(_E, "rate_limit_error", "This request would exceed the rate limit."),
    "api-error": Script(_E, "api_error", "Internal server error"),
    "credit": Script(
        _E,
        _INVALID,
        "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or purchase credits.",
        named=False,
    ),
    "usage-limit": Script(
        _E, _INVALID, "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."
    ),
    "billing": Script(_E, "billing_error", "There is an issue with the billing of your organization."),
    "disabled": Script(_E, "permission_error", "This organization has been disabled."),
    "file-url": Script(_E, _INVALID, "Unable to download the file. Please verify the URL and try again.", details=True),
    "image": Script(_E, _INVALID, "Could not process image"),
    "expired": Script(Outcome.EXPIRED),
    "canceled": Script(Outcome.CANCELED),
    **dict.fromkeys(
        (
            "max_tokens", "context-window", "thinking", "thinking-only", "refusal", "refusal-partial", "tool", "tool-twice", "pause-turn",
            "citations", "search", "search-error", "compaction", "advisor", "fallback", "invalid-output",
            *(f"refusal-{category}" for category in CATEGORIES),
        ),
        Script(),
    ),
    **{kind.replace("_", "-"): Script(_ODD_OUTCOMES.get(kind, Outcome.SUCCEEDED)) for kind in odd_lines.CHANGES},
}  # fmt: skip
_MARKER = re.compile(r"\[\[sim:([a-z_-]+?)(-once)?\]\]")
_TWO_TO_64 = 2**64


class SlipError(ApiError):
    """Refuses the whole call because of an unknown marker, with which a test would prove nothing."""


def marker_in(prompt: str) -> tuple[str, bool]:
    """Name of the prompt's first marker, and whether it strikes only once. Raises SlipError (400) for an unknown name."""
    found = _MARKER.search(prompt)
    if found is None or found[1] not in MARKERS:
        known = ", ".join(sorted(MARKERS))
        raise SlipError(400, f"messages: unknown simulator marker in {prompt[:80]!r}; known are {known}, each also with -once")
    return found[1], found[2] is not None


def chance(seed: int, purpose: str, custom_id: str) -> float:
    """A number in [0, 1) that depends on the three arguments only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{custom_id}".encode(), digest_size=8).digest()) / _TWO_TO_64
