"""A person's decisions about a shard that no proof settles: that it was never accepted, or that a batch is its own.

Each decision first states what it will do, the evidence against it, and what it may cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from airflow_provider_batchkit.api.polling import ENDED
from airflow_provider_batchkit.exceptions import BatchInputError, BatchUnavailableError, ResultStreamError
from airflow_provider_batchkit.jobs.settle import DEFAULT_TIMES, Settler
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.ledger import BatchRecord, BatchState, Ledger
from airflow_provider_batchkit.model import usd_text


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision that can be carried out. ``consequences`` are sentences."""

    consequences: tuple[str, ...]
    carry_out: Callable[[], object]


def decide_void(ledger: Ledger, record: BatchRecord) -> Decision:
    """Decide that the shard was never accepted, or that its batch is given up. Its requests may be asked again.

    :raises BatchInputError: when there is nothing to decide
    """
    _refuse_decided(record, BatchState.SENDING, BatchState.SUBMITTED, BatchState.GONE)
    bound = ledger.bound_of(record)
    cost = "nobody knows how much, since nothing bounds its cost" if bound is None else f"at most {usd_text(bound)}"
    what = f"{record} becomes void. The next attempt of its task sends its {record.requests:,} requests again."
    if record.state is not BatchState.SENDING:
        risk = f"What {record.batch_id} has answered stays billed, does not land, and is paid a second time: {cost}."
    else:
        risk = f"If the API accepted the shard after all, its requests are paid a second time: {cost}."
    return Decision((what, risk), lambda: ledger.give_up(record))


def decide_is(kit: BatchKit, ledger: Ledger, record: BatchRecord, batch_id: str) -> Decision:
    """Decide that a batch is the shard's own.

    :raises BatchInputError: when there is nothing to decide, or the batch cannot be the shard's
    :raises BatchUnavailableError: when the batch is not visible
    """
    _refuse_decided(record, BatchState.SENDING, BatchState.SUBMITTED)
    owner = ledger.find(batch_id)
    if owner is not None:
        raise BatchInputError(f"{batch_id} is {owner} in the ledger already. Nothing was changed.")
    found = kit.get(batch_id)
    if found.counted and found.counts.total != record.requests:
        raise BatchInputError(
            f"{batch_id} has {found.counts.total:,} requests and {record} has {record.requests:,}: it is another's. Nothing was changed."
        )
    proof = f"{batch_id} is {found.processing_status}, so nothing proves whose it is before it has ended."
    if found.processing_status == ENDED:
        proof = _proof(kit, ledger, record, batch_id)
    return Decision(
        (
            f"{record} is {batch_id} from now on. Nothing is sent, and the batch is billed once, as it is anyway.",
            proof,
            "A fetch writes it only when every request of the shard has a result in it.",
        ),
        lambda: ledger.decide(record, found),
    )


def _proof(kit: BatchKit, ledger: Ledger, record: BatchRecord, batch_id: str) -> str:
    try:
        first = Settler(kit, ledger, DEFAULT_TIMES, lease=None).first_custom_ids(batch_id)
    except (BatchUnavailableError, ResultStreamError) as e:
        return f"Its results cannot be read now, so nothing proves whose it is: {e}"
    if not first:
        return "Its results have no readable line, so nothing proves whose it is."
    proof = next((custom_id for custom_id in first if ledger.asks(record, custom_id)), None)
    if proof is None:
        raise BatchInputError(f"The first result of {batch_id} is {first[0]}, which {record} did not ask. Nothing was changed.")
    return f"Its result {proof} proves it."


def _refuse_decided(record: BatchRecord, *undecided: BatchState) -> None:
    if record.state not in undecided:
        raise BatchInputError(f"{record} is {record.state.value}: there is nothing to decide. Nothing was changed.")
    if record.state is BatchState.SENDING and record.doubt_at is None:
        raise BatchInputError(
            f"{record} is being sent since {record.intended_at:%Y-%m-%d %H:%M:%S} UTC, and its sender may be alive. An attempt of its task "
            "that finds it so begins to settle it; decide it after that. Nothing was changed."
        )
