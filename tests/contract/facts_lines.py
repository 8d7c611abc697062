"""Facts about answers: their lines, their usage, the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import plan
from .seen import Check, Fact, Seen, Verdict, judged, not_told

DATED = "claude-haiku-4-5-20251001"


def _message(custom_id: str, check: Callable[[dict[str, Any]], Verdict]) -> Check:
    """A check of one answer."""

    def look(seen: Seen) -> Verdict:
        message = seen.message(custom_id)
        if message is not None:
            return check(message)
        result = seen.result(custom_id)
        if result is None:
            return not_told(seen.silent.get("results", "the batch did not end in time"))
        return not_told(f"{custom_id} has no answer: {str(result)[:200]}")

    return look


def _each_once(seen: Seen) -> Verdict:
    if not seen.lines:
        return not_told("the batch did not end in time")
    got, asked = sorted(line["custom_id"] for line in seen.lines), sorted([*plan.ANSWERED, *plan.LATE])
    return judged(got == asked, f"{len(got)} lines for {len(asked)} requests")


def _twice(seen: Seen) -> Verdict:
    first, second = seen.answers.get("results"), seen.answers.get("results again")
    if first is None or second is None or first.status != 200:
        return not_told("the results were not read twice")
    return judged(
        sorted(first.body.split(b"\n")) == sorted(second.body.split(b"\n")), f"{len(first.body):,} and {len(second.body):,} bytes"
    )


def _canceled_line(seen: Seen) -> Verdict:
    canceled = [line["result"] for line in seen.canceled_lines if line["result"]["type"] == "canceled"]
    if not canceled:
        return not_told("no request was canceled before it ran" if seen.canceled_lines else "no canceled batch was seen to end")
    return judged(all(result == {"type": "canceled"} for result in canceled), f"{canceled[0]}")


def _cache(seen: Seen) -> Verdict:
    messages = [seen.message(name) for name in ("cache-1", "cache-2")]
    usages = [message["usage"] for message in messages if message is not None]
    if len(usages) < 2:
        return not_told("the two requests have no answers")
    writes = sorted(usage["cache_creation_input_tokens"] for usage in usages)
    reads = sorted(usage["cache_read_input_tokens"] for usage in usages)
    fits = writes[0] == 0 and writes[1] > 0 and reads == [0, writes[1]]
    return judged(fits, f"written {writes[1]:,} and {writes[0]:,}, read {reads[1]:,} and {reads[0]:,}")


def _split_writes(message: dict[str, Any]) -> Verdict:
    usage = message["usage"]
    split = usage["cache_creation"]
    fits = set(split) == {"ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"}
    return judged(fits and sum(split.values()) == usage["cache_creation_input_tokens"], f"{split}")


def _counted(seen: Seen) -> Verdict:
    counted, message = seen.answers.get("count"), seen.message("plain")
    if counted is None or counted.status != 200 or message is None:
        return not_told("there is no count, or no answer")
    said, billed = counted.json["input_tokens"], message["usage"]["input_tokens"]
    return judged(abs(said - billed) <= 10, f"counted {said}, billed {billed}")


def _tool(message: dict[str, Any]) -> Verdict:
    blocks = [block["type"] for block in message["content"]]
    fits = blocks == ["tool_use"] and isinstance(message["content"][0]["input"], dict)
    return judged(fits and message["stop_reason"] == "tool_use", f"{message['stop_reason']}, blocks {blocks}")


def _thinks(message: dict[str, Any]) -> Verdict:
    blocks = {block["type"] for block in message["content"]}
    if "text" in blocks:
        return not_told(f"it answered with {', '.join(sorted(blocks))} this time")
    return judged(message["stop_reason"] == "max_tokens", f"{message['stop_reason']}, blocks {sorted(blocks)}")


def _cut(message: dict[str, Any]) -> Verdict:
    tokens = message["usage"]["output_tokens"]
    return judged(message["stop_reason"] == "max_tokens" and tokens == 1, f"{message['stop_reason']}, {tokens} tokens")


FACTS = [
    Fact("each-request-once", "one line for each request, in any order", "api/results.py: what has no line is missing", _each_once),
    Fact("results-again", "the same lines when they are read again", "a fetch can be killed and run again", _twice),
    Fact("canceled-line", "nothing but its type, no usage", "api/decode.py: a canceled row costs nothing", _canceled_line),
    Fact(
        "dated-model",
        f"{plan.HAIKU} answers as {DATED}",
        "cost/prices.py prices the name that answers",
        _message("plain", lambda message: judged(message["model"] == DATED, message["model"])),
    ),
    Fact(
        "service-tier",
        "service_tier is batch",
        "cost/tally.py: the batch price",
        _message(
            "plain", lambda message: judged(message["usage"].get("service_tier") == "batch", str(message["usage"].get("service_tier")))
        ),
    ),
    Fact(
        "geography",
        "inference_geo is not_available for the 4.5 models",
        "cost/prices.py: 1.1 times the price for us",
        _message(
            "plain",
            lambda message: judged(message["usage"].get("inference_geo") == "not_available", str(message["usage"].get("inference_geo"))),
        ),
    ),
    Fact(
        "cache-split",
        "cache_creation has 5m and 1h, which add up",
        "cost/prices.py: they have two prices",
        _message("cache-1", _split_writes),
    ),
    Fact("cache-in-a-batch", "of two requests with one prefix, one writes and one reads", "prime_cache, jobs/prime.py", _cache),
    Fact(
        "cut-answer",
        "stop_reason max_tokens, and no token more",
        "UNFINISHED in model.py; the bound of every estimate",
        _message("cut", _cut),
    ),
    Fact(
        "forced-tool",
        "a tool_use block alone, its input an object",
        "landing: a forced tool's input is the answer",
        _message("tool", _tool),
    ),
    Fact(
        "thinks-unasked",
        f"{plan.OPUS} may use max_tokens up without any text",
        "truncated without text in model.py",
        _message("thinks", _thinks),
    ),
    Fact(
        "count-is-the-bill", "count_tokens is within 10 tokens of what is billed (assumed)", "cost/estimate.py: the expected cost", _counted
    ),
]
