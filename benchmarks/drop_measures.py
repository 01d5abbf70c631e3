"""Drop measures that are no longer in the tables from committed results.

    python benchmarks/drop_measures.py docs/results/smollm2
    sae-lens-auxk compare --report_only docs/results/smollm2

The other numbers do not change. docs/peeking.md says which measures were dropped, and why.
"""

import argparse
from pathlib import Path

from sae_lens_auxk.compare.run import groups_of
from sae_lens_auxk.result_files import read_results, write_results
from sae_lens_auxk.results import PEEKING


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        results = read_results(folder)
        for run in results["runs"]:
            for numbers in (run["peeking"] or {}).values():
                for key in numbers.keys() - PEEKING.keys():
                    del numbers[key]
        results["groups"] = list(groups_of(results["runs"]))
        write_results(folder, results)


if __name__ == "__main__":
    main()
