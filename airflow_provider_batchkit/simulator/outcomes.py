"""Scripted outcomes: which request fails, and how. Markers in a prompt come first, then the rates of the settings.

A marker is ``[[sim:NAME]]`` anywhere in the last user message, or ``[[sim:NAME-once]]``: only the first time that this prompt text is
seen in its workspace, so that a request which is asked again succeeds.
"""

from __future__ import annotations

import hashlib
import re
from enum import IntEnum

from .errors import ApiError
from .settings import SimulatorSettings


class Outcome(IntEnum):
    """What becomes of a request when its batch ends."""

    SUCCEEDED = 0
    ERRORED = 1
    EXPIRED = 2
    CANCELED = 3


#: name of a marker → outcome and, for an errored one, type and message of the error
MARKERS: dict[str, tuple[Outcome, str, str]] = {
    "errored": (Outcome.ERRORED, "invalid_request_error", "The simulator was told to fail this request."),
    "overloaded": (Outcome.ERRORED, "overloaded_error", "Overloaded"),
    "rate-limit": (Outcome.ERRORED, "rate_limit_error", "This request would exceed the rate limit."),
    "api-error": (Outcome.ERRORED, "api_error", "Internal server error"),
    "credit": (Outcome.ERRORED, "invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
    "expired": (Outcome.EXPIRED, "", ""),
    "canceled": (Outcome.CANCELED, "", ""),
    "refusal": (Outcome.SUCCEEDED, "", ""),
    "max_tokens": (Outcome.SUCCEEDED, "", ""),
    "invalid-output": (Outcome.SUCCEEDED, "", ""),
}
_MARKER = re.compile(r"\[\[sim:([a-z_-]+?)(-once)?\]\]")
_TWO_TO_64 = 2**64


def marker_in(prompt: str) -> tuple[str, bool]:
    """Name of the first marker in a prompt that has one, and whether it strikes once. Raises ApiError (400) for an unknown name."""
    found = _MARKER.search(prompt)
    if found is None or found[1] not in MARKERS:
        known = ", ".join(sorted(MARKERS))
        raise ApiError(400, f"messages: unknown simulator marker in {prompt[:80]!r}; known are {known}, each also with -once")
    return found[1], found[2] is not None


def chance(seed: int, purpose: str, custom_id: str) -> float:
    """A number in [0, 1) that depends on the three arguments only."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{custom_id}".encode(), digest_size=8).digest()) / _TWO_TO_64


def by_rate(settings: SimulatorSettings, custom_id: str) -> str:
    """The marker name that the rates pick for a request; ``""`` for none."""
    if not (settings.errored or settings.expired or settings.canceled):
        return ""
    drawn = chance(settings.seed, "outcome", custom_id)
    for name, rate in (("errored", settings.errored), ("expired", settings.expired), ("canceled", settings.canceled)):
        if drawn < rate:
            return name
        drawn -= rate
    return ""
