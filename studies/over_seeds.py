"""Mean and standard deviation over the seeds, for studies that do not use ``compare``."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from sae_lens_auxk.compare.schema import Metric

MeanAndStd = dict[str, float | None]


def over_seeds(results: Sequence[dict[str, float]]) -> dict[str, MeanAndStd]:
    """Of each number in the results of the seeds; ``std`` is None for a single seed."""
    return {
        key: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}
        for key in results[0]
        for values in [[result[key] for result in results]]
    }


def cells(result: Mapping[str, Any], columns: Mapping[str, Metric]) -> list[str]:
    """The numbers of a result of ``over_seeds``, as a row of a table."""
    return [metric.show(result[key]["mean"], result[key]["std"]) for key, metric in columns.items()]
