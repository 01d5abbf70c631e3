r"""Are latents found again where the other seed reads other text?

    python -m studies.rivals.other_text split smollm2 parts    # parts/1 to parts/3
    for i in 1 2 3; do
        python -m studies.rivals.run best smollm2 15 topk \
            --data parts/$i --seeds $i --output parts/$i
    done
    python -m studies.rivals.other_text compare parts/[123]/best-smollm2-15-topk

The other comparisons of this study have one text for all seeds, so a passage that an SAE memorises
is found again, too. Here each seed has a third of a text of 42 million tokens, and no row is
in two. Writes studies/rivals/other_text.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset

from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.reproducibility import with_reproducibility
from sae_lens_auxk.files import write_json

FILE = Path(__file__).with_name("other_text.json")
KEPT = ("case", "architecture", "k", "seed", "status", "metrics", "peeking", "pairs")


def split(model: Path, parts: Path, n: int) -> None:
    """Give each part the model and every n-th row of the text, whose order is random."""
    text = load_dataset(str(model / "text"), split="train")
    for i in range(n):
        folder = parts / str(i + 1) / model.name
        (folder / "text").mkdir(parents=True)
        text.shard(n, i, contiguous=False).to_parquet(folder / "text" / "train.parquet")
        (folder / "model").symlink_to((model / "model").resolve())


def compare(folders: list[Path], device: str) -> None:
    """Write what the runs reached, and what is found again over the pairs of seeds."""
    parts = [read_results(folder) for folder in folders]
    runs: list[Any] = [
        {**run, "folder": str(folder / (run["folder"] or ""))}
        for folder, part in zip(folders, parts, strict=True)
        for run in part["runs"]
    ]
    runs = with_reproducibility(runs, Path(), device)
    if lacking := [run["folder"] for run in runs if "pairs" not in run]:
        sys.exit(f"{', '.join(lacking)}: has no weights, or no other seed.")
    kept = [{key: run[key] for key in KEPT} for run in runs]
    write_json(FILE, {"commands": [part["command"] for part in parts], "runs": kept})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    stages = parser.add_subparsers(dest="stage", required=True)
    of_split = stages.add_parser("split")
    of_split.add_argument("model", type=Path, help="a folder with model and text")
    of_split.add_argument("parts", type=Path, help="the folder to write")
    of_split.add_argument("--n", type=int, default=3)
    of_compare = stages.add_parser("compare")
    of_compare.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    if args.stage == "split":
        split(args.model, args.parts, args.n)
    else:
        compare(args.folders, args.device)


if __name__ == "__main__":
    main()
