import os

# Before anything imports SAELens: no Hub, no W&B server, one thread a worker.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TQDM_DISABLE", "1")
# With more, a worker's threads wait for each other where other workers use their cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# sparsify would use Triton wherever it is installed, also without a GPU.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import gc
import runpy
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_collection_finish() -> None:
    """A look for cycles among all that was imported takes a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2's ``model`` and ``text``, written once for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    example = Path(__file__).parents[1] / "examples" / "prepare_smollm2.py"
    with FileLock(f"{folder}.lock"):
        runpy.run_path(str(example))["prepare"](folder)
    return folder
