"""The subcommands of ``sae-lens-auxk``, one file each; ``sae_lens_auxk_cli.py`` calls them."""

from sae_lens_auxk_cli import main

__all__ = ["main"]
