"""Find the SAEs in a local folder that can be published, in SAELens's own format."""

import re
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any

import torch
from sae_lens import TrainingSAE

from sae_lens_auxk import files
from sae_lens_auxk.compare.files import REPORT_FILES, RESULTS_FILENAME, RUNS_FOLDER, read_results
from sae_lens_auxk.compare.schema import Results, Run
from sae_lens_auxk.hub.errors import HubError
from sae_lens_auxk.saelens.checkpoints import fold_scaling_beside, open_sae, silent_latents
from sae_lens_auxk.saelens.evaluation import EVALUATION_FILENAME
from sae_lens_auxk.saelens.names import (
    RUNNER_CFG_FILENAME,
    RUNNER_CONFIG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_CLASS_REGISTRY,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)

SAE_FILES = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    RUNNER_CFG_FILENAME,
    EVALUATION_FILENAME,
    RUNNER_CONFIG_FILENAME,  # SAELens's synthetic runs name it so
)

CARD = "README.md"
OTHER_FILES = (CARD, *REPORT_FILES)
"""Names allowed at the top of a repository in addition to SAEs."""

_ID_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=-]*"


@dataclass(frozen=True)
class Publishable:
    """One SAE or one comparison in a local folder.

    Attributes:
        saes: local folders, by SAE id in the repository.
        reports: local files, by path in the repository.
        results: a comparison's results.json.
        prefix: the folder in the repository that a comparison goes to, with a slash at its end.
    """

    saes: dict[str, Path]
    reports: dict[str, Path] = field(default_factory=dict)
    results: Results | None = None
    prefix: str = ""


def find_saes(folder: Path, sae_id: str | None = None) -> Publishable:
    """Look at the folder of an SAE, a training checkpoint or a comparison.

    Args:
        folder: the local folder.
        sae_id: the SAE's name in the repository (default: the folder's name). For a comparison,
            the folder in the repository that it goes to (default: the top).

    Raises:
        HubError: there is no such folder, it holds nothing that can be published, or the
            ``sae_id`` is not allowed.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder.")
    if sae_id is not None and not re.fullmatch(f"{_ID_PART}(/{_ID_PART})*", sae_id):
        raise HubError(
            f"sae_id {sae_id!r} is not allowed: it must consist of letters, digits and _ . = - , "
            "in parts separated by /."
        )
    if (folder / SAE_CFG_FILENAME).is_file():
        if not (folder / SAE_WEIGHTS_FILENAME).is_file():
            raise HubError(f"{folder} has {SAE_CFG_FILENAME} but no {SAE_WEIGHTS_FILENAME}.")
        _require_inside(folder, folder, SAE_FILES)
        return Publishable({_free_id(sae_id or _as_id(folder.resolve().name)): folder})
    if (folder / RESULTS_FILENAME).is_file():
        return _comparison(folder, sae_id)
    message = f"{folder} holds no SAE: it has neither {SAE_CFG_FILENAME} nor {RESULTS_FILENAME}."
    if below := sorted(str(path.parent) for path in folder.glob(f"*/{SAE_CFG_FILENAME}")):
        message += f" Folders in it that do: {', '.join(below)}."
    raise HubError(message)


def _comparison(folder: Path, prefix: str | None) -> Publishable:
    path = folder / RESULTS_FILENAME
    try:
        results = read_results(folder)
    except ValueError as error:
        raise HubError(str(error)) from error
    prefix = f"{_free_id(prefix)}/" if prefix else ""
    saes: dict[str, Path] = {}
    for run in results["runs"]:
        if run.get("status") != "finished":
            continue
        relative = PurePosixPath(str(run.get("folder") or ""))
        local = folder / relative
        if relative.is_absolute() or ".." in relative.parts:
            raise HubError(f"{path}: run {run.get('name')!r} has a folder outside: {relative}.")
        if relative == PurePosixPath() or not (local / SAE_CFG_FILENAME).is_file():
            raise HubError(
                f"{path}: run {run.get('name')!r} is finished, but {local} holds no SAE."
            )
        sae_id = prefix + sae_id_of(run)
        if sae_id in saes:
            raise HubError(f"{path}: two runs would have the same SAE id, {sae_id}.")
        _require_inside(folder, local, SAE_FILES)
        saes[sae_id] = local
    if not saes:
        raise HubError(f"{path} has no finished run yet.")
    reports = {
        prefix + file.relative_to(folder).as_posix(): file
        for pattern in REPORT_FILES
        for file in sorted(folder.glob(pattern))
    }
    _require_inside(folder, folder, (path.relative_to(folder) for path in reports.values()))
    return Publishable(saes, reports, results, prefix)


def _require_inside(folder: Path, parent: Path, names: Iterable[str | Path]) -> None:
    """Raise a HubError if a symbolic link would publish a file from outside ``folder``."""
    for file in (parent / name for name in names):
        target = file.resolve()
        if file.exists() and not target.is_relative_to(folder.resolve()):
            raise HubError(
                f"{file} leads out of {folder}, to {target}, by a symbolic link. If that file "
                "may be published, copy it there (cp -L)."
            )


def sae_id_of(run: Run) -> str:
    """The SAE id of a comparison's finished run: its folder, without the leading ``runs/``."""
    below = (run["folder"] or "").removeprefix(f"{RUNS_FOLDER}/").strip("/")
    return "/".join(map(_as_id, PurePosixPath(below).parts))


def _free_id(sae_id: str) -> str:
    first = sae_id.split("/")[0]
    if first in OTHER_FILES:
        raise HubError(
            f"sae_id {sae_id!r} is not allowed: a repository has a file {first}. Choose another."
        )
    return sae_id


def _as_id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", name).lstrip("-.=") or "sae"


def inference_folder(folder: Path, workspace: Path) -> Path:
    """A folder that SAELens opens: this one, or ``workspace`` with a converted checkpoint.

    A training checkpoint becomes the model that a run ending there would save: estimated activation
    scaling and whitening are folded into the weights.

    Raises:
        HubError: SAELens cannot open the SAE without a plugin, or the checkpoint cannot be
            converted or lacks its scaling.
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
            warnings.simplefilter("ignore")  # they are meant for users of the SAE
            open_sae(folder)
    except Exception as error:  # whatever it is, nobody else could open the SAE either
        raise HubError(f"SAELens cannot open the SAE in {folder}: {_shown(error)}") from error
    try:
        silent_latents(folder)
    except Exception as error:  # safetensors' own, or another content
        raise HubError(f"{folder / SPARSITY_FILENAME} cannot be read: {_shown(error)}") from error
    return folder


def _convert(checkpoint: Path, target: Path) -> None:
    try:
        sae: TrainingSAE[Any] = TrainingSAE.load_from_disk(checkpoint)
        fold_scaling_beside(sae, checkpoint)
        sae.save_inference_model(target)
    except Exception as error:  # an unknown architecture, other weights, a half-written file
        raise HubError(
            f"{checkpoint} is a training checkpoint that cannot be converted to an inference "
            f"model: {_shown(error)}"
        ) from error
    for name in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME, RUNNER_CONFIG_FILENAME):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)


def _shown(error: Exception) -> str:
    """In one line; torch's own have many."""
    return f"{type(error).__name__}: {shorten(str(error), 300)}"


def samples_trained(folder: Path) -> int | None:
    """Samples (tokens) that a checkpoint had been trained on; None if it is not a checkpoint.

    Raises:
        HubError: the checkpoint is damaged.
    """
    path = folder / TRAINER_STATE_FILENAME
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", mmap=True)["n_training_samples"]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise HubError(f"{path} cannot be read: {_shown(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        HubError: the file cannot be read, or does not hold an object.
    """
    try:
        content = files.read_json(path)
    except ValueError as error:
        raise HubError(str(error)) from error
    if not isinstance(content, dict):
        raise HubError(f"{path} does not hold a JSON object.")
    return content
