"""Small comparisons for the tests of compare."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from sae_lens_auxk.compare import report
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.report import drawing, page


def tiny(**fields: Any) -> Resolved:
    """A comparison on a synthetic model that takes seconds."""
    defaults: dict[str, Any] = {
        "aux_variant": ["none", "auxk"],
        "k": [2],
        "seeds": [0],
        "d_sae": 24,
        "training_samples": 1600,
        "batch_size": 32,
        "dead_after": 128,
        "eval_samples": 256,
        "n_features": 32,
        "d_in": 12,
    }
    return resolve(Comparison(**{**defaults, **fields}))


@pytest.fixture(scope="package", autouse=True)
def _each_figure_is_drawn_once() -> Iterator[None]:
    """Drawing takes most of the time of a report, and many tests write the same one.

    As SVG only: the image is made of the same drawing.
    """
    drawn: dict[bytes, str] = {}

    def svg(figure: Any) -> str:
        key = pickle.dumps(figure)
        if key not in drawn:
            drawn[key] = drawing.svg(figure)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "svg", svg)
        patch.setattr(report, "png", lambda figure, file: file.write(figure.name.encode()))
        yield
