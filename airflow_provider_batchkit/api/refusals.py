"""What the API's refusals mean: their words, what they are about, and what to do about them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from airflow_provider_batchkit.api.wire import redirect_of
from airflow_provider_batchkit.model import RequestStatus
from airflow_provider_batchkit.request.failures import ADVICE, KNOWN_FAILURES, Failure, Reason

if TYPE_CHECKING:
    import anthropic

_BY_STATUS = {
    400: "Change the request that the message names.",
    401: "Check the API key of the connection.",
    403: "The key may not use this model or workspace; check its permissions.",
    404: "Check the model's name and the connection's base URL.",
    413: "Lower max_bytes_per_batch.",
}
#: A refusal in these words is about the token count, which does not take everything that a message may hold.
_ABOUT_THE_COUNT = re.compile(r"\bcount_tokens\b|\btoken count|\bcounting tokens\b", re.IGNORECASE)


def api_message(error: anthropic.APIStatusError) -> str:
    """The API's own words for an error, or the SDK's where it gave none.

    The SDK got an ``api_message`` of its own in the course of its 2.x releases, so the words are read from the body.
    """
    redirect = redirect_of(error.response)
    if redirect is not None:
        return redirect
    match error.body:
        case {"error": {"message": str(words)}} if words:
            return words
    return error.message


def _reason(error: anthropic.APIStatusError) -> Reason:
    return KNOWN_FAILURES.reason(Failure(RequestStatus.ERRORED.value, error.type, api_message(error)))


def advice(error: anthropic.APIStatusError) -> str:
    """What to do about a refused batch; empty where the message says enough."""
    if error.status_code != 401 and _reason(error) is Reason.ACCOUNT:
        return f"{ADVICE[Reason.ACCOUNT][0].upper()}{ADVICE[Reason.ACCOUNT][1:]}."
    return _BY_STATUS.get(error.status_code, "")


def refuses_the_message(error: anthropic.APIStatusError) -> bool:
    """Whether a refused token count is about the message that was counted, not about the account, a download, or the count itself."""
    words = api_message(error)
    if error.status_code == 404:
        # a gateway without this call answers 404, too
        return words.startswith("model:")
    return error.type == "invalid_request_error" and not _ABOUT_THE_COUNT.search(words) and _reason(error) is Reason.PERMANENT
