"""Small comparisons for the tests of compare."""

import pickle
from collections.abc import Iterator
from io import BytesIO
from typing import Any, BinaryIO

import pytest

from sae_lens_auxk.compare import report
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved


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


@pytest.fixture(scope="session", autouse=True)
def _each_figure_is_drawn_once() -> Iterator[None]:
    """Drawing takes most of the time of a report, and many tests write the same one."""
    drawn: dict[bytes, bytes] = {}
    draw = report.png

    def png(figure: Any, file: BinaryIO) -> None:
        key = pickle.dumps(figure)
        if key not in drawn:
            draw(figure, image := BytesIO())
            drawn[key] = image.getvalue()
        file.write(drawn[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "png", png)
        yield
