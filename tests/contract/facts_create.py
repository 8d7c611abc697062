"""Facts about what is refused, when, and in which words."""

from __future__ import annotations

from . import plan
from .observe import UNKNOWN_BATCH
from .seen import Fact, Outcome, Seen, Verdict, judged, not_told, refused, step
from .wire import Answer

INVALID = "invalid_request_error"


def _errored(custom_id: str, kind: str, words: str = "") -> Fact:
    """The request was accepted at create, and its line says this at the end. No words: nobody recorded them."""

    def check(seen: Seen) -> Verdict:
        created = _create_accepts(seen)
        if created.outcome is not Outcome.AS_RECORDED:
            return created
        result = seen.result(custom_id)
        if result is None:
            return not_told(seen.silent.get("results", "the batch did not end in time"))
        if result["type"] != "errored":
            return judged(False, f"{result['type']}, not errored")
        error = result["error"]["error"]
        return judged(error["type"] == kind and (not words or error["message"] == words), f'{error["type"]} "{error["message"]}"')

    expected = f"errored at the end, {kind}" + (f' "{words}"' if words else "")
    return Fact(f"late-{custom_id}", expected, "cost/checks.py asks count_tokens and models.retrieve before anything is sent", check)


def _create_accepts(seen: Seen) -> Verdict:
    answer = seen.answers.get("answered")
    if answer is None:
        return not_told(seen.silent.get("answered", "the create call was not made"))
    if answer.is_passing:
        return not_told(f"for a passing reason: {answer}")
    if answer.status != 200:
        return judged(False, f"the whole call was refused: {answer}")
    return judged(True, f"{answer.status} for {len(plan.ANSWERED)} good and {len(plan.LATE)} bad requests")


def _errored_shape(seen: Seen) -> Verdict:
    found = {custom_id: result for custom_id in plan.LATE if (result := seen.result(custom_id)) and result["type"] == "errored"}
    if not found:
        return not_told("no request errored")
    odd = [
        custom_id
        for custom_id, result in found.items()
        if result["error"]["type"] != "error"
        or result["error"]["error"].get("details") != {"error_visibility": "user_facing"}
        or result["error"].get("request_id") is not None
        or "usage" in result
    ]
    return judged(not odd, f"{len(found)} lines" + (f", others in {', '.join(odd)}" if odd else ""))


def _error_shape(answer: Answer) -> Verdict:
    named = answer.headers.get("request-id"), answer.json.get("request_id")
    fits = answer.json.get("type") == "error" and named[0] is not None and named[0] == named[1]
    return judged(fits and answer.headers.get("x-should-retry") == "false", f"request-id {named[0]}, in the body {named[1]}")


def _nothing_accepted(seen: Seen) -> Verdict:
    listed = seen.answers.get("list after refusals")
    if listed is None or listed.status != 200:
        return not_told("the list had no answer")
    made = {created.batch_id for created in seen.created}
    taken = [created.step for created in seen.created if created.step in plan.REFUSED]
    if taken:
        return judged(False, f"a batch came of {', '.join(taken)}")
    others = [batch["id"] for batch in listed.json["data"] if batch["id"] not in made and batch["created_at"] >= seen.began_at.isoformat()]
    if others:
        return not_told(f"{len(others)} batches of others began meanwhile in this workspace")
    return judged(True, "the list shows no batch of the refused calls")


_REFUSED = "request/shards.py cuts bodies so that this cannot come; api/refusals.py fails the task at once"

FACTS = [
    Fact("late-params", "200 at create, whatever the params are", "cost/checks.py: bad params are looked for beforehand", _create_accepts),
    _errored("no-messages", INVALID),
    _errored("zero-tokens", INVALID),
    _errored("stream", INVALID),
    _errored("unknown-member", INVALID),
    _errored("unknown-model", "not_found_error", f"model: {plan.UNKNOWN_MODEL}"),
    _errored(
        "over-limit",
        INVALID,
        f"max_tokens: {plan.HAIKU_LIMIT + 1} > {plan.HAIKU_LIMIT}, which is the maximum allowed number of output tokens for "
        "claude-haiku-4-5-20251001",
    ),
    _errored("old-thinking", INVALID),
    Fact(
        "errored-line",
        'error in error, details {"error_visibility": "user_facing"}, request_id null, no usage',
        "api/decode.py: the reason of a failed row, and that it costs nothing",
        _errored_shape,
    ),
    Fact(
        "refused-empty-list",
        '400 "requests: List should have at least 1 item after validation, not 0"',
        _REFUSED,
        refused("empty list", 400, INVALID, "requests: List should have at least 1 item after validation, not 0"),
    ),
    Fact(
        "refused-repeated-id",
        '400 "requests: custom_id\'s must be unique within a batch. Duplicate custom_id found: dup"',
        _REFUSED,
        refused("repeated id", 400, INVALID, "requests: custom_id's must be unique within a batch. Duplicate custom_id found: dup"),
    ),
    Fact(
        "refused-long-id",
        '400 "requests.0.custom_id: String should have at most 64 characters"',
        _REFUSED,
        refused("long id", 400, INVALID, "requests.0.custom_id: String should have at most 64 characters"),
    ),
    Fact(
        "refused-odd-id", "400 for a custom_id with a space, naming it", _REFUSED, refused("odd id", 400, INVALID, "custom_id", part=True)
    ),
    Fact("refused-missing-id", "400, naming custom_id", _REFUSED, refused("missing id", 400, INVALID, "custom_id", part=True)),
    Fact("refused-no-json", "400 for a body that is no JSON", _REFUSED, refused("no json", 400, INVALID)),
    Fact(
        "refused-is-not-accepted",
        "no batch in the list after a 400 at create",
        "ledger/states.py: sending → rejected, sent again without asking",
        _nothing_accepted,
    ),
    Fact(
        "wrong-key",
        '401 authentication_error "API key is invalid."',
        "api/refusals.py: the tasks of this connection fail, no others",
        refused("wrong key", 401, "authentication_error", "API key is invalid."),
    ),
    Fact(
        "unknown-batch",
        f'404 not_found_error "Message Batch {UNKNOWN_BATCH} not found."',
        "jobs/fetch.py: looked for again, since live batches answer so, too",
        refused("unknown batch", 404, "not_found_error", f"Message Batch {UNKNOWN_BATCH} not found."),
    ),
    Fact("unknown-results", "404 for the results of an unknown id", "the same", refused("unknown results", 404, "not_found_error")),
    Fact(
        "error-body",
        "type error, request_id as in the header, x-should-retry: false",
        "api/wire.py: what tells the API's own refusal from a proxy's page",
        step("unknown batch", _error_shape),
    ),
    Fact(
        "count-unknown-model",
        f'404 "model: {plan.UNKNOWN_MODEL}" from count_tokens',
        "cost/checks.py fails the task before it sends",
        refused("count unknown model", 404, "not_found_error", f"model: {plan.UNKNOWN_MODEL}"),
    ),
    Fact(
        "count-unknown-member",
        "400 from count_tokens for a member that it does not know, naming it",
        "cost/checks.py fails the task before it sends",
        refused("count unknown member", 400, INVALID, "max_token", part=True),
    ),
    Fact(
        "unknown-model",
        "404 from models.retrieve",
        "cost/checks.py fails the task before it sends",
        refused("unknown model", 404, "not_found_error"),
    ),
    Fact(
        "model-limits",
        f"models.retrieve says max_tokens {plan.HAIKU_LIMIT} and a lifecycle",
        "cost/checks.py compares max_tokens with it",
        step(
            "model",
            lambda answer: judged(
                answer.json.get("max_tokens") == plan.HAIKU_LIMIT and isinstance(answer.json.get("lifecycle"), str),
                f"max_tokens {answer.json.get('max_tokens')}, lifecycle {answer.json.get('lifecycle')}",
            ),
        ),
    ),
]
