"""What every arm reached at every learning rate, at one seed.

python -m studies.rivals.rates rivals    # writes rivals/rates.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.files import write_json

Rates = dict[str, dict[str, dict[str, float]]]
"""A number by model, layer and family ("smollm2-7-topk"), arm and rate."""


FILE = Path(__file__).with_name("rates.json")


def read_rates() -> Rates:
    """The explained variances of the file."""
    return json.loads(FILE.read_text(encoding="utf-8"))["explained_variance"]


def rates_of(folder: Path, metric: str) -> Rates:
    """Of all comparisons of the stage in ``folder``; a run that failed has 0."""
    found: Rates = {}
    for path in sorted(folder.glob("rates-*")):
        for run in read_results(path)["runs"]:
            arm, _, rate = run["case"].rpartition(", ")
            values = found.setdefault(path.name.removeprefix("rates-"), {}).setdefault(arm, {})
            values[rate] = round(run["metrics"].get(metric) or 0.0, 5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    known: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    commands = {read_results(path)["command"] for path in folder.glob("rates-*")}
    known["commands"] = sorted({*known.get("commands", []), *commands})
    for metric in ("explained_variance", "dead_fraction"):
        for setting, arms in rates_of(folder, metric).items():
            for arm, rates in arms.items():
                known.setdefault(metric, {}).setdefault(setting, {}).setdefault(arm, {}).update(
                    rates
                )
    write_json(FILE, known)


if __name__ == "__main__":
    main()
