"""A training SAE whose latents are shared among processes."""

import json
from copy import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sae_lens import TrainingSAE
from typing_extensions import override

from sae_lens_auxk.architectures import ARCHITECTURES
from sae_lens_auxk.files import write_text
from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.ops.encoder import Encoder, SelectedActivations
from sae_lens_auxk.ops.selection import Pairs
from sae_lens_auxk.saelens.names import (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    get_sae_training_class,
)
from sae_lens_auxk.saelens.resume import require_same_sae
from sae_lens_auxk.sharded.collectives import sum_in_backward, sum_over
from sae_lens_auxk.sharded.files import read_safetensors, write_safetensors
from sae_lens_auxk.sharded.latents import (
    OwnPairs,
    Shard,
    ShardedAccess,
    ShardedDecoder,
    ShardedInputs,
)
from sae_lens_auxk.sharded.trainer import ShardedTrainer
from sae_lens_auxk.step.inputs import UsableInput
from sae_lens_auxk.step.resampling import NewLatents
from sae_lens_auxk.step.sparse import SparseForward, SparseTopK, with_sparse_step

if TYPE_CHECKING:
    _Base = SparseTopK
else:
    _Base = object

ROWS_AT_ONCE = 65_536


def sharded_sae(cfg: Any, group: Any) -> TrainingSAE[Any]:
    """A training SAE of ``cfg`` whose latents are shared among the processes of a group.

    All processes of the group call this, with the same config.

    Args:
        cfg: the config, with the ``d_sae`` of all processes together.
        group: a ``torch.distributed`` process group.

    Raises:
        ValueError: the config is of an architecture or a ``dtype`` that cannot be shared, or
            ``d_sae`` is not a multiple of the number of processes.
    """
    training_class = get_sae_training_class(cfg.architecture())[0]
    require_shardable(cfg, group.size())
    return _sharded(training_class)(cfg, Shard(group, cfg.d_sae))


def require_shardable(cfg: Any, n_processes: int) -> None:
    """Raise a ValueError that names what in a config cannot be shared among processes."""
    allowed = [name for name, (sae, *_) in ARCHITECTURES.items() if issubclass(sae, SparseTopK)]
    if cfg.architecture() not in allowed:
        raise ValueError(
            f"architecture={cfg.architecture()!r} cannot be shared among processes: it must be one "
            f"of {', '.join(allowed)}."
        )
    if cfg.d_sae % n_processes:
        raise ValueError(
            f"d_sae={cfg.d_sae} cannot be shared among {n_processes} processes: it must be a "
            f"multiple of {n_processes}."
        )
    if cfg.dtype not in ("float32", "float64"):
        raise ValueError(
            f"dtype={cfg.dtype!r} is not allowed with more than one process: it must be float32 or "
            "float64 (autocast may be on)."
        )
    if not cfg.aux_loss.shardable:
        raise ValueError(
            f"aux_variant={cfg.aux_variant!r} is not known to be right where latents are shared "
            "among processes: register it with shardable=True once it sums over latents with "
            "inputs.total and compares them with inputs.largest_of."
        )


@cache
def _sharded(training_class: type[Any]) -> type[Any]:
    return with_sparse_step(
        type(f"Sharded{training_class.__name__}", (Sharded, training_class), {})
    )


class Sharded(_Base):
    """Mixin placed before a training SAE of the TopK family; see :func:`sharded_sae`.

    The parameters are those of this process's latents. ``cfg.d_sae``, ``tokens_since_fired`` and
    the ``feature_acts`` of a step cover all latents: every process knows which latents fired, so
    SAELens's trainer counts correctly in each. ``hidden_pre`` of a step's output is this process's.
    """

    record_class: ClassVar[type[AuxLossInputs]] = ShardedInputs
    trainer_class: ClassVar[type[Any] | None] = ShardedTrainer

    def __init__(self, cfg: Any, shard: Shard):
        self.shard, self.first_latent = shard, shard.start
        super().__init__(cfg)

    @override
    def initialize_weights(self) -> None:
        """The rows and columns that SAELens draws for these latents, on the CPU.

        Rank 0's random state is used. The rows of other processes are drawn and discarded, so the
        weights equal those of one process on the CPU, and no process ever holds them all.
        """
        state = torch.get_rng_state().to(self.device)  # NCCL takes no tensor on the CPU
        torch.distributed.broadcast(state, src=0, group=self.shard.group)
        torch.set_rng_state(state.cpu())
        cfg, device = self.cfg, self.device
        self.cfg, self.device = copy(cfg), torch.device("cpu")
        self.cfg.d_sae = self.shard.n
        self._draw(self.shard.start)
        super().initialize_weights()
        self._draw(cfg.d_sae - self.shard.start - self.shard.n)
        self.cfg, self.device = cfg, device
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    def _draw(self, n_rows: int) -> None:
        """Draw rows of W_dec as SAELens does and discard them."""
        for first in range(0, n_rows, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, n_rows - first)
            torch.nn.init.kaiming_uniform_(torch.empty(rows, self.cfg.d_in, dtype=self.dtype))

    @override
    def _sparse_forward(self, batch: UsableInput) -> SparseForward:
        forward = super()._sparse_forward(batch)
        if forward is None:
            raise RuntimeError(
                "an SAE shared among processes supports only the sparse training step: no hooks "
                "on the SAE, no input with a gradient, no methods of your own, and not "
                "SAE_LENS_AUXK_OPS=dense"
            )
        return forward

    @override
    def _decoder(self, autocast: torch.dtype | None) -> ShardedDecoder:
        rescaled = self.cfg.rescale_acts_by_decoder_norm
        return ShardedDecoder(self.W_dec, rescaled, autocast, self.shard)

    @override
    def _encoder(self, sae_in: torch.Tensor, b_dec: torch.Tensor | None) -> Encoder:
        # All processes use the parameter, each with its own latents.
        b_dec = None if b_dec is None else sum_in_backward(b_dec, self.shard.group)
        return super()._encoder(sae_in, b_dec)

    @override
    def _access(self, encoder: Encoder) -> ShardedAccess:
        return ShardedAccess(encoder, self.nearness, self.shard)

    @override
    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        h, selected = super()._select(hidden_pre)
        return self.shard.choose(h, self.nearness(h), selected, int(self.cfg.k * len(hidden_pre)))

    @override
    def fire(self, h: torch.Tensor) -> torch.Tensor:
        # A candidate that was not chosen is -inf.
        return super().fire(h.where(h != -torch.inf, 0))

    @override
    def _activations(
        self, values: torch.Tensor, h: torch.Tensor, selected: Pairs, encoder: Encoder
    ) -> torch.Tensor:
        assert isinstance(selected, OwnPairs)
        fired = selected.fired
        acts = self.fire(fired.h.to(self.W_enc.dtype))
        shape = torch.Size((len(encoder.hidden_pre), self.cfg.d_sae))
        return SelectedActivations.of(fired.rows, fired.latents, acts, shape)

    @override
    def sums_of_lengths(self, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoder, decoder = super().sums_of_lengths(self.shard.local(among))
        return sum_over(encoder, self.shard.group), sum_over(decoder, self.shard.group)

    @override
    def _write(self, new: NewLatents, moments: list[tuple[torch.Tensor, int]]) -> None:
        mine = self.shard.is_local(new.latents)
        local = NewLatents(
            new.latents[mine] - self.shard.start, new.encoder[mine], new.decoder[mine], new.step
        )
        super()._write(local, moments)

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save, on rank 0, the files that one process would. Every process must call this."""
        state = self.state_dict()
        self.process_state_dict_for_saving(state)
        return self._save(Path(path), state, self.cfg.to_dict())

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Like :meth:`save_model`, but save a plain SAELens SAE, which needs no plugin."""
        state = self.state_dict()
        self.process_state_dict_for_saving_inference(state)
        return self._save(Path(path), state, self.cfg.get_inference_sae_cfg_dict())

    def _save(
        self, path: Path, state: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> tuple[Path, Path]:
        weights, cfg = path / SAE_WEIGHTS_FILENAME, path / SAE_CFG_FILENAME
        if self.shard.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            write_text(cfg, json.dumps(config))
        write_safetensors(weights, state, self.shard)
        return weights, cfg

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Load this process's part of a checkpoint from any number of processes."""
        require_same_sae(self.cfg, checkpoint_path)
        path = Path(checkpoint_path) / SAE_WEIGHTS_FILENAME
        state = read_safetensors(path, self.device, self.shard)
        self.process_state_dict_for_loading(state)
        self.load_state_dict(state)

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        raise self._refusal()

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        raise self._refusal()

    @staticmethod
    def _refusal() -> NotImplementedError:
        return NotImplementedError(
            "this process holds only a share of the latents: save the SAE with "
            "save_inference_model, and open it with SAE.load_from_disk"
        )
