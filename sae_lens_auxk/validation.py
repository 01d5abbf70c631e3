"""Errors that name a field, its value and what is allowed, with the nearest name there is."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any


def reject(name: str, value: Any, allowed: str) -> ValueError:
    """The error that says what a field must be."""
    return ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """A ValueError with the choices, and the nearest of them, if ``value`` is none of them."""
    if value not in choices:
        error = reject(name, value, f"one of {', '.join(choices)}")
        raise ValueError(f"{error}{nearest(str(value), choices)}")


def require_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """A ValueError with the nearest name if ``given`` has one that is not ``known``."""
    names = list(known)
    for name in given:
        if name not in names:
            raise ValueError(f"{name} is no field of {what}.{nearest(str(name), names)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean ...?"``, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def require_int(name: str, value: Any, *, minimum: int) -> None:
    """A ValueError if ``value`` is no integer, or less than ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise reject(name, value, f"an integer >= {minimum}")


def require_list(name: str, values: Any) -> None:
    """A ValueError if ``values`` is no list, is empty, or says something twice."""
    if not isinstance(values, list) or not values or len(set(values)) != len(values):
        raise reject(name, values, "a list of one or more values, each once")


def require_choices(name: str, values: Any, choices: Collection[str]) -> None:
    """A ValueError if ``values`` is no list of one or more different ``choices``."""
    require_list(name, values)
    for value in values:
        require_choice(name, value, choices)
