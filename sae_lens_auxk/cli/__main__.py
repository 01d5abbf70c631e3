import sys

from sae_lens_auxk.cli import main

sys.exit(main())
