"""``runner_config``: the config of a whole SAELens run from flat keywords."""

from dataclasses import fields
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from sae_lens_auxk.checks import nearest, require_choice
from sae_lens_auxk.saelens.names import SAE_TRAINING_CLASS_REGISTRY


def runner_config(architecture: str, **keywords: Any) -> LanguageModelSAERunnerConfig[Any]:
    """Build SAELens's ``LanguageModelSAERunnerConfig`` from an architecture's name and fields.

    Each keyword goes to the config with a field of that name: the SAE's, the run's, or its
    ``LoggingConfig``. ``dtype`` and ``device``, which the SAE and the run both have, go to both.

    Args:
        architecture: a name in SAELens's training registry, this package's or SAELens's own.
        keywords: fields of the SAE's config, of LanguageModelSAERunnerConfig, or of
            LoggingConfig.

    Returns:
        The config, for ``LanguageModelSAETrainingRunner(cfg).run()``.

    Raises:
        ValueError: the architecture is unknown, or a value is not allowed.
        TypeError: a keyword is not a field (the nearest name is suggested), or one is missing.

    Example:
        >>> cfg = runner_config(
        ...     architecture="auxk-topk", model_name="gpt2", hook_name="blocks.6.hook_resid_pre",
        ...     dataset_path="apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
        ...     context_size=1024,
        ...     d_in=768, d_sae=12288, k=32, aux_variant="pursuit",
        ...     training_tokens=100_000_000, n_batches_in_buffer=64,
        ...     log_to_wandb=False, verbose=False,
        ... )
        >>> cfg.sae.aux_variant, cfg.model_name, cfg.logger.log_to_wandb
        ('pursuit', 'gpt2', False)
    """
    require_choice("architecture", architecture, SAE_TRAINING_CLASS_REGISTRY)
    sae_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    sae_fields, run_fields, logger_fields = field_names(architecture)
    known = sae_fields | run_fields | logger_fields
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"{name} is not a field of {architecture}, of LanguageModelSAERunnerConfig or of "
                f"LoggingConfig.{nearest(name, known)}"
            )
    logger = {name: value for name, value in keywords.items() if name in logger_fields}
    if logger and "logger" in keywords:
        raise TypeError(f"logger and {', '.join(logger)} exclude each other: logger holds them.")
    run = {name: value for name, value in keywords.items() if name in run_fields}
    if logger:
        run["logger"] = LoggingConfig(**logger)
    sae = sae_class(**{name: value for name, value in keywords.items() if name in sae_fields})
    return LanguageModelSAERunnerConfig(sae=sae, **run)


def field_names(architecture: str) -> tuple[set[str], set[str], set[str]]:
    """The fields of an architecture's config, of a run's, and of its ``LoggingConfig``."""
    sae_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    return (
        {field.name for field in fields(sae_class)},
        {field.name for field in fields(LanguageModelSAERunnerConfig)} - {"sae"},
        {field.name for field in fields(LoggingConfig)},
    )
