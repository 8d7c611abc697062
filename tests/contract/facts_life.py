"""Facts about a batch from its creation to its end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from .plan import HELD_STEPS
from .seen import Check, Created, Fact, Look, Outcome, Seen, Verdict, judged, not_told, refused, step
from .wire import Answer

#: seconds from a POST's doubt within which the package expects its batch in the list: [batchkit] settle_seconds
LISTED_WITHIN_S = 900.0
#: seconds by which the API's clock may differ from a worker's: SettleTimes.skew_s
SKEW_S = 900.0
API_HOST = "api.anthropic.com"
DAY = timedelta(hours=24)
_TIMES = ("created_at", "expires_at")


def _made(check: Callable[[Answer], Verdict]) -> Check:
    """A check of what the first create call that was to be accepted answered."""

    def look(seen: Seen) -> Verdict:
        for name in (*HELD_STEPS, "answered"):
            answer = seen.answers.get(name)
            if answer is not None and answer.status == 200:
                return check(answer)
        return not_told("no batch was made")

    return look


def _running(check: Callable[[Look, int], Verdict]) -> Check:
    """A check of the first look that showed a batch that runs, and of its size."""

    def look(seen: Seen) -> Verdict:
        sizes = {created.batch_id: created.requests for created in seen.created}
        for found in seen.looks:
            if found.answer.json.get("processing_status") == "in_progress":
                return check(found, sizes[found.batch_id])
        return not_told("no look showed a batch that runs")

    return look


def _at(text: object) -> datetime:
    return datetime.fromisoformat(str(text))


def _time_form(answer: Answer) -> Verdict:
    times = [answer.json[name] for name in _TIMES]
    return judged(all(text.endswith("+00:00") and _at(text).tzinfo for text in times), ", ".join(times))


def _expiry(answer: Answer) -> Verdict:
    lasts = _at(answer.json["expires_at"]) - _at(answer.json["created_at"])
    return judged(lasts == DAY, f"{lasts} after created_at")


def _clock(seen: Seen) -> Verdict:
    made: Created | None = next(iter(seen.created), None)
    if made is None:
        return not_told("no batch was made")
    created_at = _at(seen.answers[made.step].json["created_at"]).timestamp()
    off = created_at - (made.sent_at + made.made_at) / 2
    return judged(abs(off) <= SKEW_S, f"created_at is {off:+.1f} s from this machine's clock")


def _listed(seen: Seen) -> Verdict:
    if not seen.listed_after_s:
        return not_told("no batch was made")
    known = [after for after in seen.listed_after_s.values() if after is not None]
    missing = len(seen.listed_after_s) - len(known)
    if missing:
        return not_told(f"{missing} of {len(seen.listed_after_s)} batches were not in the list within a minute of their creation")
    return judged(max(known) <= LISTED_WITHIN_S, "seen after " + ", ".join(f"{after:.1f} s" for after in known))


def _hidden(seen: Seen) -> Verdict:
    hidden = [look for look in seen.looks if look.answer.status == 404]
    if not hidden:
        return not_told(f"none of {len(seen.looks)} looks answered 404 this time")
    return judged(True, f"{len(hidden)} of {len(seen.looks)} looks, after " + ", ".join(f"{look.after_s:.0f} s" for look in hidden[:5]))


def _two_batches(seen: Seen) -> Verdict:
    found = [created for created in seen.created if created.step in HELD_STEPS]
    if len(found) == 2:
        return judged(found[0].batch_id != found[1].batch_id, f"{found[0].batch_id} and {found[1].batch_id}")
    refusals = [str(seen.answers[name]) for name in HELD_STEPS if name in seen.answers and seen.answers[name].status != 200]
    return (
        judged(False, f"the second call was refused: {refusals[0]}")
        if len(found) == 1 and refusals
        else not_told("two calls were not answered")
    )


def _counters(look: Look, size: int) -> Verdict:
    counts: dict[str, int] = look.answer.json["request_counts"]
    names = {"processing", "succeeded", "errored", "canceled", "expired"}
    return judged(set(counts) == names and sum(counts.values()) == size, f"{counts}")


def _moving(seen: Seen) -> Verdict:
    running = [look.answer.json for look in seen.looks if look.answer.json.get("processing_status") == "in_progress"]
    moved = [batch["request_counts"] for batch in running if sum(batch["request_counts"].values()) != batch["request_counts"]["processing"]]
    if not running:
        return not_told("no look showed a batch that runs")
    return judged(True, f"moved in {len(moved)} of {len(running)} looks" if moved else f"zero in all {len(running)} looks")


def _limits(answer: Answer) -> Verdict:
    names = ["anthropic-organization-id", "anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining"]
    missing = [name for name in names if name not in answer.headers]
    return judged(not missing, f"without {', '.join(missing)}" if missing else "all of them")


def _canceling(answer: Answer) -> Verdict:
    batch = answer.json
    return judged(
        answer.status == 200 and batch.get("processing_status") == "canceling" and bool(batch.get("cancel_initiated_at")),
        f"{answer.status} {batch.get('processing_status')}",
    )


def _canceled_ends(seen: Seen) -> Verdict:
    held = [created for created in seen.created if created.step in HELD_STEPS]
    after = [
        (_at(look.answer.json["ended_at"]) - _at(look.answer.json["cancel_initiated_at"])).total_seconds()
        for look in seen.looks
        if look.answer.json.get("cancel_initiated_at") and look.answer.json.get("ended_at")
    ]
    if not held or not after:
        return not_told("no canceled batch was seen to end")
    return judged(max(after) <= 600, f"{max(after):.0f} s after the cancel")


def _results_host(seen: Seen) -> Verdict:
    urls = [look.answer.json["results_url"] for look in seen.looks if look.answer.json.get("results_url")]
    if not urls:
        return not_told("no batch was seen to end")
    return judged(all(urlsplit(url).hostname == API_HOST for url in urls), urls[0])


def _whole_list(seen: Seen) -> Verdict:
    listed = seen.answers.get("list")
    if listed is None:
        return not_told("the list had no answer")
    times = [_at(batch["created_at"]) for batch in listed.json.get("data", [])]
    members = {"has_more", "first_id", "last_id"} <= listed.json.keys()
    return judged(listed.status == 200 and members and times == sorted(times, reverse=True), f"{listed.status}, {len(times)} batches")


def _after_delete(seen: Seen) -> Verdict:
    deleted, look, listed = (seen.answers.get(name) for name in ("delete", "look after delete", "list after delete"))
    if deleted is None or look is None or listed is None:
        return not_told("nothing was deleted")
    batch_id: Any = deleted.json.get("id")
    shown = batch_id in {batch["id"] for batch in listed.json.get("data", [])}
    if deleted.status == 200 and (shown or look.status == 200):
        return not_told("it shows for a while after its deletion: look again by hand")
    return judged(deleted.json.get("type") == "message_batch_deleted" and look.status == 404, f"{deleted.json.get('type')}, then {look}")


def _content_type(answer: Answer) -> Verdict:
    found = answer.headers.get("content-type", "")
    return judged(answer.status == 200 and found.startswith("application/x-jsonl"), found)


def _first(names: list[str], check: Check, make: Callable[[str], Check]) -> Check:
    """The check of the first of some steps that had an answer."""

    def look(seen: Seen) -> Verdict:
        verdicts = [make(name)(seen) for name in names]
        return next((verdict for verdict in verdicts if verdict.outcome is not Outcome.NOT_TOLD), check(seen))

    return look


def _while_running(what: str, status: int, kind: str, words: str, *, part: bool) -> Check:
    """A refusal that only a batch that runs gives; one that has ended meanwhile tells nothing."""

    def make(name: str) -> Check:
        def look(seen: Seen) -> Verdict:
            answer = seen.answers.get(f"{what} while running, {name}")
            if answer is None or answer.status == 200:
                return not_told("the batch had ended before it was asked")
            return refused(f"{what} while running, {name}", status, kind, words, part=part)(seen)

        return look

    return _first([*HELD_STEPS, "answered"], lambda _: not_told("no batch was seen running"), make)


_TIMES_RULE = "jobs/settle.py: which batches of the list can be the one whose POST nobody saw end"

FACTS = [
    Fact(
        "no-idempotency", "two create calls with one idempotency-key make two batches", "ledger: a POST is never made twice", _two_batches
    ),
    Fact("list-latency", f"a new batch is in the list within {LISTED_WITHIN_S:.0f} s (assumed)", "[batchkit] settle_seconds", _listed),
    Fact("list-order", "newest first, up to 1,000 a page", "api/polling.py: one list call answers for all batches", _whole_list),
    Fact("clock", f"created_at within {SKEW_S:.0f} s of this machine's clock (assumed)", _TIMES_RULE, _clock),
    Fact("live-404", "a look at a live batch answers 404 now and then", "jobs/fetch.py: not visible is not gone", _hidden),
    Fact("time-format", "times end in +00:00", "api/calls.py reads them", _made(_time_form)),
    Fact(
        "expires-after-a-day", "expires_at is 24 h after created_at", "jobs/settle.py: how long a candidate is waited for", _made(_expiry)
    ),
    Fact("counters", "five counters, whose sum is the batch's size", "sensors and progress lines", _running(_counters)),
    Fact("counters-while-running", "zero until the end, or moving: both were recorded", "nothing: both are borne", _moving),
    Fact(
        "retry-after",
        "retry-after: 10 on looks at a batch that runs",
        "nothing: the distance of looks is the task's own",
        _running(lambda look, _: judged(look.answer.headers.get("retry-after") == "10", f"{look.answer.headers.get('retry-after')}")),
    ),
    Fact("limit-headers", "organization and rate limits in the headers", "the messages of a 429", step("list", _limits)),
    Fact(
        "results-while-running",
        '404 "Message Batch … has no available results."',
        "api/results.py: no results yet is not gone",
        _while_running("results", 404, "not_found_error", "has no available results.", part=True),
    ),
    Fact(
        "delete-while-running",
        '400 "In progress batches cannot be deleted. Consider canceling the batch instead."',
        "api/cancel.py, and nothing is lost by delete_after_fetch",
        _while_running(
            "delete",
            400,
            "invalid_request_error",
            "In progress batches cannot be deleted. Consider canceling the batch instead.",
            part=False,
        ),
    ),
    Fact("cancel", "canceling at once", "api/cancel.py, cancel_on_kill", step(f"cancel, {HELD_STEPS[0]}", _canceling)),
    Fact("cancel-ends", "ended some 25 s after the cancel; 600 s at the most", "how long a canceled job waits", _canceled_ends),
    Fact("results-host", f"results_url names {API_HOST}", "api/results.py reads from the connection's own address", _results_host),
    Fact("results-type", "application/x-jsonl", "api/wire.py: what counts as results", step("results", _content_type)),
    Fact(
        "delete", "message_batch_deleted, then 404, and not in the list", "delete_after_fetch; a deleted candidate is none", _after_delete
    ),
    Fact(
        "count-tokens",
        "count_tokens answers input_tokens",
        "cost/estimate.py: the expected cost",
        step("count", lambda answer: judged(isinstance(answer.json.get("input_tokens"), int), f"{answer.status} {answer.json}")),
    ),
]
