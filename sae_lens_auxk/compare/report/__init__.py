"""A comparison's results as something to read: report.html, report.md and figures/*.png.

Everything comes from the content of results.json: ``answers``, ``tables`` and ``figures`` make of
it what is said and shown, in the words of ``vocabulary``; ``markdown`` and ``page`` write it down,
with the figures that ``drawing`` draws.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens_auxk.compare.report.drawing import png
from sae_lens_auxk.compare.report.figures import figures_of
from sae_lens_auxk.compare.report.markdown import markdown_of
from sae_lens_auxk.compare.report.page import page_of


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html, report.md and figures/*.png; return the path of report.html.

    Args:
        results: the content of results.json, finished or not.
        folder: where to; files of an earlier report are replaced one by one, each at once.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    drawn = figures_of(results)
    images = {folder / "figures" / f"{figure.name}.png": figure for figure in drawn}
    for stale in {*(folder / "figures").glob("*.png")} - {*images}:
        stale.unlink()
    for path, figure in images.items():
        _replace(path, partial(png, figure))
    texts = {"report.md": markdown_of(results, drawn), "report.html": page_of(results, drawn)}
    for name, text in texts.items():
        _replace(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    return folder / "report.html"


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then give it that name."""
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    write(beside)
    os.replace(beside, path)
