"""The routes of the Batches page. Every route requires a login. Lists show the DAGs that the user may see, and a DAG in the path that the
user may not see is answered with 403. A test checks this for every route of the app.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from airflow.api_fastapi.core_api.security import GetUserDep, get_user
from airflow.providers.common.compat.sdk import AirflowException
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.engine import Engine

from airflow_provider_batchkit.api.cancel import Fate
from airflow_provider_batchkit.cost.budget import window_of
from airflow_provider_batchkit.exceptions import BatchKitError
from airflow_provider_batchkit.hooks.settings import configured_failures, ledger_conn_ids, show_content
from airflow_provider_batchkit.ledger.overview import STATES, BatchView, Filter, JobDetail, Overview
from airflow_provider_batchkit.ledger.spending import Spending
from airflow_provider_batchkit.request.failed import FailedRows
from airflow_provider_batchkit.ui import answers
from airflow_provider_batchkit.ui.access import VisibleDep, from_page, may_edit_runs, may_see, note_cancel
from airflow_provider_batchkit.ui.ledgers import Ledgers, Trouble, TroubleError, UnfitValueError
from airflow_provider_batchkit.ui.looks import Looks

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
#: most jobs in flight on the page
_IN_FLIGHT = 200
#: most keys of failed rows in one answer, and most characters of a key
_KEYS = 500
_KEY_CHARS = 4_000
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

_Text = Annotated[str | None, Query(max_length=250)]
_Ledger = Annotated[str, Query(max_length=250)]
_Key = Annotated[str, Query(max_length=_KEY_CHARS)]


def create_app() -> FastAPI:
    """The app that Airflow serves below ``/batchkit``."""
    # FastAPI's routes for its documentation are off, because they would need no login
    app = FastAPI(title="BatchKit", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(get_user)])
    page = _Page()
    for path, answer in (
        ("/api/about", page.about),
        ("/api/in-flight", page.in_flight),
        ("/api/progress", page.progress),
        ("/api/jobs", page.jobs),
        ("/api/spend", page.spend),
    ):
        app.get(path, response_model=None)(answer)
    app.get("/api/dags/{dag_id}/jobs/{job_id}", dependencies=[may_see], response_model=None)(page.job)
    app.get("/api/dags/{dag_id}/jobs/{job_id}/failed", dependencies=[may_see], response_model=None)(page.failed)
    cancel = "/api/dags/{dag_id}/batches/{batch_id}/cancel"
    app.post(cancel, dependencies=[from_page, may_edit_runs], response_model=None)(page.cancel)
    for name, kind in (("page.js", "text/javascript"), ("icon.svg", "image/svg+xml"), ("icon-dark.svg", "image/svg+xml")):
        app.get(f"/{name}", response_model=None)(_file(name, kind))
    app.middleware("http")(_strict)
    app.exception_handler(TroubleError)(_in_trouble)
    app.exception_handler(RequestValidationError)(_not_understood)
    app.exception_handler(UnfitValueError)(_unfit)
    return app


def _file(name: str, kind: str) -> Callable[[], Response]:
    def answer() -> Response:
        return Response((_HERE / name).read_bytes(), media_type=kind)

    return answer


async def _strict(request: Request, call_next: Callable[[Request], Any]) -> Any:
    """Set strict headers on every answer, and keep stack traces out of all of them."""
    try:
        answer = await call_next(request)
    except Exception:
        log.exception("The Batches page failed at %s", request.url.path)
        answer = JSONResponse(
            {"detail": {"message": "This could not be answered.", "todo": "The log of Airflow's API server says why."}}, status_code=500
        )
    for name, value in _HEADERS.items():
        answer.headers[name] = value
    return answer


def _in_trouble(_: Request, error: Exception) -> Response:
    assert isinstance(error, TroubleError)
    return JSONResponse({"detail": _trouble(error.trouble)}, status_code=503)


def _not_understood(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    names = ", ".join(sorted({str(one["loc"][-1]) for one in error.errors()}))
    return JSONResponse({"detail": {"message": f"This was not understood: {names}.", "todo": "Reload the page."}}, status_code=422)


def _unfit(_: Request, error: Exception) -> Response:
    assert isinstance(error, UnfitValueError)
    return JSONResponse({"detail": {"message": "The ledger can have no such value.", "todo": "Reload the page."}}, status_code=422)


def _trouble(one: Trouble) -> dict[str, str]:
    return {"ledger": one.conn_id, "kind": one.kind, "message": one.message, "todo": one.todo}


def _refuse(status: int, message: str, todo: str) -> HTTPException:
    return HTTPException(status, {"message": message, "todo": todo})


def _known(ledger: str) -> str:
    if ledger not in ledger_conn_ids():
        raise _refuse(404, "This page shows no such ledger.", "[batchkit] page_ledger_conn_ids names those that it shows.")
    return ledger


class _Page:
    """The routes, and the state that they share."""

    def __init__(self) -> None:
        self._ledgers = Ledgers()
        self._looks = Looks()

    def about(self, visible: VisibleDep) -> dict[str, Any]:
        """The ledgers of the page, and the values by which their jobs can be filtered."""
        found: dict[str, Any] = {"states": STATES, "ledgers": [], "troubles": [], "dag_ids": set(), "models": set()}
        for conn_id in ledger_conn_ids():
            found["ledgers"].append(conn_id)
            try:
                dag_ids = visible & set(self._ledgers.read(conn_id, lambda engine: Overview(engine).dag_ids()))
                models = self._ledgers.read(conn_id, lambda engine, dag_ids=dag_ids: Overview(engine).models(dag_ids))  # type: ignore[misc]
                found["dag_ids"] |= dag_ids
                found["models"] |= set(models)
            except TroubleError as e:
                found["troubles"].append(_trouble(e.trouble))
        found["dag_ids"], found["models"] = sorted(found["dag_ids"]), sorted(found["models"])
        return found

    def in_flight(
        self, visible: VisibleDep, dag_id: _Text = None, run_id: _Text = None, task_id: _Text = None, map_index: int | None = None
    ) -> dict[str, Any]:
        """Jobs with an open batch, in all ledgers."""
        show = Filter(visible, dag_id, run_id, task_id, map_index, state="open")
        jobs, troubles, more = list[dict[str, Any]](), list[dict[str, str]](), False
        for conn_id in ledger_conn_ids():
            try:
                found, further = self._ledgers.read(conn_id, partial(self._open_jobs, conn_id, show))
                jobs += found
                more = more or further
            except TroubleError as e:
                troubles.append(_trouble(e.trouble))
        jobs.sort(key=lambda one: one["oldest_at"] or one["began_at"])
        return {"jobs": jobs, "more": more, "troubles": troubles, "now": datetime.now(UTC).isoformat()}

    @staticmethod
    def _open_jobs(conn_id: str, show: Filter, engine: Engine) -> tuple[list[dict[str, Any]], bool]:
        """The oldest jobs in flight, which are the ones that may be stuck, and whether there are younger ones that are not shown."""
        overview = Overview(engine)
        page = overview.jobs(show, limit=_IN_FLIGHT, oldest_first=True)
        jobs = page.jobs
        batches = defaultdict[str, list[BatchView]](list)
        for one in overview.open_batches([job.job_id for job in jobs]):
            batches[one.record.job_id].append(one)
        usual = overview.usual((job.dag_id, job.task_id) for job in jobs)
        shown = [answers.open_job_json(conn_id, job, batches[job.job_id], usual[job.dag_id, job.task_id]) for job in jobs]
        return shown, page.next is not None

    def progress(self, visible: VisibleDep) -> dict[str, Any]:
        """The progress of open batches, from one list call per connection. Each user sees the batches of the DAGs that the user may see."""
        open_batches = list[BatchView]()
        for conn_id in ledger_conn_ids():
            try:
                open_batches += self._ledgers.read(
                    conn_id, lambda engine: Overview(engine).batches(Filter(state="open"), limit=5 * _IN_FLIGHT, oldest_first=True)
                )
            except TroubleError:
                continue  # the list of jobs reports a ledger that cannot be read
        wanted = defaultdict[str, dict[str, datetime | None]](dict)
        for one in open_batches:
            if one.record.batch_id is not None:
                wanted[one.record.anthropic_conn_id][one.record.batch_id] = one.record.created_at
        mine = {one.record.batch_id for one in open_batches if one.dag_id in visible}
        batches, troubles = dict[str, Any](), dict[str, str]()
        for conn_id in sorted({one.record.anthropic_conn_id for one in open_batches if one.dag_id in visible} & wanted.keys()):
            seen = self._looks.at(conn_id, wanted[conn_id])
            if seen.trouble is not None:
                troubles[conn_id] = seen.trouble
            batches |= {batch_id: answers.progress_json(one) for batch_id, one in seen.batches.items() if batch_id in mine}
        return {"batches": batches, "troubles": troubles}

    def jobs(
        self,
        visible: VisibleDep,
        ledger: _Ledger,
        dag_id: _Text = None,
        run_id: _Text = None,
        task_id: _Text = None,
        map_index: int | None = None,
        model: _Text = None,
        state: Annotated[str | None, Query(max_length=20)] = None,
        day: Annotated[str | None, Query(pattern=r"^\d{4}-\d{2}-\d{2}$")] = None,
        failed: bool = False,
        before: Annotated[str | None, Query(max_length=80)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 25,
    ) -> dict[str, Any]:
        """A page of jobs, the latest first."""
        if state is not None and state not in STATES:
            raise _refuse(422, "There is no such state.", f"States are {', '.join(STATES)}.")
        try:
            since = None if day is None else datetime.fromisoformat(day).replace(tzinfo=UTC)
            until = None if since is None else since + timedelta(days=1)
            show = Filter(visible, dag_id, run_id, task_id, map_index, model, state, since, until, failed)
            page = self._ledgers.read(_known(ledger), lambda engine: Overview(engine).jobs(show, limit=limit, before=before))
        except (ValueError, OverflowError) as e:
            raise _refuse(422, "This was not understood: day or before.", "Reload the page.") from e
        return {"jobs": [{**answers.job_json(one), "ledger": ledger} for one in page.jobs], "next": page.next}

    def job(self, dag_id: str, job_id: str, ledger: _Ledger) -> dict[str, Any]:
        """One job of a DAG that the user may see."""

        def question(engine: Engine) -> tuple[JobDetail, list[FailedRows], int] | None:
            overview = Overview(engine)
            found = overview.job(job_id)
            # the permission was for the DAG in the path
            return None if found is None or found.job.dag_id != dag_id else (found, *overview.failed_rows(job_id, configured_failures()))

        found = self._ledgers.read(_known(ledger), question)
        if found is None:
            raise _refuse(404, "The ledger has no such job of this DAG.", "It may have been in another ledger.")
        return answers.detail_json(ledger, *found, show_content=show_content())

    def failed(
        self, dag_id: str, job_id: str, ledger: _Ledger, like: _Key, after: Annotated[str | None, Query(max_length=_KEY_CHARS)] = None
    ) -> dict[str, Any]:
        """Keys of a job's rows that failed for the same reason as the row with the key ``like``, a page at a time."""

        def question(engine: Engine) -> list[str] | None:
            overview = Overview(engine)
            # the permission was for the DAG in the path
            return overview.keys_like(job_id, like, limit=_KEYS + 1, after=after) if overview.dag_of(job_id) == dag_id else None

        keys = self._ledgers.read(_known(ledger), question)
        if keys is None:
            raise _refuse(404, "The ledger has no such job of this DAG.", "It may have been in another ledger.")
        return {"keys": keys[:_KEYS], "next": keys[_KEYS - 1] if len(keys) > _KEYS else None}

    def spend(
        self,
        visible: VisibleDep,
        ledger: _Ledger,
        by: Literal["day", "dag", "model"] = "day",
        days: Annotated[int, Query(ge=1, le=1000)] = 30,
        month: Annotated[str | None, Query(pattern=r"^2\d{3}-(0[1-9]|1[0-2])$")] = None,
        dag_id: _Text = None,
        model: _Text = None,
    ) -> dict[str, Any]:
        """The cost of landed batches created in the last days or in a month (UTC), the budgets, and the latencies of batches."""
        dag_ids = visible if dag_id is None else visible & {dag_id}
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        since, until = today - timedelta(days=days - 1), None
        if month is not None:
            since = datetime.fromisoformat(f"{month}-01").replace(tzinfo=UTC)
            until = window_of("month", since)[1]

        def question(engine: Engine) -> dict[str, Any]:
            books = Spending(engine)
            return {
                "spent": [answers.spent_json(one) for one in books.spent(by, since=since, until=until, dag_ids=dag_ids, model=model)],
                "budgets": [answers.budget_json(one, books.told_alerts(one)) for one in books.budgets(dag_ids)],
                "latency": [answers.latency_json(one) for one in books.latencies(since=since, until=until, dag_ids=dag_ids)],
                "since": since.date().isoformat(),
                "until": None if until is None else (until - timedelta(days=1)).date().isoformat(),
            }

        return self._ledgers.read(_known(ledger), question)

    def cancel(self, dag_id: str, batch_id: str, ledger: _Ledger, user: GetUserDep) -> dict[str, Any]:
        """Cancel a running batch of a DAG whose runs the user may edit."""
        one = self._ledgers.read(_known(ledger), lambda engine: Overview(engine).batch(batch_id))
        if one is None or one.dag_id != dag_id:
            raise _refuse(404, "The ledger has no such batch of this DAG.", "Reload the page.")
        if one.state != "submitted":
            raise _refuse(409, f"The batch is {one.state}: there is nothing to cancel.", "Reload the page.")
        note_cancel(user, one)
        try:
            end = self._looks.cancel(one.record.anthropic_conn_id, batch_id)
        except (AirflowException, BatchKitError) as e:
            log.warning("The batch %s could not be canceled: %s", batch_id, e)
            raise _refuse(
                502, f"The connection {one.record.anthropic_conn_id} cannot be used.", "The batch runs on. Mend the connection."
            ) from e
        if end.fate is Fate.FAILED:
            raise _refuse(502, f"The batch could not be canceled: {end.reason}.", "If it still runs, it runs on and is billed.")
        return {"batch_id": batch_id, "fate": end.fate.value}
