"""``sae-lens-auxk compare``, with the candidates of straight_through.py among its variants.

    python benchmarks/evidence.py --config docs/results/straight-through/heldout.yaml \\
        --output heldout
"""

import sys
import warnings

import straight_through  # noqa: F401  (registers the candidates)

from sae_lens_auxk.cli import main

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(["compare", *sys.argv[1:]]))
