"""A folder for files of a submit's own. It goes with the submit; one that was killed cannot remove its own, and the next does."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

#: younger folders are left alone: somebody may be about to lock them
_YOUNG_S = 60.0


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A new folder in the system's temporary folder, locked while it is used: what is not locked has lost its owner.

    A batch's bodies are up to 256 MB, so that some killed tasks would fill a worker's disk. Only folders that this host made are removed:
    where hosts share a temporary folder, one need not see the other's locks.
    """
    prefix = f"batchkit-scratch-{re.sub(r'[^0-9A-Za-z]', '_', socket.gethostname())}-"
    _remove_abandoned(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, ExitStack() as held:
        # a file system without locks has none for the next submit either, which leaves the folder alone
        with suppress(OSError):
            held.enter_context(_locked(Path(folder)))
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it ends with the process, however that ends.

    :raises OSError: when another process holds it, or the folder is a symbolic link, another user's, or gone
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            found = folder.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _YOUNG_S:
                continue
            with _locked(folder):
                shutil.rmtree(folder)
            log.info("Removed %s, which a task that was killed had left behind", folder)
