"""``resume_from_checkpoint``: a run goes on only from a checkpoint of the same SAE.

SAELens loads weights and counters into whatever SAE a run's config describes, without a look at the
config in the checkpoint.
"""

import json
from pathlib import Path
from typing import Any

from sae_lens_auxk.files import read_json
from sae_lens_auxk.saelens.names import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens_auxk.saelens.pretrained import stock_architecture

FILES = (
    *(SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME),
    *(ACTIVATION_SCALER_CFG_FILENAME, ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME),
)

SAME_IN_SAE = (
    *("d_in", "d_sae", "dtype", "k", "matryoshka_widths", "rescale_acts_by_decoder_norm"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
)
"""The fields of an SAE that say which function its weights compute, beside its architecture. All
others may change: they are about how it is trained, or about weights that do not exist yet."""

SAME_IN_RUN = ("model_name", "hook_name", "hook_head_index")
"""The fields of a run that say which activations an SAE is of."""


def require_resumable(run: Any, sae: Any) -> None:
    """Refuse a run whose ``resume_from_checkpoint`` is not whole, or is of another SAE.

    Args:
        run: the run's config.
        sae: the config of the SAE that the checkpoint would be loaded into.

    Raises:
        ValueError: it names the files that are missing, or each field that differs with both
            values.
    """
    if run.resume_from_checkpoint is None:
        return
    folder = Path(run.resume_from_checkpoint)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} is no complete checkpoint: there is no "
            f"{', '.join(missing)}. Use the folder of one that was written completely."
        )
    there = read_json(folder / RUNNER_CFG_FILENAME)
    differing = _differing(vars(run), there, SAME_IN_RUN)
    require_same_sae(sae, folder, differing)


def require_same_sae(sae: Any, checkpoint: str | Path, differing: list[str] | None = None) -> None:
    """Raise a ValueError if the weights of a checkpoint would compute another function in an SAE.

    Args:
        sae: the SAE's config.
        checkpoint: the checkpoint's folder.
        differing: what else differs.
    """
    there = read_json(Path(checkpoint) / SAE_CFG_FILENAME)
    here = {**sae.to_dict(), "architecture": sae.architecture()}
    same = SAME_IN_SAE
    if there.get("architecture") != stock_architecture(type(sae)):
        same = ("architecture", *same)
    differing = [*_differing(here, there, same), *(differing or [])]
    if differing:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} is of another SAE: {', '.join(differing)}."
            " Give it these values, or take its weights into a new run with from_pretrained_path."
        )


def _differing(here: Any, there: Any, names: tuple[str, ...]) -> list[str]:
    """The fields that both configs have with different values."""
    both = [(name, here[name], there[name]) for name in names if name in here and name in there]
    return [
        f"{name}={a!r} must be {b!r}" for name, a, b in both if _plain(name, a) != _plain(name, b)
    ]


def _plain(name: str, value: Any) -> str:
    if name == "model_name":  # a model's folder may have moved
        return Path(value).name
    return json.dumps(value, default=str).replace("torch.", "")
