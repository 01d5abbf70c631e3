"""Measure and write everything in docs/performance.md with one command.

    python benchmarks/performance.py --device cuda      # one H100: about 6 minutes
    python benchmarks/performance.py --device cpu       # 2 cores: about 10 minutes
    python benchmarks/performance.py --render           # tables and plots again, nothing measured

Results go to docs/performance/<device>.json, with the machine, versions and date; tables go
between the markers in docs/performance.md, plots beside the results. ``--sections`` measures some
and keeps the others.
"""

import argparse
import json
import platform
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from parts import measure_parts
from step import Case, measure, ratio

from sae_lens_auxk.compare.cases import PRESETS, STOCK

DOCS = Path(__file__).parent.parent / "docs"
ARCHITECTURES = ("auxk-topk", "auxk-batchtopk", "auxk-matryoshka-batchtopk")
VARIANTS = tuple(case["aux_variant"] for case in PRESETS["variants"])
FRACTIONS = (1.0, 1 / 16)
SECTIONS = ("step", "host", "variants", "growth", "parts")


def ours(variant: str, **fields: Any) -> dict[str, Any]:
    return {"aux_variant": variant, "aux_bias": "none", "k_aux": 512, **fields}


def step_cases(device: str) -> dict[str, Case]:
    """The whole step: ours, SAELens's and sparsify's."""
    widths, base = ((24_576, 131_072), Case("", 0)) if device == "cuda" else ((12_288,), CPU)
    cases: dict[str, Case] = {}
    for d_sae in widths:
        case = replace(base, d_sae=d_sae)
        cases |= {
            f"sparsify {aux}|{d_sae}": replace(
                case, architecture="sparsify", fields={"aux": aux == "auxk"}
            )
            for aux in ("auxk", "none")
        }
        for architecture in ARCHITECTURES if device == "cuda" else ARCHITECTURES[:1]:
            stock = STOCK[architecture]
            cases[f"SAELens {stock}|{d_sae}"] = replace(case, architecture=stock)
            for variant in ("auxk", "none"):
                cases[f"{architecture} {variant}|{d_sae}"] = replace(
                    case, architecture=architecture, fields=ours(variant)
                )
    return cases


def host_cases(device: str) -> dict[str, Case]:
    """A step with next to nothing to do for the GPU, so that it takes what the host takes."""
    if device != "cuda":
        return {}
    case = Case("auxk-topk", 8192, batch=1024)
    cases = {"SAELens topk|8192": replace(case, architecture="topk")}
    for variant in VARIANTS:
        cases[f"auxk-topk {variant}|8192"] = replace(case, fields=ours(variant))
    return cases


def variant_cases(device: str) -> dict[str, Case]:
    """Every variant, at three shares of dead latents, on all rows and on some."""
    base = Case("auxk-topk", 131_072) if device == "cuda" else CPU
    return {
        f"{variant}|{dead}|{fraction}": replace(
            base, dead=dead, fields=ours(variant, aux_batch_fraction=fraction)
        )
        for dead in ((0.1, 0.5, 0.9) if device == "cuda" else (0.5,))
        for variant in VARIANTS
        for fraction in (FRACTIONS if variant != "none" else (1.0,))
    }


def growth_cases(device: str) -> dict[str, Case]:
    """One quantity changed at a time: x axis and value in the name."""
    cuda = device == "cuda"
    base = Case("auxk-topk", 65_536) if cuda else CPU
    axes: dict[str, tuple[Any, ...]] = {
        "d_sae": (8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288)
        if cuda
        else (3072, 6144, 12_288, 24_576),
        "batch": (512, 1024, 2048, 4096, 8192, 16_384) if cuda else (256, 512, 1024, 2048),
        "k": (8, 16, 32, 64, 128) if cuda else (8, 32, 128),
        "k_aux": (32, 128, 512, 1024, 2048) if cuda else (32, 128, 512),
        "dead": (0.001, 0.01, 0.1, 0.5, 0.9) if cuda else (0.01, 0.1, 0.5, 0.9),
    }
    cases: dict[str, Case] = {}
    for axis, values in axes.items():
        for value in values:
            for variant in ("none", "auxk"):
                if axis == "k_aux":
                    case = replace(base, fields=ours(variant, k_aux=value))
                else:
                    case = replace(base, fields=ours(variant), **{axis: value})
                cases[f"{axis}|{value}|{variant}"] = case
    return cases


CPU = Case("auxk-topk", 12_288, batch=1024)
CASES = {
    "step": step_cases,
    "host": host_cases,
    "variants": variant_cases,
    "growth": growth_cases,
}


def run(device: str, sections: list[str]) -> None:
    path = DOCS / "performance" / f"{device}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        **{name: version(name) for name in ("torch", "sae-lens", "eai-sparsify")},
        "python": platform.python_version(),
    }
    for section in sections:
        if section == "parts":
            with (path.parent / f"{device}-parts.txt").open("w") as file, redirect_stdout(file):
                d_sae, batch = (131_072, 4096) if device == "cuda" else (CPU.d_sae, CPU.batch)
                measure_parts(device, d_sae, batch, (0.1, 0.5, 0.9))
            continue
        results[section] = {}
        for name, case in CASES[section](device).items():
            result = measure(case, device)
            if section == "host" and case.fields:
                result |= ratio(case, replace(case, architecture="topk", fields={}), device)
            elif section == "variants" and device == "cpu":
                result |= ratio(case, replace(case, fields=ours("none")), device)
            if device == "cuda":
                torch.cuda.empty_cache()
            results[section][name] = {"case": asdict(case), **result}
            print(section, name, {k: v for k, v in result.items() if k != "case"}, flush=True)
            path.write_text(json.dumps(results, indent=1))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


# --- tables and plots ------------------------------------------------------------------------


def cell(result: dict[str, Any]) -> str:
    if "error" in result:
        return "out of memory" if "memory" in result["error"] else result["error"]
    digits = 1 if result["median"] < 100 else 0
    times = [f"{result[key]:.{digits}f}" for key in ("median", "min", "max")]
    work = f", GPU {result['device']:.{digits}f}" if "device" in result else ""
    memory = f", {result['GiB']:.1f} GiB" if "GiB" in result else ""
    return f"{times[0]} ({times[1]}–{times[2]}){work}{memory}"


def over(result: dict[str, Any], base: dict[str, Any] | None = None) -> str:
    """What ``result`` costs over ``base``; on a GPU also what of that is the GPU's work.

    What was measured in turn with its base needs no other.
    """
    if "ratio" in result:
        low, middle, high = (result[key] - 1 for key in ("ratio_min", "ratio", "ratio_max"))
        return f", **{middle:+.0%}** ({low:+.0%} to {high:+.0%})"
    if base is None or "error" in result or "error" in base:
        return ""
    more = f", **{result['median'] / base['median'] - 1:+.0%}**"
    both = "device" in result and "device" in base
    return more + (f" (GPU {result['device'] / base['device'] - 1:+.0%})" if both else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_table(results: dict[str, Any]) -> str:
    names = dict.fromkeys(key.split("|")[0] for key in results)
    widths = dict.fromkeys(key.split("|")[1] for key in results)
    rows = [[name, *(cell(results[f"{name}|{width}"]) for width in widths)] for name in names]
    return table(["ms", *(f"{int(width):,} latents" for width in widths)], rows)


def host_table(results: dict[str, Any]) -> str:
    rows = [[key.split("|")[0], cell(result) + over(result)] for key, result in results.items()]
    return table(["ms", "8,192 latents, 1,024 rows"], rows)


def variant_table(results: dict[str, Any]) -> str:
    shares = dict.fromkeys(key.split("|")[1] for key in results)
    rows = []
    for variant, fraction in dict.fromkeys(
        (key.split("|")[0], key.split("|")[2]) for key in results
    ):
        name = f"`{variant}`" + ("" if fraction == "1.0" else f", {float(fraction):.3g} of rows")
        row = [name]
        for share in shares:
            result = results[f"{variant}|{share}|{fraction}"]
            base = None if variant == "none" else results[f"none|{share}|1.0"]
            row.append(cell(result) + over(result, base))
        rows.append(row)
    return table(["ms", *(f"{float(share):.0%} dead" for share in shares)], rows)


def growth_plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = dict.fromkeys(key.split("|")[0] for key in results)
    figure, panels = plt.subplots(1, len(axes), figsize=(3.2 * len(axes), 3), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        for variant, color, marker in (("auxk", "C0", "o"), ("none", "C1", "s")):
            points = {
                float(key.split("|")[1]): result
                for key, result in results.items()
                if key.split("|")[::2] == [axis, variant] and "median" in result
            }
            values = list(points)
            steps = [result["median"] for result in points.values()]
            if all("device" in result for result in points.values()):
                work = [result["device"] for result in points.values()]
                panel.plot(values, work, marker + "-", color=color, label=f"{variant}, the GPU")
                panel.plot(values, steps, ":", color=color, label=f"{variant}, the step")
            else:
                panel.plot(values, steps, marker + "-", color=color, label=variant)
        if axis != "dead":
            panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_xlabel({"dead": "share of dead latents", "batch": "rows"}.get(axis, axis))
        panel.xaxis.set_major_formatter(
            lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:.3g}"
        )
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms a step")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def render() -> None:
    page = DOCS / "performance.md"
    text = page.read_text()
    for device in ("cuda", "cpu"):
        path = DOCS / "performance" / f"{device}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        machine = ", ".join(f"{k} {v}" if k != "date" else v for k, v in results["machine"].items())
        blocks = {"machine": machine}
        if "step" in results:
            blocks["step"] = step_table(results["step"])
        if results.get("host"):
            blocks["host"] = host_table(results["host"])
        if "variants" in results:
            blocks["variants"] = variant_table(results["variants"])
        if "growth" in results:
            growth_plot(results["growth"], path.parent / f"{device}-growth.png")
        for name, block in blocks.items():
            begin, end = f"<!-- {device} {name} -->", f"<!-- end {device} {name} -->"
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            assert after, f"{page} has no {begin} ... {end}"
            text = f"{before}{begin}\n{block}\n{end}{after}"
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if not args.render:
        run(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.sections)
    try:
        render()
    except ImportError as error:
        print(f"no plots: {error}")


if __name__ == "__main__":
    main()
