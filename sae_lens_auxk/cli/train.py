"""``sae-lens-auxk train``."""

import time
from argparse import ArgumentError, ArgumentParser
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from math import ceil
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    TrainingSAE,
    run_evals,
)

from sae_lens_auxk.checks import nearest, require_choice, require_device
from sae_lens_auxk.cli.imports import add_import_flag, import_modules
from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.processes import n_processes, prefer_own_gpu, refuse_once
from sae_lens_auxk.saelens.checkpoints import silent_latents
from sae_lens_auxk.saelens.names import (
    SAE_TRAINING_CLASS_REGISTRY,
    ActivationScaler,
    EvalConfig,
    _parse_cfg_args,
)
from sae_lens_auxk.saelens.pretrained import sae_to_go_on_from
from sae_lens_auxk.saelens.resume import require_resumable
from sae_lens_auxk.saelens.runner_config import field_names
from sae_lens_auxk_cli import refuse


def train(args: Sequence[str]) -> int:
    """SAELens's own training command, with a summary at the end; see ``--help``."""
    if n_processes() > 1:
        prefer_own_gpu()
    try:
        cfg = _parse(args)
    # simple-parsing raises argparse's errors, and passes on those of the configs.
    except Exception as error:
        return refuse_once(error)
    if n_processes() > 1:
        # By name, so that all else works without the folder sharded/.
        return import_module("sae_lens_auxk.sharded.command").train_shared(cfg)
    # SAELens seeds nothing with its own field; a command should give the same twice.
    torch.manual_seed(cfg.seed)
    start = time.perf_counter()
    try:
        require_resumable(cfg, cfg.sae)
        trained = sae_to_go_on_from(cfg, AuxConfig)
    except (ValueError, OSError) as error:
        return refuse(str(error))
    try:
        runner = LanguageModelSAETrainingRunner(cfg, override_sae=trained)
    # A model or data set that cannot be found raises one of these, at times with pages of names.
    except (ValueError, OSError) as error:
        given = f"model_name={cfg.model_name!r}, dataset_path={cfg.dataset_path!r}"
        return refuse(f"{given} cannot be loaded: {shorten(str(error), 300)}")
    sae = runner.run()
    print(f"trained in {time.perf_counter() - start:.0f} s, model loading included")
    if cfg.n_eval_batches > 0:
        print(summary(runner, sae))
    return 0


def _parse(args: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    """Parse SAELens's config of a run; raise a ValueError for anything not allowed."""
    imports = ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        usage="sae-lens-auxk train [--import MODULE ...] [--FIELD VALUE ...]",
    )
    add_import_flag(imports)
    given, args = imports.parse_known_args(args)
    import_modules(given.imports)

    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--architecture", "--sae", default="standard")
    architecture = first.parse_known_args(args)[0].architecture
    require_choice("architecture", architecture, SAE_TRAINING_CLASS_REGISTRY)

    if not args or {"-h", "--help"} & {*args}:
        print(imports.format_help())  # SAELens's help follows
    try:
        with _errors_raised():
            cfg = _parse_cfg_args(args)
    except (ValueError, ArgumentError) as error:
        *_, unknown = str(error).partition("unrecognized arguments: ")
        if not unknown:
            raise
        flags = [f"--{name}" for names in field_names(architecture) for name in names]
        suggestion = nearest(unknown.split()[0], [*flags, "--import"])
        raise ValueError(f"{error} (with --architecture {architecture}).{suggestion}") from error
    require_device("device", cfg.device)
    given_flags = {arg.partition("=")[0] for arg in args}
    if "--dtype" in given_flags and "--sae.dtype" not in given_flags:
        # As runner_config does, and as the flag's help says; SAELens would train in float32.
        cfg.sae = replace(cfg.sae, dtype=cfg.dtype)
    return cfg


@contextmanager
def _errors_raised() -> Generator[None]:
    """argparse's errors as ValueErrors; by itself it prints all its flags and exits."""

    def error(self: ArgumentParser, message: str) -> NoReturn:  # noqa: ARG001
        raise ValueError(message)

    own, ArgumentParser.error = ArgumentParser.error, error
    try:
        yield
    finally:
        ArgumentParser.error = own


@torch.no_grad()
def summary(runner: LanguageModelSAETrainingRunner, sae: TrainingSAE[Any]) -> str:
    """Summarise a finished run in a few lines, measured by SAELens's own evaluator.

    Explained variance, L0 and the latents that stay silent are over ``n_eval_batches`` batches
    of prompts that follow the training text; the latents silent in training are over its
    last ``feature_sampling_window`` steps, from SAELens's saved sparsity.
    """
    cfg = runner.cfg
    excluded = runner.activations_store.exclude_special_tokens
    metrics, features = run_evals(
        sae,
        runner.activations_store,
        runner.model,
        ActivationScaler(),  # the runner has folded any scaling into the weights
        EvalConfig(
            batch_size_prompts=cfg.eval_batch_size_prompts,
            n_eval_sparsity_variance_batches=cfg.n_eval_batches,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        ),
        model_kwargs=cfg.model_kwargs,
        exclude_special_tokens=False if excluded is None else excluded.tolist(),
    )
    n_tokens = metrics["token_stats"]["total_tokens_eval_sparsity_variance"]
    silent = sum(density == 0 for density in features["feature_density"])
    lines = [
        f"explained variance  {metrics['reconstruction_quality']['explained_variance']:.3f}",
        f"L0                  {metrics['sparsity']['l0']:.1f}",
        f"silent latents      {silent} of {sae.cfg.d_sae} in {n_tokens} evaluated tokens",
    ]
    if cfg.output_path is not None:
        n_silent = silent_latents(Path(cfg.output_path))
        n_steps = ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
        n_steps %= cfg.feature_sampling_window
        n_train = (n_steps or cfg.feature_sampling_window) * cfg.train_batch_size_tokens
        lines[-1] += f", {n_silent} in the last {n_train} of training"
    return "\n".join(lines)
