"""Files that are never half written, and errors that name the file."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from sae_lens_auxk.checks import reject


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: there is no such file, or it is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # Deeply nested lists exceed Python's recursion limit.
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON, with null for NaN and infinity, which JSON does not have.

    Mappings have a line for each entry, and so have lists with mappings; other lists have one line.
    """
    text = _text(_without_nan(content), "\n")
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file, then rename it to ``path``, which is never half written."""
    beside = partial_file(path)
    try:
        write(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def require_writable_folder(name: str, folder: str | Path) -> None:
    """Raise a ValueError if a field's folder cannot be made or written to; nothing is left behind.

    A training writes at its end, hours after it began.
    """
    made: list[Path] = []
    try:
        for part in reversed((Path(folder), *Path(folder).parents)):
            if not os.path.lexists(part):
                part.mkdir()
                made.append(part)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        allowed = f"a folder that can be written to, or a name for a new one ({error.strerror})"
        raise reject(name, str(folder), allowed) from error
    finally:
        for part in reversed(made):
            with suppress(OSError):  # another process uses it by now
                part.rmdir()


def partial_file(path: Path) -> Path:
    """The file that :func:`replace_file` writes first; a killed process leaves it behind."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


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
