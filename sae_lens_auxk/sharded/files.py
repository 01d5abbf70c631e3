"""Files of a shared SAE, as one process would have written them, a block at a time.

Rank 0 writes, and never holds more of the others than one block. torch.distributed.checkpoint would
do the same in files of its own, which neither SAELens nor a run in one process could read.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import torch
import torch.distributed as dist
from sae_lens import SAETrainer
from safetensors import safe_open
from torch.utils.serialization import config as serialization

from sae_lens_auxk.files import replace_file
from sae_lens_auxk.sharded.latents import Shard

SHARDED_DIM = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0}
"""The sharded dimension of each tensor of which a process holds only its latents' part."""

BLOCK_BYTES = 2**26
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.uint8: "U8"}


def _blocks(own: torch.Tensor, dim: int | None, held: Shard) -> Iterator[torch.Tensor]:
    """On rank 0 the whole of a tensor, in blocks that follow each other; on others nothing.

    Every process must run through it.

    Args:
        own: this process's part, or the whole where ``dim`` is None.
        dim: the dimension along which it is a part.
        held: the latents of ``own``.
    """
    group, rank = held.group, held.rank
    if dim is None:
        if rank == 0:
            yield own
        return
    own = own.contiguous()
    row_bytes = own[:1].numel() * own.element_size() * (group.size() if dim == 1 else 1)
    n_rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for sender in range(group.size()) if dim == 0 else (None,):
        for mine in own.split(n_rows):
            if sender is None:
                parts = [torch.empty_like(mine) for _ in range(group.size())] if rank == 0 else None
                dist.gather(mine, parts, group=group, group_dst=0)
                if parts is not None:
                    yield torch.cat(parts, dim=1)
            elif rank == 0 and sender == 0:
                yield mine
            elif rank == 0:
                received = torch.empty_like(mine)
                dist.recv(received, group=group, group_src=sender)
                yield received
            elif rank == sender:
                dist.send(mine, group=group, group_dst=0)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], held: Shard) -> None:
    """Write the same file as ``safetensors.torch.save_file`` would for the whole tensors.

    Args:
        path: the file, on rank 0; other processes write nothing.
        tensors: this process's parts, by the names of ``SHARDED_DIM``, and what all hold.
        held: the latents of the parts.
    """
    # The order of safetensors.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    if held.rank > 0:
        for name in names:
            _exhaust(_blocks(tensors[name], SHARDED_DIM.get(name), held))
        return
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        shape = _whole_shape(tensors[name], SHARDED_DIM.get(name), held)
        begin, end = end, end + shape.numel() * tensors[name].element_size()
        dtype = _DTYPES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replace_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for block in _blocks(tensors[name], SHARDED_DIM.get(name), held):
                _write_block(file, block)


def _write_block(file: BinaryIO, block: torch.Tensor) -> None:
    flat = block.detach().contiguous().cpu().flatten()
    file.write(flat.view(torch.uint8).numpy().data)


def _exhaust(blocks: Iterator[torch.Tensor]) -> None:
    for _ in blocks:
        pass


def _whole_shape(own: torch.Tensor, dim: int | None, held: Shard) -> torch.Size:
    shape = [*own.shape]
    if dim is not None:
        shape[dim] = held.d_sae
    return torch.Size(shape)


def _part(whole: torch.Tensor, dim: int | None, held: Shard) -> torch.Tensor:
    return whole if dim is None else whole.narrow(dim, held.start, held.n).clone()


def read_safetensors(path: Path, device: torch.device, held: Shard) -> dict[str, torch.Tensor]:
    """Read only this process's parts of the tensors in a file, and the tensors that all hold."""
    tensors: dict[str, torch.Tensor] = {}
    part = slice(held.start, held.start + held.n)
    with safe_open(path, "pt", device=str(device)) as file:
        for name in file.keys():  # noqa: SIM118  (it is not a mapping)
            match SHARDED_DIM.get(name):
                case None:
                    tensors[name] = file.get_tensor(name)
                case 0:
                    tensors[name] = file.get_slice(name)[part]
                case _:
                    tensors[name] = file.get_slice(name)[:, part].contiguous()
    return tensors


# --- the trainer's state ---------------------------------------------------------------------


def write_whole_optimizer_state(trainer: SAETrainer[Any, Any]) -> None:
    """Make a trainer's optimizer save and load the state of all processes.

    On rank 0 it lies in memory-mapped files, from which ``torch.save`` writes; on others it is
    empty. The trainer keeps and saves the same data as with one process.
    """
    optimizer, held = trainer.optimizer, trainer.sae.shard
    dims = [SHARDED_DIM.get(name) for name, _ in trainer.sae.named_parameters()]

    def whole(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        folder = trainer.cfg.checkpoint_path
        state = {
            i: {key: _whole_on_disk(value, dims[i], held, folder) for key, value in of_one.items()}
            for i, of_one in state_dict["state"].items()
        }
        return {**state_dict, "state": state if held.rank == 0 else {}}

    def part(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {
            i: {
                key: _part(value, dims[i] if value.ndim else None, held)
                for key, value in of_one.items()
            }
            for i, of_one in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(whole)
    optimizer.register_load_state_dict_pre_hook(part)


def _whole_on_disk(
    own: torch.Tensor, dim: int | None, held: Shard, folder: str | None
) -> torch.Tensor:
    """The whole of a tensor on rank 0, in a file that is gone with it; on others their part."""
    if dim is None or own.ndim == 0:
        return own
    if held.rank > 0:
        _exhaust(_blocks(own, dim, held))
        return own
    shape = _whole_shape(own, dim, held)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for block in _blocks(own, dim, held):
            _write_block(file, block)  # pyright: ignore[reportArgumentType]
        file.flush()
        return torch.from_file(file.name, True, shape.numel(), dtype=own.dtype).view(shape)


def load_trainer_state(trainer: SAETrainer[Any, Any], checkpoint: Path) -> None:
    """SAELens's ``load_trainer_state``, reading only this process's part of the optimizer's state.

    :func:`write_whole_optimizer_state` must have been called on the trainer. The checkpoint may
    come from any number of processes.
    """
    cfg = trainer.cfg
    try:
        # Memory-mapped, so that the other processes' parts are never read.
        trainer.cfg = replace(cfg, device="cpu")
        with patch.object(serialization.load, "mmap", True):
            trainer.load_trainer_state(checkpoint)
    finally:
        trainer.cfg = cfg
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        setattr(trainer, name, getattr(trainer, name).clone().to(cfg.device))
