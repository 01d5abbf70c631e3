"""The report of a comparison: report.html, report.md and figures/*.png.

Everything comes from the content of results.json. ``summary``, ``tables`` and ``figures`` work out
what to say and show, ``groups`` has what they share, and ``markdown`` and ``page`` write it
down, with the figures that ``drawing`` draws.
"""

from pathlib import Path

from sae_lens_auxk.compare.files import FIGURES_FOLDER, MARKDOWN_FILENAME, PAGE_FILENAME
from sae_lens_auxk.compare.report.drawing import png
from sae_lens_auxk.compare.report.figures import FIGURES, figures_of
from sae_lens_auxk.compare.report.markdown import markdown_of
from sae_lens_auxk.compare.report.page import page_of
from sae_lens_auxk.compare.schema import Results
from sae_lens_auxk.files import make_folder, replace_file, write_text


def write_report(results: Results, folder: Path) -> Path:
    """Write report.html, report.md and figures/*.png; return the path of report.html.

    Args:
        results: the content of results.json. The comparison need not be finished.
        folder: where to write. Each file of an earlier report is replaced in one step.
    """
    folder = Path(folder)
    figures = folder / FIGURES_FOLDER
    make_folder(figures)
    drawn = figures_of(results)
    images = {figures / f"{figure.name}.png": figure for figure in drawn}
    # Of an earlier report. Other files in the folder are not ours.
    for stale in {figures / f"{name}.png" for name in FIGURES} - {*images}:
        stale.unlink(missing_ok=True)
    for path, figure in images.items():
        with replace_file(path) as file:
            png(figure, file)
    page = folder / PAGE_FILENAME
    write_text(folder / MARKDOWN_FILENAME, markdown_of(results, drawn))
    write_text(page, page_of(results, drawn))
    return page
