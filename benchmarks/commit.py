"""The commit of the code that made a result."""

import os
import subprocess
from pathlib import Path


def commit() -> str | None:
    """``$COMMIT``, for a copy without git's folder, or the checkout's; None without either."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
