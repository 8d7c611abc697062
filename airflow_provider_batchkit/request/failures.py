"""Why a request failed, and whether another round may answer it, judged by the type of its error **and** by its text.

The API's types alone mislead: an empty credit balance, a usage limit and a download that timed out all come as ``invalid_request_error``.
:data:`RULES` is the one place that says which failures pass. The ledger keeps types and texts, and each look judges them anew, so a
pattern that is configured later also holds for batches that have landed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import RequestStatus


class Reason(str, Enum):
    """What stands between a failed request and its answer."""

    #: nothing that lasts: another round may answer it
    PASSING = "passing"
    #: the account (credit, a usage limit, a disabled organization): a further round is a waste until somebody has mended it
    ACCOUNT = "account"
    #: the answer came and is billed, but does not fit: another one may fit
    UNFIT = "unfit"
    #: the request itself: asking again ends the same way
    PERMANENT = "permanent"


#: reasons for which a further round asks a row again without being told to
WORTH_ASKING = frozenset({Reason.PASSING, Reason.ACCOUNT})


class Failure(NamedTuple):
    """What is known of a failed request."""

    status: str
    error_type: str | None
    error_message: str | None


class Rule(NamedTuple):
    """Failures of one reason."""

    reason: Reason
    #: types of the API's errors; empty for any type
    types: frozenset[str]
    #: regular expression that is searched in the text, ignoring case
    pattern: str


#: The first rule that fits decides. The types are from the API's documentation, "Errors"; the texts are as the API was seen to write them.
RULES = (
    Rule(Reason.ACCOUNT, frozenset({"billing_error", "authentication_error"}), ""),
    Rule(Reason.ACCOUNT, frozenset(), r"^your credit balance is too low|^you have reached your specified .*usage limits?\b"),
    Rule(Reason.ACCOUNT, frozenset(), r"\byou will regain access on\b|\borganization has been disabled\b"),
    Rule(Reason.PASSING, frozenset({"rate_limit_error", "api_error", "timeout_error", "overloaded_error"}), ""),
    Rule(Reason.PASSING, frozenset({"invalid_request_error"}), r"\b(unable|failed) to (download|fetch) the (file|image|document|url)\b"),
    Rule(Reason.PASSING, frozenset({"invalid_request_error"}), r"\btimed out\b.*\bdownload|\bdownload\w*\b.*\btimed out\b"),
)

#: advice for each reason
ADVICE = {
    Reason.PASSING: "worth asking again: by a further round (max_rounds of RunBatchOperator), or by a submit with only_failed_of",
    Reason.ACCOUNT: "the account is the reason: mend it in the Claude Console (credit, limits, access), then clear the task",
    Reason.UNFIT: "each is billed; with retry_invalid_output another round asks them again",
    Reason.PERMANENT: "asking again would not help: change the request (or name what passes in [batchkit] passing_errors)",
}

_OVER = {RequestStatus.EXPIRED.value, RequestStatus.CANCELED.value}


class Failures:
    """Judges failures by :data:`RULES` and by a deployment's own patterns."""

    def __init__(self, passing_errors: Iterable[str] = ()) -> None:
        """
        :param passing_errors: regular expressions, searched in ``<type>: <message>`` of an error, ignoring case; matches count as passing
        :raises BatchInputError: for an expression that is not valid
        """
        self._own = []
        for pattern in passing_errors:
            try:
                self._own.append(re.compile(pattern, re.IGNORECASE | re.DOTALL))
            except re.error as e:
                raise BatchInputError(f"passing_errors: {pattern!r} is not a regular expression: {e}.") from e
        # reasons are cached, because many rows fail with the same words
        self.reason = lru_cache(maxsize=4_096)(self._reason)

    @classmethod
    def parse(cls, text: str | None) -> Failures:
        """Failures by the patterns of a configured text: a JSON list, or one pattern a line.

        :raises BatchInputError: for a list of something else, or a pattern that is not valid
        """
        text = (text or "").strip()
        if not text.startswith("["):
            return cls(line.strip() for line in text.splitlines() if line.strip())
        try:
            patterns = json.loads(text)
        except ValueError:
            # a pattern may begin with "[", too
            return cls(line.strip() for line in text.splitlines() if line.strip())
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise BatchInputError(f"passing_errors must be a list of regular expressions, not {text!r}.")
        return cls(patterns)

    def _reason(self, failure: Failure) -> Reason:
        if failure.status == RequestStatus.INVALID_OUTPUT.value:
            return Reason.UNFIT
        if failure.status != RequestStatus.ERRORED.value:
            return Reason.PASSING if failure.status in _OVER else Reason.PERMANENT
        kind, words = failure.error_type or "", failure.error_message or ""
        if any(pattern.search(f"{kind}: {words}") for pattern in self._own):
            return Reason.PASSING
        for rule in RULES:
            if (not rule.types or kind in rule.types) and re.search(rule.pattern, words, re.IGNORECASE | re.DOTALL):
                return rule.reason
        return Reason.PERMANENT


KNOWN_FAILURES = Failures()
