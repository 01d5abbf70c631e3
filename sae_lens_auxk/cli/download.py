"""``sae-lens-auxk download``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sae_lens_auxk.hub import HubError, download_sae
from sae_lens_auxk_cli import refuse


def download(args: Sequence[str]) -> int:
    """Fetch an SAE from the Hub into a folder; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="sae-lens-auxk download",
        description="Fetch an SAE from the Hugging Face Hub into a folder that "
        "SAE.load_from_disk opens.",
    )
    parser.add_argument("repo", help="user/repo on the Hub")
    parser.add_argument(
        "sae_id", nargs="?", help="which SAE; without it, the only one, or a list of them"
    )
    parser.add_argument(
        "--output", type=Path, help="the folder to make (default: the last part of the SAE id)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    options = parser.parse_args(args)
    try:
        folder = download_sae(
            options.repo, options.sae_id, options.output, overwrite=options.overwrite
        )
    except HubError as error:
        return refuse(str(error))
    print(f"SAE.load_from_disk({str(folder)!r})")
    return 0
