"""Kill processes of a torchrun training run at random times.

Starting the processes takes half a minute, so this runs only where FUZZ is set.

A small training in 2 or 3 processes, with checkpoints, by ``sae-lens-auxk train`` under torchrun.
One process, of a random rank, gets SIGKILL at a random time. The others must end by themselves,
rank 0 (unless it was the victim) with one message, and the training is started again from the
checkpoint that the message names, or from the newest whole one, until it is through. Its files must
be those of an undisturbed training, bit for bit.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_files
from tests.fuzz import LENGTH, some_random

N_STEPS = 600
MESSAGE = "another process of this run has died"
BEGAN = "processes share"
FILES = ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json")


TRAIN = """
import os, sys
from sae_lens_auxk import cli
of_rank = eval(sys.argv[1]).get(int(os.environ["RANK"]), [])
sys.exit(cli.main(["train", *sys.argv[2:], *of_rank]))
"""


def start(
    flags: list[str],
    n: int,
    checkpoint: Path | None,
    said: Path,
    of_rank: Mapping[int, list[str]] | None = None,
) -> "subprocess.Popen[str]":
    # Standalone: torchrun takes a free port. One chosen here may be taken.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n)]
    if of_rank:
        command += ["--no-python", sys.executable, "-c", TRAIN, repr(of_rank)]
    else:
        command += ["-m", "sae_lens_auxk", "train"]
    command += flags
    if checkpoint is not None:
        command += ["--resume_from_checkpoint", str(checkpoint)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    with said.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, text=True, env=quiet)


def ranks(agent: int) -> dict[int, int]:
    """The process ids by rank of what torchrun has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    found: dict[int, int] = {}
    for child in children:
        try:
            environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        own = [entry for entry in environ if entry.startswith(b"RANK=")]
        if own:
            found[int(own[0][5:])] = int(child)
    return found


def content(path: Path) -> Any:
    # SAELens writes the fields of a config in another order in every process.
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def newest(folder: Path) -> Path | None:
    whole = [path.parent for path in folder.glob("checkpoints/*/*/runner_cfg.json")]
    return max(whole, key=lambda path: int(path.name), default=None)


def attack(folder: Path, n: int, n_kills: int, rng: random.Random, counts: Counter[str]) -> bool:
    """Train once with kills; whether the files are those of an undisturbed training."""
    data = tiny_files.write(folder)
    outputs: list[Path] = []
    seconds = 0.0
    for name in ("undisturbed", "killed"):
        where = folder / name
        where.mkdir()
        flags = [*data, "--training_tokens", str(N_STEPS * 64), "--n_checkpoints", "12"]
        flags += ["--train_batch_size_tokens", str(96 if n == 3 else 64)]
        flags += ["--checkpoint_path", f"{where}/checkpoints", "--output_path", f"{where}/output"]
        outputs.append(where / "output")
        begin = time.perf_counter()
        if name == "killed":
            for _ in range(n_kills):
                said = where / "said.txt"
                agent = start(flags, n, newest(where), said)
                time.sleep(rng.uniform(0.3, 1.0) * seconds)
                processes = ranks(agent.pid) if agent.poll() is None else {}
                if not processes:
                    agent.wait()
                    break
                victim = rng.choice([*processes])
                os.kill(processes[victim], 9)
                if agent.wait(timeout=120) == 0:
                    break
                counts["kills"] += 1
                counts[f"of rank {victim}"] += 1
                text = said.read_text()
                began, messages = BEGAN in text, text.count(MESSAGE)
                counts["before the run began"] += not began
                counts["with one message"] += messages == 1
                if began and "trained in" not in text and victim > 0 and messages != 1:
                    counts["without it though rank 0 lived"] += 1
                    print(f"rank {victim} died:\n{text}", file=sys.stderr)
                counts["resumed" if newest(where) else "begun again"] += 1
        checkpoint = newest(where) if name == "killed" else None
        last = start(flags, n, checkpoint, where / "last.txt")
        assert last.wait() == 0, (where / "last.txt").read_text()
        seconds = time.perf_counter() - begin
    counts["trainings"] += 1
    differing = [name for name in FILES if content(outputs[0] / name) != content(outputs[1] / name)]
    if differing:
        print(f"not equal: {n} processes: {differing}", file=sys.stderr)
    counts["equal"] += not differing
    return not differing


@pytest.mark.skipif("FUZZ" not in os.environ, reason="takes minutes")
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    rng, counts, n_kills = some_random(), Counter[str](), (3 * LENGTH) // 2
    equal = True
    while counts["kills"] < n_kills:
        folder = tmp_path / str(counts["trainings"])
        folder.mkdir()
        left = n_kills - counts["kills"]
        equal &= attack(folder, rng.choice((2, 3)), min(left, 10), rng, counts)
        print(", ".join(f"{n} {name}" for name, n in counts.items()), flush=True)
    assert equal
