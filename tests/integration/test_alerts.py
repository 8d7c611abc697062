"""Alerts of budgets: each share of the cap is told once a window, by whichever task reaches it. On SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from airflow.providers.common.compat.sdk import AirflowSkipException
from airflow.sdk.bases.notifier import BaseNotifier

from airflow_provider_batchkit import Budget
from airflow_provider_batchkit.ledger import Ledger
from airflow_provider_batchkit.ledger.alerts import CLAIM_S
from airflow_provider_batchkit.ledger.tables import alert, batch
from tests import releases
from tests.databases import Database, rows
from tests.integration.airflow_runs import run_source
from tests.integration.telling import Told

MEASURE = 1_000_000
SQL = "SELECT 1 AS id, 'one' AS note UNION ALL SELECT 2, 'two'"
PICO = Decimal("1e-12")
SHARE = "{{ batchkit.budget }} {{ batchkit.threshold }}"


class Broken(BaseNotifier):
    """Raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def notify(self, context: Any) -> None:
        raise self.error


class Budgeted:
    """Submits of two rows, each with the same upper bound, that count in one budget."""

    def __init__(self, database: Database, tmp_path: Path) -> None:
        self.path = tmp_path / "told"
        self.database = database
        self.submit("measure", {"name": "measure", "usd": MEASURE})
        ((pico,),) = rows(database, "SELECT bound_picousd FROM batchkit_batch")
        #: of one submit
        self.bound = pico * PICO

    def submit(self, run_id: str, budget: Any, **parameters: Any) -> Any:
        """Run the task of a run in an attempt of its own."""
        from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

        pushed: dict[str, Any] = {}
        task = {"dag_id": "d", "run_id": run_id, "task_id": "submit", "map_index": -1, "log_url": f"http://airflow/{run_id}"}
        ti = type("TI", (), {**task, "xcom_push": lambda _, key, value: pushed.update({key: value})})
        operator = SubmitBatchOperator(
            task_id="submit",
            sql=SQL,
            key="id",
            prompt="{{ row.note }}",
            max_tokens=100,
            sql_conn_id="warehouse",
            budget=budget,
            **parameters,
        )
        return operator.execute({"ti": ti()})

    def budget(self, submits: str, *notifiers: Any, alert_at: Any = (0.5, 0.8, 1), **fields: Any) -> Budget:
        """A budget with room for so many submits."""
        return Budget(
            "catalog", usd=self.bound * Decimal(submits), alert_at=alert_at, notifiers=notifiers or [Told(self.path, SHARE)], **fields
        )

    @property
    def told(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def engine(self) -> sa.Engine:
        return self.database.engine()

    def age_claims(self) -> None:
        """As if the claims had been made long ago."""
        with self.engine().begin() as connection:
            connection.execute(sa.update(alert).values(claimed_at=datetime.now(UTC) - timedelta(seconds=CLAIM_S + 1)))


@pytest.fixture
def jobs(home: Path, database: Database, tmp_path: Path) -> Budgeted:
    return Budgeted(database, tmp_path)


def test_each_share_is_told_once_with_the_numbers_and_a_link(jobs: Budgeted) -> None:
    """What is reserved counts. A submit that reaches two shares at once tells them in one message, the highest first."""
    text = "{{ batchkit.thresholds | join(',') }}|{{ batchkit.percent }}|{{ batchkit.link }}|{{ batchkit.message }}|{{ ti.task_id }}"
    budget = jobs.budget("4", Told(jobs.path, text))
    jobs.submit("1", budget)
    assert jobs.told == []
    jobs.submit("2", budget)
    (line,) = jobs.told
    thresholds, percent, link, message, task_id = line.split("|")
    assert (thresholds, percent, link, task_id) == ("0.5", "50%", "http://airflow/2", "submit")
    assert message.startswith("The budget 'catalog' has reached 50% of its cap, the month until ")
    assert "$0.00 spent and $" in message and "(50%), $" in message and message.endswith(" left. http://airflow/2")
    jobs.submit("3", budget)
    assert len(jobs.told) == 1
    jobs.submit("4", budget)
    assert [told.split("|")[0] for told in jobs.told] == ["0.5", "0.8,1"]


def test_numbers_are_there_for_notifiers_that_calculate(jobs: Budgeted) -> None:
    """A function of the context is a notifier, too; the notifier's own copy of the context is thrown away."""
    seen: list[Any] = []
    jobs.submit("1", jobs.budget("2", lambda context: seen.append(context.pop("batchkit"))))
    (facts,) = seen
    half = {"limit": 2 * jobs.bound, "spent": 0, "reserved": jobs.bound, "left": jobs.bound}
    assert (facts["usd"], facts["tokens"], facts["share"], facts["refused"]) == (half, None, Decimal("0.5"), None)
    assert facts["window_start"] <= datetime.now(UTC) < facts["window_end"]


def test_a_cleared_run_tells_nothing_again(jobs: Budgeted) -> None:
    """Nor does a share that is reached again, after a landing has brought it down."""
    budget = jobs.budget("2")
    for _ in range(3):
        jobs.submit("1", budget)
    assert jobs.told == ["catalog 0.5"]
    with jobs.engine().begin() as connection:
        connection.execute(sa.update(batch).values(bound_picousd=1))
    jobs.submit("2", budget)
    assert jobs.told == ["catalog 0.5"]


def test_the_next_window_tells_again(jobs: Budgeted) -> None:
    """All that was told lies forty days back."""
    budget = jobs.budget("2")
    jobs.submit("1", budget)
    back = timedelta(days=40)
    month = (datetime.now(UTC) - back).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    with jobs.engine().begin() as connection:
        connection.execute(sa.update(alert).values(window_start=month))
        connection.execute(sa.update(batch).values(budget_at=month))
    jobs.submit("2", budget)
    assert jobs.told == ["catalog 0.5", "catalog 0.5"]


def test_a_window_that_never_ends_tells_once(jobs: Budgeted) -> None:
    """Its alerts do not mix with those of a month, should the budget's window be changed."""
    for run in ("1", "2"):
        jobs.submit(run, jobs.budget("3", alert_at=[0.3], window="ever"))
    assert len(jobs.told) == 1
    jobs.submit("3", jobs.budget("3", alert_at=[0.3]))
    assert len(jobs.told) == 2


def test_two_tasks_that_reach_a_share_at_once_tell_it_once(jobs: Budgeted) -> None:
    """Each of them reaches it, and the notifier takes its time."""
    budget, barrier = jobs.budget("3", Told(jobs.path, SHARE, seconds=0.5), alert_at=[0.3]), threading.Barrier(2)

    def submit(run_id: str) -> None:
        barrier.wait(30)
        jobs.submit(run_id, budget)

    with ThreadPoolExecutor() as pool:
        list(pool.map(submit, ("1", "2")))
    assert len(jobs.told) == 1


def test_of_many_claims_at_once_one_is_given(jobs: Budgeted) -> None:
    """Eight tasks look at the same moment at a share that is reached."""
    jobs.submit("1", Budget("catalog", usd=jobs.bound))
    budget, barrier = jobs.budget("1"), threading.Barrier(8)

    def claim(_: int) -> int:
        ledger = Ledger(jobs.engine())
        barrier.wait(30)
        return len(ledger.claim_alerts(budget))

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(claim, range(8))) == [0] * 7 + [1]


def test_a_notifier_that_raises_fails_no_task_and_the_next_submit_tells(jobs: Budgeted, caplog: pytest.LogCaptureFixture) -> None:
    """The notifier beside it is told once all the same."""
    beside = Told(jobs.path.with_name("beside"), SHARE)
    assert len(jobs.submit("1", jobs.budget("4", beside, Broken(RuntimeError("no network")), alert_at=[0.2]))) == 1
    assert "Broken raised, and the task goes on" in caplog.text and "no network" in caplog.text
    for run in ("2", "3"):
        jobs.submit(run, jobs.budget("4", beside, Told(jobs.path, SHARE), alert_at=[0.2]))
    assert (jobs.told, len(beside.path.read_text().splitlines())) == (["catalog 0.2"], 1)


def test_a_task_that_dies_while_it_tells_leaves_the_alert_to_the_next_submit(jobs: Budgeted) -> None:
    """Not at once, since the notifier may be at work still. The next attempt has nothing to send, and tells."""
    with pytest.raises(KeyboardInterrupt):
        jobs.submit("1", jobs.budget("2", Broken(KeyboardInterrupt())))
    jobs.submit("1", jobs.budget("2"))
    assert jobs.told == []
    jobs.age_claims()
    jobs.submit("1", jobs.budget("2"))
    jobs.submit("2", jobs.budget("2", alert_at=[0.5]))
    assert jobs.told == ["catalog 0.5"]


def test_a_notifier_that_ends_after_its_claim_marks_nothing_of_the_next_one(jobs: Budgeted) -> None:
    """It was taken for dead; the other one's claim goes on."""
    jobs.submit("1", jobs.budget("2", alert_at=[0.9]))
    ledger, budget = Ledger(jobs.engine()), jobs.budget("2", alert_at=[0.5])
    (slow,) = ledger.claim_alerts(budget)
    jobs.age_claims()
    (other,) = ledger.claim_alerts(budget)
    ledger.alert_untold(slow)
    assert ledger.claim_alerts(budget) == []
    ledger.alert_untold(other)
    assert len(ledger.claim_alerts(budget)) == 1


def test_a_task_that_finds_no_room_is_told_as_the_whole_cap(jobs: Budgeted) -> None:
    """Also one that is skipped in silence. The lower shares are told when they are reached."""
    budget = jobs.budget(
        "0.5", Told(jobs.path, "{{ batchkit.threshold }}|{{ batchkit.message }}|{{ batchkit.refused }}"), on_exceeded="skip"
    )
    for run in ("1", "2"):
        with pytest.raises(AirflowSkipException):
            jobs.submit(run, budget)
    (line,) = jobs.told
    threshold, message, refused = line.split("|")
    assert threshold == "1" and "refused a task for which it has no room" in message and "would be exceeded: cap $" in refused
    jobs.submit("3", jobs.budget("1.5"))
    assert jobs.told[1:] == ["catalog 0.5"]


def test_what_was_reserved_before_midnight_is_told_after_it(jobs: Budgeted) -> None:
    """A submit that began in one window and ends in the next one is held against both."""
    from airflow_provider_batchkit.operators.alerts import tell_of_budget

    budget = jobs.budget("2", window="day")
    jobs.submit("1", Budget("catalog", usd=budget.usd, window="day"))
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with jobs.engine().begin() as connection:
        connection.execute(sa.update(batch).values(budget_at=yesterday))
    tell_of_budget({}, Ledger(jobs.engine()), budget, yesterday, None)
    assert jobs.told == ["catalog 0.5"]


def test_a_ledger_that_cannot_be_written_fails_no_task(jobs: Budgeted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests are sent; the next submit tells."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "claim_alerts", fail)
        assert len(jobs.submit("1", jobs.budget("2"))) == 1
    jobs.submit("1", jobs.budget("2"))
    assert jobs.told == ["catalog 0.5"]


DAG = """
import pendulum
from airflow.sdk import DAG, BaseNotifier, task

from airflow_provider_batchkit import Budget
from airflow_provider_batchkit.operators.batch import RunBatchOperator, SubmitBatchOperator


class Told(BaseNotifier):
    template_fields = ("text",)

    def __init__(self, text):
        super().__init__()
        self.text = text

    def notify(self, context):
        with open({path!r}, "a") as file:
            file.write(self.text + "\\n")


def budget(name):
    text = name + " {{{{ batchkit.budget }}}} {{{{ batchkit.threshold }}}} {{{{ ti.task_id }}}} {{{{ batchkit.link }}}}"
    return Budget(name, usd=0.01, window="ever", alert_at=[0.01], notifiers=[Told(text)])


with DAG({dag_id!r}, schedule=None, start_date=pendulum.datetime(2026, 1, 1, tz="UTC")) as dag:
    given = dict(max_tokens=100, sql_conn_id="warehouse")
    SubmitBatchOperator.partial(task_id="mapped", budget=budget("m"), **given).expand(requests=[["a"], ["b"]])
    RunBatchOperator(task_id="run", requests=["a"], budget=budget("r"), table="answers", poke_interval=1, **given)

    @task.claude_batch(budget=budget("d"), **given)
    def decorated():
        return ["a"]

    decorated()
"""


def test_airflow_runs_mapped_and_decorated_tasks_with_notifiers(home: Path, tmp_path: Path) -> None:
    """Through Airflow's own serialization and task runner: of two mapped tasks one tells."""
    path = tmp_path / "told"
    run = run_source(home, "alerts", DAG.format(path=str(path), dag_id="alerts"))
    assert run.state == "success"
    told = sorted(line.rpartition(" ") for line in path.read_text().splitlines())
    assert [before for before, _, _ in told] == ["d d 0.01 decorated", "m m 0.01 mapped", "r r 0.01 run"]
    assert all("/dags/alerts/runs/" in link for _, _, link in told)


@pytest.mark.parametrize("form", [lambda b: b, lambda b: {"name": b.name, "usd": 1, "alert_at": [1], "notifiers": b.notifiers}])
def test_a_dag_with_notifiers_is_serialized_alike_at_every_parse(home: Path, form: Callable[[Budget], Any]) -> None:
    """Else every parse would make a new version of the DAG."""
    from airflow.sdk import DAG as AirflowDag  # noqa: N811 - it is a class

    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    def serialized() -> Any:
        given = form(Budget("b", usd=1, alert_at=[1], notifiers=[Told(Path("x"))]))  # type: ignore[arg-type]
        with AirflowDag("d", schedule=None) as dag:
            SubmitBatchOperator.partial(task_id="m", sql_conn_id="w", budget=given).expand(requests=[["a"]])
            SubmitBatchOperator(task_id="s", sql_conn_id="w", budget=given, requests=["a"])
        return releases.serialized(dag)

    assert serialized() == serialized()
