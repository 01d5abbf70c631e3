"""Processes that work in the folder of one comparison.

A claim is a lock of the operating system on a file. It ends with the process, however that dies, so
there is never a stale claim to remove by hand. Windows and some network file systems have no such
lock, so nothing is claimed there: use one process at a time in such a folder.
"""

import errno
import os
import platform
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOCK_FILENAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""The errors of a file system without locks."""
SECONDS_BETWEEN_TRIES = 0.1


@contextmanager
def claim(folder: Path) -> Generator[None]:
    """Hold the results in a folder, to read and write them; make it if there is none.

    Waits for a process that holds them; none holds them for long.
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

    The file exists as long as the claim.
    """
    if sys.platform == "win32":
        yield True
        return
    file = _locked(path)
    if file is None:
        yield False
        return
    try:
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield True
    finally:
        path.unlink(missing_ok=True)  # still locked, so it is not yet another's
        file.close()


def _locked(path: Path) -> TextIO | None:
    """The file at this path, empty and locked; None where another process has locked it."""
    import fcntl  # not on Windows

    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after it was opened here.
            if _is_at(path, file):
                file.truncate(0)  # the name of a process that was killed
                return file
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            raise
        file.close()


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
