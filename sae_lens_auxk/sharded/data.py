"""Activations: each process runs the language model on its share of the data set.

A training batch concatenates the processes' batches and is the same on every process.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens import ActivationsStore
from safetensors.torch import load_file
from typing_extensions import override

from sae_lens_auxk.files import write_tensors
from sae_lens_auxk.processes import agree
from sae_lens_auxk.saelens.names import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens_auxk.sharded.collectives import gather


def share_data(store: ActivationsStore, group: Any) -> None:
    """Limit a new store to its process's share of the rows and of a training batch.

    Rows are dealt in blocks of the ``store_batch_size_prompts`` that the model reads at once, so
    that rows which alternate, as a question and its answer, go to all processes. Of a stream of as
    many files as N divides, each process reads its own files.

    Raises:
        ValueError: there are fewer rows than processes.
    """
    n, rank = group.size(), group.rank()
    store.train_batch_size_tokens //= n
    block = store.store_batch_size_prompts
    if store.cached_activation_dataset is not None:
        store.cached_activation_dataset = _share(store.cached_activation_dataset, n, rank, block)
    if store.dataset is not None:
        store.dataset = _share(store.dataset, n, rank, block)


def _share(dataset: Any, n: int, rank: int, block: int) -> Any:
    if isinstance(dataset, IterableDataset):
        if dataset.n_shards % n == 0:
            share = split_dataset_by_node(dataset, rank, n)
        else:
            share = dataset.filter(lambda _, i: i // block % n == rank, with_indices=True)
        if next(iter(share), None) is None:
            raise ValueError(
                f"dataset_path: the data set cannot be shared among {n} processes: it has no row "
                f"for rank {rank}. It must have at least {n * block} rows."
            )
        return share
    assert isinstance(dataset, Dataset)
    if len(dataset) < n:
        raise ValueError(
            f"dataset_path: the data set has {len(dataset)} rows, which cannot be shared among {n} "
            f"processes: it must have at least {n}."
        )
    rows = np.arange(len(dataset))
    return dataset.select(rows[rows // min(block, len(dataset) // n) % n == rank])


class GatheredBatches(Iterator[torch.Tensor]):
    """The batches of all processes, concatenated.

    With each batch the processes tell each other, on their hosts, whether one of them has no batch
    or is told to stop.
    """

    def __init__(
        self, own: Iterator[torch.Tensor], group: Any, device: str, told_to_stop: Sequence[int] = ()
    ):
        self._own, self._group, self._device = own, group, device
        self._told_to_stop, self.all_told_to_stop = told_to_stop, list[int]()
        ranks = dist.get_process_group_ranks(group)
        # The group may have NCCL alone, which exchanges only what is on GPUs, after the step there.
        self._hosts: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    @override
    def __next__(self) -> torch.Tensor:
        try:
            batch, error = next(self._own), None
        # SAELens's, where there is no text or too little of it, or a file cannot be read.
        except (ValueError, OSError, StopIteration) as raised:
            batch, error = None, raised
        signal = max(self._told_to_stop, default=0)
        word = torch.tensor([error is not None, signal], dtype=torch.int32)
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._hosts)
        if word[0]:
            agree(error, self._hosts)
        if word[1]:
            self.all_told_to_stop.append(int(word[1]))
        assert batch is not None
        return gather(batch.to(self._device), self._group).flatten(0, 1)


BY_RANK = "n_dataset_processed_by_rank"
BLOCK = "store_batch_size_prompts"


def save_position(store: ActivationsStore, group: Any, device: str, checkpoint: Path) -> None:
    """Write how many rows all processes have read, in SAELens's file; rank 0 writes.

    It also writes each process's own position, for a run that deals the rows in the same way: to as
    many processes, in blocks of as many.
    """
    by_rank = gather(torch.tensor(store.n_dataset_processed, device=device), group).cpu()
    if group.rank() == 0:
        # SAELens counts a row when it asks for the next one, so each store is one behind.
        state = {"n_dataset_processed": (by_rank + 1).sum() - 1, BY_RANK: by_rank}
        state[BLOCK] = torch.tensor(store.store_batch_size_prompts)
        write_tensors(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME, state)


def load_position(store: ActivationsStore, group: Any, checkpoint: Path) -> None:
    """Skip the rows this process has read, or its part of those that all have read."""
    state = load_file(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME)
    by_rank, block = state.get(BY_RANK), state.get(BLOCK)
    is_dealt_so = block == store.store_batch_size_prompts
    if by_rank is not None and len(by_rank) == group.size() and is_dealt_so:
        n_rows = int(by_rank[group.rank()])
    else:
        n_rows = math.ceil((int(state["n_dataset_processed"]) + 1) / group.size()) - 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ACTIVATIONS_STORE_STATE_FILENAME)
        write_tensors(path, {"n_dataset_processed": torch.tensor(n_rows)})
        store.load(str(path))
