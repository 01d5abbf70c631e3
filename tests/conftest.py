import os

# Before anything imports SAELens: no Hub, no W&B server, one thread a worker.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TQDM_DISABLE", "1")
# With more, a worker's threads wait for each other where other workers use their cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# sparsify would use Triton wherever it is installed, also without a GPU.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
