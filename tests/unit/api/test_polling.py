"""One decision class serves trigger, poke and kit; it has no clock of its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from airflow_provider_batchkit.api.polling import MAX_FAILURES, Ended, GaveUp, PollState, TimedOut, Wait, interval_at_age, validate_event
from airflow_provider_batchkit.exceptions import PollError
from airflow_provider_batchkit.model import BatchCounts, BatchSnapshot


def seen(batch_id: str, status: str, **counts: int) -> BatchSnapshot:
    return BatchSnapshot(batch_id, status, BatchCounts(**counts), datetime(2026, 1, 1, tzinfo=UTC))


def test_it_waits_until_the_last_batch_has_ended() -> None:
    """Only batches that have not ended are looked at again."""
    state = PollState(["a", "b"], interval=10)
    assert state.decide(0) == Wait(10)
    state.saw([seen("a", "ended", succeeded=3), seen("b", "canceling", processing=2)])
    assert state.open_ids() == ["b"]
    assert state.decide(0) == Wait(10)
    state.saw([seen("b", "ended", canceled=2)])
    assert state.decide(0) == Ended()
    assert state.counts() == BatchCounts(succeeded=3, canceled=2)


def test_how_far_batches_are_is_told_at_every_change_and_at_most_once_a_minute() -> None:
    """With the age of the oldest that runs and the time it has left; the end of the last batch is told at once."""
    born = datetime(2026, 1, 1, tzinfo=UTC)
    start = born.timestamp() + 72 * 60

    def shown(batch_id: str, status: str, expires: timedelta | None = None, **counts: int) -> BatchSnapshot:
        return BatchSnapshot(batch_id, status, BatchCounts(**counts), born, None if expires is None else born + expires)

    state = PollState(["a", "b"], interval=10)
    assert state.progress(start) is None
    state.saw([shown("a", "in_progress", processing=50_000), shown("b", "in_progress", processing=50_000)])
    assert state.progress(start) == "0 of 2 batches ended, 0 of 100,000 requests done, oldest 1 h 12 min, expires in 22 h 48 min"
    assert state.progress(start + 3600) is None
    state.saw([shown("a", "ended", succeeded=50_000), shown("b", "in_progress", timedelta(hours=2), processing=38_796, succeeded=11_204)])
    assert state.progress(start + 60) == "1 of 2 batches ended, 61,204 of 100,000 requests done, oldest 1 h 13 min, expires in 47 min"
    state.saw([shown("b", "in_progress", processing=30_000, succeeded=20_000)])
    assert state.progress(start + 119) is None
    assert state.progress(start + 120) == "1 of 2 batches ended, 70,000 of 100,000 requests done, oldest 1 h 14 min, expires in 22 h 46 min"
    state.saw([shown("b", "ended", succeeded=49_999, errored=1)])
    assert state.progress(start + 121) == "2 of 2 batches ended, 100,000 of 100,000 requests done"
    assert state.progress(start + 500) is None


def test_no_batches_have_ended_at_once() -> None:
    """An empty source needs no waiting."""
    assert PollState([], interval=10).decide(0) == Ended()


def test_a_wait_for_the_first_is_over_with_any_one_of_them() -> None:
    """Then no batch is to be looked at any more, also those that still run."""
    state = PollState(["a", "b", "c"], interval=10, first=True, deadline=100)
    state.saw([seen("a", "in_progress"), seen("b", "canceling"), seen("c", "in_progress")])
    assert state.open_ids() == ["a", "b", "c"]
    assert state.decide(0) == Wait(10)
    assert state.decide(100) == TimedOut(("a", "b", "c"))
    state.saw([seen("b", "ended", canceled=2)])
    assert state.open_ids() == []
    assert state.decide(100) == Ended()
    assert state.counts() == BatchCounts(canceled=2)


def test_a_wait_for_the_first_is_over_although_the_others_cannot_be_seen() -> None:
    """A batch that has ended counts more than one that is gone; without one, what is gone ends the wait as ever."""
    states = [PollState(["a", "b"], interval=10, first=True) for _ in range(2)]
    states[0].note([seen("a", "ended")])
    for state in states:
        state.failed("404 b", fatal=True)
    assert [state.decide(0) for state in states] == [Ended(), GaveUp("404 b")]


def test_an_end_of_another_batch_is_not_the_first() -> None:
    """Only the batches of the wait count."""
    state = PollState(["a"], interval=10, first=True)
    state.note([seen("x", "ended")])
    assert state.open_ids() == ["a"]


def test_intervals_grow_to_their_bound() -> None:
    """Young batches are looked at sooner, old ones later."""
    state = PollState(["a"], interval=10, max_interval=30, factor=2)
    waits = []
    for _ in range(4):
        state.saw([seen("a", "in_progress")])
        waits.append(state.decide(0))
    assert waits == [Wait(10), Wait(20), Wait(30), Wait(30)]


@pytest.mark.parametrize(
    ("age_s", "seconds"),
    [(-50, 60), (0, 60), (2399, 60), (2400, 120), (4799, 180), (4800, 240), (86_400, 240)],
    ids=lambda value: f"{value}",
)
def test_intervals_grow_with_the_age_of_the_batch_within_bounds(age_s: float, seconds: float) -> None:
    """In whole intervals, so that all stay on one beat; a wrong clock changes no bound."""
    assert interval_at_age(60, age_s) == seconds


def test_the_youngest_open_batch_sets_the_pace() -> None:
    """An old batch beside a new one is looked at with it; once the new one has ended, by its own age."""
    state, born = PollState(["old", "new"], interval=60, by_age=True), datetime(2026, 1, 1, tzinfo=UTC)
    now = born.timestamp() + 4800
    assert state.decide(now) == Wait(60)
    state.saw([seen("old", "in_progress"), BatchSnapshot("new", "in_progress", BatchCounts(), born + timedelta(hours=1))])
    assert state.decide(now) == Wait(60)
    state.saw([BatchSnapshot("new", "ended", BatchCounts(), born + timedelta(hours=1))])
    assert state.decide(now) == Wait(240)


def test_what_was_noted_does_not_forgive_failures() -> None:
    """Some of the batches showing is not a look that succeeded."""
    state = PollState(["a", "b"], interval=10)
    state.failed("500")
    state.note([seen("a", "ended")])
    state.failed("500")
    assert state.open_ids() == ["b"]
    assert state.decide(0) == Wait(20)


def test_the_deadline_ends_the_wait_and_shortens_the_last_interval() -> None:
    """The last look comes at the deadline, not an interval after it; a batch that ends there still counts."""
    state = PollState(["a"], interval=10, deadline=25)
    assert state.decide(20) == Wait(5)
    assert state.decide(25) == TimedOut(("a",))
    state.saw([seen("a", "ended")])
    assert state.decide(25) == Ended()


def test_failures_back_off_and_a_success_forgives_them() -> None:
    """A blip does not end a wait of a day."""
    state = PollState(["a"], interval=10)
    state.failed("503")
    state.failed("503")
    assert state.decide(0) == Wait(20)
    state.saw([seen("a", "in_progress")])
    assert state.decide(0) == Wait(10)


def test_retry_after_is_honoured() -> None:
    """The API knows better than our interval."""
    state = PollState(["a"], interval=10)
    state.failed("429", retry_after=77)
    assert state.decide(0) == Wait(77)


def test_too_many_failures_in_a_row_give_up_with_the_last_reason() -> None:
    """Somebody must be told in the end."""
    state = PollState(["a"], interval=1)
    for _ in range(MAX_FAILURES):
        assert isinstance(state.decide(0), Wait)
        state.failed("no route")
    decision = state.decide(0)
    assert isinstance(decision, GaveUp) and "no route" in decision.reason and str(MAX_FAILURES) in decision.reason


def test_a_fatal_failure_gives_up_at_once() -> None:
    """A revoked key does not come back by asking."""
    state = PollState(["a"], interval=1)
    state.failed("401 invalid x-api-key", fatal=True)
    assert state.decide(0) == GaveUp("401 invalid x-api-key")


def test_a_batch_that_answers_404_is_looked_at_again_before_it_is_gone() -> None:
    """The looks follow each other at doubling distances, the last one comes when it may be the last, and only a look calls it gone."""
    state, now, times = PollState(["a"], interval=60, absence=900), 0.0, []
    while True:
        state.hid({"a": "404 not found"}, now)
        decision = state.decide(now)
        if not isinstance(decision, Wait):
            break
        times.append(decision.seconds)
        now += decision.seconds
    assert times[:6] == [2, 2, 4, 8, 16, 32] and set(times[6:-1]) == {60}
    assert now == pytest.approx(900.01)
    assert isinstance(decision, GaveUp) and decision.reason.startswith("404 not found. ") and "over 900 s" in decision.reason


def test_a_batch_is_not_gone_after_one_look_or_two() -> None:
    """A sensor may poke once an hour: the time alone proves nothing."""
    state = PollState(["a"], interval=3600, absence=900)
    decisions = []
    for hour in range(3):
        state.hid({"a": "404"}, hour * 3600.0)
        decisions.append(type(state.decide(hour * 3600.0)))
    assert decisions == [Wait, Wait, GaveUp]


def test_a_batch_that_shows_again_begins_anew() -> None:
    """Two short absences are not one long one; the log hears of both, and of their ends."""
    state, news = PollState(["a"], interval=60, absence=100), []
    for start in (0.0, 1000.0):
        for step in (0.0, 50.0, 99.0):
            state.hid({"a": "404"}, start + step)
            assert isinstance(state.decide(start + step), Wait)
        news += state.news()
        state.saw([seen("a", "in_progress")])
        assert state.hidden() == []
        assert state.decide(start + 200) == Wait(60)
        news += state.news()
    assert [line.partition(".")[0] for line in news] == [
        "The API answers 404 for batch a",
        "Batch a is visible again, after 3 looks that found nothing",
        "The API answers 404 for batch a",
        "Batch a is visible again, after 3 looks that found nothing",
    ]
    assert "has not seen it yet" in news[0] and "was visible before" in news[2]


def test_a_failed_connection_says_nothing_about_a_hidden_batch() -> None:
    """Looks that failed do not make an absence longer, and a 404 shows that the connection works."""
    state = PollState(["a"], interval=10, absence=100)
    state.hid({"a": "404"}, 0.0)
    for _ in range(MAX_FAILURES - 1):
        state.failed("no route")
    assert isinstance(state.decide(500.0), Wait)
    state.hid({"a": "404"}, 600.0)
    state.failed("no route")
    assert isinstance(state.decide(600.0), Wait)


def test_an_unknown_status_fails_loudly() -> None:
    """Guessing could end a wait early, or never."""
    with pytest.raises(PollError, match="unknown status 'paused'"):
        PollState(["a"], interval=1).saw([seen("a", "paused")])


@pytest.mark.parametrize("event", [None, {}, {"status": "success"}, "ended", {"status": None}])
def test_a_malformed_event_fails_loudly(event: Any) -> None:
    """An event that this version does not know must not count as success."""
    with pytest.raises(PollError, match="an event that this version does not know"):
        validate_event(event)


@pytest.mark.parametrize("status", ["ended", "timeout", "error"])
def test_known_events_pass(status: str) -> None:
    """The three ends of a trigger."""
    assert validate_event({"status": status})["status"] == status
