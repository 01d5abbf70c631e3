"""Rename cases and variants in committed results, wherever their names occur.

    python benchmarks/rename_cases.py docs/results/pursuit-up-only \\
        --rename "pursuit=pursuit, up only"
    sae-lens-auxk compare --report_only docs/results/pursuit-up-only

All names are replaced in one pass, so that one may take another's place, each also as the names of
folders spell it. Keys and numbers stay as they are.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from sae_lens_auxk.files import read_json, write_json


def as_folder(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def renamed(value: Any, pattern: re.Pattern[str], new: dict[str, str]) -> Any:
    """``value`` with every name replaced in its strings, but not in keys."""
    if isinstance(value, dict):
        return {key: renamed(item, pattern, new) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, pattern, new) for item in value]
    return pattern.sub(lambda match: new[match[0]], value) if isinstance(value, str) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rename", nargs="+", required=True, metavar="OLD=NEW")
    args = parser.parse_args()
    pairs = [pair.split("=") for pair in args.rename]
    new = {as_folder(old): as_folder(to) for old, to in pairs} | dict(pairs)
    # The longest first: one name may be part of another.
    pattern = re.compile("|".join(sorted(map(re.escape, new), key=len, reverse=True)))
    for folder in args.folders:
        path = folder / "results.json"
        write_json(path, renamed(read_json(path), pattern, new))


if __name__ == "__main__":
    main()
