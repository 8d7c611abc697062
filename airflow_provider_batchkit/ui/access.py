"""Who may see and do what: Airflow's own permissions, asked for every request, and its audit log."""

from __future__ import annotations

import json
from typing import Annotated, Any

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from airflow.models.log import Log
from airflow.utils.session import create_session
from fastapi import Depends, Header, HTTPException

from airflow_provider_batchkit.ledger.overview import BatchView

CANCEL_EVENT = "batchkit_cancel_batch"


def visible_dags(user: GetUserDep) -> frozenset[str]:
    """The DAGs whose task instances the user may see. 401 for anybody without a login."""
    return frozenset(get_auth_manager().get_authorized_dag_ids(user=user, method="GET"))


VisibleDep = Annotated[frozenset[str], Depends(visible_dags)]

#: 401 without a login, 403 for a DAG in the path whose task instances the user may not see
may_see = Depends(requires_access_dag("GET", DagAccessEntity.TASK_INSTANCE))
#: likewise for one whose runs the user may not edit
may_edit_runs = Depends(requires_access_dag("PUT", DagAccessEntity.RUN))


def from_this_page(x_batchkit: Annotated[str | None, Header()] = None) -> None:
    """A header that another site's form cannot set: the login's cookie alone does not cancel anything."""
    if x_batchkit is None:
        raise HTTPException(403, {"message": "The header X-BatchKit is missing.", "todo": "Cancel from the Batches page."})


from_page = Depends(from_this_page)


def note_cancel(user: Any, one: BatchView) -> None:
    """A line in Airflow's audit log. It is written before the batch is canceled, so that no cancel goes without one."""
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
