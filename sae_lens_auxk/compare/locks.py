"""Processes that work in the folder of one comparison.

A claim is a lock of the operating system on a file. It ends with the process, however that dies, so
there is never a stale claim to remove by hand. Windows and some network file systems have no such
lock, so nothing is claimed there: use one process at a time in such a folder.
"""

import errno
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sae_lens_auxk.files import open_no_link

LOCK_FILENAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""The errors of a file system without locks."""
SECONDS_BETWEEN_TRIES = 0.1


@contextmanager
def claim(folder: Path) -> Generator[None]:
    """Hold the results in a folder, to read and write them; make it if there is none.

    Waits for a process that holds them; none holds them for long.

    Raises:
        ValueError: a link has the name of the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with claim_if_free(folder / LOCK_FILENAME) as is_own:
            if is_own:
                yield
                return
        time.sleep(SECONDS_BETWEEN_TRIES)


@contextmanager
def claim_if_free(path: Path) -> Generator[bool]:
    """Claim the file at ``path`` unless another process holds it; yield whether it is held.

    The file exists as long as the claim, and is empty.

    Raises:
        ValueError: there is a link at ``path``.
    """
    if sys.platform == "win32":
        yield True
        return
    file = _locked(path)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # still locked, so it is not yet another's
        file.close()


def is_held(path: Path) -> bool:
    """Whether a process holds the file, which stays as it is."""
    if sys.platform == "win32" or not path.is_file():
        return False
    import fcntl

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return False


def is_lock(path: Path) -> bool:
    """Whether this may be the lock of a folder that a killed process left."""
    return path.name == LOCK_FILENAME and path.is_file() and path.lstat().st_size == 0


def _locked(path: Path) -> BinaryIO | None:
    """The file at this path, locked; None where another process has locked it."""
    import fcntl  # not on Windows

    while True:
        file = open_no_link(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after it was opened here.
            if _is_at(path, file):
                return file
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            raise
        file.close()


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
