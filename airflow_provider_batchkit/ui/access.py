"""Access to the page: every request checks Airflow's own permissions, and actions go to Airflow's audit log."""

from __future__ import annotations

import json
from typing import Annotated, Any

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from airflow.models.log import Log
from airflow.utils.session import create_session
from fastapi import Depends, Header, HTTPException

from airflow_provider_batchkit.ledger.overview import BatchView

CANCEL_EVENT = "batchkit_cancel_batch"


def visible_dags(user: GetUserDep) -> frozenset[str]:
    """The DAGs whose task instances the user may see. A request without a login gets 401.

    A user may be allowed to see a DAG but none of its task instances. A job is a task instance, so the lists leave such DAGs out, too.
    """
    manager = get_auth_manager()
    found = frozenset(manager.get_authorized_dag_ids(user=user, method="GET"))

    def sees_tasks(dag_id: str | None) -> bool:
        details = DagDetails(id=dag_id)
        return manager.is_authorized_dag(method="GET", access_entity=DagAccessEntity.TASK_INSTANCE, details=details, user=user)

    # the check without a DAG is the one that Airflow's own list of task instances makes; only when it is refused, each DAG is checked
    return found if not found or sees_tasks(None) else frozenset(dag_id for dag_id in found if sees_tasks(dag_id))


VisibleDep = Annotated[frozenset[str], Depends(visible_dags)]

#: answers 401 without a login, and 403 when the user may not see the task instances of the DAG in the path
may_see = Depends(requires_access_dag("GET", DagAccessEntity.TASK_INSTANCE))
#: answers 401 without a login, and 403 when the user may not edit the runs of the DAG in the path
may_edit_runs = Depends(requires_access_dag("PUT", DagAccessEntity.RUN))


def from_this_page(x_batchkit: Annotated[str | None, Header()] = None, sec_fetch_site: Annotated[str | None, Header()] = None) -> None:
    """Require a header that another site's form cannot set, and refuse requests that the browser marks as another site's. The login's
    cookie alone does not cancel anything.
    """
    if x_batchkit is None:
        raise HTTPException(403, {"message": "The header X-BatchKit is missing.", "todo": "Cancel from the Batches page."})
    # browsers send this header only to https addresses and to localhost
    if sec_fetch_site not in (None, "same-origin"):
        raise HTTPException(403, {"message": "The request came from another site.", "todo": "Cancel from the Batches page."})


from_page = Depends(from_this_page)


def note_cancel(user: Any, one: BatchView) -> None:
    """Write a line to Airflow's audit log. It is written before the batch is canceled, so that no cancel lacks its line."""
    extra = {"batch_id": one.record.batch_id, "job_id": one.record.job_id, "shard": one.record.shard, "requests": one.record.requests}
    with create_session() as session:
        session.add(
            Log(
                event=CANCEL_EVENT,
                owner=user.get_name(),
                owner_display_name=user.get_name(),
                extra=json.dumps(extra),
                dag_id=one.dag_id,
                run_id=one.run_id,
                task_id=one.task_id,
                map_index=one.map_index,
            )
        )
