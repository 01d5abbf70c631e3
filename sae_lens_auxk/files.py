"""Files that are never half written, and errors that name the file.

All files of the package are written here. A link under one of their names is replaced, and a link
where a folder belongs is refused, so that nothing is written where a link leads.
"""

import json
import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from sae_lens_auxk.checks import reject

PARTIAL = ".{}.{}.partial"
MAX_DEPTH = 32


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: there is no such file, or it is not JSON; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # half a character cannot be written
    # Deeply nested lists exceed Python's recursion limit.
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    # So that nothing that reads or writes the content exceeds it.
    if _is_deeper(content, MAX_DEPTH):
        raise ValueError(f"{path} cannot be read: it is nested more than {MAX_DEPTH} levels deep.")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON, with null for NaN and infinity, which JSON does not have.

    Mappings have a line for each entry, and so have lists with mappings; other lists have one line.
    """
    write_text(path, _text(_without_nan(content), "\n"))


def write_text(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a small safetensors file."""
    with replace_file(path) as file:
        file.write(save(tensors))


@contextmanager
def replace_file(path: Path) -> Generator[BinaryIO]:
    """A new file, which gets the name ``path`` once the block has written it."""
    beside = path.with_name(PARTIAL.format(path.name, secrets.token_hex(8)))
    file = beside.open("xb")  # never one that is there, nor what a link leads to
    try:
        with file:
            yield file
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise


def require_writable_folder(name: str, folder: str | Path) -> None:
    """Raise a ValueError if a field's folder cannot be made or written to; nothing is left behind.

    A training writes at its end, hours after it began. The folder is made inside one with a random
    name, as another run may make the same one at this moment.
    """
    path = Path(folder)
    there = next(part for part in (path, *path.parents) if os.path.lexists(part))
    try:
        with TemporaryDirectory(dir=there) as trial:
            Path(trial, path.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"a folder that can be written to, or a name for a new one ({error.strerror})"
        raise reject(name, str(folder), allowed) from error


def left_behind(path: Path) -> list[Path]:
    """What :func:`replace_file` of this file left behind in processes that were killed."""
    found = path.parent.glob(PARTIAL.format(path.name, "?" * 16))
    return [path for path in found if path.is_file()]


def open_no_link(path: Path) -> BinaryIO:
    """Open a file as it is, or make an empty one.

    Raises:
        ValueError: there is a link of that name.
    """
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{path} must not be a link: remove it.") from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder in one that exists, if it is not there; raise as :func:`require_no_link`."""
    require_no_link(path)
    path.mkdir(exist_ok=True)


def require_no_link(path: Path) -> None:
    """Raise a ValueError if something is there that is not a folder, or is a link to one."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} must be a folder and no link: move it away.")


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return False
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inner)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def _text(value: Any, line: str) -> str:
    """The text of write_json; ``line`` is a line break and the indentation of ``value``."""
    if not _holds_mapping(value):
        return json.dumps(value, allow_nan=False)
    inner = line + " "
    if isinstance(value, dict):
        begin, end = "{}"
        items = [f"{json.dumps(str(key))}: {_text(item, inner)}" for key, item in value.items()]
    else:
        begin, end = "[]"
        items = [_text(item, inner) for item in value]
    return begin + inner + f",{inner}".join(items) + line + end


def _holds_mapping(value: Any) -> bool:
    """Whether it is a mapping with entries, or a list that holds one at any depth."""
    if isinstance(value, list):
        return any(map(_holds_mapping, value))
    return isinstance(value, dict) and bool(value)
