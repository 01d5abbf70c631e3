"""Which tests pass with which SAELens: the table in docs/compatibility.md.

One environment, in which sae-lens is replaced version by version, so that torch is installed once:

    python -m venv /tmp/saelens-versions && . /tmp/saelens-versions/bin/activate
    pip install torch==2.13.0 && pip install -e ".[test]"
    python benchmarks/saelens_versions.py 6.53.0 6.54.0 newest

Each line is printed as soon as it is known. ``--all`` runs every test that needs no model out of a
wheel, not only those marked ``oldest``.
"""

import argparse
import re
import subprocess
import sys
from importlib.metadata import version

EVERYTHING = ["-m", "not real_model"]
OLDEST = ["-m", "oldest"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="+", help="versions of sae-lens, or: newest")
    parser.add_argument("--all", action="store_true", help="all tests but the real model's")
    options = parser.parse_args()
    tests = "all" if options.all else "`oldest`"
    print(f"Python {sys.version.split()[0]}, torch {version('torch')}\n")
    print("| sae-lens | tests | passed | failed | skipped |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for wanted in options.versions:
        requirement = "sae-lens<7" if wanted == "newest" else f"sae-lens=={wanted}"
        # Its dependencies are there, and have hardly changed: the resolver would take minutes.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps"]
        subprocess.run([*pip, requirement], check=True)
        counts = run(EVERYTHING if options.all else OLDEST)
        cells = (counts.get(name, "0") for name in ("passed", "failed", "skipped"))
        print(f"| {installed()} | {tests} | {' | '.join(cells)} |", flush=True)


def run(selection: list[str]) -> dict[str, str]:
    """How many tests passed, failed or were skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *selection]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    summary = output.strip().splitlines()[-1]
    if not re.search(r" in [0-9.]+s", summary):
        raise SystemExit(f"pytest gave no result:\n{output}")
    counts = {what: n for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    for line in output.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(line, file=sys.stderr)
    failed = int(counts.get("failed", 0)) + int(counts.pop("error", 0))
    return {**counts, "failed": str(failed)}


def installed() -> str:
    """The version of sae-lens, asked in a new process: this one remembers the one before."""
    ask = "from importlib.metadata import version; print(version('sae-lens'))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


if __name__ == "__main__":
    main()
