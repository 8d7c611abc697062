"""Submit: send a source's rows as message batches, which are journaled first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowSkipException, XComArg, literal

from airflow_provider_batchkit.cost.budget import Budget
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.ledger import results_of
from airflow_provider_batchkit.hooks.settings import DEFAULT_CONN_ID, configured_failures, settle_times
from airflow_provider_batchkit.hooks.sql import open_connection
from airflow_provider_batchkit.jobs.rounds import Round
from airflow_provider_batchkit.jobs.waiting import Done, WaitFor
from airflow_provider_batchkit.links import ConsoleLink
from airflow_provider_batchkit.model import MAX_BYTES_PER_BATCH, MAX_REQUESTS_PER_BATCH, parse_usd
from airflow_provider_batchkit.operators.kill import OwnsBatches
from airflow_provider_batchkit.operators.output import OutputOperator
from airflow_provider_batchkit.operators.resumable import Leg
from airflow_provider_batchkit.operators.shown import SHOWN, SHOWN_AS, shown_of
from airflow_provider_batchkit.operators.tasks import as_batch_ids, asked_by, attempt_id_of, own_params
from airflow_provider_batchkit.request.failures import KNOWN_FAILURES, WORTH_ASKING, Reason
from airflow_provider_batchkit.request.system import kept_for_s, system_problem_of_task
from airflow_provider_batchkit.schema import OutputSchema

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_batchkit.jobs.advance import Asking
    from airflow_provider_batchkit.jobs.submit import Attempt, SubmitReport
    from airflow_provider_batchkit.ledger import Ledger
    from airflow_provider_batchkit.request.build import RequestBuilder
    from airflow_provider_batchkit.source.rows import Items


class SubmitBatchOperator(OwnsBatches, OutputOperator):
    """Ask Claude about every row of a source, as message batches at half price. Returns the list of batch ids.

    Every request is journaled in the ``batchkit_*`` tables of the ledger before it is sent, so a retry, a cleared task or a killed
    worker never pays for a row twice. Batches that a killed attempt may have sent are settled by proof before anything is sent again. That
    takes time, in which the task holds no worker slot. The XCom ``waits_for`` shows what it waits for, and until when at the latest.

    Give exactly one source, ``sql``, ``input_path`` or ``requests``.

    :param sql: a SELECT; each row is ``row`` in the templates (templated, ``.sql`` files too)
    :param input_path: CSV, JSONL or Parquet files whose columns are the row, CSV and JSONL also gzipped: a path or URL that
        ``ObjectStoragePath`` takes (local, ``s3://``, ``gs://``, ``abfs://``), with ``*`` for many files, or a list of them (templated).
        CSV values are strings
    :param requests: native ``{"custom_id", "params"}`` mappings, prompt strings, or row mappings; may be another task's output
    :param key: column or columns that identify a row and key the result table; required with ``sql`` and ``input_path``
    :param prompt: Jinja template of the user message over ``row`` and the task's context. A missing column is an error
    :param system: template of the system prompt; or a list of content blocks as the API takes them, with a template as the text of each
    :param model: model id; by default the connection's
    :param max_tokens: bound on an answer's length, in tokens
    :param params: any further Messages API parameters
    :param output_schema: schema that each answer must fit: a JSON Schema (a mapping) of an object, or a Pydantic model class. Its
        properties become typed columns of the result table, nested ones hold JSON; an answer that does not fit lands as
        ``invalid_output`` with its raw text
    :param anthropic_conn_id: connection of type ``anthropic``
    :param sql_conn_id: SQL connection of the results, and of the source unless ``source_conn_id`` names another. Needed unless results
        are files and the ledger lies elsewhere
    :param ledger_conn_id: SQLite or PostgreSQL connection of the ledger: ``[batchkit] ledger_conn_id`` of Airflow's configuration by
        default, else ``sql_conn_id`` (templated)
    :param source_conn_id: SQL connection to read ``sql`` from
    :param parameters: parameters of ``sql``, in the driver's own style
    :param input_conn_id: connection to read ``input_path`` with, e.g. one of type ``aws``; a local path needs none
    :param input_options: how to read ``input_path`` where its name does not tell: ``format`` (``"csv"``, ``"jsonl"``, ``"parquet"``), and
        for CSV ``encoding`` and ``delimiter``
    :param max_requests_per_batch: most requests in one batch, 1 to 100,000
    :param max_bytes_per_batch: most bytes in the body of one batch, at most 256,000,000
    :param table: the result table that a later task writes, where that is known: it is checked before anything is sent (templated)
    :param output_path: the place of the result files that a later task writes, where that is known: before anything is sent, a file is
        written there and deleted (templated). Give ``output_format`` and ``output_conn_id`` as that task has them
    :param dedupe: let rows that ask exactly the same share one request, whose answer lands for each of them
    :param skip_unchanged: leave out rows whose same request has succeeded in an earlier run of this task and landed in the same table:
        ``table``, else the one table in which that run has landed. A row is asked when it, the prompt, the model or a parameter has
        changed. The rows that the earlier run wrote are assumed to be in the table still
    :param settle_seconds: seconds of looking for a batch that a killed attempt may have sent; its rows are sent anew only after these and
        another ``[batchkit] absence_seconds``. A POST takes at most half of ``settle_seconds``
    :param cancel_on_kill: cancel the job's batches when the running task is killed; otherwise they go on, and a retry re-attaches
    :param max_cost_usd: cap in USD: fail before anything is sent when the task's batches may cost more. The estimate's upper bound counts,
        and what earlier attempts of this task have spent or may still spend. With a cap, requests without a bound (server tools, PDFs) are
        refused
    :param budget: a :class:`~airflow_provider_batchkit.Budget`, or a mapping with its fields: a named cap that tasks share over a window.
        The upper bound is reserved before anything is sent; a task that does not fit fails, or is skipped if the budget says so.
        With ``alert_at`` and ``notifiers`` it tells people when shares of the cap are reached
    :param cache_system: cache the system prompt for ``"5m"`` or ``"1h"`` after its last use. The setting is part of the request. Caching
        pays when the prompt is long (at least 512 to 4,096 tokens, by model), the same for all rows, and in the cache before the rows are
        asked: see ``prime_cache``. Content blocks may have their own ``cache_control`` instead. A native request's own ``system`` is sent
        as it is
    :param prime_cache: send the first row alone, wait for its answer without a worker slot, then send the rest, which reads what the first
        has written to the cache. Without it the requests of a batch mostly miss, and caching costs more than it saves
    :param prime_timeout: seconds, from the first row's submit, that the rest waits for its answer; after them the rest is sent anyway
    :param poke_interval: seconds between looks at the first row's batch
    :param dry_run: log what would be sent and what it would cost, push that under the XCom key ``estimate``, and skip: nothing is sent
        or journaled, and downstream tasks are skipped, too
    :param only_failed_of: landed batches of an earlier task, usually its output: ask only rows whose key failed in them in a way that is
        worth asking again (expired, canceled, overloaded, rate limited, API errors; never what the API refused). Give the same rows as that
        task: the requests are rendered anew (templated)
    :param retry_invalid_output: also ask answers again that do not fit the schema; each of them is billed
    :param retry_gone: with ``only_failed_of``, ask also the rows of batches that were deleted or archived before they landed, although
        they may have been billed
    :param on_empty: a source without rows, or without a row to ask again: ``"skip"`` the task, ``"succeed"`` with no batches, or ``"fail"``
    """

    template_fields: Sequence[str] = (
        "sql",
        "input_path",
        "requests",
        "parameters",
        "model",
        "anthropic_conn_id",
        "sql_conn_id",
        "ledger_conn_id",
        "source_conn_id",
        "input_conn_id",
        "only_failed_of",
        "table",
        "output_path",
        "output_conn_id",
        *SHOWN,
    )
    template_ext: Sequence[str] = (".sql",)
    template_fields_renderers = {"sql": "sql", "requests": "json", **SHOWN_AS}  # noqa: RUF012 - Airflow's own attribute
    ui_color = "#e8ded2"
    #: the rounds of a task that also lands its answers; empty for a submit
    rounds: Sequence[Round] = ()
    _has_job = True
    operator_extra_links = (ConsoleLink(),)

    def __init__(
        self,
        *,
        sql: str | None = None,
        input_path: Any = None,
        requests: Any = None,
        key: str | Sequence[str] | None = None,
        prompt: str | None = None,
        system: str | Sequence[Mapping[str, Any]] | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        params: Mapping[str, Any] | None = None,
        output_schema: Any = None,
        anthropic_conn_id: str = DEFAULT_CONN_ID,
        sql_conn_id: str | None = None,
        ledger_conn_id: str | None = None,
        source_conn_id: str | None = None,
        parameters: Any = None,
        input_conn_id: str | None = None,
        input_options: Mapping[str, Any] | None = None,
        max_requests_per_batch: int = MAX_REQUESTS_PER_BATCH,
        max_bytes_per_batch: int = MAX_BYTES_PER_BATCH,
        table: str | None = None,
        dedupe: bool = True,
        skip_unchanged: bool = False,
        settle_seconds: float = 900.0,
        cancel_on_kill: bool = False,
        max_cost_usd: Decimal | str | float | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        cache_system: str | None = None,
        prime_cache: bool = False,
        prime_timeout: float = 3600.0,
        poke_interval: float = 10.0,
        dry_run: bool = False,
        only_failed_of: Any = None,
        retry_invalid_output: bool = False,
        retry_gone: bool = False,
        on_empty: str = "skip",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sql = sql
        self.input_path = input_path
        # literal() keeps Jinja away from the user's requests: only another task's output is resolved
        self.requests = requests if requests is None or isinstance(requests, XComArg) else literal(requests)
        self.key = key
        self.prompt = prompt
        self.system = system
        self.model = model
        self.max_tokens = max_tokens
        self.request_params = own_params(params, self.get_dag())
        self.output_schema = None if output_schema is None else OutputSchema.parse(output_schema)
        self.anthropic_conn_id = anthropic_conn_id
        self.sql_conn_id = sql_conn_id
        self.ledger_conn_id = ledger_conn_id
        self.source_conn_id = source_conn_id
        self.parameters = parameters
        self.input_conn_id = input_conn_id
        self.input_options = input_options
        self.max_requests_per_batch = max_requests_per_batch
        self.max_bytes_per_batch = max_bytes_per_batch
        self.table = table
        self.dedupe = dedupe
        self.skip_unchanged = skip_unchanged
        self.settle_seconds = settle_seconds
        self.cancel_on_kill = cancel_on_kill
        self.only_failed_of = only_failed_of
        # another task's output may be None at run time, which must not mean "ask all rows"
        self._asks_again = only_failed_of is not None
        self.retry_invalid_output = retry_invalid_output
        self.retry_gone = retry_gone
        self.on_empty = on_empty
        self.max_cost_usd = None if max_cost_usd is None else parse_usd(max_cost_usd, f"Task {self.task_id}: max_cost_usd")
        self.budget = None if budget is None else Budget.parse(budget)
        self.cache_system = cache_system
        self.prime_cache = prime_cache
        self.prime_timeout = prime_timeout
        self.poke_interval = poke_interval
        # every operator has a method named dry_run
        self.is_dry_run = dry_run
        self._refuse_bad_parameters()
        self.asks, self.caps = shown_of(self)

    def _refuse_bad_parameters(self) -> None:
        """:raises BatchInputError: when the DAG is parsed, for parameters that cannot work"""
        if sum(source is not None for source in (self.sql, self.input_path, self.requests)) != 1:
            raise BatchInputError(f"Task {self.task_id}: give exactly one of sql, input_path and requests.")
        if self.requests is None and (not self.key or self.prompt is None):
            source = "input_path" if self.sql is None else "sql"
            raise BatchInputError(f"Task {self.task_id}: {source} needs key (the columns that identify a row) and prompt.")
        if self.sql is not None and self.source_conn_id is None and self.sql_conn_id is None:
            raise BatchInputError(f"Task {self.task_id}: sql needs source_conn_id or sql_conn_id, the connection to read it from.")
        if self.input_options is not None:
            from airflow_provider_batchkit.source.files import InputOptions

            InputOptions.parse(self.input_options)
        problem = system_problem_of_task(
            self.system, prompt=self.prompt, params=self.request_params, cache_system=self.cache_system, prime_cache=self.prime_cache
        )
        if problem:
            raise BatchInputError(f"Task {self.task_id}: {problem}.")
        self._refuse_bad_output()
        if self.on_empty not in ("skip", "succeed", "fail"):
            raise BatchInputError(f"Task {self.task_id}: on_empty must be 'skip', 'succeed' or 'fail', not {self.on_empty!r}.")

    def primer_over(self, context: Context, event: Any = None, asked_before: int = 0) -> Any:
        """The method that Airflow calls on a task that an older version of this package has deferred."""
        return self.resume(context, event, asked=asked_before, about="primer")

    def _advance(self, leg: Leg, ledger: Ledger) -> Done[Any] | WaitFor:
        from airflow_provider_batchkit.jobs.advance import ask

        if leg.about is None and not self.is_dry_run:
            self._prove_output()
        attempt = self._attempt(leg, ledger)
        return ask(attempt, self._asking(leg, attempt.job_id), leg, rehearse=self.is_dry_run)

    def _finish(self, leg: Leg, ledger: Ledger, result: Any) -> Any:
        if self.is_dry_run and result.rows:
            self._end_dry_run(leg, result)
        if not result.batch_ids:
            return self._nothing_to_ask(result)
        self.lineage_summary = {"batch_ids": result.batch_ids, "source_rows": result.rows, "submitted_requests": leg.sent}
        return result.batch_ids

    def _attempt(self, leg: Leg, ledger: Ledger) -> Attempt:
        from airflow_provider_batchkit.jobs.submit import Attempt

        if not self.is_dry_run or ledger.exists():
            ledger.ensure()
        ti = leg.context["ti"]
        kit, job, attempt_id, asked = self.hook.kit, self._identify(leg.context, ledger), attempt_id_of(ti), asked_by(self, ti)
        if asked is not None and not self.is_dry_run:
            ledger.refuse_another(job, asked)
        return Attempt(kit, ledger, job, attempt_id, leg.since, self.anthropic_conn_id, leg.waited_for, lambda: self._killed, asked)

    def _asking(self, leg: Leg, job_id: str) -> Asking:
        from airflow_provider_batchkit.jobs.advance import Asking
        from airflow_provider_batchkit.jobs.caps import Limits
        from airflow_provider_batchkit.jobs.prime import Priming
        from airflow_provider_batchkit.jobs.submit import SubmitOptions
        from airflow_provider_batchkit.landing import WriteDisposition
        from airflow_provider_batchkit.ledger.reasons import Wanted

        priming = None
        if self.prime_cache:
            ttl_s = kept_for_s(self.system, self.request_params, self.cache_system)
            assert ttl_s is not None
            priming = Priming(ttl_s, self.prime_timeout, over=leg.about == "primer")
        # a task that lands its results, too, knows how
        how = getattr(self, "write_disposition", None)
        options = SubmitOptions(
            self.max_requests_per_batch,
            self.max_bytes_per_batch,
            self.skip_unchanged,
            self.table,
            settle_times(self.settle_seconds),
            Limits(self.max_cost_usd, self.budget),
            priming,
            output_schema=None if self.output_schema is None else self.output_schema.text,
            results=results_of(self),
            disposition=None if how is None else WriteDisposition.parse(how),
            by_position=not self.key,
        )
        key = [self.key] if isinstance(self.key, str) else list(self.key or ())
        reasons = WORTH_ASKING | {Reason.UNFIT} if self.retry_invalid_output else WORTH_ASKING
        failures = configured_failures() if self._asks_again or self.rounds else KNOWN_FAILURES
        return Asking(
            options,
            key,
            self._source,
            lambda round_: self._builder(leg.context, job_id, key, round_),
            only_failed_of=as_batch_ids(self.only_failed_of) if self._asks_again else None,
            rounds=self.rounds or (Round(),),
            which=Wanted(None, reasons, failures),
            retry_gone=self.retry_gone,
        )

    def _source(self) -> Iterable[Any] | Items:
        """The items of the source. Nothing is read before the first item is taken."""
        if self.input_path is not None:
            from airflow_provider_batchkit.hooks.storage import input_files
            from airflow_provider_batchkit.source.files import FileRows, InputOptions

            return FileRows(input_files(self.input_path, self.input_conn_id), InputOptions.parse(self.input_options))
        if self.sql is None:
            from airflow_provider_batchkit.request.build import items_of

            # rendering has already replaced a literal wrapper or a task's output by its value
            return items_of(self.requests)
        from airflow_provider_batchkit.source.rows import RowItems
        from airflow_provider_batchkit.source.sql import read_sql

        conn_id = self.source_conn_id or self.sql_conn_id
        assert conn_id is not None, "sql without a connection is refused when the DAG is parsed"
        return RowItems(read_sql(partial(open_connection, conn_id), self.sql, self.parameters))

    def _builder(self, context: Context, job_id: str, key: list[str], round_: Round) -> RequestBuilder:
        from airflow_provider_batchkit.request.build import RequestBuilder, RequestDefaults
        from airflow_provider_batchkit.request.template import RowTemplate, system_template

        per_run = dict(context)
        return RequestBuilder(
            RequestDefaults(
                round_.model or self.model or self.hook.default_model,
                round_.max_tokens or self.max_tokens,
                None,
                {**self.request_params, **round_.params},
                self.cache_system,
                None if self.output_schema is None else self.output_schema.format,
                self.hook.kit.param_names,
            ),
            job_id=job_id,
            key=key,
            prompt=None if self.prompt is None else RowTemplate(self.prompt, name="prompt", context=per_run),
            system=None if "system" in round_.params else system_template(self.system, per_run),
            dedupe=self.dedupe,
            overrides=round_.overrides,
        )

    def _end_dry_run(self, leg: Leg, report: SubmitReport) -> None:
        """:raises AirflowSkipException: always, since there is no batch to wait for"""
        found = report.estimate
        assert found is not None
        summary = {"rows": report.rows, "batches": report.batches, **found.to_json()}
        leg.context["ti"].xcom_push(key="estimate", value=summary)
        if self.max_cost_usd is not None and (found.upper_usd is None or found.upper_usd > self.max_cost_usd):
            self.log.warning("max_cost_usd=%s would stop this task", self.max_cost_usd)
        self.log.info("Dry run: %s rows, %s batches, %s bytes", f"{report.rows:,}", report.batches, f"{found.bytes:,}")
        self.log.info("Estimate for %s", found)
        raise AirflowSkipException("Dry run: nothing was sent.")

    def _nothing_to_ask(self, report: SubmitReport) -> list[str]:
        if report.unchanged:
            reason = f"Each of the {report.rows:,} rows was answered by an earlier run and has not changed since"
        elif report.rows:
            reason = f"None of the source's {report.rows:,} rows is to be asked again"
        else:
            reason = "The source has no rows"
        if self.on_empty == "skip":
            raise AirflowSkipException(f"{reason}; nothing was sent.")
        if self.on_empty == "fail" and not report.unchanged:
            raise BatchInputError(f"{reason}, and on_empty is 'fail'. Nothing was sent.")
        self.log.info("%s; nothing was sent.", reason)
        return []
