"""Every request that a contract run may send, and the most that all of them can cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.model import Usage

#: the model of most requests: cheap, and its dated name, its limit and its ``inference_geo`` were recorded
HAIKU = "claude-haiku-4-5"
#: a model that thinks unasked and takes adaptive thinking alone
OPUS = "claude-opus-5"
UNKNOWN_MODEL = "claude-does-not-exist-9"
#: answer tokens of ``HAIKU`` at most, as recorded
HAIKU_LIMIT = 64_000
#: prompt tokens that the API may add to a request beside what its JSON has: for tools (530, by the documentation) and with a margin
ADDED_TOKENS = 1_000

#: above the 4,096 tokens that ``HAIKU`` caches at least, whether a token has four bytes or six
_LONG = " ".join(f"Rule {n}: shelf {n * 7919 % 1000} keeps parcels of zone {n * 104729 % 997} until noon." for n in range(420))
_TOOL = {
    "name": "note_color",
    "description": "Notes a color.",
    "input_schema": {"type": "object", "properties": {"color": {"type": "string"}}, "required": ["color"], "additionalProperties": False},
}


def _params(prompt: str, max_tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"model": HAIKU, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}], **more}


def _without(params: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != name}


PLAIN = _params("Answer with one word: which planet do we live on?", 16)
_CACHED = [{"type": "text", "text": _LONG, "cache_control": {"type": "ephemeral"}}]

#: requests of the batch that runs to its end, by custom_id
ANSWERED: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "cut": _params("Count from one to ten in words.", 1),
    "tool": _params("Note the color of the sky.", 100, tools=[_TOOL], tool_choice={"type": "tool", "name": "note_color"}),
    "cache-1": _params("Answer with one word: is zone 1 named?", system=_CACHED),
    "cache-2": _params("Answer with one word: is zone 2 named?", system=_CACHED),
    "thinks": _params("How many primes lie between 10,000 and 10,200? Work it out.", 40, model=OPUS),
}

#: requests of the same batch that the API was recorded to accept at create and to fail at the end
LATE: dict[str, dict[str, Any]] = {
    "no-messages": _without(PLAIN, "messages"),
    "zero-tokens": {**PLAIN, "max_tokens": 0},
    "stream": {**PLAIN, "stream": True},
    "unknown-member": {**PLAIN, "max_token": 5},
    "unknown-model": {**PLAIN, "model": UNKNOWN_MODEL},
    "over-limit": {**PLAIN, "max_tokens": HAIKU_LIMIT + 1},
    "old-thinking": _params("Say yes.", 1_100, model=OPUS, thinking={"type": "enabled", "budget_tokens": 1_024}),
}

#: requests of the batches that are canceled as soon as they are made
HELD: dict[str, dict[str, Any]] = {"held-1": _params("Say yes."), "held-2": _params("Say no.")}
#: the create calls that make one batch of them each
HELD_STEPS = ("held 1", "held 2")


def body_of(requests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The body of a create call."""
    return {"requests": [{"custom_id": custom_id, "params": params} for custom_id, params in requests.items()]}


def _one(custom_id: str) -> dict[str, Any]:
    return {"custom_id": custom_id, "params": _params("Say yes.")}


#: bodies of create calls that the API was recorded to refuse, or that its documentation says it refuses
REFUSED: dict[str, dict[str, Any] | bytes] = {
    "empty list": {"requests": []},
    "repeated id": {"requests": [_one("dup"), _one("dup")]},
    "long id": {"requests": [_one("x" * 65)]},
    "odd id": {"requests": [_one("no spaces")]},
    "missing id": {"requests": [{"params": _params("Say yes.")}]},
    "no json": b'{"requests": [',
}


def bound_usd(book: PriceBook, at: datetime) -> Decimal:
    """The most that a run can cost at the prices of ``at``, also when the API accepts everything that it is expected to refuse.

    A prompt has no more tokens than its JSON has bytes, and ``ADDED_TOKENS``; each costs at most what writing it to the cache for an hour
    does. An answer has at most ``max_tokens``, where that is 0 or above the limit the limit of the model. A model without a price counts
    as the dearest of the others.

    :raises LookupError: when a model of the plan has no known price
    """
    sent = [*ANSWERED.values(), *LATE.values(), *[params for params in HELD.values() for _ in HELD_STEPS]]
    for body in REFUSED.values():
        if isinstance(body, dict):
            sent += [request["params"] for request in body["requests"]]
    rates: dict[str, tuple[Decimal, Decimal]] = {}
    for model in (HAIKU, OPUS):
        found = book.rates(model, at)
        if found is None:
            raise LookupError(f"no price is known for {model}")
        tiers = [tier.batch for tier in found.tiers]
        prompt = max(max(tier.input, tier.cache_write_5m, tier.cache_write_1h, tier.cache_read) for tier in tiers)
        rates[model] = prompt * found.us_multiplier, max(tier.output for tier in tiers) * found.us_multiplier
    dearest = max(rates.values())
    total = Decimal(0)
    for params in sent:
        prompt, answer = rates.get(params["model"], dearest)
        tokens = params["max_tokens"]
        total += (len(json.dumps(params).encode()) + ADDED_TOKENS) * prompt
        total += (tokens if 0 < tokens <= HAIKU_LIMIT else HAIKU_LIMIT) * answer
    return total


def billed_usd(book: PriceBook, at: datetime, messages: list[dict[str, Any]]) -> Decimal | None:
    """What answers cost by their own usage; None where a model has no known price."""
    total = Decimal(0)
    for message in messages:
        usage = message.get("usage") or {}
        written = usage.get("cache_creation") or {}
        counted = Usage(
            input_tokens=usage.get("input_tokens") or 0,
            output_tokens=usage.get("output_tokens") or 0,
            cache_write_5m_tokens=written.get("ephemeral_5m_input_tokens") or 0,
            cache_write_1h_tokens=written.get("ephemeral_1h_input_tokens") or 0,
            cache_read_tokens=usage.get("cache_read_input_tokens") or 0,
        )
        cost = book.cost(str(message.get("model")), counted, at)
        if cost is None:
            return None
        total += cost.batch_usd
    return total
