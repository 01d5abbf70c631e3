"""What the site needs beyond MkDocs: links into the repository, and formulas without JavaScript."""

import posixpath
import re
from html import escape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")
NOTEBOOK_LINK = re.compile(r'(?<=href=")(?![a-z]+:|#|/)([^"#]+\.(?:md|ipynb|py))(?=["#])')


def on_config(config: Any) -> Any:
    """A fence ``math``, which GitHub shows as a formula too, becomes MathML."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "formula", "format": formula}]
    return config


def on_files(files: Any, config: Any) -> None:
    """Add the reports of studies/ that ``make reports`` has drawn, as if they lay in docs/."""
    for folder in {path.parent for path in (ROOT / "studies").rglob("report.md")}:
        for path in (*folder.glob("report.*"), *folder.glob("figures/*")):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))


def formula(source: str, *_: Any, **__: Any) -> str:
    """The formula in its LaTeX ``source``, with that as the text for screen readers."""
    label = escape(" ".join(source.split()), quote=True)
    mathml = convert(source, display="block")
    # Wide ones scroll, so they must be reachable by the keyboard.
    return f'<div class="formula" role="group" aria-label="{label}" tabindex="0">{mathml}</div>'


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Show a file of the repository's root, and point links that leave docs/ to the repository.

    ``source: FILE`` at the top of a page names the file that it shows. A link to results leads to
    their report, where ``make reports`` has drawn it.
    """
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    origin = folder
    if "source" in page.meta:
        origin = "."
        markdown = (ROOT / page.meta["source"]).read_text(encoding="utf-8")
    if page.file.src_uri.startswith("studies/"):
        page.meta["search"] = {"exclude": True}

    def mended(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(origin, match.group(1)))
        file = ROOT / target
        if not file.exists():
            return match.group(1)  # for MkDocs to complain about
        if file.name == "results.json" and file.with_name("report.md").is_file():
            return posixpath.relpath(f"docs/{posixpath.dirname(target)}/report.md", folder)
        if target.startswith("docs/") and file.is_file():
            return posixpath.relpath(target, folder)
        return f"{config.repo_url}/{'tree' if file.is_dir() else 'blob'}/main/{target}"

    return LINK.sub(mended, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any, **_: Any) -> str:
    """Point the links of a notebook, which MkDocs leaves as they are, to pages of the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def mended(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match.group(1)))
        file = files.get_file_from_path(target)
        if file is not None:
            return file.url_relative_to(page.file)
        return f"{config.repo_url}/blob/main/{posixpath.normpath(f'docs/{target}')}"

    return NOTEBOOK_LINK.sub(mended, html) if page.file.src_uri.endswith(".ipynb") else html


def on_post_page(output: str, **_: Any) -> str:
    """Keep the theme from asking GitHub for the repository's stars: the site loads nothing."""
    return output.replace(' data-md-component="source"', "")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for 404.html, which is not a page to MkDocs."""
    return on_post_page(output_content)
