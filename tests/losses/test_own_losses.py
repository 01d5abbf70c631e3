"""Losses from elsewhere: an installed package's entry point, and ``--import``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sae_lens.saes.sae import TrainingSAE

from sae_lens_auxk import cli, runner_config
from sae_lens_auxk.losses.registry import AUX_LOSSES
from tests import fresh
from tests.helpers import build_config, build_sae
from tests.tiny_model import run_fields

LOSSES = """
from sae_lens_auxk import register_aux_loss

@register_aux_loss("mine")
def mine(inputs, cfg):
    return inputs.dead_hidden_pre().square().sum(dim=-1).mean()
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    losses, modules, path = dict(AUX_LOSSES), set(sys.modules), list(sys.path)
    yield
    AUX_LOSSES.clear()
    AUX_LOSSES.update(losses)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]
    sys.path[:] = path


def install(folder: Path, module: str, code: str, name: str = "mine") -> None:
    """What an installer leaves of a package whose ``module`` registers the loss ``name``."""
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{module}_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-package\n")
    (metadata / "entry_points.txt").write_text(f"[sae_lens_auxk.aux_losses]\n{name} = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages can be installed into."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_installed_loss_is_imported_when_a_config_names_it(site: Path) -> None:
    install(site, "my_losses", LOSSES)
    build_config("auxk-topk", aux_variant="auxk")
    assert "my_losses" not in sys.modules
    assert build_config("auxk-topk", aux_variant="mine").aux_loss.function.__name__ == "mine"
    assert runner_config("auxk-topk", **run_fields(k=4, aux_variant="mine")).sae.d_sae == 48


def test_a_broken_package_concerns_only_those_who_name_its_loss(site: Path) -> None:
    install(site, "my_losses", LOSSES)
    install(site, "my_broken", "import my_nonexistent\n", name="broken")
    build_config("auxk-topk", aux_variant="mine")
    with pytest.raises(
        ValueError,
        match="aux_variant='broken' .*'my_broken' of my_broken-package, cannot be loaded: "
        "ModuleNotFoundError: No module named 'my_nonexistent'",
    ):
        build_config("auxk-topk", aux_variant="broken")


def test_an_entry_point_must_register_its_name(site: Path) -> None:
    install(site, "my_other", "", name="other")
    with pytest.raises(ValueError, match="'my_other' of .*registers no loss of that name"):
        build_config("auxk-topk", aux_variant="other")


def test_two_packages_with_one_name_are_refused(site: Path) -> None:
    install(site, "my_losses", LOSSES)
    install(site, "my_rivals", LOSSES)
    with pytest.raises(ValueError, match="already registered for another loss"):
        build_config("auxk-topk", aux_variant="mine")


def test_an_unknown_variant_lists_installed_ones_too(site: Path) -> None:
    install(site, "my_losses", LOSSES)
    with pytest.raises(ValueError, match="one of none, .*, mine .*Did you mean mine"):
        build_config("auxk-topk", aux_variant="mines")
    assert "my_losses" not in sys.modules


def test_importing_the_package_asks_for_no_entry_point(site: Path) -> None:
    install(site, "my_losses", "raise SystemExit(1)")
    fresh.run(f"import sys; sys.path.insert(0, {str(site)!r}); import sae_lens_auxk")


def test_a_checkpoint_says_how_to_import_its_loss(tmp_path: Path) -> None:
    exec(LOSSES, {"__name__": "my_losses"})
    sae = build_sae("auxk-topk", aux_variant="mine")
    sae.save_model(tmp_path)
    del AUX_LOSSES["mine"]
    with pytest.raises(ValueError, match="aux_variant='mine' .*import the module .*--import"):
        TrainingSAE.load_from_disk(tmp_path)


# --- the command line -----------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module in it."""
    (tmp_path / "my_losses.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_train_imports_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens_auxk.cli import train

    configs: list[Any] = []

    class Stop(Exception):
        pass

    def keep(cfg: Any, override_sae: Any) -> None:
        configs.append(cfg)
        raise Stop

    monkeypatch.setattr(train, "_Runner", keep)
    flags = "--architecture auxk-topk --import my_losses --aux_variant mine --log_to_wandb false"
    flags += " --n_batches_in_buffer 64"
    with pytest.raises(Stop):
        cli.main(["train", *flags.split()])
    assert configs[0].sae.aux_variant == "mine"


@pytest.mark.filterwarnings("ignore")
def test_compare_imports_modules_and_resumes(here: Path) -> None:
    (here / "my_second.py").write_text(LOSSES.replace("mine", "second"))
    flags = ["--import", "my_losses", "--import=my_second", "--aux_variant", "mine", "second"]
    sizes = "--d_sae 24 --k 2 --training_samples 1600 --batch_size 32 --dead_after 128"
    flags += [*sizes.split(), *["--eval_samples", "256", "--n_features", "32", "--d_in", "12"]]
    assert cli.main(["compare", *flags, "--seeds", "0"]) == 0
    assert cli.main(["compare", *flags, "--seeds", "0", "1"]) == 0
    for name in ("mine", "second"):
        del AUX_LOSSES[name]
    (here / "my_losses.py").unlink()
    assert cli.main(["compare", "--report_only", "comparison"]) == 0
    assert "second" in (here / "comparison" / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--import", "my_lossses"], "--import my_lossses: ModuleNotFoundError: No module named"),
        (["--import", "my_syntax"], "--import my_syntax: SyntaxError: "),
        (["--import"], "argument --import: expected one argument"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    command: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my_syntax.py").write_text("def (")
    assert cli.main([command, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_flag_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "--import MODULE" in capsys.readouterr().out
