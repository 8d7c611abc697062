"""Files in object storage, through Airflow's own paths and connections."""

from __future__ import annotations

import glob
import logging
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath

    from airflow_provider_batchkit.source.files import InputFile

log = logging.getLogger(__name__)

_WILDCARDS = frozenset("*?[")
#: protocols of the worker's own disk, on which folders must be created
_LOCAL = ("", "file", "local")
#: most characters of a place's name in the ledger
_MAX_NAME = 250
_BATCH_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


def input_files(input_path: Any, conn_id: str | None = None) -> list[InputFile]:
    """The files of a path or URL, or of each one in a list. The files of a pattern are sorted by name. Nothing is opened.

    :param conn_id: connection for all of them; else the one in the URL (``s3://my_conn@bucket/key``), else the storage's default
    :raises BatchInputError: for a path without a file, for a folder, and for a storage that cannot be read here
    """
    paths = list(input_path) if isinstance(input_path, Sequence) and not isinstance(input_path, str) else [input_path]
    if not paths:
        raise BatchInputError("input_path is an empty list. Nothing was sent.")
    return [(str(found), partial(found.open, "rb")) for path in paths for found in _matches(path, conn_id)]


def _matches(given: Any, conn_id: str | None) -> list[ObjectStoragePath]:
    try:
        path = _path(given, conn_id)
        storage = path.fs
    except (ValueError, ImportError) as e:
        raise BatchInputError(
            f"{given}: no file can be read from there: {e}. The provider of the storage must be installed, such as "
            "apache-airflow-providers-amazon[s3fs] for s3. Nothing was sent."
        ) from e
    try:
        kind = storage.info(path.path)["type"]
    except FileNotFoundError:
        kind = None
    if kind == "directory":
        raise BatchInputError(
            f"{path} is a folder; give a pattern for the files in it, such as {str(path).rstrip('/')}/*.csv. Nothing was sent."
        )
    if kind is not None:  # the path exists as it is, perhaps with a wildcard in its name
        return [path]
    names = []
    if _WILDCARDS & set(path.path):
        names = sorted(name for name, info in storage.glob(path.path, detail=True).items() if info["type"] != "directory")
    if not names:
        raise BatchInputError(f"{path}: there is no such file. Nothing was sent.")
    scheme = f"{path.protocol}://" if path.protocol else ""
    # Airflow 3.1 keeps the connection among the options of the storage
    own = path.conn_id if hasattr(path, "conn_id") else path.storage_options.get("conn_id")
    return [_path(f"{scheme}{name}", own) for name in names]


def _path(given: Any, conn_id: str | None) -> ObjectStoragePath:
    """A path with this connection, or with the one in its URL, which Airflow 3.1 ignores when it gets ``conn_id=None``."""
    from airflow.sdk import ObjectStoragePath

    return ObjectStoragePath(given) if conn_id is None else ObjectStoragePath(given, conn_id=conn_id)


class ResultFiles:
    """Result files in object storage: one per batch, named by its id. Each is written under a hidden name first."""

    def __init__(self, output_path: Any, output_format: str | None = None, conn_id: str | None = None) -> None:
        """
        :param output_path: a folder, or a path whose last part has a ``*`` in place of the batch's id
        :param output_format: ``"jsonl"`` or ``"parquet"``, needed where the path's suffix does not give it
        :param conn_id: connection of the storage, as in :func:`input_files`
        :raises BatchInputError: for a path or a format that cannot be written
        """
        self.form = output_form(output_path, output_format)
        self._given = str(output_path).rstrip("/")
        self._conn_id = conn_id or getattr(output_path, "conn_id", None)
        whole = self._path("*")
        name = f"{whole.protocol or 'file'}://{whole.path}"
        if len(name) > _MAX_NAME:
            import hashlib

            name = f"{name[: _MAX_NAME - 17]}#{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        #: the name of the files in the ledger
        self.name = name

    def url(self, batch_id: str) -> str:
        """The URL of a batch's file."""
        return str(self._path(batch_id))

    def exists(self, batch_id: str) -> bool:
        """Whether the file of a batch is in its place."""
        path = self._path(batch_id)
        path.fs.invalidate_cache()
        # in an object store, a prefix that objects have counts as a folder that exists
        return bool(path.fs.isfile(path.path))

    def create(self, batch_id: str) -> NewResultFile:
        """A new file for the batch, which is not in its place yet."""
        if not _BATCH_ID.fullmatch(batch_id):
            raise BatchInputError(f"{batch_id!r} is no id of a batch, and cannot be the name of a file. Nothing was written.")
        return NewResultFile(self._path(batch_id), batch_id)

    def check(self) -> None:
        """Prove that files can be written and published: one is written under a hidden name, then under another, and is taken away.

        :raises BatchInputError: when it cannot be written or deleted; an error of the storage itself is raised as it is
        """
        from airflow_provider_batchkit.landing.formats import require

        require(self.form)
        probe = self.create("probe")
        try:
            with probe as stream:
                stream.write(b"")
            probe.rehearse()
        except (OSError, ValueError, ImportError) as e:
            raise BatchInputError(
                f"{self.name}: no result file can be written there, or not be taken away again: {e}. Nothing was sent."
            ) from e
        except Exception as e:
            # an error of the storage itself may pass, so it is raised as it is
            e.add_note(f"{self.name}: no result file can be written there. Nothing was sent.")
            raise
        finally:
            probe.discard()

    def _path(self, batch_id: str) -> ObjectStoragePath:
        folder, slash, last = self._given.rpartition("/")
        last = last.replace("*", batch_id) if "*" in last else f"{last}/{batch_id}.{self.form}"
        try:
            path = _path(f"{folder}{slash}{last}", self._conn_id)
            _ = path.fs
        except (ValueError, ImportError) as e:
            raise BatchInputError(
                f"{self._given}: no file can be written there: {e}. The provider of the storage must be installed, such as "
                "apache-airflow-providers-google for gs. Nothing was written."
            ) from e
        return path


class NewResultFile:
    """A file that is written beside its place, under a name that no pattern for result files matches."""

    def __init__(self, path: ObjectStoragePath, batch_id: str) -> None:
        self._storage = path.fs
        self._place = path.path
        self._folder, _, _ = path.path.rpartition("/")
        self._hidden = f"{self._folder}/.{batch_id}."
        self._own = f"{self._hidden}{secrets.token_hex(8)}.tmp"
        self._local = path.protocol in _LOCAL
        self._stream: BinaryIO | None = None
        self._moved = False

    def __enter__(self) -> BinaryIO:
        if self._local:
            self._storage.makedirs(self._folder, exist_ok=True)
        stream: BinaryIO = self._storage.open(self._own, "wb")
        self._stream = stream
        return stream

    def __exit__(self, *_: object) -> None:
        assert self._stream is not None
        with suppress(AttributeError, OSError):
            # a file that the ledger reports as landed must really be on the disk
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()

    def publish(self) -> None:
        """Put it in its place, over a file that is there, in one step.

        An object store has no rename: its copy is visible once it is whole, and :meth:`discard` takes the hidden object away.
        """
        self._move(self._place)

    def rehearse(self) -> None:
        """Publish it under another hidden name and take that away: needs the same rights."""
        other = f"{self._hidden}{secrets.token_hex(8)}.tmp"
        self._move(other)
        self._storage.rm_file(other)

    def _move(self, to: str) -> None:
        if self._local:
            self._storage.mv(self._own, to)
        else:
            # mv of an object store takes a ? or a [ of the path for a pattern, and the place for a folder
            self._storage.cp_file(self._own, to)
        self._moved = True

    def discard(self) -> None:
        """Delete the hidden file if the file is not in its place; if it is, also delete the hidden files of killed attempts."""
        try:
            self._storage.invalidate_cache()
            left = self._storage.glob(f"{glob.escape(self._hidden)}*.tmp") if self._moved else [self._own]
            for name in left:
                with suppress(FileNotFoundError):
                    self._storage.rm_file(name)
        except Exception as e:  # noqa: BLE001 - a leftover hidden file must neither hide the error being raised nor fail a landing
            log.warning("%s*.tmp may be left behind: %s", self._hidden, e)


def output_form(output_path: Any, output_format: str | None = None) -> str:
    """The format of result files.

    :raises BatchInputError: for an unknown format, or one that contradicts the path's suffix
    """
    from airflow_provider_batchkit.landing.formats import FORMATS, SUFFIXES

    last = PurePosixPath(str(output_path)).name
    told = SUFFIXES.get(PurePosixPath(last).suffix.lower())
    if output_format is not None and output_format not in FORMATS:
        raise BatchInputError(f"output_format must be 'jsonl' or 'parquet', not {output_format!r}.")
    if told and output_format and told != output_format:
        raise BatchInputError(f"output_path {output_path} and output_format {output_format!r} say two things. Leave output_format out.")
    if last.count("*") > 1 or "*" in str(PurePosixPath(str(output_path)).parent):
        raise BatchInputError(f"output_path {output_path} has a * that is not for the batch's id: one may stand in its last part.")
    return told or output_format or "jsonl"
