"""``sae-lens-auxk compare``, with the candidates of straight_through.py among its variants.

    python benchmarks/evidence.py --config docs/results/straight-through/heldout.yaml \\
        --output heldout
"""

import sys
import warnings

import straight_through  # noqa: F401  (registers the candidates)

from sae_lens_auxk.cli.compare import compare

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(compare(sys.argv[1:], ("python", "benchmarks/evidence.py")))
