"""What ``train`` measures of an SAE at its end, by SAELens's own evaluator, and keeps beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from huggingface_hub.utils.sha import sha_fileobj
from sae_lens import SAE, LanguageModelSAETrainingRunner, run_evals

from sae_lens_auxk.checks import require_type
from sae_lens_auxk.files import read_json, write_json
from sae_lens_auxk.saelens.checkpoints import silent_latents
from sae_lens_auxk.saelens.interruption import interrupted, is_for_a_file
from sae_lens_auxk.saelens.names import (
    SAE_WEIGHTS_FILENAME,
    ActivationScaler,
    EvalConfig,
    InterruptedException,
)
from sae_lens_auxk_cli import refuse

EVALUATION_FILENAME = "evaluation.json"


class Evaluation(TypedDict):
    """``silent_latents`` fired on none of the ``tokens``, which the first numbers are of.

    ``ce_loss_score`` is (CE with zeros - CE with the SAE) / (CE with zeros - CE), on ``ce_tokens``.
    """

    explained_variance: float
    l0: float
    silent_latents: int
    tokens: int
    ce_loss: float
    ce_loss_with_sae: float
    ce_loss_score: float
    ce_tokens: int


@torch.no_grad()
def evaluate(runner: LanguageModelSAETrainingRunner, sae: SAE[Any]) -> Evaluation:
    """Measure on twice ``n_eval_batches`` batches of prompts, which follow the training text."""
    cfg = runner.cfg
    excluded = runner.activations_store.exclude_special_tokens

    def measured(**what: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return run_evals(
            sae,
            runner.activations_store,
            runner.model,
            ActivationScaler(),  # the runner has folded any scaling into the weights
            EvalConfig(batch_size_prompts=cfg.eval_batch_size_prompts, **what),
            model_kwargs=cfg.model_kwargs,
            exclude_special_tokens=False if excluded is None else excluded.tolist(),
        )

    own, features = measured(
        n_eval_sparsity_variance_batches=cfg.n_eval_batches,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    # On their own: in one call SAELens would take the losses first and then go back to the start of
    # the text, so that the other numbers would be of text that the SAE was trained on.
    model, _ = measured(n_eval_reconstruction_batches=cfg.n_eval_batches, compute_ce_loss=True)
    losses = model["model_performance_preservation"]
    return {
        "explained_variance": float(own["reconstruction_quality"]["explained_variance"]),
        "l0": float(own["sparsity"]["l0"]),
        "silent_latents": sum(density == 0 for density in features["feature_density"]),
        "tokens": own["token_stats"]["total_tokens_eval_sparsity_variance"],
        "ce_loss": float(losses["ce_loss_without_sae"]),
        "ce_loss_with_sae": float(losses["ce_loss_with_sae"]),
        "ce_loss_score": float(losses["ce_loss_score"]),
        "ce_tokens": model["token_stats"]["total_tokens_eval_reconstruction"],
    }


def measure(runner: Any, sae: Callable[[], SAE[Any]]) -> int:
    """Evaluate a finished run, say the numbers in a few lines, and keep them beside the SAE.

    Nothing that happens here is a reason to train again. The latents silent in training are over
    the samples that SAELens's saved sparsity is of, which it counts anew every
    ``feature_sampling_window``.

    Args:
        runner: the run, with the signals ``noted`` while it trained, and ``n_sparsity_samples``.
        sae: gives its SAE.

    Returns:
        The exit status.
    """
    folder = None if runner.cfg.output_path is None else Path(runner.cfg.output_path)
    there, what = "" if folder is None else f"The SAE is in {folder}; ", "it was not measured"
    try:
        if runner.noted:  # in its last step or later
            raise InterruptedException(runner.noted[0])
        if runner.cfg.n_eval_batches > 0:
            found = evaluate(runner, sae())
            lines = shown(found, runner.cfg.sae.d_sae)
            if folder is not None:
                n_silent, n_train = silent_latents(folder), runner.n_sparsity_samples
                lines["silent latents"] += f", {n_silent} in the last {n_train} of training"
            print("\n".join(f"{name:20}{value}" for name, value in lines.items()))
            what = "what was measured is not"
            if folder is not None:
                write_evaluation(folder, found)
    except (KeyboardInterrupt, InterruptedException) as raised:
        return interrupted(raised, f"{there}{what}")
    except Exception as raised:
        if isinstance(raised, ValueError | torch.OutOfMemoryError) or is_for_a_file(raised):
            return refuse(f"{str(raised).rstrip('.')}. {there}{what}.")
        raise
    return 0


def write_evaluation(folder: Path, found: Evaluation) -> None:
    """Write it beside the SAE that it is of."""
    write_json(folder / EVALUATION_FILENAME, {**found, "weights": _weights(folder)})


def read_evaluation(folder: Path) -> Evaluation | None:
    """What was measured of the SAE in a folder; None if nothing was, or of an earlier SAE there.

    Raises:
        ValueError: the file cannot be read or is damaged.
    """
    path = folder / EVALUATION_FILENAME
    if not path.is_file():
        return None
    found = read_json(path)
    require_type(str(path), found, Evaluation)
    return cast(Evaluation, found) if found.get("weights") == _weights(folder) else None


def _weights(folder: Path) -> str:
    with (folder / SAE_WEIGHTS_FILENAME).open("rb") as file:
        return sha_fileobj(file).hex()


def shown(found: Evaluation | None, d_sae: int) -> dict[str, str]:
    """The numbers as people read them, by name; "not measured" without an evaluation."""
    names = ("explained variance", "CE loss score", "CE loss", "L0", "silent latents")
    if found is None:
        return dict.fromkeys(names, "not measured")
    losses = f"{found['ce_loss_with_sae']:.3f}, and {found['ce_loss']:.3f} without the SAE"
    values = (
        f"{found['explained_variance']:.3f}",
        f"{found['ce_loss_score']:.3f}",
        f"{losses}, in {found['ce_tokens']:,} tokens",
        f"{found['l0']:.1f}",
        f"{found['silent_latents']:,} of {d_sae:,} in {found['tokens']:,} tokens",
    )
    return dict(zip(names, values, strict=True))
