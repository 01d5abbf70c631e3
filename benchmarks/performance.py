"""Measure and write everything in docs/performance.md with one command.

    python -m benchmarks.performance --device cuda    # one H200: about 5 minutes
    python -m benchmarks.performance --device cpu     # 2 cores: about 2 minutes
    python -m benchmarks.performance --render         # tables and plots again, nothing measured

Results go to docs/performance/<device>.json, with the machine, versions, date and commit; tables go
between the markers in docs/performance.md, the plot beside the results. ``--sections`` measures
some and keeps the others; ``--only pursuit "pursuit, switched off"`` measures the cases of these
names, notes the commit in each, and keeps the others.
"""

import argparse
import json
import platform
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.made_by import commit
from benchmarks.pages import table, with_blocks
from benchmarks.parts import measure_parts
from benchmarks.step import Case, device_milliseconds, measure
from sae_lens_auxk.compare.cases import STOCK
from sae_lens_auxk.files import write_json
from sae_lens_auxk.losses import BUILT_IN

DOCS = Path(__file__).parent.parent / "docs"
SECTIONS = ("peers", "growth", "variants", "parts")
OURS = ("none", "auxk", "pursuit")
CPU = Case("auxk-topk", 12_288, batch=1024)
ON_GPU = {"captured": True, "fused": True}


def peers(case: Case) -> dict[str, Case]:
    """A step of each package, for the size and architecture of ``case``."""
    stock = replace(case, architecture=STOCK[case.architecture])
    fused = replace(stock, fused=True)
    cases = {
        "SAELens": stock,
        "SAELens, fused Adam": fused,
        "SAELens, fused Adam, coefficient 0": replace(fused, fields={"aux_loss_coefficient": 0.0}),
    }
    if case.architecture == "auxk-topk":
        cases["sparsify"] = replace(case, architecture="sparsify")
        cases["sparsify, no loss"] = replace(cases["sparsify"], fields={"aux": False})
    for variant in OURS:
        ours = replace(case, fields={"aux_variant": variant})
        cases[variant] = replace(ours, **ON_GPU)
    cases["pursuit, switched off"] = ours
    return cases | {"the trainer alone": replace(case, fused=True, only_trainer=True)}


def peer_cases(device: str) -> dict[str, Case]:
    sizes = [CPU]
    if device == "cuda":
        sizes = [
            Case("auxk-topk", 8192, batch=1024),
            Case("auxk-topk", 24_576),
            Case("auxk-batchtopk", 24_576),
            Case("auxk-matryoshka-batchtopk", 24_576),
            Case("auxk-topk", 131_072),
            Case("auxk-topk", 524_288),
        ]
    return {
        f"{size.architecture}|{size.d_sae}|{name}": case
        for size in sizes
        for name, case in peers(size).items()
    }


GROWTH = ("SAELens", "sparsify", "pursuit", "auxk", "none")


def growth_cases(device: str) -> dict[str, Case]:
    """What the figure needs beside the peers."""
    sizes = [Case("auxk-topk", n) for n in (8192, 65_536, 262_144)] if device == "cuda" else []
    return {f"{size.d_sae}|{name}": peers(size)[name] for size in sizes for name in GROWTH}


def variant_cases(device: str) -> dict[str, Case]:
    """Every variant, half of the latents dead."""
    size = replace(Case("auxk-topk", 24_576), **ON_GPU) if device == "cuda" else CPU
    return {name: replace(size, fields={"aux_variant": name}) for name in BUILT_IN}


CASES = {"peers": peer_cases, "growth": growth_cases, "variants": variant_cases}


def chosen(cases: dict[str, Case], only: list[str]) -> dict[str, Case]:
    """The cases that measure one of ``only``; all if that is empty."""
    return {name: case for name, case in cases.items() if not only or last(name) in only}


def last(name: str) -> str:
    """What is measured: the name without architecture and size."""
    return name.split("|")[-1]


def run(device: str, sections: list[str], only: list[str]) -> None:
    path = DOCS / "performance" / f"{device}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not only:
        results |= {section: {} for section in sections if section in CASES}
        results["machine"] = {
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
            **{name: version(name) for name in ("torch", "sae-lens", "eai-sparsify")},
            "python": platform.python_version(),
            "commit": commit(),
        }
    made_by = {"commit": commit()} if only else {}
    for section in sections:
        if section == "parts":
            with (path.parent / f"{device}-parts.txt").open("w") as file, redirect_stdout(file):
                d_sae, batch = (131_072, 4096) if device == "cuda" else (CPU.d_sae, CPU.batch)
                measure_parts(device, d_sae, batch, (0.1, 0.5, 0.9))
            continue
        measured = results.setdefault(section, {})
        for name, case in chosen(CASES[section](device), only).items():
            measured[name] = {"case": asdict(case), **measure(case, device), **made_by}
            print(section, name, measured[name], flush=True)
            write_json(path, results)
    # Last: for a process that has been profiled, every launch takes longer.
    if device == "cuda" and "peers" in sections:
        for name, case in chosen(peer_cases(device), only).items():
            if last(name) in ("SAELens", "sparsify", *OURS, "the trainer alone"):
                results["peers"][name]["device"] = device_milliseconds(case)
                print(name, results["peers"][name]["device"], flush=True)
        write_json(path, results)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


# --- tables and plots ------------------------------------------------------------------------


def milliseconds(result: dict[str, Any]) -> str:
    if "error" in result:
        return "out of memory" if "memory" in result["error"] else result["error"]
    digits = 2 if result["median"] < 10 else 1 if result["median"] < 100 else 0
    return f"{result['median']:.{digits}f}"


ROWS = (
    *("SAELens", "SAELens, fused Adam", "SAELens, fused Adam, coefficient 0"),
    *("sparsify", "sparsify, no loss", *OURS, "pursuit, switched off"),
)
SIZES = {f"auxk-topk|{n}": f"{n:,}" for n in (8192, 24_576, 131_072, 524_288)}
ARCHITECTURES = {
    "auxk-topk|24576": "TopK",
    "auxk-batchtopk|24576": "BatchTopK",
    "auxk-matryoshka-batchtopk|24576": "Matryoshka",
}


def peer_table(
    head: str,
    peers: dict[str, Any],
    columns: dict[str, str],
    rows: Sequence[str] = ROWS,
    cell: Callable[[Any], str] = milliseconds,
) -> str:
    names = {name: re.sub(f"^({'|'.join(OURS)})", r"`\1`", name) for name in rows}
    lines = [
        [label, *(cell(peers[f"{column}|{name}"]) for column in columns)]
        for name, label in names.items()
    ]
    return table([head, *columns.values()], lines)


def whole_run_table() -> str:
    saes = {
        "SAELens topk": "SAELens",
        **{f"auxk-topk, {name}": f"`{name}`" for name in OURS},
        "auxk-topk, pursuit, before": "`pursuit`, switched off",
    }
    columns = {
        ("gpt2", "as it comes"): "GPT-2, as it comes",
        ("gpt2", "best"): "best settings",
        ("gpt2", "cached"): "cached",
        ("smollm2", "as it comes"): "SmolLM2, as it comes",
        ("smollm2", "best"): "best settings",
    }
    rates = {
        (model, run["store"], run["sae"]): f"{round(run['tokens_per_second'], -3):,.0f}"
        for model in ("gpt2", "smollm2")
        for run in read(f"whole-run-{model}")["runs"]
    }
    rows = [[saes[sae], *(rates[(*column, sae)] for column in columns)] for sae in saes]
    return table(["tokens a second", *columns.values()], rows)


def growth_plot(results: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step of 4,096 rows against the number of latents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5, 3.6), layout="constrained")
    steps = {**results["peers"], **results["growth"]}
    for name, marker in zip(GROWTH, "svo^D", strict=True):
        points = sorted(
            (result["case"]["d_sae"], result["median"])
            for key, result in steps.items()
            if last(key) == name and "batchtopk" not in key and result["case"]["batch"] == 4096
        )
        panel.plot(*zip(*points, strict=True), f"{marker}-", label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("latents")
    panel.set_ylabel("ms a step")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    figure.savefig(path, dpi=110)


def read(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "performance" / f"{name}.json").read_text(encoding="utf-8"))


def with_tables(text: str) -> str:
    """The page's text with what was measured between its pairs of marks."""
    results = read("cuda")
    peers, rivals = results["peers"], ("SAELens", "sparsify", *OURS)
    blocks = {
        "cuda machine": ", ".join(f"{k} `{v}`" for k, v in results["machine"].items()),
        "peers": peer_table("ms a step by latents", peers, SIZES),
        "architectures": peer_table("ms a step", peers, ARCHITECTURES, ("SAELens", *OURS)),
        "memory": peer_table(
            "GiB by latents", peers, SIZES, rivals, lambda result: f"{result['GiB']:.1f}"
        ),
        "whole run": whole_run_table(),
    }
    return with_blocks(text, blocks)


def render() -> None:
    page = DOCS / "performance.md"
    growth_plot(read("cuda"), DOCS / "performance" / "growth.png")
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if not args.render:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        known = {last(name) for cases in CASES.values() for name in cases(device)}
        if unknown := [name for name in args.only if name not in known]:
            parser.error(f"--only {', '.join(unknown)}: must be of {', '.join(sorted(known))}.")
        run(device, args.sections, args.only)
    try:
        render()
    except ImportError as error:
        print(f"no plots: {error}")


if __name__ == "__main__":
    main()
