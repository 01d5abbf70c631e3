"""``torchrun -m sae_lens_auxk train``."""

import os
import signal
import time
from pathlib import Path

import pytest
from sae_lens.saes.sae import SAE

from sae_lens_auxk import processes
from tests.fuzz.test_shared import MESSAGE, newest, ranks, start
from tests.sharded import tiny_files
from tests.sharded.processes import NCCL, in_processes

DEVICE = ["--device", "cuda"] if NCCL else []


def _run(flags: list[str], n: int, said: Path) -> tuple[int, str]:
    status = start([*flags, *DEVICE], n, None, said).wait(timeout=300)
    return status, said.read_text()


def test_a_run_saves_a_plain_sae_and_speaks_once(tmp_path: Path) -> None:
    flags = [*tiny_files.write(tmp_path), "--output_path", str(tmp_path / "output")]
    status, text = _run([*flags, "--checkpoint_path", str(tmp_path)], 2, tmp_path / "said.txt")
    assert status == 0, text
    assert text.count("trained in") == 1
    assert text.count("Dataset is not tokenized") == 1, "a warning of every process"
    assert SAE.load_from_disk(tmp_path / "output").cfg.architecture() == "topk"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--d_sae", "49"], "d_sae=49 cannot be shared among 2 processes: it must be a multiple"),
        (["--train_batch_size_tokens", "63"], "train_batch_size_tokens=63 cannot be shared"),
        (["--architecture", "auxk-standard"], "architecture='auxk-standard' cannot be shared"),
    ],
)
def test_what_cannot_be_shared_is_refused_once(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    given = tiny_files.write(tmp_path)
    if "--architecture" in flags:
        del given[given.index("--k") : given.index("--k") + 2]
    status, text = _run([*given, *flags], 2, tmp_path / "said.txt")
    assert status != 0
    assert text.count(message) == 1, text


def test_a_data_set_shorter_than_the_processes_is_refused_once(tmp_path: Path) -> None:
    flags = tiny_files.write(tmp_path, n_rows=1)
    status, text = _run(flags, 2, tmp_path / "said.txt")
    assert status != 0
    assert text.count("has 1 rows, which cannot be shared among 2 processes") == 1, text


def test_the_death_of_a_process_ends_the_run_with_one_message(tmp_path: Path) -> None:
    flags = [*tiny_files.write(tmp_path), "--training_tokens", str(10**6), "--n_checkpoints", "900"]
    flags += ["--checkpoint_path", str(tmp_path / "checkpoints")]
    agent = start([*flags, *DEVICE], 2, None, tmp_path / "said.txt")
    while newest(tmp_path) is None:
        assert agent.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.1)
    os.kill(ranks(agent.pid)[1], signal.SIGKILL)
    assert agent.wait(timeout=100) != 0
    text = (tmp_path / "said.txt").read_text()
    assert text.count(MESSAGE) == 1, text
    assert "--resume_from_checkpoint" in text


def _refused(message: str) -> None:
    import torch.distributed as dist

    own = processes.version
    if dist.get_rank() == 1:
        processes.version = lambda name: "0" if name == "torch" else own(name)
    with pytest.raises(ValueError, match=message):
        processes.require_same_versions(dist.group.WORLD)


def test_other_versions_are_named() -> None:
    in_processes(2, _refused, "torch is .* on rank 0 and 0 on rank 1")
