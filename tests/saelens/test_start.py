"""What would stop a run at its end, or after the model is loaded, is refused before it begins."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk import cli, runner_config
from sae_lens_auxk.saelens.start import require_startable
from tests import tiny_files, tiny_model


def config(**fields: Any) -> Any:
    return runner_config("auxk-topk", **tiny_model.run_fields(k=4, **fields))


@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
def test_a_folder_that_cannot_be_made_is_refused(field: str, tmp_path: Path) -> None:
    file, loose = tmp_path / "file", tmp_path / "loose"
    file.write_text("mine")
    loose.symlink_to(tmp_path / "gone")
    bad = [file, file / "inside" / "deeper", loose, "/proc/nothing/here", tmp_path / ("x" * 300)]
    for path in bad:
        with pytest.raises(ValueError, match=f"^{field}='{path}.*it must be a folder"):
            require_startable(config(n_checkpoints=1, **{field: str(path)}))
    assert file.read_text() == "mine"
    for path in (tmp_path, tmp_path / "missing" / "parent"):
        require_startable(config(n_checkpoints=1, **{field: str(path)}))
    assert {*os.listdir(tmp_path)} == {"file", "loose"}, "it left something behind"


@pytest.mark.parametrize("fields", [{"n_checkpoints": 1}, {"save_final_checkpoint": True}, {}])
def test_a_place_for_checkpoints_is_needed_only_where_the_run_has_some(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    cfg = config(checkpoint_path=str(tmp_path / "file"), output_path=str(tmp_path), **fields)
    if fields:
        with pytest.raises(ValueError, match="^checkpoint_path="):
            require_startable(cfg)
    else:
        require_startable(cfg)


def test_runs_that_start_at_once_do_not_refuse_each_other(tmp_path: Path) -> None:
    """Each makes what the others remove, if it leaves nothing behind in the folders themselves."""

    def ask(i: int) -> None:
        for _ in range(200):
            require_startable(config(output_path=str(tmp_path / "sweep" / f"run{i}" / "output")))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(4)))
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        require_startable(config(output_path=str(tmp_path / "new")))


@pytest.mark.parametrize(("n_processes", "smallest"), [(1, 5), (2, 3)])
def test_a_buffer_smaller_than_a_batch_is_refused(n_processes: int, smallest: int) -> None:
    fields: dict[str, Any] = {"train_batch_size_tokens": 40, "seqpos_slice": (8, 16)}
    with pytest.raises(ValueError, match=f"={smallest - 1} is .* at least {smallest}, so"):
        require_startable(config(n_batches_in_buffer=smallest - 1, **fields), n_processes)
    require_startable(config(n_batches_in_buffer=smallest, **fields), n_processes)
    if n_processes == 1:  # which SAELens takes too
        tiny_model.run(config(n_batches_in_buffer=smallest, **fields))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output_path {folder}/data/train.parquet", "/train.parquet' is not allowed: it must be"),
        ("--n_checkpoints 1 --checkpoint_path {folder}/data/train.parquet", "checkpoint_path='"),
        ("--n_batches_in_buffer 1 --train_batch_size_tokens 17", "n_batches_in_buffer=1 is not"),
        ("--d_in 8", "the model has no activations of d_in=8, hook_name='transformer.h.0'"),
        ("--hook_name transformer.h.7", "transformer.h.7"),
        ("--hook_head_index 1", "hook_head_index=1"),
        ("--hook_head_index 16", "hook_head_index=16"),
        ("--context_size 17", "context_size=17"),
    ],
)
def test_the_command_says_so_in_one_line(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*tiny_files.write(tmp_path), "--output_path", str(tmp_path / "output")]
    capsys.readouterr()
    given += ["--n_batches_in_buffer", "4", "--checkpoint_path", str(tmp_path / "checkpoints")]
    assert cli.main(["train", *given, *flags.format(folder=tmp_path).split()]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("sae-lens-auxk: error: ")
    assert message in error
    assert not (tmp_path / "output").exists()
