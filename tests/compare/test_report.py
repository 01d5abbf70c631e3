import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest

import sae_lens_auxk
from sae_lens_auxk.compare import report as module
from sae_lens_auxk.compare.report import drawing, figures, write_report
from sae_lens_auxk.compare.report.drawing import drawn, svg
from sae_lens_auxk.compare.report.figures import figures_of
from sae_lens_auxk.compare.report.groups import PALETTE, colours, reference_k
from sae_lens_auxk.compare.report.page import STYLE
from sae_lens_auxk.compare.report.summary import answer, footnote, settings
from sae_lens_auxk.compare.report.tables import main_table
from sae_lens_auxk.compare.schema import METRICS
from sae_lens_auxk.compare.schema import PEEKING as MEASURES
from sae_lens_auxk.compare.seeds import groups_of
from tests.compare.fake_results import PEEKING, failed, fake_results

FIGURES = ["dead_latents", "density", "explained_variance", "found_again", "found_again_by_age",
           "pareto", "peeking"]  # fmt: skip
AT_ONE_K = [name for name in FIGURES if name != "pareto"]
HOSTILE = "</script><script>alert('x')</script> <b>a</b> | $x_1$ $ `c` [d](e)"


class Page(HTMLParser):
    """A page's tables, ids, what its tags load, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.policy = ""
        self._raw = ""
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self._raw = tag if tag in ("script", "style") else ""
        loading = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.loaded += [v for k, v in attrs if k in loading and not v.startswith("#")]
        self.ids += [v for k, v in attrs if k == "id"]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._raw = ""
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._raw:
            if self._raw == "style":
                assert "url(" not in data
                assert "@import" not in data
            return
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def report(results: dict[str, Any], folder: Path) -> tuple[Page, str]:
    path = write_report(results, folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8")), (folder / "report.md").read_text("utf-8")


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    tables = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    return [
        [
            [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in table.splitlines()
            if not line.startswith("| ---")
        ]
        for table in tables
    ]


def test_only_figures_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    assert sorted(figures.FIGURES) == FIGURES  # a new one is to be removed as well
    report(fake_results(), tmp_path)
    (tmp_path / "figures" / "mine.png").touch()
    report(fake_results(peeking=False), tmp_path)
    left = sorted(path.stem for path in (tmp_path / "figures").iterdir())
    assert left == ["dead_latents", "density", "found_again_by_age", "mine", "pareto"]


def test_the_page_loads_nothing_and_may_not(tmp_path: Path) -> None:
    page, _ = report(fake_results(ks=(25,)), tmp_path)
    assert page.loaded == ["data:,"]
    assert page.policy.startswith("default-src 'none';")
    assert "http" not in page.policy


def test_one_library_draws() -> None:
    """SAELens brings plotly, so that an import of it would work by luck."""
    sources = Path(sae_lens_auxk.__path__[0]).rglob("*.py")
    assert [path.name for path in sources if "plotly" in path.read_text(encoding="utf-8")] == []


def test_a_page_of_twelve_cases_is_small(tmp_path: Path) -> None:
    path = write_report(fake_results(cases=[f"case {i}" for i in range(12)]), tmp_path)
    assert path.stat().st_size < 1_000_000


def test_the_figures_of_a_page_are_images_with_a_title_and_a_description(tmp_path: Path) -> None:
    results = fake_results(ks=(25,))
    page, _ = report(results, tmp_path)
    assert len(page.ids) == len(set(page.ids))
    text = (tmp_path / "report.html").read_text()
    assert set(re.findall(r"(?:url\(|href=\")#(\w+)", text)) <= {*page.ids}
    for figure in figures_of(results):
        assert svg(figure) == svg(figure)
        assert svg(figure) in text
        element = ElementTree.fromstring(svg(figure))
        title, description = element[:2]
        assert element.get("role") == "img"
        assert element.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert (title.text, description.text) == (figure.title, figure.caption)


def test_the_tables_hold_the_numbers_of_the_runs(tmp_path: Path) -> None:
    results = fake_results()
    page, markdown = report(results, tmp_path)
    in_markdown = markdown_tables(markdown)
    assert [len(table) for table in in_markdown] == [len(table) for table in page.tables]
    for table in (page.tables[0], in_markdown[0]):
        head, *rows = table
        rows_by_group = {(row[0].replace("\\", ""), row[2]): row for row in rows}
        assert len(rows_by_group) == len(rows) == 18
        for case in names_of(results):
            runs = [r for r in results["runs"] if r["case"] == case and r["k"] == 50]
            row = rows_by_group[case, "50"]
            assert row[head.index("seeds")] == "3"
            for column, key, factor, digits in (
                ("EV", "explained_variance", 1, 3),
                ("dead", "dead_fraction", 100, 1),
                ("F1", "f1", 1, 3),
                ("ms/step", "ms_per_step", 1, 1),
            ):
                values = [factor * run["metrics"][key] for run in runs]
                unit = "%" if factor == 100 else ""
                shown = f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}{unit}"
                assert row[head.index(column)].strip("*") == shown


def test_the_peeking_table_holds_the_numbers_of_the_runs(tmp_path: Path) -> None:
    results = fake_results(ks=(25,))
    page, _ = report(results, tmp_path)
    head, *rows = page.tables[1]
    assert {row[0] for row in rows} == {f"{c}, k 25" for c in names_of(results)[1:]}
    runs = [r for r in results["runs"] if r["case"] == "auxk"]
    for group, never_died, shown in (
        ("revived", "never_died", "revived"),
        ("revived_old", "never_died_old", "revived, old"),
    ):
        (row,) = (r for r in rows if r[:2] == ["auxk, k 25", shown])
        values = [run["peeking"][group]["direction_spread"] for run in runs]
        control = mean(run["peeking"][never_died]["direction_spread"] for run in runs)
        text = f"{mean(values):.3f} ± {stdev(values):.3f} ({control:.3f})"
        assert row[head.index("spread")] == text


def test_a_case_has_one_colour_and_six_are_lines() -> None:
    cases = [f"case {i}" for i in range(21)]
    results = fake_results(cases=cases, ks=(10, 25), seeds=(0,))
    colour = colours(results)
    assert len(set(colour.values())) == 21
    assert [colour[case] for case in cases[:8]] == list(PALETTE)
    for figure in figures_of(results):
        for panel in figure.panels:
            drawn = {series.label: series.colour for series in panel.series}
            n_lines = 21 if panel.categories else 6
            assert drawn == {case: colour[case] for case in cases[:n_lines]}
        named = "Left out, and in the table: case 6, case 7, " in figure.caption
        assert named == (not figure.panels[0].categories)


def test_the_lines_of_a_figure_are_the_first_rows_of_the_table() -> None:
    """Of made-up cases the last are the best by F1."""
    results = fake_results(cases=[f"case {i}" for i in range(8)], ks=(25,))
    rows = [row[0].text for row in main_table(results).rows]
    assert rows[0] == "case 7"
    (figure,) = (f for f in figures_of(results) if f.name == "dead_latents")
    assert [series.label for series in figure.panels[0].series] == rows[:6]
    assert figure.caption.endswith(f"Left out, and in the table: {rows[6]}, {rows[7]}.")
    (figure,) = (f for f in figures_of(results) if f.name == "explained_variance")
    assert list(figure.panels[0].categories) == rows


def test_images_are_written_and_stale_ones_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "png", drawing.png)
        report(fake_results(ks=(16, 25)), tmp_path)
        assert (tmp_path / "figures" / "pareto.png").read_bytes().startswith(b"\x89PNG")
        report(fake_results(ks=(25,), seeds=(0, 1)), tmp_path)
    images = sorted((tmp_path / "figures").iterdir())
    assert [image.name for image in images] == [f"{name}.png" for name in AT_ONE_K]
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)
    page, markdown = report(fake_results(ks=(25,), peeking=False), tmp_path)
    assert not (tmp_path / "figures" / "peeking.png").exists()
    assert "peeking.png" not in markdown
    assert "too few latents that were dead and came back" in page.text
    assert len(page.tables) == 1
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    names = ("dead_latents", "density", "explained_variance", "found_again_by_age")
    assert left == sorted(["report.html", "report.md", *(f"{name}.png" for name in names)])


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    results = fake_results(ground_truth=False, ks=(32,), seeds=(0,))
    page, markdown = report(results, tmp_path)
    for text in (page.text, markdown):
        assert "±" not in text
        assert "One seed" in text
    assert "CE recovered" in page.tables[0][0]
    assert "F1" not in page.tables[0][0]
    assert "Best F1" not in page.text
    assert all(s.band is None for f in figures_of(results) for p in f.panels for s in p.series)


def test_failed_and_unfinished_runs_are_named(tmp_path: Path) -> None:
    results = fake_results(ks=(25,))
    failed(results["runs"][0], "failed", "RuntimeError: <CUDA>\nout of memory")
    failed(results["runs"][1], "unfinished", None)
    results["groups"] = list(groups_of(results["runs"]))
    page, markdown = report(results, tmp_path)
    for text in (page.text, markdown.replace("\\", "")):
        assert "Failed: none, auxk-topk, k=25, seed 0: RuntimeError: <CUDA>" in text
        assert "Not finished: none, auxk-topk, k=25, seed 1" in text
    assert page.tables[0][1][3] == "1"


def test_a_report_without_a_finished_run(tmp_path: Path) -> None:
    results = fake_results(cases=("auxk",), ks=(25,))
    for run in results["runs"]:
        failed(run, "unfinished", None)
    results["groups"] = []
    page, markdown = report(results, tmp_path)
    assert "no run has finished" in page.text
    assert "no run has finished" in markdown
    assert page.tables == []


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    results = fake_results(cases=("auxk", HOSTILE, "$x_1$"), ks=(25,), seeds=(0,))
    page, markdown = report(results, tmp_path)
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert ">$x_1$</text>" in svg(figures_of(results)[0])
    assert page.tables[0][2][0] == HOSTILE
    assert len(markdown_tables(markdown)[0][2]) == len(page.tables[0][2])


def test_the_markdown_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Names may come from a repository of anyone's, and report.md is read with cat."""
    results = fake_results(cases=("auxk", "\x1b[2Ja"), ks=(25,), seeds=(0, 1))
    failed(results["runs"][1], "failed", "no\x1b]0;title\x07")
    results["groups"] = list(groups_of(results["runs"]))
    results["name"] = results["data"]["description"] = "\x9b31m"
    _, markdown = report(results, tmp_path)
    assert all(character.isprintable() or character == "\n" for character in markdown)
    assert r"\\x1b\[2Ja" in markdown


def names_of(results: Any) -> list[str]:
    return [case["name"] for case in results["comparison"]["cases"]]


def results_of(l0: float = 8, **cases: Any) -> Any:
    """Results with nothing but explained variance by seed, or all metrics of each seed."""
    runs = [
        {"case": case, "architecture": "auxk-topk", "k": None, "seed": seed, "status": "finished",
         "metrics": {"l0": l0, "dead_fraction": 0.25}
         | (value if isinstance(value, dict) else {"explained_variance": value}),
         "peeking": None, "sae_config": {"d_sae": 4096, "d_in": 64}}
        for case, values in cases.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    groups = list(groups_of(runs))  # type: ignore[arg-type]
    return {"runs": runs, "groups": groups, "comparison": {}, "data": {}}


@pytest.mark.parametrize(
    ("cases", "text"),
    [
        (
            {"a": (0.5, 0.51, 0.5), "b": (0.6, 0.61, 0.6), "c": (0.4, 0.42, 0.4)},
            '"b", 0.603 ± 0.006 (L0 8.0, 25.0% of 4,096 latents dead), is better than each of '
            'the others, and than the next, "a" (0.503 ± 0.006), by 0.100 to 0.100 '
            "(95% interval).",
        ),
        (
            {"a": (0.5, 0.51, 0.5), "b": (0.6, 0.61, 0.6)},
            '"b", 0.603 ± 0.006 (L0 8.0, 25.0% of 4,096 latents dead), is better than the other, '
            '"a" (0.503 ± 0.006), by 0.100 to 0.100 (95% interval).',
        ),
        (
            {
                case: [{"dead_fraction": x, "l0": 8} for x in shares]
                for case, shares in {"a": (0.3, 0.4, 0.3), "b": (0.1, 0.1, 0.11)}.items()
            },
            '"b", 10.33 ± 0.58% (L0 8.0, 10.33% of 4,096 latents dead), is better than the other, '
            '"a" (33.33 ± 5.77%), by 7.89 to 38.11 points (95% interval).',
        ),
        (
            {"a": (0.5, 0.7, 0.4), "b": (0.6, 0.61, 0.6), "c, d": (0.1, 0.12, 0.1)},
            'Not told apart: "b" (0.603 ± 0.006) and "a" (0.533 ± 0.153). Worse than at least one '
            'other: "c, d" (0.107 ± 0.012).',
        ),
        (
            # "a" and "c" have no seed in common.
            {"a": (0.7,) * 3, "b": (0.6,) * 6, "c": (None,) * 3 + (0.5,) * 3},
            'Not worse than any other: "a" (0.700 ± 0.000). Worse than at least one other: "b" '
            '(0.600 ± 0.000) and "c" (0.500 ± 0.000).',
        ),
        (
            {"a": (0.5, 0.5), "b": (0.6, 0.6)},
            'Not told apart, as no two have 3 seeds in common; by their means: "b" (0.600 ± 0.000) '
            'and "a" (0.500 ± 0.000).',
        ),
        (
            {"a": (0.5, 0.5, 0.5), "b": (0.6, 0.6)},
            'Not told apart, as no two have 3 seeds in common; by their means: "b" (0.600 ± 0.000) '
            'and "a" (0.500 ± 0.000).',
        ),
        (
            {"a": (0.5,)},
            'Only "a" has this number: 0.500 (L0 8.0, 25.0% of 4,096 latents dead).',
        ),
    ],
)
def test_an_answer_by_hand(cases: dict[str, Any], text: str) -> None:
    assert text in dict(answer(results_of(**cases))).values()


def with_pairs(results: Any) -> Any:
    """Each seed finds in each other what it finds in all."""
    seeds = {run["seed"] for run in results["runs"]}
    for run in results["runs"]:
        pair = {"metrics": run["metrics"], "peeking": {}, "found_again_by_age": []}
        run["pairs"] = {str(seed): pair for seed in seeds - {run["seed"]}}
    return {**results, "groups": list(groups_of(results["runs"]))}


def test_killing_latents_wins_nothing() -> None:
    """faults.md, A5: 64% dead, and level with none; and two to four latents of 256."""
    question = "Most latents found again by other seeds"

    def said(d_sae: int, **shares: float) -> str:
        cases = {
            case: [{"found_again": share, "dead_fraction": 0.6, "l0": 8}] * 3
            for case, share in shares.items()
        }
        results = results_of(**cases)
        for run in results["runs"]:
            run["sae_config"]["d_sae"] = d_sae
        return dict(answer(with_pairs(results)))[question]

    assert said(256, multi_topk=4 / 256, none=2 / 256) == (
        "Not told apart, as no case has 30 latents that are found again; by their means: "
        '"multi_topk" (1.6 ± 0.0%) and "none" (0.8 ± 0.0%).'
    )
    text = said(256, multi_topk=40 / 256, none=20 / 256)
    assert text.startswith('"multi_topk", 15.6 ± 0.0%')
    assert text.endswith("by 7.8 to 7.8 points (95% interval).")


def test_pairs_that_are_not_known_are_the_reason() -> None:
    """Of version 1, with four seeds."""
    results = results_of(**{case: [{"found_again": share, "l0": 8}] * 4
                            for case, share in {"a": 0.5, "b": 0.1}.items()})  # fmt: skip
    assert dict(answer(results))["Most latents found again by other seeds"] == (
        "Not told apart, as no two have 3 seeds in common whose pairs are all known; by their "
        'means: "a" (50.0%) and "b" (10.0%).'
    )


def test_cases_of_another_l0_are_named_and_not_ranked(tmp_path: Path) -> None:
    """faults.md, A6: JumpReLU at L0 14.5 against TopK at L0 32."""
    sparse = [{"explained_variance": value, "l0": 14.5} for value in (0.9, 0.91, 0.9)]
    results = results_of(l0=32, jumprelu=sparse, a=(0.5, 0.51, 0.5), b=(0.6, 0.61, 0.6))
    text = dict(answer(results))["Best explained variance"]
    assert text.startswith('"b", 0.603 ± 0.006 (L0 32.0, ')
    assert text.endswith('Not compared, as some L0 are more than 10% away: "jumprelu" (14.5).')
    only = results_of(l0=32, jumprelu=sparse, a=(0.5, 0.51, 0.5))
    text = dict(answer(only))["Best explained variance"]
    assert text.startswith('No two cases have about the same L0: "jumprelu", 0.903 ± 0.006 (L0')


def test_no_case_is_called_worse_than_one_of_another_l0() -> None:
    results = results_of(
        **{
            case: [{"f1": f1, "l0": l0, "dead_fraction": 0.25}] * 3
            for case, f1, l0 in (("A", 0.9, 30), ("B", 0.8, 32.5), ("C", 0.7, 35))
        }
    )
    text = dict(answer(results))["Best F1 with true features"]
    assert text.startswith('"A", 0.900 ± 0.000 (L0 30.0, ')
    assert text.endswith('Not compared, as some L0 are more than 10% away: "C" (35.0).')


def test_a_metric_that_only_another_k_has_is_not_asked_for() -> None:
    results = fake_results(cases=("a", "b"), ks=(16, 25, 50))
    for run in results["runs"]:
        if run["k"] != 50:
            del run["metrics"]["f1"]
    results["groups"] = list(groups_of(results["runs"]))
    assert "Best F1 with true features" not in dict(answer(results))
    assert "Best explained variance" in dict(answer(results))


def test_the_only_case_that_did_not_fail() -> None:
    results = fake_results(cases=("a", "b"), ks=(25,))
    for run in results["runs"][:3]:
        failed(run, "failed", "no")
    results["groups"] = list(groups_of(results["runs"]))
    assert dict(answer(results))["Best F1 with true features"].startswith(
        'Only "b" has this number: 0.7'
    )


def test_bold_is_by_l0_where_an_architecture_has_no_k() -> None:
    """JumpReLU beside TopK at two k: it is the best at the k that has its L0."""
    results = fake_results(cases=("topk", "jumprelu"), ks=(16, 32))
    for run in results["runs"]:
        k = run["k"]
        run["metrics"] |= {"l0": k, "explained_variance": 0.5 + k / 1000}
        if run["case"] == "jumprelu":
            run["k"] = None
            run["metrics"] |= {"l0": 31, "explained_variance": 0.6}
    results["runs"] = [
        run for run in results["runs"] if "jumprelu, auxk-topk, k=16" not in run["name"]
    ]
    results["groups"] = list(groups_of(results["runs"]))
    table = main_table(results)
    column = table.columns.index("EV")
    assert [(row[0].text, row[2].text) for row in table.rows if row[column].best] == [
        ("jumprelu", "–")
    ]


def test_times_name_no_winner() -> None:
    """A case that is trained again is timed alone."""
    results = results_of(
        a=[{"ms_per_step": 1.0, "l0": 8}] * 3, b=[{"ms_per_step": 9.0, "l0": 8}] * 3
    )
    table = main_table(results)
    column = table.columns.index("ms/step")
    assert not any(row[column].best for row in table.rows)


def test_bold_rows_and_answers_agree() -> None:
    """Of many made-up comparisons."""
    for i in range(6):
        cases = [f"{i} {j}" for j in range(4)]
        results = fake_results(cases=cases, ks=(16, 25, None), architectures=("auxk-topk",))
        table, answers = main_table(results), dict(answer(results))
        for key, question in (("f1", "Best F1"), ("explained_variance", "Best explained")):
            column = table.columns.index(METRICS[key].label)
            bold = [row[0].text for row in table.rows if row[column].best and row[2].text == "16"]
            (text,) = (text for head, text in answers.items() if head.startswith(question))
            assert bold == [case for case in cases if text.startswith(f'"{case}", ')]


def peeking_of(n: int = 90, rates: tuple[float, float] = (0.1, 0.2), **junk: Any) -> str:
    """The line on cases whose revived latents, and those that never died, are junk this often."""
    results = results_of(**{case: (0.5,) * len(shares) for case, shares in junk.items()})
    for run in results["runs"]:
        both = junk[run["case"]][run["seed"]]
        run["peeking"] = {
            which: {"junk_share": share, "n_latents": n, "firing_rate": rate, "found_again": 0.5}
            for which, share, rate in zip(("revived", "never_died"), both, rates, strict=True)
        }
    (text,) = (
        text
        for head, text in answer({**results, "groups": list(groups_of(results["runs"]))})
        if head.startswith("Residual peeking")
    )
    return text


def test_the_peeking_line_by_hand() -> None:
    about = "Junk is what no true feature is near; given of those that came back, and of others "
    about += "that fire as often."
    again = "Found again of those that came back, and of all that never died:"
    worse, same = [(0.5, 0.2), (0.5, 0.21), (0.52, 0.2)], [(0.5, 0.2), (0.2, 0.5), (0.3, 0.3)]
    assert peeking_of(a=worse, b=[share[::-1] for share in worse], c=same) == (
        f'{about} Larger: "a" 50.7% and 20.3%. Not told apart: "c" 33.3% and 33.3%. Smaller: "b" '
        f'20.3% and 50.7%. {again} "a" 50.0% and 50.0%, "b" 50.0% and 50.0% and "c" 50.0% and '
        "50.0%."
    )
    few = "Not told apart with fewer than 3 seeds"
    assert peeking_of(a=worse[:2]).startswith(f'{about} {few}: "a" 50.0% and 20.5%. ')
    assert "Too few, less than 30: " in peeking_of(n=29, a=worse)
    assert "Too few" not in peeking_of(n=30, a=worse)
    unlike = "Not comparable, as no others fire about as often: "
    assert unlike in peeking_of(rates=(0.1, 0.21), a=worse)
    assert unlike in peeking_of(rates=(0.21, 0.1), a=worse)


def test_the_settings_say_what_each_case_is() -> None:
    results: Any = results_of(auxk=(0.5,), hard=(0.5,))
    for run, bias in zip(results["runs"], ("decoder", "none"), strict=True):
        run["sae_config"] |= {"aux_bias": bias, "k_aux": 32, "d_sae": 64}
    cases = ("cases", '"auxk" (auxk-topk); "hard" (auxk-topk, aux_bias none)')
    assert cases in settings(results)
    results["comparison"] = {"cases": [{"name": "hard", "lr": 1e-3}, {"aux_variant": "auxk"}]}
    shown = dict(settings(results))["cases"]
    assert shown == cases[1].replace("aux_bias none", "aux_bias none, lr 0.001")
    results["comparison"] = {}
    unfinished = [{**run, "seed": 1, "status": "unfinished", "sae_config": {}}
                  for run in results["runs"]]  # fmt: skip
    results["runs"] += unfinished
    assert cases in settings(results)
    results["runs"] = unfinished
    assert ("cases", '"auxk" (auxk-topk); "hard" (auxk-topk)') in settings(results)


def test_the_settings_say_which_rows_are_left_out() -> None:
    results = results_of(a=(0.5,))
    assert "left out" not in dict(settings(results))
    results["comparison"]["max_norm_multiple"] = 10.0
    assert ("left out", "rows above 10 times the median norm") in settings(results)


def test_the_settings_stand_above_all_numbers(tmp_path: Path) -> None:
    results = fake_results(cases=("auxk",), ks=(16, 25))
    results["comparison"] |= {"training_samples": 8_000_000, "lr": 3e-4, "dead_after": 10_000,
                              "batch_size": 4096, "eval_samples": 500}  # fmt: skip
    assert dict(settings(results)) == {
        "d_sae": "4,096", "d_in": "768", "k": "16, 25", "training samples": "8,000,000",
        "batch size": "4,096", "learning rate": "0.0003", "held-out samples": "500",
        "dead after": "10,000 silent samples", "seeds": "0, 1, 2", "cases": '"auxk" (auxk-topk)',
       
    }  # fmt: skip
    page, markdown = report(results, tmp_path)
    for text, first in ((page.text, "All numbers"), (markdown, "## All numbers")):
        assert text.index("0.0003") < text.index("Best F1") < text.index(first)


def test_the_axes_of_peeking_have_zero() -> None:
    (peeking,) = (f for f in figures_of(fake_results(ks=(25,))) if f.name == "peeking")
    titles = {panel.title for panel in peeking.panels}
    assert not titles & {"alive", "fire", "measured", "firing rate", "age, %"}
    axes = drawn(peeking).axes[: len(PEEKING)]
    assert all(low <= 0 < high for low, high in (at.get_xlim() for at in axes))


def test_cases_are_compared_at_one_k() -> None:
    results = fake_results(ks=(16, 25, 50, None))
    assert reference_k(results["groups"]) == 25
    assert "compare at k 25" in footnote(results)
    ks = {group["k"] for group in results["groups"]}
    assert ks == {16, 25, 50, None}


def test_the_best_of_a_column_is_bold(tmp_path: Path) -> None:
    results = fake_results(cases=("a", "b", "c"), ks=(16, 50))
    for group in results["groups"]:
        for run in group["runs"]:
            better, noise = "acb".index(group["case"]), run["seed"] / 1000
            run["metrics"] |= {"explained_variance": 0.5 + better / 10 + noise,
                               "dead_fraction": 0.5 - better / 10 + noise,
                               "mse": 1.0 + noise if group["case"] == "a" else 0.9 + 70 * noise,
                               "mcc": 0.5}  # fmt: skip
    results["groups"] = list(groups_of(results["runs"]))
    _, markdown = report(results, tmp_path)
    head, *rows = markdown_tables(markdown)[0]
    for row in rows:  # of each k
        bold = [name for name, cell in zip(head, row, strict=True) if cell.startswith("**")]
        assert ("EV" in bold) == ("dead" in bold) == (row[0] == "b")
        assert not {"L0", "MSE", "MCC"} & set(bold)
    assert "Bold: better than every other case" in footnote(results)
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="number best"') == markdown.count("**") // 2 - len(answer(results))
    two = fake_results(cases=("a", "b", "c"), ks=(16,), seeds=(0, 1))
    assert not any(cell.best for row in main_table(two).rows for cell in row)
    assert "Bold" not in footnote(two)


def test_without_true_features_reproducibility_comes_first(tmp_path: Path) -> None:
    results = fake_results(ks=(25,), ground_truth=False)
    page, _ = report(results, tmp_path)
    assert page.tables[0][0][4:7] == ["found again", "best cosine", "matched cosine"]
    assert answer(results)[0][0] == "Most latents found again by other seeds"
    assert [figure.name for figure in figures_of(results)][0] == "found_again"

    page, _ = report(fake_results(ks=(25,)), tmp_path)
    assert page.tables[0][0].index("found again") > page.tables[0][0].index("F1")
    assert [figure.name for figure in figures_of(fake_results())][0] == "pareto"


def test_what_it_takes_to_find_latents_again() -> None:
    needs_two = "can be measured from two seeds on"
    shares_one = "with synthetic_model: {seed: 0} all seeds share one"
    one = fake_results(ks=(25,), seeds=(0,))
    assert needs_two in footnote(one)
    two = fake_results(ks=(25,), seeds=(0, 1))
    assert needs_two not in footnote(two)
    assert shares_one not in footnote(two)
    for group in two["groups"]:
        del group["mean"]["found_again"]
    assert shares_one in footnote(two)
    two["comparison"]["synthetic_model"] = {"seed": 42}
    assert shares_one not in footnote(two)


def test_with_one_k_explained_variance_is_drawn_by_case() -> None:
    results = fake_results(ks=(25,))
    (figure,) = (f for f in figures_of(results) if f.name == "explained_variance")
    assert {*figure.panels[0].categories} == {*names_of(results)}
    groups = {group["case"]: group for group in results["groups"]}
    for series in figure.panels[0].series:
        group = groups[series.label]
        assert list(series.x) == [group["mean"]["explained_variance"]]
        assert list(series.x_error) == [group["std"]["explained_variance"]]
    for ks in ((16, 25), (None,), (25, None)):
        assert "pareto" in {figure.name for figure in figures_of(fake_results(ks=ks))}


def test_random_directions_are_found_more_often_where_a_row_has_no_sign() -> None:
    def caption(architecture: str) -> str:
        results = fake_results(architectures=(architecture,), ks=(25,))
        for run in results["runs"]:
            run["sae_config"] |= {"d_sae": 24, "d_in": 12}
        (text,) = (f.caption for f in figures_of(results) if f.name == "found_again")
        return text

    assert "At most 8.9% of random directions would" in caption("auxk-topk")
    assert "At most 17% of random directions would" in caption("auxk-abstopk")


def test_found_again_by_group_and_by_age() -> None:
    results = fake_results(ks=(25,), ground_truth=False)
    made = {figure.name: figure for figure in figures_of(results)}
    (panel,) = made["found_again"].panels
    assert panel.title == "found again, %"
    assert {*panel.categories} == {*names_of(results)[1:]}
    assert [series.filled for series in panel.series[:2]] == [False, True]
    assert (
        "Fewer than 0.01% of random directions would be found again." in made["found_again"].caption
    )
    assert "found again, %" not in {panel.title for panel in made["peeking"].panels}
    groups = {group["case"]: group for group in results["groups"]}
    for series in made["found_again_by_age"].panels[0].series:
        group = groups[series.label]
        assert list(series.x) == pytest.approx([0.05 + i / 10 for i in range(9)])
        assert series.y[0] == pytest.approx(group["mean"]["found_again"])
        assert series.band is not None


def test_the_page_defines_every_column_that_it_shows(tmp_path: Path) -> None:
    page, _ = report(fake_results(ks=(25,)), tmp_path)
    shown = [METRICS[key] for key in ("found_again", "f1", "explained_variance")]
    for metric in (*shown, MEASURES["direction_spread"]):
        assert page.text.count(metric.definition) == 1
    assert METRICS["ce_loss_recovered"].definition not in page.text


def test_report_md_defines_every_column_that_it_shows(tmp_path: Path) -> None:
    _, markdown = report(fake_results(ks=(25,)), tmp_path)
    text = markdown.replace("\\", "")
    for metric in (METRICS["found_again"], METRICS["f1"], MEASURES["direction_spread"]):
        assert f"- {metric.label}: {metric.definition}" in text
    assert METRICS["ce_loss_recovered"].definition not in text


def test_a_page_can_be_read_without_seeing_and_without_a_mouse(tmp_path: Path) -> None:
    report(fake_results(ks=(25,)), tmp_path)
    page = (tmp_path / "report.html").read_text()
    tables = re.findall("<table.*?</table>", page, flags=re.DOTALL)
    for table in tables:
        assert table.count("<caption>") == 1
        n_rows = table.count("<tr>") - 1
        assert table.count('scope="row"') == n_rows > 0
        assert table.count('scope="col"') == table.count("<button ")
    # What scrolls is reached by Tab, and says what it is.
    scrolling = re.findall(r'<(?:div class="(?:wide|plot)"|pre)[^>]*>', page)
    assert len(scrolling) > len(tables)
    for element in scrolling:
        assert 'tabindex="0"' in element
        assert re.search('role="group" aria-label="[^"]+"', element)
    assert page.count("<figure>") == page.count("<figcaption") == page.count("<svg ")


def test_a_dark_page_has_no_colour_of_the_light_one() -> None:
    _, _, rules = STYLE.partition("body {")
    written = re.findall(r"[{;\s](?:color|background): *(#\w+)", rules)
    assert not written, "these do not change with prefers-color-scheme"
    for variable in set(re.findall(r"var\((--\w+)\)", rules)):
        assert STYLE.count(f"{variable}: #") == 2, variable
