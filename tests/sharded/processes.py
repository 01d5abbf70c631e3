"""Runs a function in several processes that are one process group.

On CPUs with gloo. With ``SHARDED_TESTS=nccl`` in the environment on GPUs, one for each process.
"""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

NCCL = os.environ.get("SHARDED_TESTS") == "nccl"
COUNTS = [n for n in (1, 2, 3, 4) if not NCCL or n <= torch.cuda.device_count()]
SEVERAL = max((n for n in COUNTS if n <= 3), default=3)
"""Three processes, or as many as there are GPUs."""
DEADLINE_S = 300.0


def device() -> str:
    return f"cuda:{dist.get_rank()}" if NCCL else "cpu"


def in_processes(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``n`` ranks; fails where one raises.

    Skipped where there are fewer GPUs.
    """
    if n not in COUNTS:
        pytest.skip(f"there are no {n} GPUs")
    # CUDA does not survive a fork; without it, imports would take longer than the tests.
    context = multiprocessing.get_context("spawn" if NCCL else "fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(Path(folder), rank, n, function, args))
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + DEADLINE_S
        running = {process.sentinel: process for process in processes}
        while running and (left := deadline - time.monotonic()) > 0:
            ended = [running.pop(sentinel) for sentinel in connection.wait([*running], left)]
            for process in ended:
                process.join()
            if any(process.exitcode for process in ended):
                break  # the others would wait for it
        waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        results = []
        for rank in range(n):
            path = Path(folder, f"{rank}.pickle")
            if rank not in waiting:
                assert path.exists(), f"rank {rank} died with {processes[rank].exitcode}"
                results.append(pickle.loads(path.read_bytes()))
    failures = [result for ok, result in results if not ok]
    assert not failures, failures[0]
    assert not waiting, f"ranks {waiting} did not end within {DEADLINE_S:.0f} s"
    return [result for _, result in results]


def _run(folder: Path, rank: int, n: int, function: Callable[..., Any], args: tuple[Any]) -> None:
    torch.set_num_threads(1)
    if NCCL:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if NCCL else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=n,
        timeout=timedelta(seconds=120),  # a rank that waits for nobody fails
    )
    try:
        # What the function made is gone before the group.
        result = (True, function(*args))
    except BaseException:
        result = (False, f"rank {rank}: {traceback.format_exc()}")
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if not result[0]:
        os._exit(1)  # the others may be waiting for this process
    dist.destroy_process_group()
    os._exit(0)
