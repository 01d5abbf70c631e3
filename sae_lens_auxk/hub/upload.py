"""Publishes a trained SAE, or a whole comparison, for ``SAE.from_pretrained``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from sae_lens_auxk.compare.files import RESULTS_FILENAME
from sae_lens_auxk.hub.errors import HubError, explained, require_repo_id
from sae_lens_auxk.hub.model_card import comparison_part, sae_part, with_part
from sae_lens_auxk.hub.private import publishable_file, without_user_name
from sae_lens_auxk.hub.sae_folder import (
    CARD,
    SAE_FILES,
    Publishable,
    find_saes,
    inference_folder,
    samples_trained,
)
from sae_lens_auxk.saelens.names import SAE_CFG_FILENAME


@dataclass(frozen=True)
class Upload:
    """The content of a planned or finished upload.

    Attributes:
        sizes: sizes in bytes, by path in the repository.
        card: the model card.
        unchanged: ids of the SAEs that were already complete on the Hub.
        url: the repository's address; None in a dry run.
    """

    sizes: dict[str, int]
    card: str
    unchanged: list[str]
    url: str | None


@dataclass(frozen=True)
class _Remote:
    """The repository at one commit; ``commit`` is None if there is no repository yet."""

    commit: str | None
    files: dict[str, RepoFile]
    card: str | None


def upload_sae(
    folder: str | Path,
    repo_id: str,
    sae_id: str | None = None,
    *,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Upload:
    """Publish the SAE, training checkpoint or comparison in ``folder`` on the Hugging Face Hub.

    Each SAE is one commit, so it is published completely or not at all. Files that are already on
    the Hub are not sent again, so the same call completes an interrupted upload.

    Args:
        folder: the output_path of a ``LanguageModelSAETrainingRunner``, what
            ``save_inference_model`` wrote, a training checkpoint (its inference model is
            published), or a comparison's folder with results.json.
        repo_id: ``user/repo``; created if it does not exist.
        sae_id: the SAE's name in the repository (default: the folder's name). For a
            comparison, the folder that it goes to (default: the top).
        private: create a private repository; an existing one must be private.
        overwrite: replace SAEs and reports that have the same name but differ.
        dry_run: only look at the folder. This needs no token and no network.

    Raises:
        HubError: something is not allowed or went wrong; the message says what to do. Local
            errors, a missing token and name conflicts are raised before anything is sent.
    """
    require_repo_id(repo_id)
    source = find_saes(Path(folder), sae_id)
    api = HfApi()
    remote = _Remote(None, {}, None)
    if not dry_run:
        with explained(repo_id):
            remote = _look_at(api, repo_id, private)
    with TemporaryDirectory() as workspace:
        saes = {
            name: inference_folder(path, Path(workspace) / name)
            for name, path in source.saes.items()
        }
        card = _card(repo_id, Path(folder), source, saes, remote.card)
        files = {
            name: {
                f"{name}/{file}": publishable_file(path / file, Path(workspace))
                for file in SAE_FILES
                if (path / file).is_file()
            }
            for name, path in saes.items()
        }
        local_reports = {
            path: publishable_file(local, Path(workspace)) for path, local in source.reports.items()
        }
        sizes = {
            path: local.stat().st_size
            for group in (*files.values(), local_reports)
            for path, local in group.items()
        }
        sizes[CARD] = len(card.encode())
        if dry_run:
            return Upload(sizes, card, [], None)
        changes = [_change(name, files[name], remote.files) for name in files]
        pending = [change for change in changes if change.additions or change.deletions]
        unchanged = [change.sae_id for change in changes if change not in pending]
        reports = _missing(local_reports, remote.files)
        if not overwrite:
            taken = [change.sae_id for change in changes if change.replaces]
            _refuse_to_overwrite(repo_id, [*taken, *(p for p in reports if p in remote.files)])
        with explained(repo_id):
            url = _send(api, repo_id, remote, pending, reports, card, private)
    return Upload(sizes, card, unchanged, url)


def _look_at(api: HfApi, repo_id: str, private: bool) -> _Remote:
    token = (api.whoami().get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"the Hub token {token.get('displayName', '')!r} may only read: make one with the "
            "role `write`."
        )
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        return _Remote(None, {}, None)
    if private and not info.private:
        raise HubError(f"{repo_id} already exists and is public: make it private first.")
    commit = info.sha
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    card = None
    if CARD in files:
        path = Path(hf_hub_download(repo_id, CARD, revision=commit))
        card = path.read_bytes().decode("utf-8-sig")
    return _Remote(commit, files, card)


def _card(
    repo_id: str, folder: Path, source: Publishable, saes: dict[str, Path], existing: str | None
) -> str:
    try:
        if source.results is not None:
            reports = list(source.reports)
            part = comparison_part(repo_id, saes, source.results, source.prefix, reports)
            name = f"comparison {source.prefix}".strip("/ ")
        else:
            ((sae_id, local),) = saes.items()
            part = sae_part(repo_id, sae_id, local, samples_trained(source.saes[sae_id]))
            name = f"SAE {sae_id}"
    # SAELens opens a config, and a results.json counts as one, without a look at all that the
    # card is made of.
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise HubError(
            f"{folder / (RESULTS_FILENAME if source.results is not None else SAE_CFG_FILENAME)} "
            f"or a config beside it is malformed: {type(error).__name__}: {error}"
        ) from error
    return with_part(existing, name, without_user_name(part), repo_id)


@dataclass(frozen=True)
class _Change:
    """The commit that makes one SAE on the Hub equal to the local one."""

    sae_id: str
    additions: dict[str, Path]
    deletions: list[str]
    replaces: bool


def _change(sae_id: str, files: Mapping[str, Path], remote: Mapping[str, RepoFile]) -> _Change:
    additions = _missing(files, remote)
    # A file left over from an earlier SAE does not belong to this one.
    names = (f"{sae_id}/{file}" for file in SAE_FILES)
    deletions = [name for name in names if name in remote and name not in files]
    replaces = bool(deletions) or any(path in remote for path in additions)
    return _Change(sae_id, additions, deletions, replaces)


def _missing(files: Mapping[str, Path], remote: Mapping[str, RepoFile]) -> dict[str, Path]:
    """The files that the Hub does not have, or has with other content."""
    return {
        path: local
        for path, local in files.items()
        if path not in remote or not _same(local, remote[path])
    }


def _same(local: Path, remote: RepoFile) -> bool:
    if local.stat().st_size != remote.size:
        return False
    if remote.lfs is None:
        return git_hash(local.read_bytes()) == remote.blob_id
    with local.open("rb") as file:
        return sha_fileobj(file).hex() == remote.lfs.sha256


def _refuse_to_overwrite(repo_id: str, taken: Iterable[str]) -> None:
    if names := ", ".join(taken):
        raise HubError(
            f"{repo_id} already has another version of {names}. Choose another sae_id, or "
            "replace it with --overwrite."
        )


def _send(
    api: HfApi,
    repo_id: str,
    remote: _Remote,
    pending: list[_Change],
    reports: Mapping[str, Path],
    card: str,
    private: bool,
) -> str:
    commit = remote.commit
    if commit is None:
        api.create_repo(repo_id, private=private)
        commit = api.repo_info(repo_id).sha
    last: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, local) for path, local in reports.items()
    ]
    if card != remote.card:
        last.append(CommitOperationAdd(CARD, card.encode()))
    for change in pending or [None]:
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        if change is not None:
            operations += [CommitOperationDelete(path) for path in change.deletions]
            operations += [CommitOperationAdd(p, local) for p, local in change.additions.items()]
        # The card goes with the last SAE, so it never names an SAE that is not there yet.
        if change is None or change is pending[-1]:
            operations += last
        if operations:
            message = f"Upload {change.sae_id}" if change else "Update the card and the reports"
            # With a parent, the Hub refuses the commit if somebody else has pushed meanwhile.
            commit = api.create_commit(
                repo_id, operations, commit_message=message, parent_commit=commit
            ).oid
    return f"{api.endpoint}/{repo_id}"
