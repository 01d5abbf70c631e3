"""Errors that name a field, its value and what is allowed, and suggest the nearest name."""

import json
import re
from collections.abc import Callable, Collection, Iterable
from difflib import SequenceMatcher
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import torch

INT64_MAX = 2**63 - 1


def python_value(value: Any) -> Any:
    """Convert NumPy numbers to Python's, also inside lists, tuples and mappings.

    JSON has no NumPy numbers, so a config that keeps one cannot be saved.
    """
    if isinstance(value, list | tuple):
        return [python_value(item) for item in value]
    if isinstance(value, dict):
        return {name: python_value(item) for name, item in value.items()}
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def reject(name: str, value: Any, allowed: str) -> ValueError:
    """The error that says what a field must be."""
    return ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")


def require_choice(name: str, value: Any, choices: Collection[str], hint: str = "") -> None:
    """Raise a ValueError with the choices, ``hint`` and the nearest one unless one is given."""
    if not isinstance(value, str) or value not in choices:
        error = reject(name, value, f"one of {', '.join(choices)}{hint}")
        raise ValueError(f"{error}{nearest(str(value), choices)}")


def require_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a ValueError with the nearest name if ``given`` has one that is not ``known``."""
    names = list(known)
    for name in given:
        if name not in names:
            raise ValueError(f"{name} is not a field of {what}.{nearest(str(name), names)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean ...?"``, or ``""`` if no known name is close, in any order of its words."""

    def likeness(other: str) -> float:
        pairs = (name, other), (_in_order(name), _in_order(other))
        return max(SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    best = max(known, key=likeness, default="")
    return f" Did you mean {best}?" if likeness(best) >= 0.6 else ""


def _in_order(name: str) -> str:
    return "-".join(sorted(re.split("[-_]", name.lower())))


def require_bool(name: str, value: Any) -> None:
    """Raise a ValueError if ``value`` is neither True nor False."""
    if not isinstance(value, bool):
        raise reject(name, value, "True or False")


def require_text(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise a ValueError unless ``value`` is a string; ``optional``: None is allowed too."""
    if not isinstance(value, str) and not (optional and value is None):
        raise reject(name, value, f"{'None or ' if optional else ''}a string")


def require_writable(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` can be written as JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        allowed = "made of JSON types: strings, finite numbers, True, False, None, lists, mappings"
        raise ValueError(f"{reject(name, value, allowed)} ({error})") from error


def require_int(name: str, value: Any, *, minimum: int, optional: bool = False) -> None:
    """Raise a ValueError unless ``value`` is an integer >= ``minimum`` that fits int64.

    ``optional``: None is allowed too.
    """
    if optional and value is None:
        return
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not minimum <= value <= INT64_MAX:
        none_or = "None or " if optional else ""
        fits = " that fits int64" if is_int and value > INT64_MAX else ""
        raise reject(name, value, f"{none_or}an integer >= {minimum}{fits}")


def require_number(
    name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]
) -> None:
    """Raise a ValueError unless ``value`` is a finite number that passes ``is_allowed``."""
    try:
        is_finite = isinstance(value, int | float) and isfinite(value)
    except OverflowError:  # an integer that no float holds
        is_finite = False
    if not is_finite or isinstance(value, bool) or not is_allowed(value):
        raise reject(name, value, allowed)


def require_type(name: str, value: Any, kind: Any) -> None:
    """Raise a ValueError that names the place unless a value read from JSON has this type.

    ``kind`` is made of TypedDict, dict, list, ``|``, Literal, Any and JSON's own types. Numbers are
    finite, and a mapping may have more entries than its TypedDict.
    """
    arguments = get_args(kind)
    if kind is Any:
        return
    if is_typeddict(kind):
        require_type(name, value, dict)
        for key, inner in get_type_hints(kind).items():
            if key in value:
                require_type(f"{name}.{key}", value[key], inner)
            elif key in kind.__required_keys__:
                raise ValueError(f"{name} has no {key}.")
    elif get_origin(kind) in (dict, list):
        require_type(name, value, get_origin(kind))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            require_type(f"{name}.{key}", item, arguments[-1])
    elif get_origin(kind) is Literal:
        require_choice(name, value, arguments)
    elif type(None) in arguments:
        if value is not None:
            require_type(name, value, arguments[0])
    elif kind is float:
        require_number(name, value, "a finite number", lambda _: True)
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise reject(name, value, f"of type {kind.__name__}")


def require_list(name: str, values: Any) -> None:
    """Raise a ValueError unless ``values`` is a list of one or more values, each once."""
    # Not a set: a nested list cannot be in one.
    if (
        not isinstance(values, list)
        or not values
        or any(value in values[:i] for i, value in enumerate(values))
    ):
        raise reject(name, values, "a list of one or more values, each once")


def require_choices(name: str, values: Any, choices: Collection[str]) -> None:
    """Raise a ValueError unless ``values`` is a list of one or more different ``choices``."""
    require_list(name, values)
    for value in values:
        require_choice(name, value, choices)


def require_device(name: str, value: Any) -> None:
    """Raise a ValueError unless torch can compute on the device here."""
    allowed = "cpu, cuda or another device that torch has here"
    try:
        if value is None:  # torch's own default, which has no name to save
            raise TypeError("None is not a device")
        # The device meta takes everything and computes nothing.
        torch.empty(0, device=value).tolist()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{reject(name, value, allowed)} ({error})") from error
