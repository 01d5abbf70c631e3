"""Merge the results of comparisons that were trained in separate processes, and write a report.

    python studies/merge.py MERGED PART PART ...

The parts are folders of ``sae-lens-auxk compare``, of the same data and training, that differ in
cases, architectures, k or seeds. If two of them have finished the same run, the first is used.
Seeds of different parts cannot find each other's latents: train them in one folder, which several
processes may share.
"""

import argparse
from pathlib import Path
from typing import Any

from sae_lens_auxk.compare.files import read_results, write_results
from sae_lens_auxk.compare.report import write_report
from sae_lens_auxk.compare.schema import Results, Run
from sae_lens_auxk.compare.seeds import groups_of

MAY_DIFFER = (
    "architecture",
    "preset",
    "aux_variant",
    "aux_loss_coefficient",
    "k",
    "cases",
    "seeds",
)


def merge(parts: list[Results], name: str) -> Results:
    """One results.json's content; a ValueError where the parts' data or training differ."""
    comparison = dict(parts[0]["comparison"])
    for field in comparison:
        values = [part["comparison"][field] for part in parts]
        if field in MAY_DIFFER:
            entries = [entry for value in values for entry in value or []]
            comparison[field] = [e for i, e in enumerate(entries) if e not in entries[:i]]
        elif any(value != values[0] for value in values):
            raise ValueError(f"{field} is not the same in all parts: {values}")
    runs: dict[tuple[Any, ...], Run] = {}
    for part in parts:
        for run in part["runs"]:
            key = run["architecture"], run["case"], run["k"], run["seed"]
            if key not in runs or runs[key]["status"] != "finished":
                runs[key] = run
    # Of one architecture after the other, and in each a case's seeds together.
    order = list(dict.fromkeys(key[:3] for key in runs))
    ordered = [runs[key] for key in sorted(runs, key=lambda key: (order.index(key[:3]), key[3]))]
    return {
        **parts[0],
        "name": name,
        "finished": all(part["finished"] for part in parts),
        "command": "\n".join(part["command"] for part in parts),
        "comparison": comparison,
        "runs": ordered,
        "groups": list(groups_of(ordered)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("merged", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    args = parser.parse_args()
    results = merge([read_results(part) for part in args.parts], args.merged.name)
    args.merged.mkdir(parents=True, exist_ok=True)
    write_results(args.merged, results)
    print(write_report(results, args.merged))


if __name__ == "__main__":
    main()
