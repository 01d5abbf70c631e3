"""Records which attributes of an SAE and of its config SAELens's own code reads or sets."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sae_lens

SAELENS = Path(sae_lens.__file__).parent


def _is_from(frame: Any, places: tuple[str, ...]) -> bool:
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(SAELENS):
        return False
    name = path.relative_to(SAELENS).as_posix()
    return any(name == place or name.startswith(f"{place}/") for place in places)


@contextmanager
def watched(thing: Any, *places: str) -> Iterator[set[str]]:
    """The names that code in ``places`` (files or folders of SAELens) uses on an object."""
    touched: set[str] = set()
    own = type(thing)

    def get(self: Any, name: str) -> Any:
        if self is thing and _is_from(sys._getframe(1), places):
            touched.add(name)
        return own.__getattribute__(self, name)

    def put(self: Any, name: str, value: Any) -> None:
        if self is thing and _is_from(sys._getframe(1), places):
            touched.add(name)
        own.__setattr__(self, name, value)

    watching = type(own.__name__, (own,), {"__getattribute__": get, "__setattr__": put})
    object.__setattr__(thing, "__class__", watching)
    try:
        yield touched
    finally:
        object.__setattr__(thing, "__class__", own)
