"""What can go wrong, as one tree.

::

    BatchKitError
    ├── BatchInputError            terminal   the input or a setting is wrong; nothing was sent, nothing billed
    │   ├── RequestError           terminal   one request would be refused by the API; names the item
    │   └── TableError             terminal   the result table does not fit the results
    ├── CostLimitError             terminal   the most that a job can cost is above max_cost_usd, or unknown; nothing was sent
    │   └── BudgetExceededError    terminal   the budget has no room for the job in this window; nothing was sent
    │       └── BudgetReservedError  retry    there is room if batches under way land for less than they reserved; nothing was sent
    ├── SubmitRefusedError         terminal   the API refused the batch (4xx); nothing was billed
    ├── SubmitThrottledError       retry      the API said "not now" (429, 529) longer than we wait; nothing was billed
    ├── SubmitUncertainError       retry      nobody knows yet whether the API accepted the batch; settle, never resend
    ├── LeaseLostError             retry      another attempt of the same job has taken over; this one sent nothing more
    ├── LandedMeanwhileError       retry      a batch landed while rows that share its requests were added to it; nothing was sent
    ├── LedgerError                terminal   the ledger does not allow this state change, or is of another version
    ├── BatchUnavailableError      terminal   the batch is archived or invisible to this key; says what can be recovered
    │   ├── BatchNotVisibleError   retry      the API answers 404 for the batch: deleted, of another workspace, or hidden for a moment
    │   └── BatchGoneError         terminal   a submitted batch was archived before it landed; it may have been billed
    │       └── BatchVanishedError retry      the batch answers 404 for longer than [batchkit] absence_seconds; it may return
    ├── WrongBatchError            terminal   a batch has results that its row did not ask; nothing was written
    ├── ReplaceRefusedError        retry      a "replace" would have deleted rows without an answer to put in their place
    ├── WarehouseBusyError         retry      another process has the database of the results to itself
    │   └── TurnTakenError         retry      another landing has the turn at the result table
    ├── BatchNotEndedError         retry      results were asked of a batch that is still running
    ├── BatchWaitTimeout           retry      the batch did not end in the time allowed; it keeps running and can be waited for again
    ├── PollError                  retry      the API kept failing while we polled; the batch itself is untouched
    ├── ResultStreamError          retry      the results could not be read to their end; nothing was written
    └── ErrorRateError             terminal   results landed, but more of them failed than ``fail_on_error_rate`` allows

"terminal" means that another try of the same thing ends the same way; "retry" means that a try is worth while. Programs read
``retryable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar


class BatchKitError(Exception):
    """Base of every error that this package raises on purpose."""

    retryable: ClassVar[bool] = False
    #: ids of batches that the same call had submitted before it failed; they run and are billed
    submitted: Sequence[str] = ()
    #: figures of the batches that the same call had landed before it failed
    landed: Sequence[Any] = ()
    #: a :class:`~airflow_provider_batchkit.jobs.waiting.WaitFor` where the same call may succeed later without any intervention
    wait: Any = None

    def __init_subclass__(cls, *, retryable: bool | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if retryable is not None:
            cls.retryable = retryable


class BatchInputError(BatchKitError, ValueError):
    """The input or a setting is wrong. Nothing was sent."""


class RequestError(BatchInputError):
    """One request is not what the Messages API takes. The message names the item by its key or position.

    ``position`` is the item's position in its source, from 0, where it is known.
    """

    def __init__(self, message: str, *, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


class TableError(BatchInputError):
    """The result table, its name or its columns do not fit the results."""


class CostLimitError(BatchKitError):
    """The requests may cost more than they are allowed to, or nothing bounds their cost. This attempt sent nothing."""


class BudgetExceededError(CostLimitError):
    """The requests may exceed a budget. The message gives cap, spent, reserved, asked and the window's end. Nothing was sent."""


class BudgetReservedError(BudgetExceededError, retryable=True):
    """The budget has room, but batches under way have reserved it. When they land, the part that they did not cost is free again."""


class SubmitRefusedError(BatchKitError):
    """The API refused to create the batch, so nothing is running and nothing is billed.

    ``status`` is the HTTP status of the refusal. ``error_type`` is the API's own error type, where it gave one.
    """

    def __init__(self, message: str, *, status: int, error_type: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type


class SubmitThrottledError(BatchKitError, retryable=True):
    """The API answered 429 or 529, or no connection could be made, until the wait's limit was reached. Nothing was accepted or billed.

    ``pause_s`` is how long to wait before the next try, in seconds.
    """

    def __init__(self, message: str, *, pause_s: float = 0.0) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class SubmitUncertainError(BatchKitError, retryable=True):
    """No answer proves what the create call did. The batch must be reconciled before anything is sent again."""


class LeaseLostError(BatchKitError, retryable=True):
    """A newer attempt of the same job holds its lease; this attempt stops before it sends anything more.

    A retry is worth while, because the error says nothing about the job: Airflow's newest attempt has a lease of its own and goes on.
    """


class LandedMeanwhileError(BatchKitError, retryable=True):
    """A batch landed while rows that share its requests were added to it. These rows would have had no answer."""


class LedgerError(BatchKitError):
    """The ledger refuses a state change that its state table does not have, or its tables are of another version."""


class BatchUnavailableError(BatchKitError):
    """The batch or its results are unavailable to this connection: they are archived, or the key is refused."""


class BatchNotVisibleError(BatchUnavailableError, retryable=True):
    """The API answers 404. Live batches answer 404 now and then, so this alone does not prove that a batch is gone."""

    #: id of the batch that is not visible, where the error is about one batch
    batch_id: str | None = None


class BatchGoneError(BatchUnavailableError):
    """An accepted batch was deleted or archived before it landed. Its rows have no answer, and it may have been billed."""

    #: id of the batch, and what has become of it
    batch_id: str = ""
    reason: str = ""


class BatchVanishedError(BatchGoneError, retryable=True):
    """An accepted batch has answered 404 to every look for long enough to be called gone. A retry looks again, for it may be back."""


class WrongBatchError(BatchKitError):
    """A batch has results that it was never asked for, and lacks some that it was asked for. Nothing of it was written."""


class ReplaceRefusedError(BatchKitError, retryable=True):
    """A ``replace`` would have deleted the table's rows, although some requests lack a readable result, or none has an answer.

    Nothing was written or deleted. A retry reads the results again. ``torn`` says that results are missing or unreadable.
    """

    def __init__(self, message: str, *, torn: bool = False) -> None:
        super().__init__(message)
        self.torn = torn


class WarehouseBusyError(BatchKitError, retryable=True):
    """The database of the results cannot be used at the moment. What was prepared is in the ledger, and a retry goes on from there."""


class TurnTakenError(WarehouseBusyError):
    """Another landing has the turn at the result table, or died with it. From ``free_at`` (aware, UTC) on, anyone may take it."""

    def __init__(self, message: str, free_at: datetime) -> None:
        super().__init__(message)
        self.free_at = free_at


class BatchNotEndedError(BatchKitError, retryable=True):
    """The batch is still running; its results exist only once the whole batch has ended."""


class BatchWaitTimeout(BatchKitError, TimeoutError, retryable=True):
    """The batch did not end within the time allowed. It keeps running, is billed as usual, and can be waited for again."""


class PollError(BatchKitError, retryable=True):
    """Polling failed too many times in a row. The batch itself is untouched."""


class ResultStreamError(BatchKitError, retryable=True):
    """The result stream was cut more often than it is read again. Nothing was written."""


class ErrorRateError(BatchKitError):
    """The share of failed requests is above ``fail_on_error_rate``. What succeeded has landed."""
