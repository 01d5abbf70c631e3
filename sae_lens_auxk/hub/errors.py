"""Turn errors of the Hub and the network into messages that say what to do."""

from collections.abc import Generator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

# The HTTP library under huggingface_hub is another one in each of its major versions; its
# errors are what HfHubHTTPError is derived from, or before 1.0 an OSError.
_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    OSError,
    RuntimeError,
    ValueError,
)


class HubError(Exception):
    """Something cannot be published; the message says what to do about it."""


def require_repo_id(repo_id: str) -> None:
    """Raise a HubError unless ``repo_id`` is a possible ``user/repo`` on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"repository {repo_id!r} is not allowed: {error}") from error
    if repo_id.count("/") != 1:
        raise HubError(f"repository {repo_id!r} is not allowed: it must be user/name.")


@contextmanager
def explained(repo_id: str) -> Generator[None]:
    """Turn errors of huggingface_hub into a HubError.

    Raises:
        HubError: for every error of the network and of the Hub.
    """
    try:
        yield
    except _ERRORS as error:
        raise HubError(_explain(error, repo_id)) from error


def _explain(error: BaseException, repo_id: str) -> str:
    # A failed transfer of one file comes wrapped, and before huggingface_hub 1.0 a refused token.
    cause = error.__cause__
    refused = isinstance(cause, HfHubHTTPError) and not isinstance(error, HfHubHTTPError)
    if cause is not None and (refused or isinstance(error, RuntimeError)):
        error = cause
    if isinstance(error, LocalTokenNotFoundError):
        return (
            "there is no Hub token: run `hf auth login`, or set HF_TOKEN to one that may write "
            f"to {repo_id}."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub cannot be reached: unset it."
    # Without an answer, which huggingface_hub before 1.0 has too, it is a broken connection.
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        said = error.server_message or str(error).splitlines()[0]
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{repo_id} is not on the Hub, or it is private and the token may not read it "
                f"({status})."
            )
        if status == 401:
            return f"the Hub refused the token (401: {said}). Make a new one: `hf auth login`."
        if status == 403:
            return (
                f"the token may not write to {repo_id} (403: {said}). It needs the role `write` "
                "and the right to this user or organisation."
            )
        if status == 412:
            return f"{repo_id} was changed by someone else meanwhile. Run the same command again."
        return f"the Hub answered {status}: {said}"
    if isinstance(error, ValueError):
        return str(error)
    return (
        f"the connection to the Hub broke ({type(error).__name__}: {error}). Run the same command "
        "again: complete files are not transferred twice."
    )
