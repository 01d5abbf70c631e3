"""What happens in a training step: the seam between SAELens's trainer and an auxiliary loss."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])


def never_compiled(method: _Method) -> _Method:
    """Exclude a method from ``torch.compile``: it runs uncompiled between compiled parts."""
    return torch.compiler.disable(method)  # type: ignore[no-any-return]
