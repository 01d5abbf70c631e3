"""One process at a time in a folder, and none that is dead."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lens_auxk.compare.claim import claim

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is claimed on Windows")

HOLD = """
import sys, time
from pathlib import Path
from sae_lens_auxk.compare.claim import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_gives_up(tmp_path: Path) -> None:
    args = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            message = f"is in use: process {holder.pid} on .* is running a comparison there"
            with pytest.raises(ValueError, match=message), claim(tmp_path):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()), "the dead process left its file"
    with claim(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


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
    with claim(tmp_path), pytest.raises(ValueError, match="in use"), claim(tmp_path):
        pass
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
        pass
    assert not list(tmp_path.iterdir())
