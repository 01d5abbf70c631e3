"""``torchrun -m sae_lens_auxk train``.

torchrun takes 20 seconds to start the processes, which import SAELens. So what needs no torchrun is
tried in forked processes.
"""

import io
import os
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from datasets import Dataset
from sae_lens.saes.sae import SAE

from sae_lens_auxk import cli, processes, runner_config
from sae_lens_auxk.saelens.evaluation import read_evaluation
from sae_lens_auxk.saelens.interruption import noted_signals
from sae_lens_auxk.sharded.runner import ShardedTrainingRunner, require_same_run
from tests import tiny_files, tiny_model
from tests.fuzz.test_shared import MESSAGE, newest, ranks, start
from tests.sharded.processes import NCCL, in_processes

DEVICE = ["--device", "cuda"] if NCCL else []


def _run(flags: list[str], n: int, said: Path) -> tuple[int, str]:
    """The exit status and what was said."""
    begin = time.monotonic()
    status = start([*flags, *DEVICE], n, None, said).wait(timeout=300)
    assert time.monotonic() - begin < 100
    return status, said.read_text()


def _command(flags: list[str], said: Path, of_rank: Mapping[int, list[str]]) -> int:
    rank, n = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n)
    processes.process_group = lambda: nullcontext(dist.group.WORLD)
    with said.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        return cli.main(["train", *flags, *of_rank.get(int(rank), [])])


def _refusal(flags: list[str], said: Path, of_rank: Mapping[int, list[str]] | None = None) -> str:
    """What two processes say, without a traceback; ``of_rank`` has further flags of some."""
    statuses = in_processes(2, _command, [*flags, *DEVICE], said, of_rank or {})
    assert statuses == [2, 2]
    text = said.read_text()
    assert text.count("sae-lens-auxk: error") == 1, text
    return text


def test_a_run_saves_a_plain_sae_and_speaks_once(tmp_path: Path) -> None:
    flags = [*tiny_files.write(tmp_path), "--output_path", str(tmp_path / "output")]
    status, text = _run([*flags, "--checkpoint_path", str(tmp_path)], 2, tmp_path / "said.txt")
    assert status == 0, text
    assert text.count("trained in") == 1
    assert text.count("Dataset is not tokenized") == 1, "a warning of every process"
    assert SAE.load_from_disk(tmp_path / "output").cfg.architecture() == "topk"
    measured = read_evaluation(tmp_path / "output")
    assert measured is not None
    assert measured["l0"] == 4
    assert "in the last 2560 of training\n" in text
    assert text.count(f"explained variance  {measured['explained_variance']:.3f}") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--d_sae", "49"], "d_sae=49 cannot be shared among 2 processes: it must be a multiple"),
        (["--train_batch_size_tokens", "31"], "train_batch_size_tokens=31 cannot be shared"),
        (["--architecture", "auxk-standard"], "architecture='auxk-standard' cannot be shared"),
        (["--output_path", __file__], "output_path='{}' is not allowed: it must be a folder"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint='x' is no complete checkpoint"),
    ],
)
def test_what_cannot_be_shared_is_refused_once(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    given = tiny_files.write(tmp_path)
    if "--architecture" in flags:
        del given[given.index("--k") : given.index("--k") + 2]
    text = _refusal([*given, *flags], tmp_path / "said.txt")
    assert text.count(message.format(__file__)) == 1, text


def test_a_data_set_shorter_than_the_processes_is_refused_once(tmp_path: Path) -> None:
    flags = tiny_files.write(tmp_path, n_rows=1)
    text = _refusal(flags, tmp_path / "said.txt")
    assert text.count("has 1 rows, which cannot be shared among 2 processes") == 1, text


@pytest.mark.parametrize(
    ("of_rank_1", "message"),
    [
        (
            ["--lr", "0.05", "--seed", "7"],
            "seed is 42 on rank 0 and 7 on rank 1; lr is 0.01 on rank 0 and 0.05 on rank 1; lr_end",
        ),
        (["--k", "x"], "rank 1: "),
    ],
)
def test_flags_of_one_process_are_refused_once(
    tmp_path: Path, of_rank_1: list[str], message: str
) -> None:
    flags = tiny_files.write(tmp_path)
    text = _refusal(flags, tmp_path / "said.txt", {1: of_rank_1})
    assert f"sae-lens-auxk: error: {message}" in text
    assert "checkpoint" not in text, "it has not begun"


def test_a_process_without_text_is_named_once(tmp_path: Path) -> None:
    flags = tiny_files.write(tmp_path)
    text = " ".join(["w1"] * tiny_files.CONTEXT_SIZE)
    rows = [{"text": row} for row in [text, text, "", ""] * 50]  # blocks of two
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    text = _refusal([*flags, "--checkpoint_path", str(tmp_path)], tmp_path / "said.txt")
    assert "sae-lens-auxk: error: rank 1: " in text
    assert text.endswith(" It had no checkpoint yet: start it again.\n")


def test_a_file_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "output" / "sae_weights.safetensors").mkdir(parents=True)
    flags = [*tiny_files.write(tmp_path), "--output_path", str(tmp_path / "output")]
    status, text = _run([*flags, "--checkpoint_path", str(tmp_path)], 2, tmp_path / "said.txt")
    assert status != 0
    assert text.count("sae-lens-auxk: error: rank 0: [Errno 21] Is a directory") == 1, text
    assert text.count("sae-lens-auxk: error") == 1
    assert not [line for line in text.splitlines() if "[rank" in line], "a traceback"


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.weekly), signal.SIGTERM]
)
def test_a_signal_leaves_a_checkpoint_that_resumes(tmp_path: Path, number: signal.Signals) -> None:
    flags = [
        *tiny_files.write(tmp_path),
        "--checkpoint_path",
        str(tmp_path / "checkpoints"),
        *DEVICE,
    ]
    said = tmp_path / "said.txt"
    long = ["--training_tokens", str(10**7), "--n_checkpoints", "5000"]
    agent = start([*flags, *long], 2, None, said)
    while (before := newest(tmp_path)) is None:
        assert agent.poll() is None, said.read_text()
        time.sleep(0.1)
    # A scheduler sends SIGTERM to all; torchrun passes on its own.
    own = ranks(agent.pid).values() if number == signal.SIGTERM else ()
    for process in (agent.pid, *own):
        os.kill(process, number)
    assert agent.wait(timeout=100) != 0
    text, after = said.read_text(), newest(tmp_path)
    assert after is not None
    assert int(after.name) > int(before.name)
    assert text.count(f"with --resume_from_checkpoint {after}.") == text.count("interrupted") == 1
    assert MESSAGE not in text
    n_tokens = str(int(after.name) + 640)
    flags += ["--training_tokens", n_tokens, "--resume_from_checkpoint", str(after)]
    assert in_processes(2, _command, flags, said, {}) == [0, 0]


SLOW_MODEL = """
import time
from sae_lens import llm_sae_training_runner
llm_sae_training_runner.load_model = lambda *_, **__: print("loading") or time.sleep(100)
"""


@pytest.mark.weekly
def test_a_signal_while_the_model_loads_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    flags = [*tiny_files.write(tmp_path), "--import", "slow_model", *DEVICE]
    flags += [f"--{name}_path={tmp_path / name}" for name in ("output", "checkpoint")]
    before = {*tmp_path.rglob("*")}
    said = tmp_path / "said.txt"
    agent = start(flags, 2, None, said)
    while said.read_text().count("loading") < 2:
        assert agent.poll() is None, said.read_text()
        time.sleep(0.1)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=50) != 0
    text = said.read_text()
    assert text.count("or torchrun was told to stop: its report below says which. It had no") == 1
    assert not [line for line in text.splitlines() if "[rank" in line], "a traceback of ours"
    assert {*tmp_path.rglob("*")} - before <= {said, *tmp_path.glob("__pycache__*/**")}


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
    own = processes.version
    if dist.get_rank() == 1:
        processes.version = lambda name: "0" if name == "torch" else own(name)
    with pytest.raises(ValueError, match=message):
        processes.require_same({}, dist.group.WORLD)


def test_other_versions_are_named() -> None:
    in_processes(2, _refused, "torch is .* on rank 0 and '0' on rank 1: it must be the same")


def _an_error_without_text() -> None:
    error = StopIteration() if dist.get_rank() == 1 else None
    with pytest.raises(ValueError, match=r"^rank 1: StopIteration\(\)$"):
        processes.agree(error, dist.group.WORLD)


def test_an_error_without_text_is_named() -> None:
    in_processes(2, _an_error_without_text)


def _is_slow_to_end() -> str:
    processes.SECONDS_TO_SAVE = 0
    said = io.StringIO()
    with redirect_stderr(said):
        processes.end_with(lambda: "Resume")
        with noted_signals() as noted:
            signal.raise_signal(signal.SIGTERM)
            deadline = time.monotonic() + 20
            while not said.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
        assert noted == [signal.SIGTERM]
        time.sleep(0.1)  # in which it would end
    return said.getvalue()


def test_a_slow_checkpoint_is_not_cut_off() -> None:
    (said,) = in_processes(1, _is_slow_to_end)
    assert said.count("error: told to stop 0 seconds ago") == said.count(". Resume.") == 1


def _config(of_rank_1: dict[str, Any]) -> Any:
    return runner_config(
        "auxk-topk",
        **tiny_model.run_fields(
            k=4, checkpoint_path="c", **(of_rank_1 if dist.get_rank() == 1 else {})
        ),
    )


def _another_config_is_refused(fields: dict[str, Any], message: str) -> None:
    cfg = _config({})
    if dist.get_rank() == 1:
        for name, value in fields.items():
            setattr(cfg.sae if name == "k" else cfg, name, value)
    with pytest.raises(ValueError, match=message):
        ShardedTrainingRunner(cfg, tiny_model.tokens(), tiny_model.gpt2())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 3}, "sae.k is 4 on rank 0 and 3 on rank 1: it must"),
        ({"device": "cuda:1"}, "^device is 'cpu' on rank 0 and 'cuda' on rank 1: it must"),
        ({"resume_from_checkpoint": "x"}, "checkpoint is None on rank 0 and 'x' on rank 1"),
    ],
)
def test_another_field_is_named(fields: dict[str, Any], message: str) -> None:
    in_processes(2, _another_config_is_refused, fields, message)


def _what_only_rank_0_uses_may_differ() -> None:
    cfg = _config({"output_path": "o", "run_name": "r", "verbose": True})
    for name in ("model_name", "dataset_path", "resume_from_checkpoint"):
        setattr(cfg, name, f"/node{dist.get_rank()}/same")  # its own copy
    require_same_run(cfg, dist.group.WORLD)


def test_what_only_rank_0_uses_may_differ() -> None:
    in_processes(2, _what_only_rank_0_uses_may_differ)
