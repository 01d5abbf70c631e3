"""Damage the files that commands read, or put links in their place, and count.

Bytes change, a file is cut, a value is gone, of another type, huge or deeply nested. A command must
then work or say in one line why it does not, and write nothing where a link leads.
"""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk import cli
from sae_lens_auxk.compare.run import run_comparison
from tests.compare.conftest import tiny
from tests.compare.test_links import state
from tests.fuzz import LENGTH, some_random
from tests.hub.saes import comparison, train

AGAIN = (
    "compare --effect --aux_variant none auxk --k 2 --seeds 0 1 --d_sae 24 --training_samples 320 "
    "--batch_size 32 --dead_after 128 --eval_samples 64 --n_features 32 --d_in 12 --output"
)
WRONG = (None, True, 0, -1, 2.5, 10**400, "", "x", "\ud800", [], {}, [[]], [1, "x"], {"a": 1})
WRONG += (float("nan"), float("inf"), 1e308, "../../x", "\x1b[2J", "a" * 5000)


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def damaged(rng: random.Random, good: bytes) -> bytes:
    kind = rng.choice(("bytes", "cut", "gone", "wrong", "wrong", "wrong", "nested"))
    if kind == "cut":
        return good[: rng.randrange(len(good))]
    if kind == "bytes":
        changed = bytearray(good)
        for _ in range(rng.choice((1, 1, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    content = json.loads(good)
    value, parent, key = content, None, None
    while isinstance(value, dict | list) and value and (parent is None or rng.random() < 0.7):
        parent, key = value, rng.choice([*value] if isinstance(value, dict) else range(len(value)))
        value = parent[key]
    if kind == "gone":
        del parent[key]
    else:
        parent[key] = rng.choice(WRONG) if kind == "wrong" else nested(rng.choice((40, 300, 900)))
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that are damaged, by name."""
    root = tmp_path_factory.mktemp("made")
    fields: dict[str, Any] = {"seeds": [0, 1], "training_samples": 320, "eval_samples": 64}
    run_comparison(tiny(**fields), root / "compared")
    trained = train(root / "trained")
    return {
        "compared": root / "compared",
        "uploaded": comparison(root / "uploaded", n_seeds=1),
        **trained,
    }


def attack(
    rng: random.Random, made: dict[str, Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    name = rng.choice(("compared", "compared", *made))
    there, outside = root / "there", root / "outside"
    shutil.copytree(made[name], there)
    outside.mkdir(parents=True)
    (outside / "file").write_text("theirs")
    if name == "compared" and rng.random() < 0.3:
        path = rng.choice([*there.rglob("*"), there / ".lock", there / "runs" / "seed-0.lock"])
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(outside / rng.choice((".", "file", "nowhere")))
    else:
        path = rng.choice(sorted(there.rglob("*.json")))
        path.write_bytes(damaged(rng, path.read_bytes()))
    before = state(outside)
    args = ["upload", str(there), "me/saes", "--dry_run"]
    if name == "compared":
        args = [*rng.choice((["compare", "--report_only"], AGAIN.split())), str(there)]
    try:
        status = cli.main(args)
    except Exception as error:
        return f"{args[:2]} {path.name}: {type(error).__name__}: {str(error)[:200]}"
    printed = capsys.readouterr()
    if state(outside) != before:
        return f"{path.name}: followed"
    if status and printed.err.count("\n") != 1:
        return f"{path.name}: {printed.err.count(os.linesep)} lines: {printed.err[-300:]}"
    return {0: "done", 2: "refused"}[status]


def test_damage_is_one_line(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = some_random()
    counts = Counter(attack(rng, made, tmp_path / str(i), capsys) for i in range(20 * LENGTH))
    with capsys.disabled():
        print(f"\n{counts.total()} attacks; {dict(counts)}")
    assert {*counts} == {"done", "refused"}
