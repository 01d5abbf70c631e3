"""Every script outside the package imports, and those with flags answer ``--help``.

In one process and not in one each: importing SAELens takes seconds, and there are two dozen.
"""

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

# Imported here because an editable install is on the path by the folder that the test takes off it.
import sae_lens_auxk.cli  # noqa: F401
from sae_lens_auxk.losses.registry import AUX_LOSSES

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("benchmarks", "studies", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


def source(script: Path) -> str:
    return (ROOT / script).read_text(encoding="utf-8")


def module_of(script: Path) -> str | None:
    """The module that its docstring runs by ``python -m``; None where it says ``python FILE``."""
    module = ".".join(script.with_suffix("").parts)
    return module if f"python -m {module}" in source(script) else None


@pytest.fixture
def fresh_python(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import path of a new Python: the repository is on it for ``python -m`` only."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("benchmarks", "studies", "tests", "step", "parts"):
            monkeypatch.delitem(sys.modules, name)
    first = ROOT if module_of(script) else (ROOT / script).parent
    others = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(first), *others])


def start(script: Path, run_name: str) -> None:
    if module := module_of(script):
        runpy.run_module(module, run_name=run_name)
    else:
        runpy.run_path(str(ROOT / script), run_name=run_name)


@pytest.mark.usefixtures("fresh_python")
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_can_be_run(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with patch.dict(AUX_LOSSES):  # a script may register its own
        if "ArgumentParser(" in source(script):
            with pytest.raises(SystemExit) as stopped:
                start(script, "__main__")
            assert not stopped.value.code
            assert capsys.readouterr().out.startswith("usage:")
        else:
            start(script, "imported")


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 20
