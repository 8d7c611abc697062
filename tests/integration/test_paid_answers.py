"""What was paid for lands: whole contents, unfinished answers, odd members; and tables of every release take it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_provider_batchkit.exceptions import TableError
from airflow_provider_batchkit.simulator import Simulator
from tests.databases import Database
from tests.warehouse import LANDING_PATHS, Warehouse, kit_for

CALL = {"type": "tool_use", "id": "toolu_1", "name": "answer", "input": {"summary": "A \u0000lamp\U0001f600.", "n": 1.50}}
SCHEMA = {"type": "object", "properties": {"summary": {"type": "string"}}, "required": ["summary"]}
DETAILS = {"type": "refusal", "category": "cyber", "explanation": "It could enable harm."}
#: the result columns of the first release, as it created them
FIRST_RELEASE = (
    "response TEXT, status VARCHAR(16), stop_reason VARCHAR(64), error_type VARCHAR(100), error_message TEXT, model VARCHAR(100), "
    "input_tokens BIGINT, output_tokens BIGINT, cost_usd {cost}, custom_id VARCHAR(64) NOT NULL, batch_id VARCHAR(100), landed_at {time}"
)
NEW_COLUMNS = {"content", "stop_details", "message_id", "request_id"}

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def warehouse(database: Database, sim: Simulator) -> Warehouse:
    return Warehouse(database.engine(), kit_for(sim.base_url))


def rewrite(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, changes: dict[int, Change]) -> None:
    """Have the API's results changed on the way, by the key of their rows."""
    keys = {row["custom_id"]: row["id"] for row in asked(warehouse)}
    stream = type(warehouse.kit).stream_results

    def changed(batch_id: str, **options: Any) -> Iterator[bytes]:
        for line in b"".join(stream(warehouse.kit, batch_id, **options)).splitlines():
            decoded = json.loads(line)
            change = changes.get(keys.get(decoded["custom_id"], -1))
            if change is not None:
                change(decoded)
            yield json.dumps(decoded).encode() + b"\n"

    monkeypatch.setattr(warehouse.kit, "stream_results", changed)


def asked(warehouse: Warehouse) -> list[dict[str, Any]]:
    """The rows of all batches, with the ids under which they were asked."""
    return [
        {"id": json.loads(entry.key)[0], "custom_id": entry.custom_id}
        for row in warehouse.rows("SELECT job_id, shard FROM batchkit_batch")
        for piece in warehouse.ledger.rows_of(warehouse.ledger.get(row["job_id"], row["shard"]))
        for entry in piece
    ]


def message(**members: Any) -> Change:
    """A change of an answer's message."""
    return lambda line: line["result"]["message"].update(members)


def items(number: int) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"product {i}"} for i in range(number)]


def landed(warehouse: Warehouse, columns: str, table: str = "answers") -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in warehouse.rows(f"SELECT {columns} FROM {table} ORDER BY id")]


def parsed(value: Any) -> Any:
    """JSON as the database gives it."""
    return json.loads(value) if isinstance(value, str) else value


@pytest.mark.parametrize("path", LANDING_PATHS)
def test_an_answer_lands_whole_on_every_way_into_a_table(
    path: str, sim: Simulator, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forced call is the answer, and the content is kept as JSON; plain text has none."""
    kind, driver, portable = LANDING_PATHS[path]
    database: Database = request.getfixturevalue(kind)
    url = database.url.replace("+psycopg", driver) if driver else database.url
    warehouse = Warehouse(sa.create_engine(url, poolclass=sa.pool.NullPool), kit_for(sim.base_url), portable=portable)
    ids = warehouse.submit(items(3)).batch_ids
    thinking = [{"type": "thinking", "thinking": "hm", "signature": "a\tb\\n"}, {"type": "text", "text": "It is."}]
    rewrite(warehouse, monkeypatch, {1: message(content=[CALL], stop_reason="tool_use"), 2: message(content=thinking)})
    report = warehouse.fetch(ids)
    assert (dict(report.counts), dict(report.unfinished)) == ({"succeeded": 3}, {})
    (_, plain), (call, content), (text, thought) = landed(warehouse, "response, content")
    assert plain is None
    assert (json.loads(call), parsed(content)) == (CALL["input"], [CALL])
    assert (text, parsed(thought)) == ("It is.", thinking)
    assert all(id_.startswith("msg_") for (id_,) in landed(warehouse, "message_id"))


def test_a_forced_call_is_the_answer_to_a_schema(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input is checked and typed as a text would be; a call that was cut fits nothing."""
    ids = warehouse.submit(items(3), output_schema=SCHEMA).batch_ids
    call = {**CALL, "input": {"summary": "A lamp."}}
    bad = {**CALL, "input": {"summary": 7}}
    rewrite(
        warehouse,
        monkeypatch,
        {
            0: message(content=[call], stop_reason="tool_use"),
            1: message(content=[bad], stop_reason="tool_use"),
            2: message(content=[call], stop_reason="max_tokens"),
        },
    )
    warehouse.fetch(ids)
    assert landed(warehouse, "summary, status, error_type") == [
        ("A lamp.", "succeeded", None),
        (None, "invalid_output", "invalid_output"),
        (None, "invalid_output", "truncated"),
    ]


def test_unfinished_answers_are_told_apart_counted_and_overwrite_nothing(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the table, the summary, the log and the ledger; a truncated answer with text has succeeded, and is not bought again."""
    warehouse.fetch(warehouse.submit(items(5), run_id="run-0").batch_ids)
    before = dict(landed(warehouse, "id, response"))
    report = warehouse.submit(items(5), prompt="Now about {{ row.name }}", run_id="run-1")
    rewrite(
        warehouse,
        monkeypatch,
        {
            1: message(stop_reason="max_tokens"),
            2: message(stop_reason="max_tokens", content=[{"type": "thinking", "thinking": "hm", "signature": "s"}]),
            3: message(stop_reason="pause_turn"),
            4: message(stop_reason="refusal", content=[], stop_details=DETAILS),
        },
    )
    with caplog.at_level(logging.WARNING):
        fetched = warehouse.fetch(report.batch_ids)
    assert dict(fetched.counts) == {"succeeded": 2, "invalid_output": 3}
    assert fetched.to_json()["unfinished"] == {"paused": 1, "refused": 1, "truncated": 2}
    assert "2 rows have an answer that is truncated" in caplog.text
    rows = landed(warehouse, "id, response, status, error_type")
    assert [(status, kind) for _, _, status, kind in rows] == [("succeeded", None), ("succeeded", "truncated"), *[("succeeded", None)] * 3]
    assert [text == before[id_] for id_, text, _, _ in rows] == [False, False, True, True, True]
    # told again without the API
    assert dict(warehouse.fetch(report.batch_ids).unfinished) == {"paused": 1, "refused": 1, "truncated": 2}
    outcomes = warehouse.rows("SELECT status, error_type, COUNT(*) AS n FROM batchkit_request WHERE error_type IS NOT NULL GROUP BY 1, 2")
    assert sorted(tuple(row.values()) for row in outcomes) == [
        ("invalid_output", "paused", 1),
        ("invalid_output", "refused", 1),
        ("invalid_output", "truncated", 1),
        ("succeeded", "truncated", 1),
    ]
    job = warehouse.job("run-2")
    assert sorted(key for key, _ in warehouse.ledger.answered(job, warehouse.ledger.table_name("answers")))[:2] == ["[0]", "[0]"]
    assert "[1]" in {key for key, _ in warehouse.ledger.answered(job, warehouse.ledger.table_name("answers"))}


def test_an_unbilled_refusal_lands_with_its_reasons_and_costs_nothing(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a billed category costs what its usage says; the rows add up to the bill."""
    ids = warehouse.submit(items(3)).batch_ids
    billed = {**DETAILS, "category": "bio"}
    rewrite(
        warehouse,
        monkeypatch,
        {
            0: message(stop_reason="refusal", content=[], stop_details=DETAILS),
            1: message(stop_reason="refusal", content=[], stop_details=billed),
        },
    )
    report = warehouse.fetch(ids)
    rows = landed(warehouse, "status, error_type, error_message, stop_details, cost_usd")
    assert [(status, kind, parsed(details)) for status, kind, _, details, _ in rows[:2]] == [
        ("invalid_output", "refused", DETAILS),
        ("invalid_output", "refused", billed),
    ]
    assert "cyber" in rows[0][2] and "It could enable harm." in rows[0][2]
    costs = [Decimal(str(row[-1])) for row in rows]
    # the simulator's clock is the test's: the billed categories are billed since 2026-09-24
    assert costs[0] == 0 and costs[1] > 0
    assert sum(costs) == report.tally.batch_cost_usd


def test_iterations_are_billed_and_counted(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Haiku 5.5, 203,000 and 4,500 tokens in two inferences: the large one at the price of large prompts."""
    ids = warehouse.submit(items(2)).batch_ids
    counts = [(180_000, 3_500), (23_000, 1_000)]
    iterations = [
        {"type": kind, "input_tokens": i, "output_tokens": o} for kind, (i, o) in zip(("compaction", "message"), counts, strict=True)
    ]
    usage = {"input_tokens": 23_000, "output_tokens": 1_000, "service_tier": "batch", "iterations": iterations}
    rewrite(warehouse, monkeypatch, {1: message(usage=usage)})
    report = warehouse.fetch(ids)
    tokens, cost = landed(warehouse, "input_tokens, output_tokens")[1], landed(warehouse, "cost_usd")[1][0]
    assert tokens == (203_000, 4_500)
    # half of 180,000 x $0.50 + 3,500 x $2.50 + 23,000 x $0.10 + 1,000 x $0.50 a million
    assert Decimal(str(cost)) == Decimal("0.050775")
    assert report.tally.requests == 2


def test_odd_members_cost_no_answer_and_are_named_once(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every answer lands; a batch has one warning for each member, however many rows have it."""
    ids = warehouse.submit(items(6)).batch_ids

    def no_usage(line: dict[str, Any]) -> None:
        del line["result"]["message"]["usage"]

    def flat(line: dict[str, Any]) -> None:
        line["result"] = {"type": "errored", "error": {"type": "overloaded_error", "message": "busy"}}

    rewrite(
        warehouse,
        monkeypatch,
        {
            0: message(novelty=1),
            1: message(novelty=2, content=[{"type": "text", "text": "half \ud83d"}]),
            2: no_usage,
            3: message(content=[{"type": "sketch", "text": {"strokes": []}}, {"type": "text", "text": "x"}]),
            4: flat,
            5: lambda line: line.update(result={"type": "postponed", "reason": "capacity"}),
        },
    )
    with caplog.at_level(logging.WARNING):
        report = warehouse.fetch(ids, include_failed=True)
    assert dict(report.counts) == {"succeeded": 4, "errored": 2}
    rows = landed(warehouse, "response, status, error_type, cost_usd")
    assert [row[0] for row in rows[1:4:2]] == ["half \ufffd", "x"]
    assert [row[1:3] for row in rows[4:]] == [("errored", "overloaded_error"), ("errored", "unknown_result")]
    assert rows[2][1] == "succeeded" and rows[2][3] is None
    assert report.tally.batch_cost_usd is None
    named = [record.getMessage() for record in caplog.records if "novelty" in record.getMessage()]
    assert len(named) == 1 and "in 2 results" in named[0]
    for member in ("result.message.usage", "result.message.content[].text", "result.error", "result.type", "the line"):
        assert member in caplog.text


def test_the_request_id_of_a_failed_request_lands(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where failed rows are written."""
    ids = warehouse.submit(items(1)).batch_ids
    error = {"type": "error", "error": {"details": None, "type": "api_error", "message": "m"}, "request_id": "workerreq_1"}
    rewrite(warehouse, monkeypatch, {0: lambda line: line.update(result={"type": "errored", "error": error})})
    warehouse.fetch(ids, include_failed=True)
    assert landed(warehouse, "error_type, request_id, message_id") == [("api_error", "workerreq_1", None)]


# --- tables of every release ------------------------------------------------------------------------------------------------------


def columns_of(warehouse: Warehouse, table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(warehouse.engine).get_columns(table)}


def first_release(warehouse: Warehouse, more: str = "") -> str:
    """The result columns as the first release's DDL has them."""
    postgres = warehouse.engine.dialect.name == "postgresql"
    kinds = {"cost": "NUMERIC(38, 12)", "time": "TIMESTAMP WITH TIME ZONE"} if postgres else {"cost": "TEXT", "time": "DATETIME"}
    return f"id BIGINT NOT NULL, {FIRST_RELEASE.format(**kinds)}, {more}PRIMARY KEY (id)"


@pytest.mark.parametrize("disposition", ["merge", "append", "replace"])
def test_a_table_of_the_first_release_gains_the_new_columns(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, disposition: str
) -> None:
    """It was made by this package, as its columns show; what it held stays as it was."""
    warehouse.execute(f"CREATE TABLE answers ({first_release(warehouse)})")
    warehouse.execute("INSERT INTO answers (id, response, status, custom_id, batch_id) VALUES (9, 'old', 'succeeded', 'c', 'b')")
    ids = warehouse.submit(items(2)).batch_ids
    rewrite(warehouse, monkeypatch, {1: message(content=[CALL], stop_reason="tool_use")})
    warehouse.fetch(ids, disposition=disposition)
    assert columns_of(warehouse, "answers") >= NEW_COLUMNS
    rows = landed(warehouse, "id, content")
    assert [(id_, parsed(content)) for id_, content in rows][:2] == [(0, None), (1, [CALL])]
    assert len(rows) == (2 if disposition == "replace" else 3)


def test_a_table_of_somebody_elses_making_is_left_as_it_is(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key and four columns are all that it needs; others are written where it has them."""
    warehouse.execute(
        "CREATE TABLE answers (note TEXT, id BIGINT, status TEXT, response TEXT, batch_id TEXT, custom_id TEXT, model TEXT, content TEXT)"
    )
    before = columns_of(warehouse, "answers")
    ids = warehouse.submit(items(2)).batch_ids
    rewrite(warehouse, monkeypatch, {1: message(content=[CALL], stop_reason="tool_use")})
    for _ in range(2):
        warehouse.fetch(ids, rewrite=True)
    assert columns_of(warehouse, "answers") == before
    rows = landed(warehouse, "status, model, content, note")
    assert [(status, model, parsed(content), note) for status, model, content, note in rows] == [
        ("succeeded", "claude-haiku-5-5", None, None),
        ("succeeded", "claude-haiku-5-5", [CALL], None),
    ]


def test_a_table_without_what_is_needed_is_refused(warehouse: Warehouse) -> None:
    """And only that is named."""
    warehouse.execute("CREATE TABLE answers (id BIGINT, response TEXT, status TEXT)")
    ids = warehouse.submit(items(1)).batch_ids
    with pytest.raises(TableError, match="lacks the columns custom_id, batch_id\\."):
        warehouse.fetch(ids)


def test_a_column_of_the_users_own_is_not_taken_for_a_new_one(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that an earlier release filled may have a column named content: it is not written, nothing is added, and the log says so."""
    warehouse.execute(f"CREATE TABLE answers ({first_release(warehouse, 'content TEXT, ')})")
    warehouse.execute("INSERT INTO answers (id, status, custom_id, content) VALUES (0, 'succeeded', 'c', 'mine')")
    ids = warehouse.submit(items(2)).batch_ids
    with caplog.at_level(logging.WARNING):
        warehouse.fetch(ids)
    assert landed(warehouse, "status, content") == [("succeeded", "mine"), ("succeeded", None)]
    assert not columns_of(warehouse, "answers") & {"stop_details", "message_id", "request_id"}
    assert "columns of its own named content" in caplog.text


def test_a_key_or_a_property_may_have_a_new_columns_name(warehouse: Warehouse) -> None:
    """Both could be so in an earlier release, and still can."""
    schema = {"type": "object", "properties": {"content": {"type": "string"}}, "required": ["content"]}
    rows = [{"message_id": f"m{i}", "name": f"product {i}"} for i in range(2)]
    ids = warehouse.submit(rows, key=("message_id",), output_schema=schema).batch_ids
    for _ in range(2):
        warehouse.fetch(ids, rewrite=True)
    found = warehouse.rows("SELECT message_id, content, status, request_id FROM answers ORDER BY message_id")
    assert [(row["message_id"], row["status"], row["request_id"]) for row in found] == [
        ("m0", "succeeded", None),
        ("m1", "succeeded", None),
    ]
    assert all(row["content"] for row in found)


def test_a_table_that_cannot_be_altered_takes_the_answers_all_the_same(
    postgres: Database, sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Only its owner may add columns; a landing of another user goes on without them, and says so."""
    warehouse = Warehouse(postgres.engine(), kit_for(sim.base_url))
    warehouse.execute(f"CREATE TABLE answers ({first_release(warehouse)})")
    ids = warehouse.submit(items(1)).batch_ids
    with postgres.engine().connect() as holding, caplog.at_level(logging.WARNING):
        holding.execute(sa.text("SELECT * FROM answers"))
        pytest.MonkeyPatch().setattr("airflow_provider_batchkit.landing.evolve._LOCK_S", 1)
        warehouse.fetch(ids)
    assert landed(warehouse, "status") == [("succeeded",)]
    assert "was not given the columns content" in caplog.text
