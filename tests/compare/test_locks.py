"""One process at a time in a folder, and none that is dead."""

import errno
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from sae_lens_auxk.compare.locks import claim, claim_if_free, is_held

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is claimed on Windows")


@contextmanager
def held(path: Path, seconds: float = 600) -> Iterator[BaseProcess]:
    """Another process that holds the lock of this path, and dies after so many seconds."""
    fork = multiprocessing.get_context("fork")  # imports would take longer than the tests
    theirs, mine = fork.Pipe()
    process = fork.Process(target=_hold, args=(path, seconds, theirs))
    process.start()
    theirs.close()
    try:
        assert mine.poll(60)
        assert mine.recv()
        yield process
    finally:
        process.kill()
        process.join()


def _hold(path: Path, seconds: float, ready: Connection) -> None:
    with claim_if_free(path) as is_own:
        ready.send(is_own)
        time.sleep(seconds)
        os._exit(9)


def test_a_second_process_does_not_get_it_and_a_dead_one_gives_up(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held(path):
        with claim_if_free(path) as is_own:
            assert not is_own
        assert is_held(path)
    assert not is_held(path)
    assert path.exists(), "the dead process left its file"
    assert not is_held(tmp_path / "none")
    assert [*tmp_path.iterdir()] == [path]
    with claim_if_free(path) as is_own:
        assert is_own
        assert path.read_bytes() == b""
    assert not path.exists()


def test_a_folder_is_waited_for(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with claim(tmp_path):
            order.append("second")

    with claim(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_whoever_locks_a_removed_file_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder removes its file after the next process opened it, and before it locks it."""
    import fcntl

    flock, calls = fcntl.flock, []

    def slow(*args: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(args)
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", slow)
    path = tmp_path / ".lock"
    with claim_if_free(path) as first, claim_if_free(path) as second:
        assert first
        assert not second
    assert len(calls) == 3


def test_a_folder_is_made_and_free_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), claim(folder):
        raise RuntimeError
    with claim(folder):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with claim(tmp_path):
        assert not is_held(tmp_path / ".lock")
    assert not list(tmp_path.iterdir())
