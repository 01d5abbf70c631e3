"""Small comparisons for the tests of compare."""

from typing import Any

from sae_lens_auxk.compare.plan import Comparison, Resolved
from sae_lens_auxk.compare.resolve import resolve


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
