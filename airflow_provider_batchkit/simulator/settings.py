"""The settings of a simulator: limits, clock, keys, token model, scripted outcomes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

import msgspec

from .outcomes import MARKERS

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]

#: Limits of the API for one batch, from its documentation: bytes of the body, and requests.
MAX_BODY_BYTES = 256_000_000
MAX_REQUESTS = 100_000
#: Seconds until a batch that has not ended expires, and until its results are archived, both from creation.
EXPIRES_AFTER_SECONDS = 24 * 3600
ARCHIVED_AFTER_SECONDS = 29 * 24 * 3600
_CLOCK = re.compile(r"polls:(?P<polls>\d+)|seconds:(?P<least>\d+(\.\d+)?)(-(?P<most>\d+(\.\d+)?))?")


class SimulatorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of the simulator. Outcome and token settings hold for requests accepted after they are set.

    ``clock`` decides when a batch ends. ``"instant"``: at its creation. ``"polls:N"``: after N looks (a retrieve, or a list page that shows
    it) have answered ``in_progress``. ``"seconds:S"``: S seconds after its creation; ``"seconds:S-T"``: after a time between S and T, which
    differs from batch to batch. ``"manual"``: only by a control call. In every mode a batch that is 24 hours old on the simulator's clock
    expires, and a batch that is 29 days old loses its results.
    """

    clock: str = "instant"
    #: seconds by which the server's clock is ahead of the machine's (negative: behind)
    skew_seconds: float = 0.0
    #: decides the order of results, the rates below, the time of each batch, and the calls that a fault with a chance strikes; nothing else
    seed: int = 0
    #: API key or bearer token → workspace; empty: every non-empty key belongs to workspace ``default``
    keys: dict[str, str] = {}
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_BODY_BYTES)] = MAX_BODY_BYTES
    max_requests: Annotated[int, msgspec.Meta(ge=1, le=MAX_REQUESTS)] = MAX_REQUESTS
    #: whether bad ``params`` of one request make its whole batch refused. The API accepts the batch, and that request is errored
    strict_params: bool = False
    #: requests of one workspace that may be processing at the same time; a create above it is a 429. None: any number
    queue_requests: Count | None = None
    #: the host in ``results_url``: the API names its own, even to a client behind a gateway. Empty: the host that the client called
    results_host: str = "https://api.anthropic.com"
    #: whether the counters of a running batch move with its looks or its seconds; otherwise they stay zero until it has ended
    moving_counts: bool = False
    #: model id → members of its ``ModelInfo`` to change (``{"lifecycle": "retired"}``, ``{"max_tokens": 8000}``); a new id is a new model
    models: dict[str, dict[str, Any]] = {}

    #: tokens of every request and answer, in place of the token model of ``tokens.py``; ``count_tokens`` returns the same number. They may
    #: be more than a text can have: an estimate's bound holds for the token model, not for these settings
    input_tokens: Count | None = None
    output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    #: tokens up to which a text answer is filled, or ``max_tokens`` where that is less; the usage counts the filled text
    answer_tokens: Count = 0
    #: searches billed to every succeeded request that has a ``web_search_…`` tool
    web_searches: Count = 1
    #: tokens of the shortest prompt prefix that is cached, in place of each model's own
    cache_min_tokens: Count | None = None
    #: requests of a batch that run at the same time, as far as the cache is concerned: so many write a cold prefix, and the rest read it.
    #: None: all of them write. In the one recorded batch one request wrote and the other read
    cache_concurrency: Annotated[int, msgspec.Meta(ge=1)] | None = 1

    #: shares of all requests (0 to 1, their sum at most 1), picked by a hash of seed and custom_id
    errored: Share = 0.0
    expired: Share = 0.0
    canceled: Share = 0.0
    #: marker (see ``outcomes.py``) → share of all requests, beside the three above
    rates: dict[str, Share] = {}
    #: whether the rates strike a prompt text only the first time it is seen, so that asking again succeeds
    once: bool = False
    #: share of a batch that was finished before a cancel or an expiry reached it
    done_share: Share = 0.0
    #: looks that answer ``canceling`` before a canceled batch is ``ended``; with the manual clock it stays canceling
    cancel_looks: Count = 1

    def __post_init__(self) -> None:
        """Raises ValueError for a clock that is not one of the five forms, an unknown marker, and rates whose sum is above 1."""
        clock_mode(self.clock)
        unknown = sorted(set(self.rates) - set(MARKERS))
        if unknown:
            raise ValueError(f"rates: {', '.join(unknown)} is no marker; known are {', '.join(sorted(MARKERS))}")
        if sum(self.shares.values()) > 1:
            raise ValueError(f"errored, expired, canceled and the other rates add up to {sum(self.shares.values())}, above 1")

    def changed(self, changes: Mapping[str, Any]) -> SimulatorSettings:
        """A copy with some fields changed. Raises ValueError for an unknown name or a value out of its range."""
        merged = {**msgspec.structs.asdict(self), **changes}
        try:
            return msgspec.convert(merged, SimulatorSettings)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error

    @property
    def shares(self) -> dict[str, float]:
        """Marker → share of all requests."""
        return {"errored": self.errored, "expired": self.expired, "canceled": self.canceled, **self.rates}


@cache
def clock_mode(clock: str) -> tuple[str, float, float]:
    """Splits ``"seconds:3-20"`` into ``("seconds", 3.0, 20.0)``, ``"polls:3"`` into ``("polls", 3.0, 3.0)``; instant is no polls.

    Raises ValueError for anything else.
    """
    if clock == "instant":
        return "polls", 0.0, 0.0
    if clock == "manual":
        return "manual", 0.0, 0.0
    found = _CLOCK.fullmatch(clock)
    if found is None:
        raise ValueError(f"clock {clock!r} is none of 'instant', 'polls:N', 'seconds:S', 'seconds:S-T', 'manual'")
    if found["polls"]:
        return "polls", float(found["polls"]), float(found["polls"])
    least = float(found["least"])
    most = float(found["most"] or least)
    if most < least:
        raise ValueError(f"clock {clock!r}: {most:g} seconds are less than {least:g}")
    return "seconds", least, most
