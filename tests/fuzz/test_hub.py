"""Send malicious folders to upload, and count.

They have links to private files, runs outside, tokens, pickles for weights, damaged and lying
configs, and terminal escapes. Everything goes through the command and the real client to a small
Hub on localhost (tests/hub/server.py). An attack gets through if a private text goes out, a pickle
is loaded, a control character is printed, or the command ends in a traceback.
"""

import contextlib
import io
import json
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from sae_lens_auxk import cli
from tests.fuzz import LENGTH, some_random
from tests.hub.conftest import client, hub  # noqa: F401  (fixtures)
from tests.hub.saes import comparison
from tests.hub.server import Hub

REPO = "me/saes"
SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"
LINKS = ("figures/x.png", "report.md", "report.html", "figures", "runs/seed-0/auxk-k3/cfg.json")
LINKS += ("runs/seed-0/auxk-k3/sparsity.safetensors", "runs/seed-0/auxk-k3", "runs/seed-0", "runs")


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def command(*args: str) -> tuple[str, str]:
    """Its result, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            result = {0: "done", 2: "refused"}[cli.main([*args])]
        except Exception as error:
            result = f"TRACEBACK {type(error).__name__}: {error}"
    return result, printed.getvalue()


def damaged(rng: random.Random, good: dict[str, bytes], marker: Path) -> dict[str, bytes]:
    """The files of an SAE, or of something that claims to be one."""
    files = dict(good)
    name = rng.choice([*files])
    kind = rng.choice(("good", "pickle", "cut", "junk", "lie"))
    if kind == "pickle":
        files["sae_weights.safetensors"] = pickle.dumps(Payload(marker))
    elif kind == "cut":
        files[name] = files[name][: len(files[name]) // 2]
    elif kind == "junk":
        files[name] = rng.choice((b"[]", b"{}", b"5", b"\xff", b"", rng.randbytes(99)))
    elif kind == "lie":
        cfg = json.loads(files["cfg.json"])
        key = rng.choice([*cfg])
        cfg[key] = rng.choice((-1, None, "\x1b[31m", [], {"x": "\x9b2J"}, "../../x", 3, "meta"))
        files["cfg.json"] = json.dumps(cfg).encode()
    return files


def attack(rng: random.Random, server: Hub, good: Path, root: Path) -> str:
    marker, made = root / "pickle-was-loaded", root / "made"
    private = root / "private"
    shutil.copytree(good, made)
    for name in ("file", "folder/pareto.png", "folder/cfg.json"):
        (private / name).parent.mkdir(parents=True, exist_ok=True)
        (private / name).write_text('{"PRIVATE": 1}')
    sae = made / "runs/seed-0/auxk-k3"
    results = json.loads((made / "results.json").read_text())
    kind = rng.choice(("link", "outside", "token", "damaged", "escape"))
    if kind == "link":
        path = made / rng.choice(LINKS)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(private / rng.choice(("file", "folder")))
    elif kind == "outside":
        outside = ("..", "../private", str(private), "runs/../../private/folder", 5, None)
        results["runs"][0]["folder"] = rng.choice(outside)
    elif kind == "token":
        where = rng.choice((made / "report.md", made / "report.html", sae / "runner_cfg.json"))
        where.write_text(json.dumps({rng.choice(("a", "b")): f"{rng.choice('x/ ')}{SECRET}"}))
    elif kind == "damaged":
        old = {path.name: path.read_bytes() for path in sae.iterdir()}
        for name, data in damaged(rng, old, marker).items():
            (sae / name).write_bytes(data)
    else:
        results["name"] = results["runs"][0]["name"] = "\x1b[2J\u202e<script>"
        (made / "figures" / "\x1b[2J.png").write_bytes(b"x")
    (made / "results.json").write_text(json.dumps(results))
    server.repos.clear()
    result, printed = command("upload", str(made), REPO, *rng.choice(([], ["--dry_run"])))
    sent = b"".join([*server.files(REPO).values(), *server.objects.values()])
    return judged(result, printed, marker, b"PRIVATE" in sent or SECRET.encode() in sent)


def judged(result: str, printed: str, marker: Path, harm: bool) -> str:
    if harm or marker.exists():
        return "THROUGH: " + ("a pickle was loaded" if marker.exists() else "harm")
    if any(not (c.isprintable() or c in "\n\r") for c in printed):
        return "THROUGH: a control character was printed"
    return result


def test_no_attack_gets_through(client: Hub, tmp_path: Path) -> None:  # noqa: F811
    good = comparison(tmp_path / "good", n_seeds=1)
    rng = some_random()
    counts = Counter(attack(rng, client, good, tmp_path / str(i)) for i in range(5 * LENGTH))
    print(f"\n{counts.total()} attacks; {dict(counts)}")
    assert {*counts} == {"done", "refused"}
