"""Sends malicious repositories to download and malicious folders to upload, and counts.

    python -m benchmarks.attack_hub [N_PER_SIDE] [SEED]

Repositories have ids with .., absolute names and terminal escapes, pickles for weights, damaged
and lying configs; they are downloaded to links, to working folders and over other people's files.
Folders have links to private files, runs outside, tokens, pickles and escapes. Everything goes
through the commands and the real client to a small Hub on localhost (tests/hub/server.py). An
attack gets through if a file outside of the target changes, a private text goes out, a pickle is
loaded, a control character is printed, or a command ends in a traceback.

With the defaults (CPU, about 2 minutes) it printed:

    download_attack: 100, 0 through; {'refused': 97, 'done': 3}
    upload_attack: 100, 0 through; {'done': 27, 'refused': 73}
"""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.hub.server import WRITE_TOKEN, Hub

REPO = "me/saes"
SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"
IDS = ("a", "..", "../up", "/abs", "a/../../x", "\x1b[2J", "x\u202ey", "a\nb", "README.md", "l/..")
LINKS = ("figures/x.png", "report.md", "report.html", "figures", "runs/seed-0/auxk-k3/cfg.json")
LINKS += ("runs/seed-0/auxk-k3/sparsity.safetensors", "runs/seed-0/auxk-k3", "runs/seed-0", "runs")


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def command(cli: Any, *args: str) -> tuple[str, str]:
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


def download_attack(rng: random.Random, cli: Any, hub: Hub, good: Any, root: Path) -> str:
    world, marker = root / "world", root / "pickle-was-loaded"
    (world / "work").mkdir(parents=True)
    (world / "mine").mkdir()
    (world / "mine" / "thesis.txt").write_text("mine")
    (world / "link").symlink_to("mine")
    (world / "work" / "notes.txt").write_text("mine")
    sae_id = rng.choice(IDS)
    files = {f"{sae_id}/{name}": data for name, data in damaged(rng, good, marker).items()}
    hub.repos[REPO].commit({k: ("regular", v) for k, v in files.items()}, str(rng.random()))
    before = contents(world)
    targets = ("new", ".", "..", "../mine", "../link", "../link/x", "notes.txt/x", "notes.txt")
    os.chdir(world / "work")
    args = [REPO, *rng.choice(([], [sae_id]))]
    if target := rng.choice((None, *targets)):
        args += ["--output", target]
    result, printed = command(cli, "download", *args, *rng.choice(([], ["--overwrite"])))
    after = contents(world)
    return judged(result, printed, marker, {k: after.get(k) for k in before} != before)


def upload_attack(rng: random.Random, cli: Any, hub: Hub, good: Any, root: Path) -> str:
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
    hub.repos.clear()
    result, printed = command(cli, "upload", str(made), REPO, *rng.choice(([], ["--dry_run"])))
    sent = b"".join([*hub.files(REPO).values(), *hub.objects.values()])
    return judged(result, printed, marker, b"PRIVATE" in sent or SECRET.encode() in sent)


def judged(result: str, printed: str, marker: Path, harm: bool) -> str:
    if harm or marker.exists():
        return "THROUGH: " + ("a pickle was loaded" if marker.exists() else "harm")
    if any(not (c.isprintable() or c in "\n\r") for c in printed):
        return "THROUGH: a control character was printed"
    return result


def main(n_per_side: int, seed: int) -> None:
    with Hub() as hub, TemporaryDirectory() as folder:
        root = Path(folder)
        # Read when huggingface_hub is imported.
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_TOKEN": WRITE_TOKEN}
        os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        from sae_lens_auxk import cli
        from tests.hub.saes import comparison

        good = comparison(root / "good", n_seeds=1)
        sae = {path.name: path.read_bytes() for path in (good / "runs/seed-0/auxk-k3").iterdir()}
        rng = random.Random(seed)
        for attack, what in ((download_attack, sae), (upload_attack, good)):
            counts: Counter[str] = Counter()
            for i in range(n_per_side):
                command(cli, "upload", str(good), REPO)
                counts[attack(rng, cli, hub, what, root / f"{attack.__name__}-{i}")] += 1
            bad = sum(n for result, n in counts.items() if result not in ("done", "refused"))
            print(f"{attack.__name__}: {n_per_side}, {bad} through; {dict(counts)}")


if __name__ == "__main__":
    main(*(int(given) for given in (*sys.argv[1:], *("100", "0")[len(sys.argv) - 1 :])))
