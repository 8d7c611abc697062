"""Files in object storage, through Airflow's own paths and connections."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow_provider_batchkit.exceptions import BatchInputError

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath

    from airflow_provider_batchkit.source.files import InputFile

_WILDCARDS = frozenset("*?[")


def input_files(input_path: Any, conn_id: str | None = None) -> list[InputFile]:
    """The files that a path or URL, or each of a list of them, stands for. Those of a pattern are sorted by name. Nothing is opened.

    :param conn_id: connection for all of them; else the one in the URL (``s3://my_conn@bucket/key``), else the storage's default
    :raises BatchInputError: for a path without a file, a folder, a storage that nothing here can read
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
    if kind is not None:  # also a file whose name has a wildcard in it
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
    """A path with a connection, or with the one in its URL: Airflow 3.1 overlooks that where it is given ``conn_id=None``."""
    from airflow.sdk import ObjectStoragePath

    return ObjectStoragePath(given) if conn_id is None else ObjectStoragePath(given, conn_id=conn_id)
