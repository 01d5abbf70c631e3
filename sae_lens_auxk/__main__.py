import sys

from sae_lens_auxk_cli import main

sys.exit(main())
