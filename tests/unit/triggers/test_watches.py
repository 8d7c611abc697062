"""Whose turn it is, which pages of the list are worth reading, and who is told what: all without a clock and without I/O."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from airflow_provider_batchkit.api.polling import Ended, GaveUp, PollState, TimedOut, Wait
from airflow_provider_batchkit.model import BatchCounts, BatchSnapshot
from airflow_provider_batchkit.triggers.watches import Failure, Look, Search, Watches

BORN = datetime(2026, 1, 1, tzinfo=UTC)
NOW = BORN.timestamp()


def shown(batch_id: str, status: str = "in_progress", age_s: float = 0.0) -> BatchSnapshot:
    return BatchSnapshot(batch_id, status, BatchCounts(processing=1), BORN - timedelta(seconds=age_s))


def a_look(*snapshots: BatchSnapshot, clock: float = 0.0, failure: Failure | None = None, **failed: Failure) -> Look:
    return Look(clock, {s.batch_id: s for s in snapshots}, failed, failure)


def born(*ages_s: float | None) -> dict[str, datetime | None]:
    return {f"b{i}": None if age is None else BORN - timedelta(seconds=age) for i, age in enumerate(ages_s)}


def test_paging_ends_when_all_but_a_few_are_found() -> None:
    """What one page shows needs no second one, and the last few are retrieved."""
    search = Search(born(*range(50)))
    assert search.read([f"b{i}" for i in range(46)], BORN - timedelta(seconds=45), more=True)
    assert not search.read(["b46"], BORN - timedelta(seconds=46), more=True)
    assert sorted(search.missing) == ["b47", "b48", "b49"]


def test_paging_ends_when_every_missing_batch_should_have_come() -> None:
    """A deleted batch is not searched through years of other people's."""
    search = Search(born(*range(50)))
    assert search.read([], BORN - timedelta(seconds=48), more=True)
    assert search.read([], BORN - timedelta(seconds=49), more=True), "the oldest may share its time with the page's last"
    assert not search.read([], BORN - timedelta(seconds=49.1), more=True)


def test_batches_that_were_never_seen_are_searched_within_bounds() -> None:
    """Their age is unknown, so only the cost bounds the search: a page may stand for ten retrieves."""
    search = Search(born(*[None] * 35))
    pages = [search.read([], BORN - timedelta(days=page), more=True) for page in range(4)]
    assert pages == [True, True, True, False]


def test_the_last_page_is_the_last() -> None:
    """Without more pages there is nothing to read."""
    assert not Search(born(*range(50))).read([], BORN, more=False)


def watching(*states: PollState) -> Watches:
    watches = Watches()
    for state in states:
        watches.join(state, due=0.0, now=NOW, clock=0.0)
    return watches


def test_a_look_made_for_one_counts_for_all_that_it_shows() -> None:
    """The one that was not due waits a whole interval again: so all fall into one beat."""
    watches = watching(PollState(["a"], interval=10))
    late = watches.join(PollState(["b"], interval=10), due=7.0, now=NOW, clock=0.0)
    look = a_look(shown("a"), shown("b"), clock=3.0)
    for watch in watches.concerned(watches.due(3.0), look):
        assert watches.tell(watch, look, now=NOW, clock=3.0) == Wait(10)
    assert late.due == watches.next_due() == 13.0


def test_all_whom_a_look_answered_share_the_next_one() -> None:
    """Telling thousands takes a while; their next turn is counted from the look all the same."""
    watches = watching(*(PollState([f"b{i}"], interval=10) for i in range(50)))
    look = a_look(*(shown(f"b{i}") for i in range(50)), clock=1.0)
    for clock, watch in enumerate(watches.concerned(watches.due(1.0), look), start=2):
        watches.tell(watch, look, now=NOW, clock=clock)
    assert len(watches.due(11.0)) == 50


def test_a_batch_that_two_wait_for_ends_for_both() -> None:
    """Two sensors on one batch, one of which came later."""
    watches = watching(PollState(["a"], interval=10), PollState(["a"], interval=99))
    look = a_look(shown("a", "ended"))
    assert [watches.tell(watch, look, now=NOW, clock=0) for watch in watches.concerned(watches.due(0), look)] == [Ended(), Ended()]
    assert not watches.watched("a")


def test_a_failure_of_one_batch_is_told_to_its_own_watch_alone() -> None:
    """One 404 among many."""
    watches = watching(PollState(["a"], interval=10), PollState(["b"], interval=10))
    look = a_look(shown("a"), b=Failure("gone", fatal=True))
    told = {w.state.batch_ids[0]: watches.tell(w, look, now=NOW, clock=0) for w in watches.concerned(watches.due(0), look)}
    assert told == {"a": Wait(10), "b": GaveUp("gone")}


def test_an_unknown_status_fails_its_own_watch_alone() -> None:
    """The batch that nobody understands is one trigger's matter."""
    watches = watching(PollState(["a"], interval=10), PollState(["b"], interval=10))
    look = a_look(shown("a"), shown("b", "paused"))
    told = {w.state.batch_ids[0]: watches.tell(w, look, now=NOW, clock=0) for w in watches.concerned(watches.due(0), look)}
    assert told["a"] == Wait(10)
    assert isinstance(told["b"], GaveUp) and "'paused'" in told["b"].reason


def test_a_partly_failed_look_keeps_what_was_shown_and_counts_as_failed() -> None:
    """A shard that never shows ends the wait in the end, even though the others do."""
    state = PollState(["a", "b"], interval=10)
    watches = watching(state)
    decisions = []
    for turn in range(20):
        (watch,) = watches.due(float("inf"))
        look = a_look(shown("a", "ended"), clock=watch.due, b=Failure("500"))
        decisions.append(watches.tell(watch, look, now=NOW, clock=watch.due))
        assert state.open_ids() == ["b"], turn
    assert all(isinstance(decision, Wait) for decision in decisions[:-1])
    assert isinstance(decisions[-1], GaveUp)


def test_a_failed_connection_is_left_alone_also_by_newcomers() -> None:
    """Retry-after holds for the connection: who comes meanwhile waits with the rest."""
    watches = watching(PollState(["a"], interval=10))
    look = a_look(failure=Failure("429", retry_after=60))
    due = watches.due(0)
    assert watches.judge_connection(due, look, 1.0) == 60
    for watch in due:
        watches.tell(watch, look, now=NOW, clock=1.0)
    newcomer = watches.join(PollState(["b"], interval=10), due=2.1, now=NOW, clock=2.0)
    assert newcomer.due == watches.next_due() == 61.0
    assert watches.paused(60.9) and not watches.paused(61.0)


def test_failures_of_the_connection_double_the_pause_until_a_look_succeeds() -> None:
    """A storm is not met with a storm."""
    watches = watching(PollState(["a"], interval=10))
    failed = a_look(failure=Failure("529"))
    assert [watches.judge_connection(watches.due(0), failed, 0) for _ in range(4)] == [10, 20, 40, 80]
    assert watches.judge_connection(watches.due(0), a_look(), 0) is None
    assert watches.judge_connection(watches.due(0), failed, 0) == 10


def test_a_deadline_within_a_pause_is_kept() -> None:
    """A sensor's timeout does not wait for the API's retry-after."""
    watches = watching(PollState(["a"], interval=10, deadline=NOW + 30))
    (watch,) = watches.due(0)
    look = a_look(failure=Failure("429", retry_after=60))
    watches.judge_connection([watch], look, 0)
    watches.tell(watch, look, now=NOW, clock=0)
    assert watch.due == 30
    assert watches.hold(watch, now=NOW + 30, clock=30) == TimedOut(("a",))


def test_a_refused_key_is_told_to_everybody_at_once() -> None:
    """401 on the list: those that are not due need not ask again to hear it."""
    watches = watching(PollState(["a"], interval=10))
    watches.join(PollState(["b"], interval=10), due=7.0, now=NOW, clock=0.0)
    look = a_look(failure=Failure("401", fatal=True))
    assert [watches.tell(w, look, now=NOW, clock=0) for w in watches.concerned(watches.due(0), look)] == [GaveUp("401")] * 2


@pytest.mark.parametrize(
    ("watched", "due", "listed"),
    [(3, 3, False), (4, 4, True), (500, 1, True)],
    ids=["a few are retrieved", "more are listed", "one of many brings all into one beat"],
)
def test_a_few_are_retrieved_and_many_are_listed(watched: int, due: int, listed: bool) -> None:
    """The cheapest way that answers for those who are due."""
    watches = watching(*(PollState([f"b{i}"], interval=10) for i in range(watched)))
    look = a_look(*(shown(f"b{i}") for i in range(watched)))
    for watch in watches.concerned(watches.due(0), look):
        watches.tell(watch, look, now=NOW, clock=0)
    assert watches.worth_listing(watches.wanted(watches.due(10)[:due])) is listed


def test_a_few_newcomers_among_many_are_retrieved() -> None:
    """Their first look is their own; the next list shows them with the others."""
    watches = watching(*(PollState([f"b{i}"], interval=10) for i in range(500)))
    assert not watches.worth_listing({"b0": None, "b1": None})


def test_who_has_left_is_watched_no_more() -> None:
    """Nothing is kept of a trigger that was canceled; leaving twice is fine."""
    watches = watching(PollState(["a", "b"], interval=10), PollState(["b"], interval=10))
    first, second = watches.due(0)
    watches.leave(first)
    watches.leave(first)
    watches.leave(second)
    assert not watches.watched("a") and not watches.watched("b")
    assert watches.next_due() == float("inf")


def test_a_wait_for_the_first_ends_with_one_and_leaves_the_others_to_whoever_watches_them() -> None:
    """Its running batches are forgotten when it leaves, but not for another trigger that waits for them."""
    watches = watching(PollState(["a", "b", "c"], interval=10, first=True))
    other = watches.join(PollState(["b"], interval=10), due=0.0, now=NOW, clock=0.0)
    (first,) = (watch for watch in watches.due(0) if watch is not other)
    look = a_look(shown("a", "ended"), shown("b"), shown("c"))
    told = {id(watch): watches.tell(watch, look, now=NOW, clock=0) for watch in watches.concerned(watches.due(0), look)}
    assert told == {id(first): Ended(), id(other): Wait(10)}
    watches.leave(first)
    assert [watches.watched(batch_id) for batch_id in "abc"] == [False, True, False]
    assert watches.unchanged("b", "in_progress") is not None and watches.unchanged("c", "in_progress") is None
    assert list(watches.wanted(watches.due(10))) == ["b"]


def test_a_wait_for_the_first_waits_on_while_none_has_ended() -> None:
    """All of its batches are looked at again, whether they were shown or not."""
    watches = watching(PollState(["a", "b"], interval=10, first=True))
    (watch,) = watches.due(0)
    assert watches.tell(watch, a_look(shown("a"), b=Failure("500")), now=NOW, clock=0) == Wait(10)
    assert list(watches.wanted([watch])) == ["a", "b"]


def test_a_wait_for_the_first_ends_by_a_look_that_failed_for_the_others() -> None:
    """What was shown counts, also by the way of a look that was made for somebody else."""
    watches = watching(PollState(["a", "b"], interval=10, first=True))
    (watch,) = watches.due(0)
    assert watches.tell(watch, a_look(shown("a", "ended"), b=Failure("404", fatal=True)), now=NOW, clock=0) == Ended()
    by_the_way = watches.join(PollState(["c", "d"], interval=10, first=True), due=9.0, now=NOW, clock=0.0)
    assert watches.tell(by_the_way, a_look(shown("d", "ended")), now=NOW, clock=0) == Ended()
    for told in (watch, by_the_way):
        watches.leave(told)
    assert not any(watches.watched(batch_id) for batch_id in "abcd")
