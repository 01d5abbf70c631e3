"""Imports of the package run one way: each part knows only those below it."""

import ast
from pathlib import Path

import sae_lens_auxk

PACKAGE = Path(sae_lens_auxk.__file__).parent
FROM_THE_GROUND_UP = (
    *("checks", "files", "processes", "ops", "saelens", "losses", "config", "step"),
    *("architectures", "sharded", "compare", "hub", "cli", "__init__", "__main__"),
)


def test_no_import_runs_upward() -> None:
    found = 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            name = f"{node.module}.{node.names[0].name}".split(".")
            if name[0] != "sae_lens_auxk" or name[1] == own:
                continue
            assert FROM_THE_GROUND_UP.index(name[1]) < FROM_THE_GROUND_UP.index(own), path
            found += 1
    assert found > 100
