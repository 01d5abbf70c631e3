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
from sae_lens_auxk.compare.reproducibility import alive_latents, reproducibility
from sae_lens_auxk.files import write_json

FILE = Path(__file__).with_name("other_text.json")


def split(model: Path, parts: Path, n: int) -> None:
    """Give each part the model and every n-th row of the text, whose order is random."""
    text = load_dataset(str(model / "text"), split="train")
    for i in range(n):
        folder = parts / str(i + 1) / model.name
        (folder / "text").mkdir(parents=True)
        text.shard(n, i, contiguous=False).to_parquet(folder / "text" / "train.parquet")
        (folder / "model").symlink_to((model / "model").resolve())


def compare(folders: list[Path], device: str) -> None:
    """Of each arm the explained variances, and what is found again over the pairs of seeds."""
    by_arm: dict[str, list[tuple[Path, Any]]] = {}
    commands: list[str] = []
    for folder in folders:
        results = read_results(folder)
        commands.append(results["command"])
        for run in results["runs"]:
            if run["status"] == "finished":
                by_arm.setdefault(run["case"], []).append((folder, run))
    arms: dict[str, Any] = {}
    for arm, runs in by_arm.items():
        alive = [alive_latents(run, folder, device) for folder, run in runs]
        if None in alive:
            sys.exit(f"{arm}: the weights of a run are gone.")
        pairs = reproducibility([latents for latents in alive if latents is not None])
        arms[arm] = {
            "explained_variance": [run["metrics"]["explained_variance"] for _, run in runs],
            "dead_fraction": [run["metrics"]["dead_fraction"] for _, run in runs],
            "pairs": pairs,
        }
        print(arm, [pair["metrics"]["found_again"] for of_run in pairs for pair in of_run])
    write_json(FILE, {"commands": commands, "arms": arms})


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
