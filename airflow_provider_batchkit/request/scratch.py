"""A folder for a submit's own files. The submit removes it; a killed one cannot, and the next submit does."""

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
    """A new folder in the system's temporary folder, locked while it is used. An unlocked folder belongs to a process that has died.

    A batch's bodies are up to 256 MB, so a few killed tasks would fill a worker's disk. Only folders that this host made are removed: where
    hosts share a temporary folder, one may not see the locks of another.
    """
    prefix = f"batchkit-scratch-{re.sub(r'[^0-9A-Za-z]', '_', socket.gethostname())}-"
    _remove_abandoned(prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, ExitStack() as held:
        # on a file system without locks, the next submit gets no lock either, and leaves the folder alone
        with suppress(OSError):
            held.enter_context(_locked(Path(folder)))
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it ends with the process, however that ends.

    :raises OSError: another process holds the lock, or the folder is a symbolic link, another user's, or gone
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
