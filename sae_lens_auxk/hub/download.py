"""Fetch an SAE from the Hub into a folder that ``SAE.load_from_disk`` opens."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, hf_hub_download
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAE

from sae_lens_auxk.hub.errors import HubError, explained, require_repo_id
from sae_lens_auxk.hub.sae_folder import SAE_FILES


def list_saes(repo_id: str, revision: str | None = None) -> list[str]:
    """The ids of the SAEs in a repository: its folders with a config and weights.

    Raises:
        HubError: there is no such repository, or it cannot be read.
    """
    require_repo_id(repo_id)
    with explained(repo_id):
        return _ids(HfApi().list_repo_files(repo_id, revision=revision))


def _ids(files: list[str]) -> list[str]:
    return sorted(
        folder
        for folder, _, name in (path.rpartition("/") for path in files)
        if name == SAE_CFG_FILENAME
        and f"{folder}/{SAE_WEIGHTS_FILENAME}" in files
        # The id becomes a folder's name, and is shown on a terminal.
        and not {"", ".", ".."} & {*folder.split("/")}
        and folder.isprintable()
    )


def download_sae(
    repo_id: str,
    sae_id: str | None = None,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Fetch one SAE into a local folder, completely or not at all.

    Args:
        repo_id: ``user/repo`` on the Hugging Face Hub.
        sae_id: which SAE; needed where the repository has several.
        output: the folder to make (default: the last part of the id, in the working folder).
        overwrite: replace an existing folder, if an SAE is all that it holds.

    Returns:
        The folder.

    Raises:
        HubError: no such repository or SAE, a folder of that name, a place that cannot be
            written to, a broken connection, or an SAE that SAELens cannot open.
    """
    require_repo_id(repo_id)
    if output is not None:
        _require_free(Path(output), overwrite)
    with explained(repo_id):
        api = HfApi()
        # One commit for all the files, whatever is pushed meanwhile.
        commit = api.repo_info(repo_id).sha
        files = api.list_repo_files(repo_id, revision=commit)
    sae_id = _choose(repo_id, sae_id, _ids(files))
    target = Path(sae_id.rpartition("/")[2] if output is None else output)
    _require_free(target, overwrite)
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace = TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}.")
    except OSError as error:
        raise HubError(f"{target} cannot be written: {error}. Choose another --output.") from error
    with workspace:
        new = Path(workspace.name) / "new"
        new.mkdir()
        for name in SAE_FILES:
            if f"{sae_id}/{name}" in files:
                with explained(repo_id):
                    # Through the cache: an interrupted download does not start over.
                    cached = hf_hub_download(repo_id, f"{sae_id}/{name}", revision=commit)
                shutil.copyfile(cached, new / name)
        try:
            SAE.load_from_disk(new)
        except Exception as error:  # a training format, an architecture of another plugin
            raise HubError(
                f"SAELens cannot open {sae_id} of {repo_id}: {type(error).__name__}: {error}"
            ) from error
        try:
            _put_in_place(new, target, Path(workspace.name) / "old")
        except OSError as error:
            raise HubError(f"{target} cannot be written: {error}.") from error
    return target


def _put_in_place(new: Path, target: Path, old: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _choose(repo_id: str, sae_id: str | None, ids: list[str]) -> str:
    if not ids:
        raise HubError(f"{repo_id} holds no SAE in SAELens's format.")
    listed = "".join(f"\n  {name}" for name in ids)
    if sae_id is None:
        if len(ids) > 1:
            raise HubError(f"{repo_id} holds {len(ids)} SAEs; name one of them:{listed}")
        return ids[0]
    if sae_id.strip("/") not in ids:
        raise HubError(f"{repo_id} holds no SAE {sae_id!r}, only:{listed}")
    return sae_id.strip("/")


def _require_free(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise HubError(f"{target} already exists: choose another --output, or use --overwrite.")
    if target.is_symlink():
        raise HubError(f"{target} is a symbolic link, which is not replaced: name its target.")
    if not target.is_dir():
        raise HubError(f"{target} is a file, not a folder.")
    # Only what a download can write again may go: everything else in there is somebody's work.
    names = {path.name for path in target.iterdir() if path.is_file() and not path.is_symlink()}
    others = sorted({path.name for path in target.iterdir()} - (names & {*SAE_FILES}))
    if others or not {SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME} <= names:
        what = f"also holds {', '.join(others[:5])}" if others else "holds no SAE"
        raise HubError(
            f"{target} {what}: --overwrite only replaces a folder with an SAE and nothing else. "
            "Choose another --output."
        )
