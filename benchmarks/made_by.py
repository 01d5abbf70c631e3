"""What made a result: for the results of all benchmarks that are committed."""

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from sae_lens_auxk import processes


def made_by(device: str) -> dict[str, Any]:
    """The number of processes, the hardware, torch's version, and the commit of the code."""
    return {
        "processes": processes.n_processes(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
    }


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
