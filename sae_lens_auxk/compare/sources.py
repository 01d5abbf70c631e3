"""The training data of a pass: a synthetic model or a language model.

A source belongs to a comparison. It opens a pass for each seed: the batches that all SAEs of
the pass share, held-out activations, and the metrics that need more than activations.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import load_dataset
from sae_lens import (
    SAE,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TrainingSAE,
    run_evals,
)

from sae_lens_auxk.checks import nearest, reject
from sae_lens_auxk.compare.config import Resolved
from sae_lens_auxk.compare.norms import RowFilter
from sae_lens_auxk.compare.peeking import MAX_LATENTS, NEIGHBOURS
from sae_lens_auxk.compare.prompts import Prompts
from sae_lens_auxk.compare.saelens_evals import Float32Losses, SameFeatures, SamePrompts
from sae_lens_auxk.compare.split import SPLIT_TENSORS
from sae_lens_auxk.saelens.names import (
    ActivationScaler,
    EvalConfig,
    SAETrainerConfig,
    SyntheticActivationIterator,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunnerConfig,
    eval_sae_on_synthetic_data,
    load_model,
)

HELD_OUT_SEED = 2**31
"""Added to a pass's seed for its held-out samples: they are not its training samples again."""
SHUFFLED_ROWS = 10_000
"""Size of the shuffle buffer for streamed text, in rows; text on disk is shuffled as a whole."""


class Pass(Protocol):
    """The data of one seed."""

    @property
    def trainer_config(self) -> SAETrainerConfig:
        """SAELens's config of each SAE's trainer."""
        ...

    @property
    def hook_name(self) -> str:
        """The name of the hook that the batches come from."""
        ...

    @property
    def true_features(self) -> torch.Tensor | None:
        """(n_features, d_in), or None if they are not known."""
        ...

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Endless training batches (batch_size, d_in), keyed by the name of the hook."""
        ...

    @property
    def held_out_features(self) -> list[torch.Tensor]:
        """Batches (n, n_features) of the true features' activations in the samples of
        :meth:`held_out`, sparse; none where they are not known."""
        ...

    def held_out(self) -> torch.Tensor:
        """(eval_samples, d_in): activations that are not trained on."""
        ...

    def prompts(self) -> Prompts | None:
        """Held-out prompts of the language model, the same for every seed."""
        ...

    @property
    def measured_at_once(self) -> int:
        """Threads that :meth:`metrics` may be called from."""
        ...

    def metrics(self, sae: SAE[Any]) -> dict[str, float]:
        """Further metrics of an inference SAE that this kind of data allows."""
        ...


class Source(Protocol):
    """Where the data of a comparison comes from."""

    d_in: int

    def describe(self) -> dict[str, Any]:
        """The entry ``data`` of results.json."""
        ...

    def open(self, seed: int, saes: Mapping[str, TrainingSAE[Any]]) -> Pass:
        """The data of a seed, for these SAEs."""
        ...


def source_of(comparison: Resolved) -> Source:
    """The source that a resolved comparison names; loads its model."""
    return LanguageModel(comparison) if comparison.model_name else Synthetic(comparison)


# --- synthetic models ------------------------------------------------------------------------


class Synthetic:
    """SAELens's synthetic models: sums of known features."""

    def __init__(self, comparison: Resolved):
        self._comparison = comparison
        self._config: SyntheticModelConfig | str | None = None
        self.model = self._load(seed=comparison.seeds[0])
        self.d_in = self.model.cfg.hidden_dim

    def _load(self, seed: int) -> SyntheticModel:
        config = self._comparison.synthetic_model_config(seed)
        # A model with its own seed is the same in every pass, and can take minutes to make.
        if config != self._config:
            self._config = config
            try:
                self.model = SyntheticModel.load_from_source(config, device=self._comparison.device)
            except OSError as error:
                raise ValueError(f"synthetic_model={config!r} cannot be loaded: {error}") from error
        return self.model

    def describe(self) -> dict[str, Any]:
        cfg = self.model.cfg
        return {
            "kind": "synthetic",
            "description": (
                f"synthetic model: {cfg.num_features} features in {cfg.hidden_dim} dimensions"
            ),
            "synthetic_model": cfg.to_dict(),
        }

    def open(self, seed: int, saes: Mapping[str, TrainingSAE[Any]]) -> Pass:
        comparison = self._comparison
        config = SyntheticSAERunnerConfig(
            synthetic_model=self.model.cfg,
            sae=next(iter(saes.values())).cfg,
            training_samples=comparison.training_samples,
            batch_size=comparison.batch_size,
            lr=comparison.lr,
            device=comparison.device,
            autocast_sae=comparison.autocast,
            dead_feature_window=comparison.dead_feature_window,
            logger=LoggingConfig(log_to_wandb=False),
        )
        model = self._load(seed)
        held_out, row_filter = self._hold_out(model, seed)
        torch.manual_seed(seed)
        return SyntheticPass(
            comparison, model, config.to_sae_trainer_config(), held_out, row_filter
        )

    @torch.no_grad()
    def _hold_out(
        self, model: SyntheticModel, seed: int
    ) -> tuple[list[torch.Tensor], RowFilter | None]:
        """The features' activations in the held-out samples that stay, and what leaves out rows."""
        comparison = self._comparison
        torch.manual_seed(seed + HELD_OUT_SEED)
        sizes = map(len, torch.arange(comparison.eval_samples).split(comparison.batch_size))
        features = [model.activation_generator(size).to_sparse() for size in sizes]
        if comparison.max_norm_multiple is None:
            return features, None
        rows = [model.feature_dict(batch.to_dense()) for batch in features]
        row_filter = RowFilter(torch.cat(rows), comparison.max_norm_multiple)
        stay = map(row_filter.keeps, rows)
        return [
            batch.to_dense()[mask].to_sparse() for batch, mask in zip(features, stay, strict=True)
        ], row_filter


@dataclass
class SyntheticPass:
    """A synthetic model and the samples of one seed."""

    comparison: Resolved
    model: SyntheticModel
    trainer_config: SAETrainerConfig
    held_out_features: list[torch.Tensor]
    row_filter: RowFilter | None = None
    hook_name: str = "synthetic"

    @property
    def true_features(self) -> torch.Tensor:
        return self.model.feature_dict.feature_vectors.detach()

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        batches: Iterator[torch.Tensor] = SyntheticActivationIterator(
            self.model.feature_dict,
            self.model.activation_generator,
            batch_size=self.trainer_config.train_batch_size_samples,
        )
        if self.row_filter is not None:
            batches = self.row_filter.full_batches(batches)
        return ({self.hook_name: batch} for batch in batches)

    @torch.no_grad()
    def held_out(self) -> torch.Tensor:
        features = (batch.to_dense() for batch in self.held_out_features)
        return torch.cat([self.model.feature_dict(batch) for batch in features])

    def prompts(self) -> None:
        return None

    @property
    def measured_at_once(self) -> int:
        # Most of the time is MCC's, on one core. Each holds a few (d_sae, n_features) tensors, or
        # those of the split, (d_sae, measured latents), here of no more than 16 GiB in all.
        d_sae, n_features = self.comparison.d_sae, self.true_features.shape[0]
        n_latents = min(d_sae, (1 + NEIGHBOURS) * MAX_LATENTS)
        bytes_each = 4 * d_sae * max(6 * n_features, SPLIT_TENSORS * n_latents)
        return max(1, min(8, os.cpu_count() or 1, 2**34 // bytes_each))

    def metrics(self, sae: SAE[Any]) -> dict[str, float]:
        """SAELens's own evaluation against the true features, on the same samples every time."""
        result = eval_sae_on_synthetic_data(
            sae,
            self.model.feature_dict,
            SameFeatures(self.held_out_features),  # type: ignore[arg-type]
            num_samples=self.comparison.eval_samples,
            batch_size=self.trainer_config.train_batch_size_samples,
        )
        return {
            "f1": result.classification.f1_score,
            "mcc": result.mcc,
            "precision": result.classification.precision,
            "recall": result.classification.recall,
            "uniqueness": result.uniqueness,
            **_left_out(self.row_filter),
        }


# --- language models -------------------------------------------------------------------------


class LanguageModel:
    """Activations of a language model on text, by SAELens's ``MultiSAETrainingRunner``."""

    def __init__(self, comparison: Resolved):
        self._comparison = comparison
        given = comparison.language_model
        try:
            self.model = load_model(
                comparison.model_class_name,
                comparison.model_name or "",
                device=given.get("llm_device") or comparison.device,
                model_from_pretrained_kwargs=given.get("model_from_pretrained_kwargs"),
            )
        except (OSError, ValueError) as error:
            name = comparison.model_name
            raise ValueError(f"model_name={name!r} cannot be loaded: {error}") from error
        n_layers: Any = getattr(getattr(self.model, "cfg", None), "n_layers", 0)
        self.hook_name = comparison.hook_name or f"blocks.{n_layers // 2}.hook_resid_pre"
        self.d_in = self._width()
        # Of a folder of tokens SAELens asks the Hub who made them, and a path is no name there.
        self._dataset: Any = None
        if comparison.dataset_path and Path(comparison.dataset_path).is_dir():
            streaming = given.get("streaming", True)
            self._dataset = load_dataset(
                comparison.dataset_path, split="train", streaming=streaming
            )

    @torch.no_grad()
    def _width(self) -> int:
        """The size of the activations at the hook; a ValueError if there is no such hook."""
        if self.hook_name not in self.model.hook_dict:
            raise reject(
                "hook_name",
                self.hook_name,
                f"a hook point of {self._comparison.model_name}."
                f"{nearest(self.hook_name, self.model.hook_dict)}",
            )
        token = torch.zeros((1, 1), dtype=torch.long, device=next(self.model.parameters()).device)
        _, cache = self.model.run_with_cache(token, names_filter=[self.hook_name])
        return cache[self.hook_name].shape[-1]

    def describe(self) -> dict[str, Any]:
        comparison = self._comparison
        return {
            "kind": "language_model",
            "description": (
                f"{comparison.model_name}, {self.hook_name}, text {comparison.dataset_path}"
            ),
            "model_name": comparison.model_name,
            "hook_name": self.hook_name,
            "dataset_path": comparison.dataset_path,
            "d_in": self.d_in,
        }

    def open(self, seed: int, saes: Mapping[str, TrainingSAE[Any]]) -> Pass:
        comparison = self._comparison
        own: dict[str, Any] = {
            "saes": {name: sae.cfg for name, sae in saes.items()},
            "hook_names": self.hook_name,
            "model_name": comparison.model_name,
            "model_class_name": comparison.model_class_name,
            "dataset_path": comparison.dataset_path,
            "context_size": comparison.context_size,
            "training_tokens": comparison.training_samples,
            "train_batch_size_tokens": comparison.batch_size,
            "lr": comparison.lr,
            "device": comparison.device,
            "autocast": comparison.autocast,
            "dead_feature_window": comparison.dead_feature_window,
            "seed": seed,
            "output_path": None,
            "checkpoint_path": None,
            "logger": LoggingConfig(log_to_wandb=False),
        }
        config = MultiSAETrainingRunnerConfig(**comparison.language_model, **own)
        torch.manual_seed(seed)
        try:
            runner = MultiSAETrainingRunner(
                config,
                override_dataset=self._dataset,
                override_model=self.model,
                override_saes=dict(saes),
            )
        except TypeError as error:  # SAELens does not check the types of its fields
            if not comparison.language_model:
                raise
            given = f"language_model={comparison.language_model!r}"
            raise ValueError(f"{given} cannot be used: {error}") from error
        # run() does this before training; without it a saved SAE would not name its model.
        runner._set_sae_metadata()
        return LanguageModelPass(comparison, runner)


class LanguageModelPass:
    """A language model and its text: the first rows held out, the others in the seed's order."""

    def __init__(self, comparison: Resolved, runner: MultiSAETrainingRunner):
        self.trainer_config = runner.cfg.to_sae_trainer_config()
        self.hook_name = next(iter(runner.cfg.hook_names_per_sae.values()))
        self.true_features = None
        self.held_out_features: list[torch.Tensor] = []
        self._runner = runner
        store: Any = runner.activations_store
        try:
            held_out, self._tokens = self._hold_out(comparison.eval_samples)
            store.dataset = _after(store.n_dataset_processed + 1, store.dataset)
        except StopIteration as error:
            path, n = comparison.dataset_path, comparison.eval_samples
            raise ValueError(
                f"dataset_path={path!r} is too short: after eval_samples={n} tokens and the "
                "prompts of the CE loss are held out, no row is left to train on."
            ) from error
        self._held_out, self._row_filter = held_out, None
        if comparison.max_norm_multiple is not None:
            self._row_filter = RowFilter(held_out, comparison.max_norm_multiple)
            self._held_out = held_out[self._row_filter.keeps(held_out)]
        # SAELens does not give its seed to the data set.
        store.shuffle_input_dataset(runner.cfg.seed, SHUFFLED_ROWS)
        store.iterable_sequences = store._iterate_tokenized_sequences()
        self._batches = store.get_multi_hook_data_loader()

    def _hold_out(self, n_rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(n_rows, d_in) activations from the beginning of the text, and the prompts after them."""
        cfg, store = self._runner.cfg, self._runner.activations_store
        rows: list[torch.Tensor] = []
        while sum(len(part) for part in rows) < n_rows:
            batch = store._get_filtered_multi_hook_llm_batch(raise_on_epoch_end=True)
            rows.append(batch[self.hook_name].cpu())
        size = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
        prompts = [store.get_batch_tokens(size, True) for _ in range(cfg.n_eval_batches)]
        return torch.cat(rows)[:n_rows], prompts

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        if self._row_filter is None:
            return iter(self._batches)
        rows = (batch[self.hook_name] for batch in self._batches)
        return ({self.hook_name: kept} for kept in self._row_filter.full_batches(rows))

    def held_out(self) -> torch.Tensor:
        return self._held_out

    def prompts(self) -> Prompts:
        """Those of the CE loss, and of them the tokens that an SAE is trained on."""
        cfg, store = self._runner.cfg, self._runner.activations_store
        tokens = torch.cat(self._tokens)
        trained_on = torch.zeros_like(tokens, dtype=torch.bool)
        trained_on[:, slice(*cfg.seqpos_slice)] = True
        if store.exclude_special_tokens is not None:
            trained_on &= ~torch.isin(tokens, store.exclude_special_tokens.to(tokens.device))
        return Prompts(
            self._runner.model,
            self.hook_name,
            tokens,
            trained_on,
            self._row_filter,
            cfg.model_kwargs,
        )

    @property
    def measured_at_once(self) -> int:
        return 1  # there is one language model, with one set of hooks

    def metrics(self, sae: SAE[Any]) -> dict[str, float]:
        """SAELens's CE loss recovered, on the same prompts every time, averaged in float32."""
        cfg, store = self._runner.cfg, self._runner.activations_store
        excluded = store.exclude_special_tokens
        metrics, _ = run_evals(
            sae,
            SamePrompts(self._tokens),  # type: ignore[arg-type]
            Float32Losses(self._runner.model, self._row_filter),  # type: ignore[arg-type]
            ActivationScaler(),  # any scaling has been folded into the weights
            EvalConfig(compute_ce_loss=True, n_eval_reconstruction_batches=len(self._tokens)),
            model_kwargs=cfg.model_kwargs,
            exclude_special_tokens=False if excluded is None else excluded.tolist(),
        )
        score = metrics["model_performance_preservation"]["ce_loss_score"]
        return {"ce_loss_recovered": score, **_left_out(self._row_filter)}


def _left_out(row_filter: RowFilter | None) -> dict[str, float]:
    return {} if row_filter is None else {"rows_left_out": row_filter.share_left_out}


def _after(n_rows: int, dataset: Any) -> Any:
    """The rows after the first ``n_rows``; a StopIteration if there are none."""
    try:
        rest = dataset.skip(n_rows)
        next(iter(rest))
    except IndexError as error:  # of a data set on disk
        raise StopIteration from error
    return rest
