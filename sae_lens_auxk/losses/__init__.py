"""The auxiliary losses, one file each. Importing one registers it.

The order is that of error messages and of comparisons.
"""

# pyright: reportUnusedImport=false
from sae_lens_auxk.losses import (  # noqa: F401, I001
    none,
    auxk,
    reanimation,
    straight_through,
    pursuit,
    pre_activation,
    ghost_gradients,
    multi_topk,
)
from sae_lens_auxk.losses.registry import AUX_LOSSES

BUILT_IN = tuple(AUX_LOSSES)
"""The variants of this package."""
