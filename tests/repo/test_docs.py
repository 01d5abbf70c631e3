"""The pages that repeat what stands elsewhere say the same."""

import json
import re
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks import performance
from sae_lens_auxk import AuxConfig, runner_config
from sae_lens_auxk.cli.train import _parse
from sae_lens_auxk.hub.sae_folder import SAE_FILES
from sae_lens_auxk.losses import AUX_LOSSES, BUILT_IN
from sae_lens_auxk.saelens.names import RUNNER_CONFIG_FILENAME
from sae_lens_auxk.saelens.start import require_startable
from studies.rivals import tables as rivals
from tests.repo import rules
from tests.saelens.test_swapped_class import SAELENS_LOSS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OF_RIVALS = "\n".join(page.read_text(encoding="utf-8") for page in rivals.PAGES)

LIMITS = {
    "README.md": rules.MAX_WORDS_OF_README,
    "choosing.md": 500,
    "compatibility.md": 700,
    "issue-666.md": 600,
    "performance.md": 1200,
}
"""The words that other pages may have, if fewer than rules.MAX_WORDS."""


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_performance_has_the_measured_numbers() -> None:
    text = page("performance.md")
    assert performance.with_tables(text) == text
    minutes = {
        (run["store"], run["sae"].split(", ")[-1]): round(200e6 / 60 / run["tokens_per_second"])
        for run in performance.read("whole-run-gpt2")["runs"]
        if "before" not in run["sae"]
    }
    (ours, theirs), (ours_before, theirs_before) = (
        (minutes[store, "pursuit"], minutes[store, "SAELens topk"])
        for store in ("best", "as it comes")
    )
    says = " ".join(text.split())
    assert f"take {ours} minutes with `pursuit`, and {theirs} with SAELens's loss" in says
    assert f"the two take {ours_before} and {theirs_before} minutes" in says
    assert f"about {ours} minutes on an H200" in page("getting-started.md")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_section_of_performance_has_its_cases(device: str) -> None:
    """They are measured on a GPU, where a name that no longer exists costs the whole run."""
    sections = {name: cases(device) for name, cases in performance.CASES.items()}
    assert set(sections["variants"]) == set(BUILT_IN)
    assert {performance.last(name) for name in sections["peers"]} >= {*performance.OURS, "SAELens"}


def test_the_tables_of_rivals_have_the_committed_numbers() -> None:
    assert rivals.with_tables(OF_RIVALS) == OF_RIVALS
    assert all(f"<!-- {name} -->" in OF_RIVALS for name in rivals.TABLES)


@pytest.mark.parametrize("name", ["evidence.md", "issue-666.md"])
def test_a_page_says_of_rivals_only_numbers_of_its_tables(name: str) -> None:
    def numbers(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w.])\d+\.\d+", text))  # of either sign: A less B, B less A

    of_rivals = re.compile(r"^\| (SmolLM2|Gemma)|/rivals/")
    rows = [line for line in page(name).splitlines() if of_rivals.search(line)]
    assert rows
    assert numbers("\n".join(rows)) <= numbers(OF_RIVALS)


def test_variants_has_every_variant_and_field_with_its_default() -> None:
    text = page("variants.md")
    for name in BUILT_IN:
        assert f"\n## `{name}`\n" in text
    variants, _, *of_fields = rules.tables(text)
    shown = {row[0]: row[1].replace("–", "0") for row in variants[1:]}
    losses = {f"[`{name}`](#{name})": AUX_LOSSES[name].default_coefficient for name in BUILT_IN}
    assert {name: float(Fraction(number)) for name, number in shown.items()} == losses
    defaults: dict[str, str] = {}
    for names, values, _ in (row for table in of_fields for row in table[1:]):
        named, given = (re.findall("`(.*?)`", cell) for cell in (names, values))
        defaults |= zip(named, given * (len(named) // len(given)), strict=True)
    of_config = {field.name: repr(field.default).replace("'", '"') for field in fields(AuxConfig)}
    assert defaults == of_config


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
        for path in DOCS.glob("*.md")
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
    pages = [*DOCS.glob("*.md"), *(ROOT / "examples").glob("*.py")]
    logs = {log for path in pages for log in re.findall(r"2>(\S+)", path.read_text())}
    assert {"train.log"} <= logs
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {f"*{Path(log).suffix}" for log in logs} <= {*ignored}, logs


def pages() -> dict[str, str]:
    """The texts of the pages that are written by hand: those of docs, its notebooks, the README."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    for path in (DOCS / "tutorials").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[f"tutorials/{path.name}"] = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    del texts["changelog.md"], texts["contributing.md"]  # each shows a file of the root
    return texts | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}


PAGES = pages()


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_is_within_the_rules(name: str) -> None:
    assert rules.broken_rules(PAGES[name], LIMITS.get(name, rules.MAX_WORDS)) == []


def test_all_pages_together_are_within_the_budget() -> None:
    assert sum(map(rules.words, PAGES.values())) <= rules.MAX_WORDS_OF_ALL


PAGE = """# Three words here

An answer of `two words`
over two lines.

![not a paragraph](figure.png)

- One item.
- Another, Gao et al. Say *so.* Then 1 more.

```bash
echo 1 2 3 4  # 12 words of code that are no paragraph, sentence or table

| no | table |
```

| a | b |
|---|---|
| one \\| two | three |
After the table.
"""


def test_paragraphs_are_told_from_code_tables_headings_and_figures() -> None:
    assert [*rules.paragraphs(PAGE)] == [
        "An answer of `two words` over two lines.",
        "One item.",
        "Another, Gao et al. Say *so.* Then 1 more.",
        "After the table.",
    ]


def test_sentences_end_where_they_end() -> None:
    assert [*rules.sentences(PAGE)][2:4] == ["Another, Gao et al. Say *so", "Then 1 more."]
    text = "Is it 0.5? Yes, e.g. There! `Code` [is](x.md) one. 3 is none."
    assert len([*rules.sentences(text)]) == 3


@pytest.mark.parametrize(
    ("sentence", "n"),
    [
        ("From 1,024 to 0.5 ± 0.1% of 1/32, in 2024.", 5),
        ("From -1 to −2, 3–4.", 4),
        ("SmolLM2-135M, #666, H100, k8, 3.x and f1.5 are names but one.", 1),
        ("`1 2 3` [4](5.md) <https://6.org> $7$ do not count.", 0),
    ],
)
def test_numbers_are_counted_once_and_not_in_names_code_links_or_formulas(
    sentence: str, n: int
) -> None:
    assert [rules.numbers(s) for s in rules.sentences(sentence)] == [n]


def test_tables_are_read_by_cells() -> None:
    assert [*rules.tables(PAGE)] == [[["a", "b"], [r"one \| two", "three"]]]


def test_each_rule_can_be_broken() -> None:
    def table(rows: int, columns: int, cell: str) -> str:
        row = "|" + f" {cell} |" * columns + "\n"
        return row + "|" + "---|" * columns + "\n" + row * rows

    within = ["a " * 80, "1 2 3, X.", "1. 2 3 4", table(10, 6, "a " * 15)]
    assert rules.broken_rules("\n\n".join(within)) == []
    beyond = ["a " * 81, "1 2 3, 4.", table(11, 1, "a"), table(1, 7, "a"), table(1, 1, "a " * 16)]
    text = "\n\n".join(beyond)
    n = rules.words(text)
    found = rules.broken_rules(text, n - 1)
    assert [problem.split(":")[0] for problem in found] == [
        f"{n} words in a page, at most {n - 1}",
        "81 words in a paragraph, at most 80",
        "4 numbers in a sentence, at most 3",
        "11 rows in a table, at most 10",
        "7 columns in a table, at most 6",
        *["16 words in a cell, at most 15"] * 2,
    ]
