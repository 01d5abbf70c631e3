"""The pages that repeat what stands elsewhere say the same."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from sae_lens_auxk import AuxConfig, runner_config
from sae_lens_auxk.cli.train import _parse
from sae_lens_auxk.hub.sae_folder import SAE_FILES
from sae_lens_auxk.losses import BUILT_IN
from sae_lens_auxk.saelens.names import RUNNER_CONFIG_FILENAME
from sae_lens_auxk.saelens.start import require_startable
from tests.saelens.test_swapped_class import SAELENS_LOSS

ROOT = Path(__file__).parents[2]

MAX_WORDS = {
    "choosing.md": 2688,
    "compare.md": 1441,
    "compatibility.md": 707,
    "evidence.md": 26098,
    "getting-started.md": 1036,
    "hub.md": 1041,
    "index.md": 320,
    "issue-666.md": 3545,
    "own-loss.md": 433,
    "peeking.md": 3666,
    "performance.md": 1200,
    "pursuit.md": 5146,
    "reproducibility.md": 2316,
    "resampling.md": 2484,
    "scale.md": 4055,
    "variants.md": 1032,
}
"""What a page may have. A page that is rewritten gets a smaller number; only what is new in the
package, as the section of a new variant, gives a page a larger one."""


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_tables_have_the_committed_numbers() -> None:
    script = runpy.run_path(str(ROOT / "studies" / "tables.py"))
    for name, tables in script["TABLES"].items():
        assert script["with_tables"](page(name), tables) == page(name), name


def test_evidence_says_only_numbers_of_its_tables() -> None:
    def numbers(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w#])\d+(?:[.,]\d+)*", text))

    text = page("evidence.md")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    says = text.split("\n## What it says\n")[1].split("\n## ")[0]
    assert numbers(says) - numbers(tables) == set()


def test_variants_has_every_variant_and_field() -> None:
    text = page("variants.md")
    for name in BUILT_IN:
        assert f"\n## `{name}`\n" in text
    for field in fields(AuxConfig):
        assert f"`{field.name}`" in text, field.name


def test_one_version_and_one_address() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version, site, source = (
        re.findall(rf'^{key} = "(.*)"$', project, re.MULTILINE)[0]
        for key in ("version", "Documentation", "Source")
    )
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for text in (citation, (ROOT / "mkdocs.yml").read_text(encoding="utf-8")):
        assert site in text
        assert source in text


def test_getting_started_has_the_settings_that_give_saelens_loss_back() -> None:
    text = page("getting-started.md")
    for name, value in SAELENS_LOSS.items():
        shown = "d_in // 2" if name == "k_aux" else f'"{value}"' if type(value) is str else value
        assert f"| `{name}={shown}` |" in text, name


def test_the_trainings_of_the_docs_can_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With SAELens's defaults the buffer of activations is smaller than a batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sae_lens_auxk.cli.train.require_device", lambda *_: None)
    blocks = [
        (block.replace("\\\n", " "), path.name)
        for path in (ROOT / "docs").glob("*.md")
        for block in re.findall(r"```\w+\n(.*?)```", path.read_text(), re.DOTALL)
    ]
    started: list[str] = []
    for block, name in blocks:
        for processes, flags in re.findall(r"(?:node (\d+) -m )?sae.lens.auxk train (.*)", block):
            if "--help" not in flags and "..." not in flags:
                command = flags.partition("2>")[0]
                require_startable(_parse(command.split()), int(processes or 1))
                started.append(name)
        for call in re.findall(r"cfg = (runner_config\(\n.*?\n\))", block, re.DOTALL):
            require_startable(eval(call, {"runner_config": runner_config}))
            started.append(name)
    assert {"getting-started.md", "scale.md"} <= {*started}
    assert len(started) >= 4


def test_the_listing_of_a_dry_run_has_all_files_and_their_sum() -> None:
    listed = re.findall(r"^ +([\d,]+)  (\S+)", page("hub.md"), re.MULTILINE)
    sizes = [int(size.replace(",", "")) for size, _ in listed]
    *names, last = [name.rpartition("/")[2] for _, name in listed]
    assert names == [*(name for name in SAE_FILES if name != RUNNER_CONFIG_FILENAME), "README.md"]
    assert (last, sizes[-1]) == ("bytes", sum(sizes[:-1]))


def test_git_does_not_see_the_logs_of_the_commands() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    logs = {log for path in pages for log in re.findall(r"2>(\S+)", path.read_text())}
    assert {"train.log"} <= logs
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {f"*{Path(log).suffix}" for log in logs} <= {*ignored}, logs


def test_no_page_gets_longer() -> None:
    words = {path.name: len(path.read_text().split()) for path in (ROOT / "docs").glob("*.md")}
    includes = {"changelog.md", "contributing.md"}
    assert words.keys() - includes == MAX_WORDS.keys()
    for name, limit in MAX_WORDS.items():
        assert words[name] <= limit, name
