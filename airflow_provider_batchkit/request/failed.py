"""Failed rows by kind, and the log's text on them: how many, which, why, whether another round would help, and by which parameter.

No part of a prompt or an answer is logged: the text of a kind is the API's own error message.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from airflow_provider_batchkit.model import PAUSED, REFUSED, TRUNCATED, RequestStatus
from airflow_provider_batchkit.request.failures import ADVICE, WORTH_ASKING, Failure, Failures, Reason

#: number of keys that a kind keeps, and of those that the log names
KEYS_KEPT, KEYS_SAID = 5, 3
#: number of kinds that the log names, the largest first
KINDS_SAID = 8
_KEY_CHARS, _MESSAGE_CHARS = 80, 300
#: number of kinds of a batch that are told apart by message; further ones are told apart by status and type only
_KINDS_KEPT = 1_000

_SUCCEEDED = RequestStatus.SUCCEEDED.value
#: advice for outcomes whose reason alone does not decide it
_ADVICE_FOR = {
    RequestStatus.MISSING.value: (
        "the answers may be there and billed: clear the task that landed the others to read the results again, which costs nothing"
    ),
    TRUNCATED: "each is billed; a larger max_tokens leaves them room, also in a further round: Round(ask=['truncated'], max_tokens=…)",
    PAUSED: "each is billed; a further round asks them again: Round(ask=['paused'])",
    REFUSED: "the model declined; a further round may ask another one: Round(ask=['refused'], model=…)",
}


@dataclass(frozen=True, slots=True)
class FailedRows:
    """Rows without a whole answer that have failed in the same way."""

    status: str
    error_type: str | None
    #: the value of a :class:`Reason`
    reason: str
    #: the error message of one of the rows
    message: str | None
    rows: int
    #: the first keys, as JSON arrays
    keys: list[str]
    #: whether another round may answer the rows
    worth_asking: bool

    @property
    def advice(self) -> str:
        """What to do about the rows."""
        return advice_for(self.status, self.error_type, Reason(self.reason))

    def __str__(self) -> str:
        kind = f"{self.status} ({self.error_type})" if self.error_type not in (None, self.status) else self.status
        words = f": {_short(self.message, _MESSAGE_CHARS).rstrip('.')}" if self.message else ""
        keys = ", ".join(_short(key, _KEY_CHARS) for key in self.keys[:KEYS_SAID])
        return f"{self.rows:,} rows {kind}{words}; {self.advice}; first keys: {keys}"


def advice_for(status: str, error_type: str | None, reason: Reason) -> str:
    """What to do about rows with this outcome, and by which parameter."""
    return _ADVICE_FOR.get(status) or _ADVICE_FOR.get(error_type or "") or ADVICE[reason]


def _short(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def merged(kinds: Iterable[FailedRows]) -> list[FailedRows]:
    """Kinds of several batches or jobs as one list, the largest first."""
    found: dict[tuple[str, str | None, str], FailedRows] = {}
    for kind in kinds:
        same = (kind.status, kind.error_type, kind.reason)
        before = found.get(same)
        if before is not None:
            keys = list(dict.fromkeys([*before.keys, *kind.keys]))[:KEYS_KEPT]
            kind = replace(before, message=before.message or kind.message, rows=before.rows + kind.rows, keys=keys)
        found[same] = kind
    return sorted(found.values(), key=lambda kind: -kind.rows)


def failed_text(kinds: Sequence[FailedRows], total: int, untold: int = 0) -> str:
    """The log's text on failed rows, in a bounded number of lines; empty where no row has failed.

    :param total: number of rows that were asked
    :param untold: number of further failed rows, whose reasons are not kept
    """
    kinds = merged(kinds)
    if not kinds and not untold:
        return ""
    unfinished = sum(kind.rows for kind in kinds if kind.status == _SUCCEEDED)
    failed = untold + sum(kind.rows for kind in kinds) - unfinished
    head = [f"{failed:,} of {total:,} rows have no answer"] if failed else []
    head += [f"{unfinished:,} of {total:,} have one that is cut"] if unfinished else []
    lines = [f"{'; '.join(head)}:", *map(str, kinds[:KINDS_SAID])]
    if len(kinds) > KINDS_SAID:
        lines.append(f"{sum(kind.rows for kind in kinds[KINDS_SAID:]):,} rows of {len(kinds) - KINDS_SAID} further kinds")
    if untold:
        lines.append(
            f"{untold:,} rows of batches that were submitted elsewhere and had landed before: rewrite=True reads their results again and "
            "says why"
        )
    return "\n  ".join(lines)


class FailedKinds:
    """Failed results of batches that the ledger does not know, counted by kind while they are read. Memory does not grow with them."""

    def __init__(self) -> None:
        #: failure → rows, first ids
        self._found: dict[Failure, tuple[int, list[str]]] = {}

    def add(
        self,
        custom_ids: Sequence[str],
        statuses: Sequence[str],
        error_types: Sequence[str | None],
        error_messages: Sequence[str | None],
    ) -> None:
        """Count results, column by column."""
        if not any(error_types) and set(statuses) <= {_SUCCEEDED}:
            return
        for custom_id, status, kind, message in zip(custom_ids, statuses, error_types, error_messages, strict=True):
            if status == _SUCCEEDED and kind is None:
                continue
            # only an error's message is kept: the message of an answer that does not fit differs from row to row
            failure = Failure(status, kind, message if status == RequestStatus.ERRORED.value else None)
            if failure not in self._found and len(self._found) >= _KINDS_KEPT:
                failure = failure._replace(error_message=None)
            rows, ids = self._found.get(failure, (0, []))
            self._found[failure] = rows + 1, ids if len(ids) >= KEYS_KEPT else [*ids, custom_id]

    def rows(self, failures: Failures, reasons: Collection[Reason] = WORTH_ASKING) -> list[FailedRows]:
        """The kinds, each with its reason. Their keys are ``custom_id`` values.

        :param reasons: the reasons for which another round would ask again
        """
        found = []
        for failure, (rows, ids) in self._found.items():
            reason = failures.reason(failure)
            keys = [json.dumps([custom_id]) for custom_id in ids]
            found.append(FailedRows(failure.status, failure.error_type, reason.value, failure.error_message, rows, keys, reason in reasons))
        return merged(found)
