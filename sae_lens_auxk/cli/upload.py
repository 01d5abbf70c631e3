"""``sae-lens-auxk upload``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sae_lens_auxk.hub import HubError, Upload, upload_sae
from sae_lens_auxk_cli import printable, refuse


def upload(args: Sequence[str]) -> int:
    """Publish an SAE, a training checkpoint or a comparison on the Hub; see ``--help``."""
    options = _parser().parse_args(args)
    try:
        done = upload_sae(
            options.folder,
            options.repo,
            options.sae_id,
            private=options.private,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
        )
    except (HubError, OSError) as error:  # the latter for a full disk, or a file that vanished
        return refuse(str(error))
    if options.dry_run:
        print(listing(options.repo, done))
    else:
        for sae_id in done.unchanged:
            print(f"{sae_id} was already there")
        print(f"published at {done.url}")
    return 0


def listing(repo_id: str, planned: Upload) -> str:
    """The files of an upload and their sizes in bytes, one per line."""
    lines = [f"{size:15,d}  {printable(path)}" for path, size in planned.sizes.items()]
    total = sum(planned.sizes.values())
    return "\n".join([f"would go to {repo_id}:", *lines, f"{total:15,d}  bytes in all"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sae-lens-auxk upload",
        description="Publish a trained SAE, or a whole comparison, on the Hugging Face Hub, so "
        'that SAE.from_pretrained("user/repo", "sae_id") opens it without a plugin. An '
        "interrupted upload is completed by the same command.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="a trained SAE (a run's output_path), a training checkpoint, or a comparison's folder",
    )
    parser.add_argument("repo", help="user/repo on the Hub; created if it does not exist")
    parser.add_argument(
        "--sae_id",
        help="the SAE's name in the repository (default: the folder's name); for a comparison, "
        "the folder that it goes to (default: the top)",
    )
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace SAEs and reports of the same name"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="show which files would go up; needs no token and no network",
    )
    return parser
