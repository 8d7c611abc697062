"""Results as files: one a batch, in its place once it is whole, with the outcomes and the bill in the ledger."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from decimal import Decimal
from functools import partialmethod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from airflow.providers.common.compat.sdk import AirflowFailException, TaskDeferred

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.simulator import SimulatorProcess
from tests.databases import Database, rows
from tests.integration.test_fetch_operator import SOURCE, Task, fetch, fill, submit

FORMS = ["jsonl", "parquet"]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return found
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def read_all(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.iterdir()) for row in read(path)]


def to_files(ids: list[str], path: Any, **parameters: Any) -> Task:
    return fetch(ids, **{"table": None, "sql_conn_id": None, "ledger_conn_id": "warehouse", "output_path": str(path), **parameters})


def run(**parameters: Any) -> Task:
    from airflow_provider_batchkit.operators.batch import RunBatchOperator

    return Task(RunBatchOperator, "run", **{**SOURCE, **parameters})


@pytest.mark.parametrize("form", FORMS)
def test_each_batch_lands_in_a_file_of_its_own(home: Path, database: Database, tmp_path: Path, form: str) -> None:
    """With the columns of a table; the ledger has the outcomes and the bill, and the database no result table."""
    fill(database, 5)
    ids = submit(max_requests_per_batch=2).run()
    out = tmp_path / "new" / "answers"
    summary = to_files(ids, out, output_format=form).run()
    assert summary["files"] == [f"{out}/{batch_id}.{form}" for batch_id in ids]
    assert summary["output_path"] == f"file://{out}/*.{form}"
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{batch_id}.{form}" for batch_id in ids)
    found = read_all(out)
    assert sorted(row["id"] for row in found) == [0, 1, 2, 3, 4]
    assert list(found[0])[:3] == ["id", "response", "status"] and list(found[0])[-1] == "round"
    assert all(f"thing {row['id']}" in row["response"] and row["round"] == 1 for row in found)
    cost = sum(Decimal(str(row["cost_usd"])) for row in found)
    assert cost == Decimal(summary["cost_tally"]["batch_cost_usd"]) > 0
    assert summary["table"] is None and summary["rows"] == 5 and summary["counts"] == {"succeeded": 5}
    assert rows(database, "SELECT status, count(*) FROM batchkit_request GROUP BY status") == [("succeeded", 5)]
    assert {state for (state,) in rows(database, "SELECT state FROM batchkit_batch")} == {"landed"}


def test_landing_twice_changes_nothing_and_a_lost_file_is_written_again(home: Path, database: Database, tmp_path: Path) -> None:
    """A file that is there is not read again, whatever the API has; one that is missing is."""
    fill(database, 3)
    ids = submit().run()
    (first,) = [tmp_path / "out" / f"{batch_id}.jsonl" for batch_id in ids]
    to_files(ids, tmp_path / "out").run()
    written, changed = first.read_bytes(), first.stat().st_mtime_ns
    again = to_files(ids, tmp_path / "out").run()
    assert first.read_bytes() == written and first.stat().st_mtime_ns == changed
    assert again["rows"] == 3 and again["counts"] == {"succeeded": 3}
    first.unlink()
    to_files(ids, tmp_path / "out").run()
    assert first.read_bytes() == written
    assert rows(database, "SELECT count(*) FROM batchkit_landing") == [(1,)]


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_download_leaves_no_file(
    home: Path, database: Database, api: SimulatorProcess, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in its place nor beside it; the next attempt has all rows."""
    from airflow_provider_batchkit import BatchKit

    monkeypatch.setattr(BatchKit, "read_blocks", partialmethod(BatchKit.read_blocks, sleep=lambda _: None))
    fill(database, 50)
    ids = submit().run()
    api.faults.add("cut_results", batch=ids[0], line=20, times=None)
    with pytest.raises(Exception, match="result"):
        to_files(ids, tmp_path / "out", output_format=form).run()
    assert list((tmp_path / "out").iterdir()) == []
    assert rows(database, "SELECT state FROM batchkit_batch") == [("submitted",)]
    api.faults.clear()
    to_files(ids, tmp_path / "out", output_format=form).run()
    assert len(read_all(tmp_path / "out")) == 50


def test_a_kill_between_the_file_and_the_ledger_writes_the_same_rows_again(
    home: Path, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is in its place, and the ledger knows of no landing: it is written over, and what the killed one left goes."""
    from airflow_provider_batchkit.hooks.storage import NewResultFile

    class KilledError(BaseException):
        """The end of a process, for as much as it can be had in one."""

    fill(database, 3)
    ids = submit().run()
    whole: Any = NewResultFile.publish

    def die(self: NewResultFile) -> None:
        whole(self)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(NewResultFile, "publish", die)
        with pytest.raises(KilledError):
            to_files(ids, tmp_path / "out").run()
    assert rows(database, "SELECT count(*) FROM batchkit_landing") == [(0,)]
    (path,) = (tmp_path / "out").iterdir()
    before = read(path)
    (tmp_path / "out" / f".{ids[0]}.0123456789abcdef.tmp").write_bytes(b"half a file")
    to_files(ids, tmp_path / "out").run()
    assert list((tmp_path / "out").iterdir()) == [path]
    assert [{**row, "landed_at": None} for row in read(path)] == [{**row, "landed_at": None} for row in before]
    assert rows(database, "SELECT rows_written FROM batchkit_landing") == [(3,)]


def test_a_table_and_files_land_beside_each_other(home: Path, database: Database, api: SimulatorProcess, tmp_path: Path) -> None:
    """Each is a landing of its own; a batch is deleted from the API once it is whole in both."""
    fill(database, 4)
    ids = submit(max_requests_per_batch=2).run()
    summary = fetch(ids, output_path=f"{tmp_path}/out/part-*.parquet", delete_after_fetch=True).run()
    assert summary["table"] == "answers" and summary["rows"] == 4 and len(summary["files"]) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"part-{batch_id}.parquet" for batch_id in ids)
    in_table = rows(database, "SELECT id, response FROM answers ORDER BY id")
    assert [(row["id"], row["response"]) for row in sorted(read_all(tmp_path / "out"), key=lambda row: row["id"])] == in_table
    assert rows(database, "SELECT DISTINCT landed_table FROM batchkit_batch") == [("answers",)]
    assert rows(database, "SELECT count(*) FROM batchkit_landing") == [(4,)]
    assert [b for b in api.stats()["batches"] if b["id"] in ids] == []
    assert fetch(ids, output_path=f"{tmp_path}/out/part-*.parquet").run()["rows"] == 4


def test_failed_rows_are_in_a_file_only_when_they_are_asked_for(home: Path, database: Database, tmp_path: Path) -> None:
    """As in a table."""
    fill(database, 3)
    with database.engine().begin() as connection:
        connection.exec_driver_sql("UPDATE things SET note = 'please [[sim:errored]]' WHERE id = 1")
    ids = submit().run()
    summary = to_files(ids, tmp_path / "answers").run()
    assert sorted(row["id"] for row in read_all(tmp_path / "answers")) == [0, 2]
    to_files(ids, tmp_path / "all", include_failed=True).run()
    (failed,) = [row for row in read_all(tmp_path / "all") if row["status"] != "succeeded"]
    assert failed["id"] == 1 and failed["response"] is None and failed["error_type"]
    assert summary["counts"] == {"errored": 1, "succeeded": 2}
    assert rows(database, "SELECT key FROM batchkit_request WHERE status = 'errored'") == [("[1]",)]


#: keys that a text, a pattern, a statement or a template may take for something else
KEYS = [
    *("ab", "AB", "ab ", "\u00e9", "e\u0301", "'; DROP TABLE things; --", "{{ row.note }}", "%s %(x)s :name ?", "a\u2028b\u0085c\u2029"),
    *("\u202eabc", '{"a": [1]}', "line\r\nbreak\ttab", "\\N", "x" * 255, "NaN", "null", ""),
]
ANSWERS = [
    *("a\u2028b\u2029c\u0085d\r\ne", "nul \0 nul", '"quoted" \\ \\u0000', "\U0001f4a9 \u202e", "x" * 100_000, "", "null"),
    *("nan", "\ufeff\ufffd", "a,b;c|d\t'"),
]


@pytest.mark.parametrize("form", FORMS)
def test_hostile_keys_and_answers_are_in_a_file_as_they_are(
    home: Path, database: Database, api: SimulatorProcess, tmp_path: Path, form: str
) -> None:
    """Also what the ledger's database could not store: a NUL in PostgreSQL. Half a surrogate pair is U+FFFD, and no line is two."""
    import sqlalchemy as sa

    things = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Text), sa.Column("note", sa.Text))
    with database.engine().begin() as connection:
        things.create(connection)
        connection.execute(sa.insert(things), [{"id": key, "note": str(number)} for number, key in enumerate(KEYS)])
    ids = submit(sql="SELECT id, note FROM things", max_requests_per_batch=len(KEYS)).run()
    for line, answer in enumerate(ANSWERS, start=1):
        api.faults.add("set_member", batch=ids[0], line=line, member="result.message.content.0.text", value=answer, times=None)
    api.faults.add("lone_surrogate", batch=ids[0], line=len(ANSWERS) + 1, times=None)
    try:
        to_files(ids, tmp_path / "out", output_format=form).run()
    finally:
        api.faults.clear()
    (path,) = (tmp_path / "out").iterdir()
    found = read(path)
    assert sorted(row["id"] for row in found) == sorted(KEYS)
    assert [row["response"] for row in found[: len(ANSWERS)]] == ANSWERS
    assert "\ufffd" in found[len(ANSWERS)]["response"]
    if form == "jsonl":
        assert len(path.read_text().splitlines()) == len(KEYS)


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "number"}, "i": {"type": "integer"}, "day": {"type": "string", "format": "date"},
        "at": {"type": "string", "format": "date-time"}, "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["n", "i", "day", "at", "tags"], "additionalProperties": False,
}  # fmt: skip
TYPED: list[tuple[str, dict[str, Any] | None]] = [
    (
        '{"n": -0.1, "i": 9223372036854775807, "day": "0001-01-01", "at": "0001-01-01T00:00:00Z", "tags": ["a\\u2028", "\\u0000"]}',
        {"n": -0.1, "i": 2**63 - 1, "day": dt.date(1, 1, 1), "at": dt.datetime(1, 1, 1, tzinfo=dt.UTC), "tags": ["a\u2028", "\ufffd"]},
    ),
    (
        '{"n": 1e300, "i": -1, "day": "9999-12-31", "at": "9999-12-31T23:59:59.999999+05:30", "tags": []}',
        {
            "n": 1e300,
            "i": -1,
            "day": dt.date(9999, 12, 31),
            "at": dt.datetime(9999, 12, 31, 18, 29, 59, 999_999, tzinfo=dt.UTC),
            "tags": [],
        },
    ),
    ('{"n": NaN, "i": 1, "day": "2026-01-01", "at": "2026-01-01T00:00:00Z", "tags": []}', None),
    ('{"n": 1e400, "i": 1, "day": "2026-01-01", "at": "2026-01-01T00:00:00Z", "tags": []}', None),
    ('{"n": 1, "i": 9223372036854775808, "day": "2026-01-01", "at": "2026-01-01T00:00:00Z", "tags": []}', None),
    ('{"n": 1, "i": 1, "day": "10000-01-01", "at": "2026-01-01T00:00:00Z", "tags": []}', None),
    ('{"n": 1, "i": 1, "day": "2026-01-01", "at": "9999-12-31T23:59:59-12:00", "tags": []}', None),
]


@pytest.mark.parametrize("form", FORMS)
def test_typed_answers_are_exact_or_refused_by_row(
    home: Path, database: Database, api: SimulatorProcess, tmp_path: Path, form: str
) -> None:
    """NaN, infinity, 65 bits and times outside Python's years are an invalid_output with its raw text."""
    fill(database, len(TYPED))
    ids = submit(output_schema=SCHEMA).run()
    for line, (answer, _) in enumerate(TYPED, start=1):
        api.faults.add("set_member", batch=ids[0], line=line, member="result.message.content.0.text", value=answer, times=None)
    try:
        to_files(ids, tmp_path / "out", output_format=form, include_failed=True).run()
    finally:
        api.faults.clear()
    found = read_all(tmp_path / "out")
    for row, (answer, wanted) in zip(found, TYPED, strict=True):
        assert row["response"] == answer
        assert row["status"] == ("invalid_output" if wanted is None else "succeeded"), row
        if wanted is None:
            assert row["error_type"] == "invalid_output" and row["error_message"]
            assert [row[name] for name in ("n", "i", "day", "at", "tags")] == [None] * 5
        else:
            assert as_python(row, form) == wanted


def as_python(row: dict[str, Any], form: str) -> dict[str, Any]:
    """The typed values of a row."""
    day, at, tags = row["day"], row["at"], row["tags"]
    if form == "jsonl":
        day, at = dt.date.fromisoformat(day), dt.datetime.fromisoformat(at)
    return {"n": row["n"], "i": row["i"], "day": day, "at": at, "tags": tags if form == "jsonl" else json.loads(tags)}


#: type of a key in PostgreSQL → a literal, its value in JSON, and its value and type in Parquet
KEY_TYPES: dict[str, tuple[str, Any, Any, str]] = {
    "smallint": ("7", 7, 7, "int16"),
    "integer": ("7", 7, 7, "int32"),
    "bigint": ("9223372036854775807", 2**63 - 1, 2**63 - 1, "int64"),
    "numeric": ("1.50", "1.5", "1.5", "string"),
    "numeric(38,10)": ("1234567890123456789012345678.0123456789",) * 2
    + (Decimal("1234567890123456789012345678.0123456789"), "decimal128(38, 10)"),
    "numeric(60,1)": ("7.5", "7.5", Decimal("7.5"), "decimal256(60, 1)"),
    "numeric(90,1)": ("7.5", "7.5", "7.5", "string"),
    "real": ("0.1", 0.1, pytest.approx(0.1), "float"),
    "double precision": ("0.1", 0.1, 0.1, "double"),
    "char(4)": ("'ab'", "ab  ", "ab  ", "string"),
    "mood": ("'glad'", "glad", "glad", "string"),
    "uuid": ("'00000000-0000-0000-0000-000000000001'",) + ("00000000-0000-0000-0000-000000000001",) * 2 + ("string",),
    "boolean": ("true", True, True, "bool"),
    "date": ("'9999-12-31'", "9999-12-31", dt.date(9999, 12, 31), "date32[day]"),
    "timestamp": (
        "'0001-01-02 03:04:05.678901'",
        "0001-01-02T03:04:05.678901",
        dt.datetime.fromisoformat("0001-01-02T03:04:05.678901"),
        "timestamp[us]",
    ),
    "timestamptz": (
        "'2026-01-02 03:04:05+05:30'",
        "2026-01-01T21:34:05Z",
        dt.datetime(2026, 1, 1, 21, 34, 5, tzinfo=dt.UTC),
        "timestamp[us, tz=UTC]",
    ),
}


def test_keys_have_their_types_though_the_ledger_has_none_of_them(
    airflow_db: Path, api: SimulatorProcess, postgres: Database, sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL is the source, and a SQLite file the ledger."""
    import pyarrow.parquet as pq

    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", postgres.airflow_uri)
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", sqlite.airflow_uri)
    with postgres.engine().begin() as connection:
        connection.exec_driver_sql("CREATE TYPE mood AS ENUM ('glad')")
        for number, (type_, (literal, *_)) in enumerate(KEY_TYPES.items()):
            connection.exec_driver_sql(f"CREATE TABLE t{number} AS SELECT {literal}::{type_} AS id, 'thing' AS note")
    for number, (type_, (_, in_json, in_parquet, arrow)) in enumerate(KEY_TYPES.items()):
        task = {"sql": f"SELECT id, note FROM t{number}", "source_conn_id": "source", "sql_conn_id": None, "ledger_conn_id": "warehouse"}
        ids = submit(**task, run_id=f"r{number}").run()
        for form, wanted in (("jsonl", in_json), ("parquet", in_parquet)):
            out = tmp_path / f"{number}.{form}"
            to_files(ids, out).run()
            assert [row["id"] for row in read_all(out)] == [wanted], (type_, form)
        assert str(pq.read_schema(out / f"{ids[0]}.parquet").field("id").type) == arrow, type_


def test_a_run_needs_no_database_of_results(
    home: Path, database: Database, api: SimulatorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in, files out, and a ledger that the deployment names."""
    monkeypatch.setenv("AIRFLOW__BATCHKIT__LEDGER_CONN_ID", "warehouse")
    source = tmp_path / "things.csv"
    source.write_text(f"id,note\na,tea\nb,coffee {database.kind} [[sim:overloaded-once]]\n")
    out = tmp_path / "out"
    parameters = {"sql": None, "input_path": str(source), "sql_conn_id": None, "output_path": f"{out}/*.jsonl"}
    task = run(**parameters, max_rounds=2, include_failed=True, poke_interval=0.1)
    found = task.run()
    while isinstance(found, TaskDeferred):
        event = {"status": "ended", "batch_ids": found.trigger.batch_ids}
        found = task.leg(found.method_name, event=event, **(found.kwargs or {}))
    assert found["counts"] == {"succeeded": 2} and found["table"] is None and len(found["files"]) == 2
    first, second = (read(out / f"{batch_id}.jsonl") for batch_id in found["batch_ids"])
    assert [(row["id"], row["status"], row["round"]) for row in sorted(first, key=lambda row: row["id"])] == [
        ("a", "succeeded", 1),
        ("b", "errored", 1),
    ]
    assert [(row["id"], row["status"], row["round"]) for row in second] == [("b", "succeeded", 2)]


def test_a_place_that_cannot_be_written_is_found_before_anything_is_sent(
    home: Path, database: Database, api: SimulatorProcess, tmp_path: Path
) -> None:
    """A task that submits and lands proves it with a file of nothing, which it takes away."""
    fill(database, 1)
    (tmp_path / "taken").write_text("a file, not a folder")
    before = len(api.stats()["batches"])
    with pytest.raises(AirflowFailException, match=r"no result file can be written there.*Nothing was sent"):
        run(output_path=str(tmp_path / "taken" / "answers")).run()
    with pytest.raises(AirflowFailException, match=r"no file can be written there.*provider of the storage must be installed"):
        run(output_path="nowhere://bucket/answers").run()
    assert len(api.stats()["batches"]) == before


def staged(**parameters: Any) -> Task:
    """The first task of a stage whose last one writes files."""
    from airflow.sdk import DAG

    from airflow_provider_batchkit.operators.stages import batch_stage

    def make(task_id: str, **given: Any) -> Any:
        with DAG("stages", schedule=None):
            return batch_stage(task_id, **given).submit

    return Task(make, "copy", **{**SOURCE, **parameters})  # type: ignore[arg-type] # whatever makes an operator


def decorated(**parameters: Any) -> Task:
    """A task whose function says what to ask."""
    from airflow_provider_batchkit.decorators.claude_batch import ClaudeBatchDecoratedOperator

    how = {"key": None, "sql_conn_id": None, "ledger_conn_id": "warehouse", "model": "claude-haiku-5-5", "max_tokens": 10, **parameters}
    return Task(ClaudeBatchDecoratedOperator, "ask", python_callable=lambda: ["tea?"], **how)


@pytest.mark.parametrize("make", [staged, decorated])
def test_a_task_that_sends_what_a_later_one_writes_proves_the_place_too(
    home: Path, database: Database, api: SimulatorProcess, tmp_path: Path, make: Any
) -> None:
    """The stage gives the place to both of its tasks; with the decorator it is a parameter as any of the submit's."""
    fill(database, 1)
    (tmp_path / "taken").write_text("a file, not a folder")
    before, out = len(api.stats()["batches"]), tmp_path / "out"
    for place, says in (
        (str(tmp_path / "taken" / "answers"), r"no result file can be written there.*Nothing was sent"),
        ("nowhere://bucket/answers", r"no file can be written there.*provider of the storage must be installed"),
    ):
        with pytest.raises(AirflowFailException, match=says):
            make(output_path=place).run()
    assert len(api.stats()["batches"]) == before
    assert len(make(output_path=f"{out}/*.parquet").run()) == 1
    assert list(out.iterdir()) == []
    with pytest.raises(BatchInputError, match="are for output_path, which is missing"):
        decorated(output_format="parquet").make()


def test_a_file_that_cannot_be_taken_away_is_found_before_anything_is_sent(
    home: Path, database: Database, api: SimulatorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result file is moved to its place, for which object storage copies and deletes."""
    from fsspec.implementations.local import LocalFileSystem

    fill(database, 1)
    before = len(api.stats()["batches"])

    def denied(*_: Any) -> None:
        raise PermissionError("s3:DeleteObject is denied")

    monkeypatch.setattr(LocalFileSystem, "rm_file", denied)
    with pytest.raises(AirflowFailException, match=r"not be taken away again: s3:DeleteObject is denied\. Nothing was sent"):
        run(output_path=str(tmp_path / "out")).run()
    assert len(api.stats()["batches"]) == before


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"table": None}, "give table or output_path"),
        ({"table": "t", "sql_conn_id": None, "ledger_conn_id": "warehouse"}, "table needs sql_conn_id"),
        ({"table": None, "output_path": "x", "write_disposition": "replace"}, "is for a table"),
        ({"table": None, "output_path": "x.csv", "output_format": "csv"}, "must be 'jsonl' or 'parquet'"),
        ({"table": None, "output_path": "x/*.parquet", "output_format": "jsonl"}, "say two things"),
        ({"table": None, "output_path": "*/x.parquet"}, "one may stand in its last part"),
        ({"output_format": "parquet"}, "are for output_path, which is missing"),
    ],
)
def test_what_cannot_work_is_said_when_the_dag_is_parsed(parameters: dict[str, Any], says: str) -> None:
    """With the task's name."""
    with pytest.raises(BatchInputError, match=f"Task fetch: .*{says}"):
        fetch(["msgbatch_1"], **parameters).make()


def test_a_task_without_any_database_says_where_a_ledger_may_lie(home: Path, database: Database, tmp_path: Path) -> None:
    """Nothing names one."""
    with pytest.raises(AirflowFailException, match=r"has no sql_conn_id, and nothing says where its ledger lies.*ledger_conn_id"):
        to_files(["msgbatch_1"], tmp_path, ledger_conn_id=None).run()


KILLED = """
import os, sys
from airflow_provider_batchkit.hooks.storage import NewResultFile
from tests.integration.test_result_files import to_files

where, ids, out = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
whole = {"enter": NewResultFile.__exit__, "publish": NewResultFile.publish}

def leave(self, *error):
    whole["enter"](self, *error)
    os._exit(9)

def publish(self):
    whole["publish"](self)
    os._exit(9)

if where == "written":
    NewResultFile.__exit__ = leave
if where == "in its place":
    NewResultFile.publish = publish
to_files(ids, out).run()
"""


@pytest.mark.parametrize("where", ["written", "in its place"])
def test_a_process_that_dies_loses_and_doubles_nothing(home: Path, database: Database, tmp_path: Path, where: str) -> None:
    """Before the file is in its place, and between that and the ledger's commit."""
    fill(database, 20)
    ids = submit(max_requests_per_batch=10).run()
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, where, ",".join(ids), str(out)], env={**os.environ}, check=False, timeout=120)
    assert died.returncode == 9
    assert rows(database, "SELECT count(*) FROM batchkit_landing") == [(0,)]
    to_files(ids, out).run()
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{batch_id}.jsonl" for batch_id in ids)
    assert sorted(row["id"] for row in read_all(out)) == list(range(20))
    assert rows(database, "SELECT count(*), sum(rows_written) FROM batchkit_landing") == [(2, 20)]


@pytest.mark.parametrize(
    ("path", "namespace", "name"),
    [
        ("s3://my_conn@lake/copy/2026/*.jsonl", "s3://lake", "copy/2026/*.jsonl"),
        ("gs://lake/copy", "gs://lake", "copy"),
        ("/data/copy", "file", "/data/copy"),
        ("file:///data/copy", "file", "/data/copy"),
    ],
)
def test_lineage_names_the_files(path: str, namespace: str, name: str) -> None:
    """As OpenLineage names the files of a bucket, without the connection."""
    from airflow_provider_batchkit.lineage import describe

    found = describe(to_files(["msgbatch_1"], path).make())
    assert found is not None and [(output.namespace, output.name) for output in found.outputs] == [(namespace, name)]


def test_a_table_in_another_database_and_files_land_beside_each_other(
    home: Path, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has a database of its own; a process that dies between the two landings leaves the files to the next."""
    duckdb = pytest.importorskip("duckdb", reason="apache-airflow-providers-duckdb is not installed")
    from airflow_provider_batchkit.hooks.storage import NewResultFile

    lake = tmp_path / "lake.duckdb"
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", f"duckdb://{quote(str(lake), safe='')}")
    fill(database, 4)
    ids = submit(max_requests_per_batch=2).run()
    both = {"sql_conn_id": "lake", "ledger_conn_id": "warehouse", "output_path": f"{tmp_path}/out"}

    def fail(self: NewResultFile) -> None:
        raise ConnectionError("the storage is gone")

    with monkeypatch.context() as patch:
        patch.setattr(NewResultFile, "publish", fail)
        with pytest.raises(ConnectionError, match="the storage is gone"):
            fetch(ids, **both).run()
    summary = fetch(ids, **both).run()
    assert summary["rows"] == 4 and summary["counts"] == {"succeeded": 4}
    with duckdb.connect(str(lake)) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT id) FROM answers").fetchone() == (4, 4)
    assert sorted(row["id"] for row in read_all(tmp_path / "out")) == [0, 1, 2, 3]
    assert rows(database, "SELECT count(*), sum(rows_written) FROM batchkit_landing") == [(4, 8)]
