"""Files as the source of real DAG runs, on SQLite and PostgreSQL: through Airflow's object storage, into a table."""

from __future__ import annotations

import csv
import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.simulator import SimulatorProcess, answer_for
from tests.databases import Database, rows
from tests.integration.airflow_runs import Run, run_dag, run_source

EXAMPLES = Path(__file__).resolve().parents[2] / "example_dags"


@pytest.fixture
def memory_store() -> Iterator[Any]:
    """An object store that Airflow's paths reach as ``memory://`` with the connection ``store``, empty before and after."""
    from airflow.sdk.io import attach
    from airflow.sdk.io.store import _STORE_CACHE
    from fsspec.implementations.memory import MemoryFileSystem

    store = MemoryFileSystem()
    attach("memory", conn_id="store", fs=store)
    yield store
    store.rm("/", recursive=True)
    _STORE_CACHE.pop("memory-store")


def run(home: Path, path: Any, more: str = "", key: str = "sku", prompt: str = "About {{ row.name }}") -> Run:
    """Submit and fetch ``path``; ``more`` is further parameters of the submit task."""
    return run_dag(
        home,
        f"""
        submit = SubmitBatchOperator(
            task_id="submit", input_path={path!r}, key={key!r}, prompt={prompt!r}, max_tokens=100, sql_conn_id="warehouse", {more}
        )
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
        """,
    )


def refusal(home: Path, output: pytest.CaptureFixture[str], path: Any, more: str = "") -> str:
    """What a run prints whose submit task must fail."""
    output.readouterr()
    ended = run(home, path, more)
    assert ended.states()["submit"] == "failed"
    return output.readouterr().out


# sources


@pytest.mark.parametrize("url", ["{folder}/airports.csv", "file://{folder}/airports.csv.gz"])
def test_every_airport_of_a_csv_file_gets_its_own_answer(home: Path, database: Database, tmp_path: Path, url: str) -> None:
    """The 3,376 airports of vega-datasets as they are on disk, by a plain path, and zipped by a URL: every row is checked."""
    from vega_datasets import local_data

    original = Path(local_data.airports.filepath)
    shutil.copy(original, tmp_path / "airports.csv")
    (tmp_path / "airports.csv.gz").write_bytes(gzip.compress(original.read_bytes()))
    ended = run(home, url.format(folder=tmp_path), key="iata", prompt="What is {{ row.name }} in {{ row.city }} known for?")
    assert ended.state == "success"
    assert ended.xcom("fetch")["counts"] == {"succeeded": 3376}
    with original.open(newline="") as lines:
        expected = {a["iata"]: answer_for(f"What is {a['name']} in {a['city']} known for?") for a in csv.DictReader(lines)}
    assert dict(rows(database, "SELECT iata, response FROM answers")) == expected


def test_the_files_of_a_pattern_in_object_storage_are_read_with_the_connection(home: Path, database: Database, memory_store: Any) -> None:
    """Sorted by name, what does not match left alone; the path is a template, and integer keys stay integers."""
    memory_store.pipe(
        {
            "/shop/day=1/b.jsonl": b'{"sku": 3, "name": "cup"}\n',
            "/shop/day=1/a.jsonl.gz": gzip.compress(b'{"sku": 1, "name": "tea"}\n{"sku": 2, "name": "pot"}\n'),
            "/shop/day=1/_SUCCESS": b"",
            "/shop/day=2/c.jsonl": b'{"sku": 4, "name": "no"}\n',
        }
    )
    ended = run(home, "memory://shop/day={{ 2 - 1 }}/*.jsonl*", "input_conn_id=\"{{ 'store' }}\"")
    assert ended.state == "success"
    assert rows(database, "SELECT sku, response FROM answers ORDER BY sku") == [
        (1, answer_for("About tea")),
        (2, answer_for("About pot")),
        (3, answer_for("About cup")),
    ]


def test_a_connection_in_the_url_and_a_list_of_paths_work_too(home: Path, database: Database, memory_store: Any, tmp_path: Path) -> None:
    """As everywhere in Airflow: ``scheme://connection@bucket/key``. A list may be another task's output, and mix formats."""
    memory_store.pipe("/shop/a.csv", b"sku;name\nA;t\xe9\n")
    (tmp_path / "b[1].csv").write_bytes(b"sku;name\nB;pot\n")
    ended = run_dag(
        home,
        f"""
        @task
        def paths():
            return ["memory://store@shop/a.csv", {str(tmp_path / "b[1].csv")!r}]

        submit = SubmitBatchOperator(
            task_id="submit", input_path=paths(), input_options={{"delimiter": ";", "encoding": "latin-1"}}, key="sku",
            prompt="About {{{{ row.name }}}}", max_tokens=100, sql_conn_id="warehouse",
        )
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
        """,
    )
    assert ended.state == "success"
    assert rows(database, "SELECT sku, response FROM answers ORDER BY sku") == [
        ("A", answer_for("About té")),
        ("B", answer_for("About pot")),
    ]


def test_parquet_keys_keep_their_types_in_the_result_table(home: Path, database: Database, memory_store: Any) -> None:
    """Read from object storage, which seeks; a date and an integer make the key."""
    import datetime as dt
    import io

    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    days = [dt.date(2026, 11, day) for day in (22, 23)]
    pq.write_table(pa.table({"shop": [7, 7], "day": days, "name": ["tea", "cup"]}), stream)
    memory_store.pipe("/shop/x.parquet", stream.getvalue())
    ended = run(home, "memory://store@shop/x.parquet", key=["shop", "day"], prompt="{{ row.name }} on {{ row.day.isoformat() }}")  # type: ignore[arg-type]
    assert ended.state == "success"
    found = rows(database, "SELECT shop, CAST(day AS VARCHAR(10)), response FROM answers ORDER BY day")
    assert found == [(7, "2026-11-22", answer_for("tea on 2026-11-22")), (7, "2026-11-23", answer_for("cup on 2026-11-23"))]


def test_a_file_may_be_read_by_one_mapped_task_each(home: Path, database: Database, tmp_path: Path) -> None:
    """Dynamic mapping over partitions."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(f"sku,name\n{name},{name}-name\n")
    ended = run_dag(
        home,
        f"""
        submit = SubmitBatchOperator.partial(
            task_id="submit", key="sku", prompt="About {{{{ row.name }}}}", max_tokens=100, sql_conn_id="warehouse",
        ).expand(input_path=[{str(tmp_path / "a.csv")!r}, {str(tmp_path / "b.csv")!r}])
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
        """,
    )
    assert ended.state == "success"
    assert rows(database, "SELECT sku FROM answers ORDER BY sku") == [("a",), ("b",)]


def test_a_csv_of_a_header_alone_is_a_source_without_rows(home: Path, tmp_path: Path) -> None:
    """on_empty decides: skip by default."""
    (tmp_path / "x.csv").write_text("sku,name\n")
    assert run(home, str(tmp_path / "x.csv")).states() == {"submit": "skipped", "fetch": "skipped"}


# refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sku,name\nA,tea\nB\n", "x.csv, line 3: 1 fields, but the header has 2: ['B']. Nothing was sent."),
        ('sku,name\nA,"green\ntea"\nB,pot\nA,cup\n', 'x.csv, line 5: row 2: the key ["A"] came before, in row 0.'),
        ("id,name\nA,tea\n", "x.csv, line 2: row 0: key column sku is not in the source. Columns: id, name. Nothing was sent."),
        ("sku,title\nA,tea\n", "x.csv, line 2: row 0 (sku='A'): the prompt template uses something that is not there:"),
        (f"sku,name\nA,tea\n{'B' * 3000},pot\n", "the key is 3,004 bytes long, over the limit of 2,000. Nothing was sent."),
    ],
)
def test_bad_input_is_refused_by_file_and_line_before_anything_is_sent(
    home: Path,
    simulator: SimulatorProcess,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    """Whoever finds it: the reader, the template, or the check of keys; also with the good rows before it in batches of their own."""
    (tmp_path / "x.csv").write_text(content)
    before = simulator.stats()["requests_accepted"]
    log = refusal(home, capfd, str(tmp_path / "x.csv"), "max_requests_per_batch=1, retries=3")
    assert f"AirflowFailException: {tmp_path}/x.csv, line" in log
    assert message in log.partition("AirflowFailException: ")[2]
    assert simulator.stats()["requests_accepted"] == before


def test_a_path_that_gives_no_file_says_why(home: Path, tmp_path: Path, memory_store: Any) -> None:
    """A missing file, an empty pattern, a folder, a storage whose provider is not there, an empty list."""
    from airflow_provider_batchkit.hooks.storage import input_files

    memory_store.pipe("/shop/folder/x.csv", b"a\n1\n")
    for path, message in (
        (f"{tmp_path}/x.csv", f"{tmp_path}/x.csv: there is no such file. Nothing was sent."),
        ("memory://store@shop/*.csv", "memory://store@/shop/*.csv: there is no such file. Nothing was sent."),
        (str(tmp_path), f"{tmp_path} is a folder; give a pattern for the files in it, such as {tmp_path}/*.csv. Nothing was sent."),
        ("memory://store@shop/folder/", "memory://store@/shop/folder is a folder; give a pattern"),
        ("memory://shop/x.csv", "memory://shop/x.csv: no file can be read from there: No filesystem registered for scheme memory."),
        ([], "input_path is an empty list. Nothing was sent."),
    ):
        with pytest.raises(BatchInputError) as caught:
            input_files(path)
        assert str(caught.value).startswith(message)


def test_a_retry_skips_what_was_sent_and_asks_what_is_new_in_the_file(
    home: Path, simulator: SimulatorProcess, database: Database, tmp_path: Path
) -> None:
    """The file has grown, and its old rows have moved, between two attempts of one task."""
    from airflow_provider_batchkit.ledger import Ledger

    path = tmp_path / "x.csv"
    path.write_text("sku,name\nA,tea\nB,pot\n")
    before = simulator.stats()["requests_accepted"]
    ended = run_dag(
        home,
        f"""
        def change_and_fail_once(context, result):
            with open({str(path)!r}, "w") as file:
                file.write("sku,name\\nC,cup\\nB,pot\\nA,tea\\n")
            assert context["ti"].try_number > 1

        submit = SubmitBatchOperator(
            task_id="submit", input_path={str(path)!r}, key="sku", prompt="About {{{{ row.name }}}}", max_tokens=100,
            sql_conn_id="warehouse", retries=1, retry_delay=0.1,
            post_execute=change_and_fail_once,
        )
        fetch = FetchBatchOperator(task_id="fetch", batch_id=submit.output, table="answers", sql_conn_id="warehouse")
        """,
    )
    assert ended.state == "success"
    assert simulator.stats()["requests_accepted"] - before == 3
    assert rows(database, "SELECT sku FROM answers ORDER BY sku") == [("A",), ("B",), ("C",)]
    assert len(Ledger(database.engine()).batches(job_id_of(database))) == 2


def job_id_of(database: Database) -> str:
    ((job_id,),) = rows(database, "SELECT job_id FROM batchkit_job")
    return str(job_id)


# parameters


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"input_path": "x.csv"}, "input_path needs key (the columns that identify a row) and prompt."),
        ({"input_path": "x.csv", "key": "sku"}, "input_path needs key (the columns that identify a row) and prompt."),
        ({"input_path": "x.csv", "sql": "SELECT 1", "key": "sku", "prompt": "x"}, "give exactly one of sql, input_path and requests."),
        ({"input_path": "x.csv", "requests": [], "key": "sku", "prompt": "x"}, "give exactly one of sql, input_path and requests."),
        ({}, "give exactly one of sql, input_path and requests."),
        ({"input_path": "x.csv", "key": "a", "prompt": "x", "input_options": {"sep": ";"}}, "input_options has no sep;"),
    ],
)
def test_a_source_is_checked_when_the_dag_is_parsed(source: dict[str, Any], message: str) -> None:
    """Exactly one, with all that it needs, and options that exist."""
    from airflow_provider_batchkit.operators.batch import SubmitBatchOperator

    with pytest.raises(BatchInputError) as caught:
        SubmitBatchOperator(task_id="submit", sql_conn_id="warehouse", **source)
    assert message in str(caught.value)


# the example


def test_the_example_lands_a_csv_in_a_table(home: Path, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """example_dags/csv_to_table.py as it is, on the reviews that the demo writes."""
    from example_dags.demo.catalog import fill_catalog, write_reviews

    fill_catalog(tmp_path / "catalog.db", 3)
    write_reviews(tmp_path / "reviews.csv", tmp_path / "catalog.db")
    monkeypatch.setenv("AIRFLOW_VAR_REVIEWS_CSV", str(tmp_path / "reviews.csv"))
    ended = run_source(home, "csv_to_table", (EXAMPLES / "csv_to_table.py").read_text())
    assert ended.states() == {"submit": "success", "wait": "success", "fetch": "success"}
    with (tmp_path / "reviews.csv").open(newline="") as file:
        question = "Is this review of {product} positive, negative or mixed? Answer with one word.\n\n{text}"
        expected = {review["review_id"]: answer_for(question.format(**review)) for review in csv.DictReader(file)}
    assert len(expected) == 6
    assert dict(rows(database, "SELECT review_id, response FROM review_sentiment")) == expected
