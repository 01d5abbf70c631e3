"""One process at a time in the folder of a comparison."""

import errno
import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOCK_FILENAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""The errors of a file system without locks."""


@contextmanager
def claim(folder: Path) -> Generator[None]:
    """Hold the folder; make it if there is none.

    The claim is a lock of the operating system on a file in the folder. It ends with the process,
    however that dies, so there is never a claim to clear away by hand. Windows and some network
    file systems have no such lock, and nothing is claimed there.

    Raises:
        ValueError: another process holds the folder; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    path = folder / LOCK_FILENAME
    file = _locked(path)
    try:
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked, so it is not yet another's
        file.close()


def _locked(path: Path) -> TextIO:
    """The file at this path, empty and locked."""
    import fcntl  # not on Windows

    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after it was opened here.
            if _is_at(path, file):
                file.truncate(0)  # the name of a process that was killed
                return file
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ValueError(
                f"{path.parent} is in use: {holder} is running a comparison there. "
                "Wait until it is done, or give another --output."
            ) from error
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
