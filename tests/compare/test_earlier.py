"""Results of version 1 are read as the present one."""

from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk.compare.files import read_results, write_results
from sae_lens_auxk.compare.schema import VERSION
from sae_lens_auxk.files import read_json, write_json
from tests.compare.fake_results import fake_results


def as_version_1(results: Any) -> Any:
    """Without pairs, and with the share found again of the alive latents."""
    runs = [{key: v for key, v in run.items() if key != "pairs"} for run in results["runs"]]
    for run in runs:
        metrics = run["metrics"]
        run["metrics"] = {
            **metrics,
            "found_again": metrics["found_again"] / (1 - metrics["dead_fraction"]),
        }
    groups = [{key: v for key, v in g.items() if key != "runs"} for g in results["groups"]]
    return {**results, "version": 1, "runs": runs, "groups": groups}


@pytest.mark.parametrize("seeds", [(0, 1), (3, 0, 7)], ids=str)
def test_pairs_and_shares_come_back(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    results = fake_results(cases=("auxk", "none"), ks=(25,), seeds=seeds)
    write_json(tmp_path / "results.json", as_version_1(results))
    read = read_results(tmp_path)
    assert read["version"] == VERSION
    for run, expected in zip(read["runs"], results["runs"], strict=True):
        assert run["metrics"] == pytest.approx(expected["metrics"])
        assert list(run["pairs"]) == list(expected["pairs"])
        for other, pair in run["pairs"].items():
            was = expected["pairs"][other]
            assert pair["metrics"] == pytest.approx(was["metrics"])
            assert pair["found_again_by_age"] == pytest.approx(was["found_again_by_age"])
            assert pair["peeking"]["revived"] == pytest.approx(was["peeking"]["revived"])
    for group, expected in zip(read["groups"], results["groups"], strict=True):
        assert group["std"] == pytest.approx(expected["std"])

    write_results(tmp_path, read)
    assert "groups" not in read_json(tmp_path / "results.json")
    assert read_results(tmp_path) == read


def test_four_seeds_have_no_spread(tmp_path: Path) -> None:
    results = fake_results(cases=("auxk",), ks=(25,), seeds=(0, 1, 2, 3))
    write_json(tmp_path / "results.json", as_version_1(results))
    (group,) = read_results(tmp_path)["groups"]
    mean = results["groups"][0]["mean"]["found_again"]
    assert group["mean"]["found_again"] == pytest.approx(mean)
    assert group["std"]["found_again"] is None
    assert group["std"]["explained_variance"] is not None


def test_damaged_results_are_named(tmp_path: Path) -> None:
    results = as_version_1(fake_results(cases=("auxk",), ks=(25,), seeds=(0, 1)))
    results["runs"][1]["found_again_by_age"].pop()
    write_json(tmp_path / "results.json", results)
    with pytest.raises(ValueError, match="results.json is damaged: found_again_by_age of"):
        read_results(tmp_path)


def test_one_seed_and_unfinished_runs_stay(tmp_path: Path) -> None:
    results: Any = fake_results(cases=("auxk",), ks=(25,), seeds=(0,))
    results["runs"][0]["metrics"].pop("f1")
    write_json(tmp_path / "results.json", {**results, "version": 1, "groups": []})
    assert read_results(tmp_path)["runs"] == results["runs"]
