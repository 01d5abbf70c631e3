"""What a local folder holds that can be published, in the format that SAELens itself opens."""

import json
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.synthetic import RUNNER_CONFIG_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_auxk.hub.errors import HubError
from sae_lens_auxk.saelens import whitening_of

SAE_FILES = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    RUNNER_CFG_FILENAME,
    RUNNER_CONFIG_FILENAME,  # SAELens's synthetic runs name it so
)
RESULTS_FILENAME = "results.json"
_REPORT_FILES = (RESULTS_FILENAME, "report.html", "report.md", "figures/*.png")

_ID_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=-]*"


@dataclass(frozen=True)
class Source:
    """One SAE or one comparison, as it lies in a local folder.

    ``saes`` and ``reports`` go from what they are called in the repository (an SAE id, a
    file's path) to the local folder or file; ``results`` is a comparison's results.json.
    """

    saes: dict[str, Path]
    reports: dict[str, Path] = field(default_factory=dict)
    results: dict[str, Any] | None = None
    prefix: str = ""


def find_saes(folder: Path, sae_id: str | None = None) -> Source:
    """Look at a folder of an SAE, of a training checkpoint or of a comparison.

    ``sae_id`` names the SAE in the repository (default: the folder's name), or the folder in
    the repository that a comparison goes to (default: the top).

    Raises:
        HubError: no such folder, nothing in it that could be published, or a bad ``sae_id``.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder.")
    if sae_id is not None and not re.fullmatch(f"{_ID_PART}(/{_ID_PART})*", sae_id):
        raise HubError(
            f"sae_id {sae_id!r} is not allowed: it must be made of letters, digits and _ . = - , "
            "in parts divided by /."
        )
    if (folder / SAE_CFG_FILENAME).is_file():
        if not (folder / SAE_WEIGHTS_FILENAME).is_file():
            raise HubError(f"{folder} has {SAE_CFG_FILENAME} but no {SAE_WEIGHTS_FILENAME}.")
        return Source({sae_id or _as_id(folder.resolve().name): folder})
    if (folder / RESULTS_FILENAME).is_file():
        return _comparison(folder, sae_id)
    message = f"{folder} holds no SAE: it has neither {SAE_CFG_FILENAME} nor {RESULTS_FILENAME}."
    if below := sorted(str(path.parent) for path in folder.glob(f"*/{SAE_CFG_FILENAME}")):
        message += f" Folders in it that do: {', '.join(below)}."
    raise HubError(message)


def _comparison(folder: Path, prefix: str | None) -> Source:
    path = folder / RESULTS_FILENAME
    results = read_json(path)
    if results.get("version") != 1 or not isinstance(results.get("runs"), list):
        raise HubError(f"{path} is not the results of a comparison, version 1.")
    prefix = f"{prefix}/" if prefix else ""
    saes: dict[str, Path] = {}
    for run in results["runs"]:
        if run.get("status") != "finished":
            continue
        relative = PurePosixPath(run.get("folder") or "")
        local = folder / relative
        if relative.is_absolute() or ".." in relative.parts:
            raise HubError(f"{path}: run {run['name']!r} has its folder outside: {relative}.")
        if relative == PurePosixPath() or not (local / SAE_CFG_FILENAME).is_file():
            raise HubError(f"{path}: run {run['name']!r} is finished, but {local} holds no SAE.")
        sae_id = prefix + sae_id_of(run)
        if sae_id in saes:
            raise HubError(f"{path}: two runs would have the same SAE id, {sae_id}.")
        saes[sae_id] = local
    if not saes:
        raise HubError(f"{path} has no finished run yet.")
    reports = {
        prefix + file.relative_to(folder).as_posix(): file
        for pattern in _REPORT_FILES
        for file in sorted(folder.glob(pattern))
    }
    return Source(saes, reports, results, prefix)


def sae_id_of(run: dict[str, Any]) -> str:
    """The SAE id of a comparison's run: its folder, without the ``runs/`` before it."""
    return "/".join(
        map(_as_id, PurePosixPath(run["folder"].removeprefix("runs/").strip("/")).parts)
    )


def _as_id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", name).lstrip("-.=") or "sae"


def inference_folder(folder: Path, workspace: Path) -> Path:
    """The folder itself where SAELens opens it as it is, else its SAE converted in ``workspace``.

    A training checkpoint becomes what the end of its training would have saved: estimated
    activation scaling and whitening are folded into the weights.

    Raises:
        HubError: SAELens cannot open it without a plugin, and it cannot be converted.
    """
    # Every training config of SAELens has this field, and no inference config does.
    if "decoder_init_norm" in read_json(folder / SAE_CFG_FILENAME):
        _convert(folder, workspace)
        folder = workspace
    architecture = read_json(folder / SAE_CFG_FILENAME).get("architecture", "standard")
    plain = [
        name for name, (c, _) in SAE_CLASS_REGISTRY.items() if c.__module__.startswith("sae_lens.")
    ]
    if architecture not in plain:
        raise HubError(
            f"{folder} has architecture {architecture!r}, which SAELens cannot open without a "
            f"plugin: it must be one of {', '.join(plain)}."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are for whoever uses the SAE
            SAE.load_from_disk(folder)
    except Exception as error:  # any of them means that nobody else can open it either
        raise HubError(f"SAELens cannot open the SAE in {folder}: {error}") from error
    return folder


def _convert(checkpoint: Path, target: Path) -> None:
    try:
        sae: TrainingSAE[Any] = TrainingSAE.load_from_disk(checkpoint)
        scaler = ActivationScaler()
        if (checkpoint / ACTIVATION_SCALER_CFG_FILENAME).is_file():
            scaler.load(checkpoint / ACTIVATION_SCALER_CFG_FILENAME)
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if (whitening := whitening_of(scaler)) is not None:
            sae.fold_activation_whitening(
                whitening.mean, whitening.matrix, whitening.inverse_matrix
            )
        sae.save_inference_model(target)
    except Exception as error:  # an unknown architecture, other weights, a half-written file
        raise HubError(
            f"{checkpoint} is a training checkpoint that cannot be converted to an inference "
            f"model: {type(error).__name__}: {error}"
        ) from error
    for name in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME, RUNNER_CONFIG_FILENAME):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)


def samples_trained(folder: Path) -> int | None:
    """How far a checkpoint's training was, in samples (tokens); None for a trained SAE.

    Raises:
        HubError: the checkpoint is damaged.
    """
    path = folder / TRAINER_STATE_FILENAME
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", mmap=True)["n_training_samples"]
    except Exception as error:  # torch has many for a damaged file
        raise HubError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file.

    Raises:
        HubError: it cannot be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HubError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise HubError(f"{path} is no JSON object.")
    return content


def require_no_token(path: Path) -> None:
    """Raise a HubError if a JSON file holds what looks like a token of the Hub."""
    # SAELens writes all of model_from_pretrained_kwargs into its configs.
    if path.suffix == ".json" and (
        found := re.search(r"\bhf_[A-Za-z0-9]{20,}", path.read_text(encoding="utf-8"))
    ):
        raise HubError(f"{path} holds what looks like a Hub token: take out {found[0][:6]}...")
