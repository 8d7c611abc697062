"""A submit's folder goes with it, and with the next one when it was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from airflow_provider_batchkit.request.scratch import scratch_folder

HOLD = """
import sys, time
from pathlib import Path
from airflow_provider_batchkit.request.scratch import scratch_folder
with scratch_folder() as folder:
    Path(folder, "shard-00000.json").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@contextmanager
def holder() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process in a folder of its own, which looks old."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            folder = Path(process.stdout.readline().strip())
            make_old(folder)
            yield process, folder
        finally:
            process.kill()


def make_old(folder: Path) -> None:
    """As if nothing had been put in for ten minutes."""
    then = time.time() - 600
    os.utime(folder, (then, then), follow_symlinks=False)


def test_what_a_killed_process_left_is_removed_by_the_next() -> None:
    """And not before it is dead, however long it works."""
    with holder() as (process, folder):
        with scratch_folder() as mine:
            assert folder.exists() and Path(mine).exists() and Path(mine) != folder
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Path(folder, "shard-00000.json").exists()
        with scratch_folder():
            assert not folder.exists()


def test_folders_that_are_not_surely_abandoned_stay(temporary: Path) -> None:
    """A young one, whose owner may not have come to lock it, another host's, and what a link of that name leads to."""
    with scratch_folder() as mine:
        prefix, _, _ = mine.rpartition("-")
    assert not Path(mine).exists()
    young, linked, link, others = Path(f"{prefix}-young"), temporary / "precious", Path(f"{prefix}-link"), Path(f"{prefix}x-1")
    for folder in (young, linked, others):
        folder.mkdir()
        Path(folder, "file").write_text("x")
    link.symlink_to(linked)
    for folder in (linked, link, others):
        make_old(folder)
    with scratch_folder():
        pass
    assert all(Path(folder, "file").exists() for folder in (young, linked, others))
    make_old(young)
    with scratch_folder():
        assert not young.exists()


def test_a_file_system_without_locks_keeps_nobody_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is removed there but a process's own."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with scratch_folder() as first:
        make_old(Path(first))
        with scratch_folder() as second:
            assert Path(first).exists() and Path(second).exists()
    assert not Path(first).exists() and not Path(second).exists()
