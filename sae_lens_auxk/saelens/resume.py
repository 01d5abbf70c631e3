"""``resume_from_checkpoint``: a run goes on only from a checkpoint of the same SAE.

SAELens loads weights and counters into whatever SAE a run's config describes, without a look at the
config in the checkpoint.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open

from sae_lens_auxk.checks import require_type
from sae_lens_auxk.files import read_json
from sae_lens_auxk.saelens.checkpoints import scaling_beside
from sae_lens_auxk.saelens.names import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens_auxk.saelens.pretrained import DEFAULTS, stock_architecture

FILES = (
    *(SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME),
    *(ACTIVATION_SCALER_CFG_FILENAME, ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME),
)

SAME_IN_SAE = (
    *("d_in", "d_sae", "dtype", "k", "matryoshka_widths", "rescale_acts_by_decoder_norm"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
)
"""The fields of an SAE that say which function its weights compute, and how exactly, beside its
architecture. All others may change: they are about how it is trained, or about weights that do not
exist yet."""

SAME_IN_RUN = ("hook_name", "hook_head_index")
"""The fields of a run that say which activations an SAE is of. The model's folder may have another
name by now, so that one is only warned about."""


class _Run(TypedDict):
    model_name: str
    hook_name: str
    hook_head_index: int | None


def require_resumable(run: Any, sae: Any) -> None:
    """Refuse a run whose ``resume_from_checkpoint`` is not whole, or is of another SAE.

    Args:
        run: the run's config.
        sae: the config of the SAE that the checkpoint would be loaded into.

    Raises:
        ValueError: it names the files that are missing or damaged, or each field that differs with
            both values.
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
    require_type(str(folder / RUNNER_CFG_FILENAME), there, _Run)
    in_run = _differing(vars(run), there, SAME_IN_RUN)
    _refuse(folder, [*_differing_in_sae(sae, folder), *in_run])
    if Path(run.model_name).name != Path(there["model_name"]).name:
        warnings.warn(
            f"model_name={run.model_name!r}, but {folder} is of {there['model_name']!r}",
            stacklevel=1,
        )
    for name in FILES:
        try:
            _open(folder / name, sae.normalize_activations)
        # Each library has its own errors for a damaged file.
        except Exception as error:
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r} is damaged: {name} cannot be read: {error}"
            ) from error


def require_same_sae(sae: Any, checkpoint: str | Path) -> None:
    """Raise a ValueError if the weights of a checkpoint would compute another function in an SAE.

    Args:
        sae: the SAE's config.
        checkpoint: the checkpoint's folder.
    """
    _refuse(checkpoint, _differing_in_sae(sae, checkpoint))


def _refuse(checkpoint: str | Path, differing: list[str]) -> None:
    if differing:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} is of another SAE: {', '.join(differing)}."
            " Give it these values, or take its weights into a new run with from_pretrained_path."
        )


def _differing_in_sae(sae: Any, checkpoint: str | Path) -> list[str]:
    path = Path(checkpoint) / SAE_CFG_FILENAME
    there = read_json(path)
    require_type(str(path), there, dict)
    there = {"dtype": "float32", **DEFAULTS, **there}
    here = {**sae.to_dict(), "architecture": sae.architecture()}
    own = (here["architecture"], stock_architecture(type(sae)))
    is_own = there.get("architecture") in own
    # Another one has other fields, which say nothing.
    names = [name for name in SAME_IN_SAE if name in here] if is_own else ["architecture"]
    if absent := [name for name in names if name not in there]:
        raise ValueError(f"{path} has no {', '.join(absent)}.")
    return _differing(here, there, names)


def _differing(here: Any, there: Any, names: Iterable[str]) -> list[str]:
    return [
        f"{name}={here[name]!r} must be {there[name]!r}"
        for name in names
        if _plain(here, name) != _plain(there, name)
    ]


def _plain(config: Any, name: str) -> Any:
    value = config[name]
    if name == "dtype":
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple):  # matryoshka_widths
        # SAELens appends d_sae, if it is not the last, when it builds the SAE.
        return [*value[:-1]] if [*value[-1:]] == [config["d_sae"]] else [*value]
    return value


def _open(path: Path, mode: str) -> None:
    """Raise an error for a damaged file, without reading the whole of a large one."""
    if path.name == ACTIVATION_SCALER_CFG_FILENAME:
        scaling_beside(mode, path.parent)
    elif path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".pt":
        torch.load(path, map_location="cpu", mmap=True)
    else:
        with safe_open(path, "pt"):
            pass
