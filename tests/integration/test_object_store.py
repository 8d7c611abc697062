"""Files in a real S3 API over HTTP: moto's server on the loopback, through Airflow's amazon provider and s3fs.

These are not installed with the tests: s3fs needs a python-dateutil below 3. Where they are
(``pip install 'moto[server]' 'apache-airflow-providers-amazon[s3fs]'``), the tests run.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.hooks.storage import ResultFiles
from airflow_provider_batchkit.simulator import SimulatorProcess
from airflow_provider_batchkit.simulator.tokens import answer_for
from tests.databases import Database, rows
from tests.integration.test_fetch_operator import fill, submit
from tests.integration.test_result_files import run, to_files

pytest.importorskip("s3fs", reason="s3fs is not installed")
pytest.importorskip("airflow.providers.amazon.aws.hooks.s3", reason="apache-airflow-providers-amazon is not installed")
moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")

#: folders whose names mean something to a pattern, a URL or a shell
FOLDERS = ["answers", "sp ace/ünï", "wh?t/a#b", "br[a]ck{x}", "per%20cent+plus&amp"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client with an empty bucket ``lake``, which Airflow's connection ``aws_default`` reaches, too."""
    boto3 = pytest.importorskip("boto3")

    extra = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    connection = {"conn_type": "aws", "login": "an-id", "password": "a-secret", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_AWS_DEFAULT", json.dumps(connection))
    client = boto3.client("s3", aws_access_key_id="an-id", aws_secret_access_key="a-secret", **extra)
    client.create_bucket(Bucket="lake")
    for key in keys(client):
        client.delete_object(Bucket="lake", Key=key)
    return client


def keys(s3: Any) -> list[str]:
    return [found["Key"] for found in s3.list_objects_v2(Bucket="lake").get("Contents", [])]


def body(s3: Any, key: str) -> bytes:
    found: bytes = s3.get_object(Bucket="lake", Key=key)["Body"].read()
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_file_is_in_its_place_and_nothing_beside_it(airflow_db: Path, s3: Any, folder: str) -> None:
    """Whatever its folder is called; written over, and with what a killed attempt has left cleared away."""
    files = ResultFiles(f"s3://lake/{folder}/*.jsonl", conn_id="aws_default")
    files.check()
    assert keys(s3) == []
    abandoned = files.create("msgbatch_1")
    with abandoned as stream:
        stream.write(b"half")
    assert not files.exists("msgbatch_1")
    # the second is large enough for an upload in parts
    for content in (b"first", b"second" * 10_000_000):
        new = files.create("msgbatch_1")
        with new as stream:
            stream.write(content)
        new.publish()
        new.discard()
        assert keys(s3) == [f"{folder}/msgbatch_1.jsonl"]
        assert body(s3, keys(s3)[0]) == content
        assert files.exists("msgbatch_1") and not files.exists("msgbatch_2")


def test_a_prefix_of_other_objects_is_no_file(airflow_db: Path, s3: Any) -> None:
    """A batch whose file's name others have for a folder has no file."""
    s3.put_object(Bucket="lake", Key="x/msgbatch_1.jsonl/other", Body=b"")
    assert not ResultFiles("s3://lake/x/*.jsonl", conn_id="aws_default").exists("msgbatch_1")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_come_from_s3_and_answers_go_there_once(home: Path, database: Database, api: SimulatorProcess, s3: Any, form: str) -> None:
    """Three batches, one with an answer of 900,000 characters; a cleared task writes only what is missing."""
    s3.put_object(Bucket="lake", Key="in/a b.csv", Body="id,note\n" + "".join(f"{i},thing {i}\n" for i in range(7)))
    batches = {"ledger_conn_id": "warehouse", "max_requests_per_batch": 3}
    ids = submit(sql=None, sql_conn_id=None, input_path="s3://lake/in/*.csv", input_conn_id="aws_default", **batches).run()
    target = f"s3://aws_default@lake/ünï out/*.{form}"
    long = "x" * 900_000
    api.faults.add("set_member", batch=ids[0], line=1, member="result.message.content.0.text", value=long, times=None)
    try:
        to_files(ids, target).run()
    finally:
        api.faults.clear()
    written = {f"ünï out/{batch_id}.{form}" for batch_id in ids}
    assert set(keys(s3)) == written | {"in/a b.csv"}
    found = [row for key in written for row in read(body(s3, key), form)]
    assert sorted(row["id"] for row in found) == [str(i) for i in range(7)]
    assert sum(row["response"] == long for row in found) == 1
    others = {row["id"]: row["response"] for row in found if row["response"] != long}
    assert others == {key: answer_for(f"thing {key}") for key in others} and len(others) == 6
    kept = max(written)
    s3.put_object(Bucket="lake", Key=kept, Body=b"written again, it would be another")
    to_files(ids, target).run()
    assert body(s3, kept) == b"written again, it would be another"
    lost = min(written)
    s3.delete_object(Bucket="lake", Key=lost)
    to_files(ids, target).run()
    assert set(keys(s3)) == written | {"in/a b.csv"} and len(read(body(s3, lost), form)) in (1, 3)
    assert rows(database, "SELECT count(*) FROM batchkit_landing") == [(3,)]


def read(content: bytes, form: str) -> list[dict[str, Any]]:
    if form == "jsonl":
        return [json.loads(line) for line in content.split(b"\n")[:-1]]
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
    return found


def test_a_bucket_that_is_missing_is_named_before_anything_is_sent(home: Path, database: Database, api: SimulatorProcess, s3: Any) -> None:
    """By a Run's check of its files."""
    fill(database, 2)
    before = api.stats()["requests_accepted"]
    with pytest.raises((AirflowFailException, BatchInputError), match=r"s3://nowhere.*bucket does not exist.*Nothing was sent"):
        run(table=None, output_path="s3://nowhere/out/*.jsonl", output_conn_id="aws_default").run()
    assert api.stats()["requests_accepted"] == before


def test_credentials_that_are_wrong_are_named_before_anything_is_sent(
    home: Path, database: Database, api: SimulatorProcess, s3: Any, endpoint: str
) -> None:
    """The server checks them from here on, and knows no such key."""
    fill(database, 2)
    before = api.stats()["requests_accepted"]
    httpx.post(f"{endpoint}/moto-api/reset-auth", content="0").raise_for_status()
    try:
        with pytest.raises((AirflowFailException, BatchInputError), match=r"s3://lake.*Access Key.*Nothing was sent"):
            run(table=None, output_path="s3://lake/out/*.jsonl", output_conn_id="aws_default").run()
    finally:
        httpx.post(f"{endpoint}/moto-api/reset-auth", content="inf").raise_for_status()
    assert api.stats()["requests_accepted"] == before
