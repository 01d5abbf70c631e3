"""``sae-lens-auxk train``."""

import time
from argparse import SUPPRESS, ArgumentError, ArgumentParser
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from textwrap import shorten
from typing import Any, NoReturn

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SAETrainer,
    TrainingSAE,
)
from typing_extensions import override

from sae_lens_auxk.checks import nearest, require_choice, require_device
from sae_lens_auxk.cli.imports import add_import_flag, import_modules
from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.processes import n_processes, prefer_own_gpu
from sae_lens_auxk.saelens.evaluation import measure
from sae_lens_auxk.saelens.interruption import (
    fit,
    how_to_go_on,
    interrupted,
    is_for_a_file,
    noted_signals,
)
from sae_lens_auxk.saelens.names import (
    SAE_TRAINING_CLASS_REGISTRY,
    InterruptedException,
    _parse_cfg_args,
)
from sae_lens_auxk.saelens.pretrained import sae_to_go_on_from
from sae_lens_auxk.saelens.resume import require_resumable
from sae_lens_auxk.saelens.runner_config import field_names
from sae_lens_auxk.saelens.start import require_activations, require_startable
from sae_lens_auxk_cli import refuse


def train(args: Sequence[str]) -> int:
    """SAELens's own training command, with a summary at the end; see ``--help``."""
    shared = n_processes() > 1
    if shared:
        prefer_own_gpu()
    cfg = error = None
    try:
        cfg = _parse(args)
    # simple-parsing raises argparse's errors, and passes on those of the configs.
    except Exception as raised:
        error = raised
    if shared:
        # By name, so that all else works without the folder sharded/.
        return import_module("sae_lens_auxk.sharded.command").train_shared(cfg, error)
    if cfg is None:
        return refuse(str(error))
    try:
        return _train(cfg)
    except (KeyboardInterrupt, InterruptedException) as raised:
        return interrupted(raised, how_to_go_on(cfg))
    except Exception as raised:
        # The former is of the text, which is read only now.
        if isinstance(raised, ValueError) or is_for_a_file(raised):
            return refuse(f"{str(raised).rstrip('.')}. {how_to_go_on(cfg)}.")
        raise


def _train(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    # SAELens seeds nothing with its own field; a command should give the same twice.
    torch.manual_seed(cfg.seed)
    start = time.perf_counter()
    try:
        require_startable(cfg)
        require_resumable(cfg, cfg.sae)
        trained = sae_to_go_on_from(cfg, AuxConfig)
    except (ValueError, OSError) as error:
        return refuse(str(error))
    try:
        runner = _Runner(cfg, override_sae=trained)
    # A model or data set that cannot be found raises one of these, at times with pages of names.
    except (ValueError, OSError) as error:
        given = f"model_name={cfg.model_name!r}, dataset_path={cfg.dataset_path!r}"
        return refuse(f"{given} cannot be loaded: {shorten(str(error), 300)}")
    try:
        require_activations(runner)
    except ValueError as error:
        return refuse(str(error))
    sae = runner.run()
    print(f"trained in {time.perf_counter() - start:.0f} s, model loading included")
    return measure(runner, lambda: sae)


class _Runner(LanguageModelSAETrainingRunner):
    """SAELens's runner, which a signal ends after a step, with a checkpoint."""

    noted: Sequence[int] = ()
    """The signals that came while it trained."""

    n_sparsity_samples: int = 0
    """The samples that the firing rates saved with the SAE are of."""

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        with noted_signals() as self.noted:
            sae = fit(trainer, self.noted)
        self.n_sparsity_samples = trainer.n_frac_active_samples
        return sae


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
        with _parser_of_ours():
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
def _parser_of_ours() -> Generator[None]:
    """SAELens's parser raises a ValueError for an error, and its help begins with the SAE's flags.

    By itself it prints all its flags and exits.
    """

    def error(self: ArgumentParser, message: str) -> NoReturn:  # noqa: ARG001
        raise ValueError(message)

    def format_help(self: ArgumentParser) -> str:
        self.usage = SUPPRESS  # sixty lines
        self._action_groups.sort(key=lambda group: "cfg.sae" not in str(group.title))
        return own[1](self)

    own = ArgumentParser.error, ArgumentParser.format_help
    ArgumentParser.error, ArgumentParser.format_help = error, format_help
    try:
        yield
    finally:
        ArgumentParser.error, ArgumentParser.format_help = own
