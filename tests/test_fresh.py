"""What is run in a fresh Python fails here as it does there."""

import subprocess
import sys

import pytest

from tests import fresh


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('said'); sys.exit('no such file')", r"(?s)with 1:.*said.*no such file"),
        ("import sys; sys.exit(3)", "with 3:"),
        ("import os; os.write(2, b'from C'); os.abort()", r"(?s)with -6:.*from C"),
        ("raise KeyError('gone')", "KeyError: 'gone'"),
    ],
)
def test_an_end_is_reported(code: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        fresh.run(code)


def test_only_what_is_printed_is_returned_from_a_process_offline_and_without_the_package() -> None:
    said = fresh.run("""
        import os, sys
        import huggingface_hub.constants
        assert "sae_lens_auxk" not in sys.modules
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        print(os.environ["WANDB_MODE"], os.environ["MPLBACKEND"])
        print("a warning", file=sys.stderr)
        sys.exit(None)
    """)
    assert said == "disabled Agg\n"


def test_a_dead_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit(7)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    monkeypatch.setattr(fresh, "_server", lambda: server)
    for _ in range(2):
        with pytest.raises(AssertionError, match="ended with 7"):
            fresh.run("")
