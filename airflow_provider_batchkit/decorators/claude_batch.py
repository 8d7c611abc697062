"""``@task.claude_batch``: a Python function returns the requests, and :class:`SubmitBatchOperator` submits them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import DecoratedOperator, task_decorator_factory

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.operators.resumable import Leg
from airflow_provider_batchkit.operators.shown import SHOWN_AS
from airflow_provider_batchkit.operators.submit import SubmitBatchOperator
from airflow_provider_batchkit.operators.tasks import batchkit_errors

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import TaskDecorator

#: the source parameters of a submit, which the function replaces here
_SOURCES = ("sql", "input_path", "requests")


class ClaudeBatchDecoratedOperator(DecoratedOperator, SubmitBatchOperator):
    """A submit whose requests are what a function returns. Returns the list of batch ids.

    The function's result never passes through XCom, and a generator is read row by row. A retry calls the function again. A row that an
    earlier attempt has asked is recognized by its key (``key``, a native request's ``custom_id``, else its position) and is not asked
    again, so without keys the order must be the same on every call.

    :param python_callable: a function that returns prompts, rows or native requests, as ``requests`` of :class:`SubmitBatchOperator` takes
        them: a list, or any iterable that has an order
    :param op_args: the function's positional arguments (templated)
    :param op_kwargs: the function's keyword arguments (templated)
    """

    template_fields: Sequence[str] = (
        *DecoratedOperator.template_fields,
        # the requests exist only while the task runs: a million of them do not belong on the UI's page of rendered fields
        *(field for field in SubmitBatchOperator.template_fields if field not in _SOURCES),
    )
    template_fields_renderers = {**DecoratedOperator.template_fields_renderers, **SHOWN_AS}  # noqa: RUF012 - Airflow's own attribute
    custom_operator_name = "@task.claude_batch"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Iterable[Any]],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        multiple_outputs: bool = False,
        **kwargs: Any,
    ) -> None:
        name = python_callable.__name__
        for source in _SOURCES:
            if source in kwargs:
                raise BatchInputError(f"@task.claude_batch {name}: the requests are what the function returns; leave {source} out.")
        if multiple_outputs:
            raise BatchInputError(
                f"@task.claude_batch {name}: it gives one output, the list of batch ids. Leave multiple_outputs out; it is also "
                "what a function that is annotated to return a mapping stands for. Return an iterable of requests."
            )
        if inspect.iscoroutinefunction(python_callable) or inspect.isasyncgenfunction(python_callable):
            raise BatchInputError(f"@task.claude_batch {name}: the function must not be async. Return a list or a generator.")
        super().__init__(python_callable=python_callable, op_args=op_args, op_kwargs=op_kwargs, requests=(), **kwargs)

    def _go_on(self, leg: Leg) -> Any:
        try:
            from airflow.sdk.bases.decorator import determine_kwargs
        except ImportError:  # Airflow 3.1 has it only in a module that a parse does not load
            from airflow.utils.operator_helpers import determine_kwargs  # type: ignore[attr-defined]
        # the function is the source, so every leg calls it again, as it would run a query again
        arguments = determine_kwargs(self.python_callable, self.op_args, {**leg.context, **self.op_kwargs})
        returned = self.python_callable(*self.op_args, **arguments)
        with batchkit_errors():
            _check(self.python_callable.__name__, returned)
        self.requests = returned
        return super()._go_on(leg)


def _check(name: str, returned: Any) -> None:
    """:raises BatchInputError: when the result is no ordered iterable of requests, such as None, one text or a set"""
    kind = type(returned).__name__
    if returned is None:
        problem = "nothing. Does it lack a return or a yield?"
    elif isinstance(returned, str | bytes | Mapping):
        problem = f"a {kind}. For one request, return a list of one."
    elif isinstance(returned, set | frozenset):
        problem = f"a {kind}, which has no order: a retry would see other positions. Return a list, sorted."
    elif hasattr(returned, "columns"):
        problem = f"a {kind}, which gives its columns when it is iterated. Return its rows as mappings: frame.to_dict('records')."
    elif not isinstance(returned, Iterable):
        problem = f"a {kind}."
    else:
        return
    raise BatchInputError(
        f"The function {name} returned {problem} It must return a list, a generator or another iterable of prompts, rows or native "
        "requests. Nothing was sent."
    )


def claude_batch_task(python_callable: Callable[..., Iterable[Any]] | None = None, **kwargs: Any) -> TaskDecorator:
    """``@task.claude_batch``: the function returns prompts, rows or native requests; the task returns the list of batch ids.

    :param python_callable: the decorated function
    :param kwargs: parameters of :class:`SubmitBatchOperator` (all but its sources) and of any task
    """
    return task_decorator_factory(python_callable=python_callable, decorated_operator_class=ClaudeBatchDecoratedOperator, **kwargs)
