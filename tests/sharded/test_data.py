"""How rows are dealt to processes, without processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from sae_lens_auxk.files import write_tensors
from sae_lens_auxk.sharded.data import BLOCK, BY_RANK, load_position, share_data


def shares(dataset: Any, n: int, n_prompts: int) -> list[list[int]]:
    """The rows of each rank."""
    found: list[list[int]] = []
    for rank in range(n):
        store: Any = SimpleNamespace(
            dataset=dataset,
            cached_activation_dataset=None,
            store_batch_size_prompts=n_prompts,
            train_batch_size_tokens=64,
        )
        share_data(store, SimpleNamespace(size=lambda: n, rank=lambda rank=rank: rank))
        assert store.train_batch_size_tokens == 64 // n
        found.append([row["row"] for row in store.dataset])
    return found


def rows(n: int) -> Dataset:
    return Dataset.from_dict({"row": [*range(n)]})


@pytest.mark.parametrize("streams", [False, True])
def test_rows_are_dealt_in_blocks(streams: bool) -> None:
    dataset = rows(11).to_iterable_dataset() if streams else rows(11)
    assert shares(dataset, 2, 3) == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10]]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_rows_that_alternate_go_to_all(n: int, streams: bool) -> None:
    dataset = rows(64).to_iterable_dataset() if streams else rows(64)
    found = shares(dataset, n, 4)
    assert sorted(row for share in found for row in share) == [*range(64)]
    for share in found:
        assert sum(row % 2 for row in share) == len(share) / 2


def test_a_stream_of_files_is_dealt_by_file() -> None:
    found = shares(rows(12).to_iterable_dataset(num_shards=4), 2, 5)
    assert sorted(row for share in found for row in share) == [*range(12)]
    assert [len(share) for share in found] == [6, 6]


def position(state: dict[str, Any], block: int, folder: Path) -> int:
    """The position of rank 1 of two in a run with this block."""
    found: list[int] = []

    def load(path: str) -> None:
        found.append(int(load_file(path)["n_dataset_processed"]))

    write_tensors(folder / "activations_store_state.safetensors", state)
    store: Any = SimpleNamespace(store_batch_size_prompts=block, load=load)
    load_position(store, SimpleNamespace(size=lambda: 2, rank=lambda: 1), folder)
    return found[0]


def test_a_position_is_of_rows_that_are_dealt_in_the_same_way(tmp_path: Path) -> None:
    state = {"n_dataset_processed": 60, BY_RANK: [19, 40], BLOCK: 4}
    saved = {name: torch.tensor(value) for name, value in state.items()}
    assert position(saved, 4, tmp_path) == 40
    assert position(saved, 8, tmp_path) == 30
    del saved[BY_RANK], saved[BLOCK]
    assert position(saved, 4, tmp_path) == 30


def test_every_process_gets_a_row_where_there_are_enough() -> None:
    assert shares(rows(3), 3, 32) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="has 2 rows, which cannot be shared among 3 processes"):
        shares(rows(2), 3, 32)
    with pytest.raises(ValueError, match="no row for rank 1. It must have at least 64 rows"):
        shares(rows(32).to_iterable_dataset(), 2, 32)
