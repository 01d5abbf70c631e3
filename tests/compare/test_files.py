"""The files of a comparison, and the table of metrics that everything else follows."""

import json
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk.compare.files import (
    PASS_FILENAME,
    read_pass,
    read_results,
    write_pass,
    write_results,
)
from sae_lens_auxk.compare.report.figures import figures_of
from sae_lens_auxk.compare.report.markdown import markdown_of
from sae_lens_auxk.compare.report.page import page_of
from sae_lens_auxk.compare.schema import AGES, METRICS, PEEKING, Metric, Run
from sae_lens_auxk.compare.seeds import groups_of
from sae_lens_auxk.files import write_json
from sae_lens_auxk.hub.model_card import comparison_part
from studies.compact import compact
from tests.compare.fake_results import fake_results
from tests.helpers import build_sae

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(path.parent for path in (ROOT / "studies").rglob("results.json"))
# If the report is to change: make reports; git ls-files studies | grep results.json |
# sed s/results.json/report.md/ | xargs sha256sum > tests/compare/reports.sha256
REPORTS = Path(__file__).with_name("reports.sha256").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_results_are_compact_and_give_the_same_report_as_ever(
    folder: Path, tmp_path: Path
) -> None:
    results = read_results(folder)
    report = markdown_of(results, figures_of(results))
    name = (folder / "report.md").relative_to(ROOT).as_posix()
    assert f"{sha256(report.encode()).hexdigest()}  {name}" in REPORTS
    assert compact(results) == results
    write_results(tmp_path, results)
    text = (folder / "results.json").read_text(encoding="utf-8")
    assert text == (tmp_path / "results.json").read_text(encoding="utf-8")


def test_compact_results_say_the_same_with_fewer_digits_and_points() -> None:
    results: Any = fake_results(cases=("auxk",), ks=(25,), seeds=(0, 1))
    finished, failed = results["runs"]
    failed["status"] = "failed"
    for run in results["runs"]:
        run["metrics"] = {"mse": 12.3456789, "f1": 0.12345678, "l0": 131072.0, "mcc": None}
        run["history"] = {
            "samples": [*range(100)],
            "dead_fraction": [i + 1 / 3 for i in range(100)],
        }
        run["sae_config"]["lr"] = 0.00012345678
    finished["metrics"]["found_again"] = 0.123456789
    small: Any = compact(results)
    run, other = small["runs"]
    assert run["metrics"] == {
        "mse": 12.346,
        "f1": 0.12346,
        "l0": 131072.0,
        "mcc": None,
        "found_again": 0.12346,
    }
    assert run["sae_config"] == finished["sae_config"]
    samples = run["history"]["samples"]
    assert (samples[0], samples[-1], len(samples)) == (0, 99, 50)
    assert {b - a for a, b in pairwise(samples)} <= {2, 3}
    assert run["history"]["dead_fraction"] == [float(f"{i + 1 / 3:.5g}") for i in samples]
    assert other["history"]["samples"] == [*range(100)]
    assert finished["history"]["samples"] == [*range(100)]
    finished["metrics"]["recall"] = 0.1874999  # 0.187, but 0.1875 is 0.188
    metrics = compact(results)["runs"][0]["metrics"]
    assert (metrics["mse"], metrics["recall"]) == (12.34568, 0.1874999)


def test_a_row_in_the_table_is_all_that_a_metric_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(
        METRICS, "novelty", Metric("new", 1, "How new it is.", percent=True, better="up")
    )
    monkeypatch.setitem(PEEKING, "spikes", Metric("spikes", 2, "How spiky they are."))
    results: Any = fake_results(cases=("auxk",), ks=(25,), seeds=(0,))
    for run in results["runs"]:
        run["metrics"]["novelty"] = 0.375
        for group in run["peeking"].values():
            group["spikes"] = 1.25
        run["folder"] = "runs/seed-0/auxk"
    results["groups"] = list(groups_of(results["runs"]))
    write_results(tmp_path, results)
    write_pass(tmp_path, results["runs"])

    report = markdown_of(results, figures_of(results))
    assert "| new |" in report
    assert "| 37.5% |" in report
    assert "| spikes |" in report
    assert "| 1.25 (1.25) |" in report
    (peeking,) = (figure for figure in figures_of(results) if figure.name == "peeking")
    assert "spikes" in [panel.title for panel in peeking.panels]
    assert "new</button>" in page_of(results, [])

    build_sae("auxk-topk").save_inference_model(tmp_path / "sae")
    card = comparison_part("me/saes", {"seed-0/auxk": tmp_path / "sae"}, results, "", [])
    assert "| 37.5% |" in card
    assert "- new: How new it is." in card
    assert "new 37.5%" in card


@pytest.mark.parametrize(("entry", "table"), [("metrics", "METRICS"), ("peeking", "PEEKING")])
def test_a_metric_that_is_not_in_the_table_is_not_written(
    entry: str, table: str, tmp_path: Path
) -> None:
    results: Any = fake_results(cases=("auxk",), ks=(25,), seeds=(0,))
    run = results["runs"][0]
    numbers = run["metrics"] if entry == "metrics" else run["peeking"]["never_died"]
    numbers["novelty"] = 1.0
    message = f"'novelty' is not in the table: add a row to {table}"
    with pytest.raises(ValueError, match=message):
        write_results(tmp_path, results)
    with pytest.raises(ValueError, match=message):
        write_pass(tmp_path, results["runs"])
    assert not list(tmp_path.iterdir())


def test_a_pass_of_an_earlier_version_is_read_without_what_has_no_row_any_more(
    tmp_path: Path,
) -> None:
    (fake,) = fake_results(cases=("auxk",), ks=(25,), seeds=(0,))["runs"]
    folder = tmp_path / "seed-0"
    folder.mkdir()
    runs: Any = [dict.fromkeys(Run.__required_keys__) | fake | {"folder": "runs/seed-0/auxk"}]
    write_pass(folder, runs)
    expected = read_pass(folder)
    runs[0]["metrics"]["novelty"] = runs[0]["peeking"]["revived"]["rows_hurt"] = 1.0
    write_json(folder / PASS_FILENAME, runs)
    assert read_pass(folder) == expected


def test_every_definition_is_a_sentence() -> None:
    for metric in (*METRICS.values(), *PEEKING.values()):
        assert metric.definition.endswith(".")
        assert "\n" not in metric.definition


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no comparison: there is no results.json in it"),
        ("{", "results.json cannot be read"),
        ("[" * 100_000, "results.json cannot be read"),
        ("[]", "is not the results of a comparison, version 2"),
        ('{"version": 3, "runs": []}', "is not the results of a comparison, version 2"),
        ('{"version": 2, "runs": []}', "results.json is damaged: results has no name"),
        ('{"version": 1, "runs": [5]}', "results.json is damaged: results has no name"),
        ("[" * 33 + "]" * 33, "cannot be read: it is nested more than 32 levels deep"),
    ],
)
def test_files_that_are_not_results(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path)


def pair(n_ages: int) -> Any:
    return {"metrics": {}, "peeking": {}, "found_again_by_age": [None] * n_ages}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"seed": True}, "0.seed=True is not allowed: it must be of type int"),
        ({"k": "3"}, "0.k='3' is not allowed: it must be a finite number"),
        ({"status": "done"}, "0.status='done' is not allowed: it must be one of finished"),
        ({"metrics": {"l0": float("inf")}}, "0.metrics.l0=inf is not allowed"),
        ({"peeking": {"revived": [1]}}, "0.peeking.revived="),
        ({"history": {"samples": [1], "l0": []}}, "lists in history of .* are not equally long"),
        ({"density": {"log10_edges": [1.0], "counts": [1.0]}}, "one edge more than counts"),
        ({"found_again_by_age": [0.5]}, "found_again_by_age of .* must have 10 entries"),
        ({"pairs": {"1": pair(AGES + 1)}}, "found_again_by_age of .* must have 10 entries"),
        ({"error": ...}, "0 has no error"),
    ],
)
def test_a_damaged_pass_or_results_is_named(
    damage: dict[str, Any], message: str, tmp_path: Path
) -> None:
    results: Any = fake_results(cases=("auxk",), ks=(25,), seeds=(0,))
    run = results["runs"][0]
    run |= {"folder": None} | damage
    for key in [key for key, value in run.items() if value is ...]:
        del run[key]
    # As json.dumps writes it: write_json would write null for infinity.
    (tmp_path / PASS_FILENAME).write_text(json.dumps([run]))
    with pytest.raises(ValueError, match=f"is damaged: .*{message}.* to train the pass again"):
        read_pass(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"results.json is damaged: .*{message}"):
        read_results(tmp_path)
