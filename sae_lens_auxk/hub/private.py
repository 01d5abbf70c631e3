"""Keep private data out of an upload: tokens, passwords, the user's name in local paths."""

import getpass
import html
import re
import shlex
import tempfile
from pathlib import Path, PureWindowsPath
from typing import Any

from sae_lens_auxk.hub.errors import HubError

_TEXT_SUFFIXES = (".json", ".html", ".md")

_HUB_TOKEN = re.compile(r"(hf_oauth_|hf_jwt_)([\w.=-]{20,})|(hf_|api_org_)([A-Za-z0-9]{20,})")
_RANDOM_RUN = re.compile(r"[A-Za-z0-9]{30,}")
_PASSWORD_IN_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s:@\"'<>]+:[^/\s@\"'<>]+@", re.IGNORECASE)
# A quoted key and a value, also where the JSON stands escaped in a string. A tokenizer's
# pad_token and the like are none, and `"token": true` says to take the one that is stored.
_SECRET_FIELD = re.compile(
    r"""(["'])(
        (?:[\w-]*[_-])?(?:password|passwd|passphrase|pwd|secret|secret_key|api_?key|access_key
            |private_key|credentials?|auth|authorization)
        |(?:(?:use_)?(?:hf|hub|auth|access|api|bearer)_)?token
    )\\*\1\s*:\s*(?!null|none|true|false|\\*(["'])\\*\3)\S""",
    re.IGNORECASE | re.VERBOSE,
)

# Fields and flags that may name a local file or folder.
_PATH_FIELD = re.compile("path$|^(?:model_name|synthetic_model|output|config)$")

# With what JSON and Markdown escape in a name.
_NAME = r"""(?:[^/\s"'<>\\]|\\u[0-9a-f]{4}|\\_)+"""
# An absolute path begins here: no address, no relative path, no closing tag of HTML.
_ROOT = r"""(?:(?<![\w./~<-])|(?<=\\[nt]))(?:file://)?(?:/[^/\s"'<>]+){0,8}?/"""
_HOMES = (
    re.compile(rf"({_ROOT}(?:home|Users)/){_NAME}"),
    re.compile(rf"(\b[A-Za-z]:(?:\\{{1,2}}|/)Users(?:\\{{1,2}}|/)){_NAME}"),
)


def without_user_name(text: str) -> str:
    """The text, with USER for the user's name in absolute local paths.

    Example:
        >>> without_user_name("from /home/anna/texts, not https://x.org/home/page")
        'from /home/USER/texts, not https://x.org/home/page'
    """
    for home in _HOMES:
        text = home.sub(r"\1USER", text)
    try:
        name = re.escape(getpass.getuser()).replace("_", r"\\?_")
    except (OSError, KeyError):  # a container's user may have no name
        return text
    # Such as /scratch/anna/texts.
    return re.sub(rf"({_ROOT}){name}(?![^/\\\s\"'<>])", r"\1USER", text)


def public_name(name: str) -> str:
    """The name of a model or data set on the Hub; of a local path only the last part.

    Example:
        >>> [*map(public_name, ("openai-community/gpt2", "/data/texts", "/home/anna"))]
        ['openai-community/gpt2', 'PATH/TO/texts', 'PATH/TO/USER']
    """
    path = Path(name)
    is_local = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or path.exists()
    return f"PATH/TO/{PureWindowsPath(without_user_name(name)).name}" if is_local else name


def public_command(command: str) -> str:
    """A command, with :func:`public_name` of the paths in it.

    Example:
        >>> public_command("compare --k 8 --dataset_path ../anna/texts --output=/data/anna/out")
        'compare --k 8 --dataset_path PATH/TO/texts --output=PATH/TO/out'
    """
    words = [""]
    for word in shlex.split(command):
        flag, is_flag, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        name = (flag or words[-1]).lstrip("-")
        words.append(flag + is_flag + _public_value(name, value))
    return shlex.join(words[1:])


def public_fields(values: Any, name: str = "") -> Any:
    """A config, or the value of its field ``name``, with :func:`public_name` of the paths in it.

    Example:
        >>> public_fields({"k": [8], "kwargs": {"cache_dir": "/data/anna/models"}})
        {'k': [8], 'kwargs': {'cache_dir': 'PATH/TO/models'}}
    """
    if isinstance(values, dict):
        return {inner: public_fields(value, str(inner)) for inner, value in values.items()}
    if isinstance(values, list):
        return [public_fields(value, name) for value in values]
    return _public_value(name, values) if isinstance(values, str) else values


def _public_value(name: str, value: str) -> str:
    is_absolute = Path(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return public_name(value) if is_absolute or _PATH_FIELD.search(name) else value


def publishable_file(path: Path, workspace: Path) -> Path:
    """The file, or a copy in ``workspace`` without the user's name in local paths.

    Raises:
        HubError: the file holds what looks like a token or a password, or cannot be read.
    """
    if path.suffix not in _TEXT_SUFFIXES:
        return path
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise HubError(f"{path} cannot be read: {error}") from error
    _require_no_secret(path, html.unescape(text) if path.suffix == ".html" else text)
    public = without_user_name(text)
    if public == text:
        return path
    with tempfile.NamedTemporaryFile(dir=workspace, delete=False) as copy:
        copy.write(public.encode())
    return Path(copy.name)


def _require_no_secret(path: Path, text: str) -> None:
    for found in _HUB_TOKEN.finditer(text):
        prefix, body = found[1] or found[3], found[2] or found[4]
        kinds = sum(bool(re.search(kind, body)) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
        # The name of a model or file may begin so too, but is made of words.
        if _RANDOM_RUN.search(body) or kinds >= (3 if found[1] else 2):
            raise HubError(
                f"{path} holds what looks like a Hub token: remove {prefix}{body[:3]}..."
            )
    if found := _SECRET_FIELD.search(text):
        raise HubError(f"{path} holds what looks like a secret: remove the value of {found[2]!r}.")
    if found := _PASSWORD_IN_URL.search(text):
        shown = found[0].rpartition(":")[0]
        raise HubError(f"{path} holds an address with a password: remove {shown}:...@.")
