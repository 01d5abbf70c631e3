"""``sae-lens-auxk compare``."""

import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from sae_lens import logger as sae_lens_logger
from simple_parsing import ArgumentParser

from sae_lens_auxk.cli.refuse import refuse
from sae_lens_auxk.compare.plan import Comparison, Resolved
from sae_lens_auxk.compare.report import write_report
from sae_lens_auxk.compare.resolve import resolve
from sae_lens_auxk.compare.run import load_results, run_comparison
from sae_lens_auxk.validation import require_known

INTERRUPTED = 130
SMALL_STEP = 2**24
"""Products in an encoder's forward pass: batch size times latents times width."""


def compare(args: Sequence[str], program: Sequence[str] = ("sae-lens-auxk", "compare")) -> int:
    """Train variants side by side, measure and report; see ``--help``.

    ``program``: how it was called, for the command line that the results name.
    """
    command = shlex.join([*program, *args])
    # A bar and a report say it all; SAELens would warn of what this command does on purpose,
    # once a case.
    sae_lens_logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    try:
        options = _parse(args)
        if options.report_only is not None:
            report = write_report(load_results(options.report_only), options.report_only)
        else:
            comparison = resolve(options.comparison)
            _use_threads_that_pay(comparison)
            report = run_comparison(comparison, options.output, command)
    # An OSError is what a model or data set that cannot be found comes as.
    except (ValueError, TypeError, OSError) as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print(
            "interrupted: the passes that were finished are kept, and reported; the same command "
            f"goes on from there:\n  {command}",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(f"report  {report}")
    return 0


def _use_threads_that_pay(comparison: Resolved) -> None:
    """One thread for steps so small that threads cost more time than they save.

    On a busy machine, where they wait for each other, such a step takes ten times as long.
    """
    n_products = comparison.batch_size * comparison.d_sae * (comparison.d_in or 0)
    if comparison.device == "cpu" and 0 < n_products <= SMALL_STEP:
        torch.set_num_threads(1)


def _parse(args: Sequence[str]) -> Namespace:
    """``comparison``, ``output`` and ``report_only``; a ValueError for a flag there is not."""
    file_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config", type=Path)
    file = file_parser.parse_known_args(args)[0].config

    parser = ArgumentParser(
        prog="sae-lens-auxk compare",
        allow_abbrev=False,
        description=(
            "Train auxiliary losses side by side on the same activations, measure them, and "
            "write a report. Without arguments: a small synthetic model, about a minute on 2 CPU "
            "cores. The same command again goes on where it was stopped."
        ),
    )
    default = Comparison() if file is None else Comparison.from_file(file)
    parser.add_arguments(Comparison, dest="comparison", default=default)
    parser.add_argument(
        "--config", type=Path, help="a YAML or TOML file of the same fields; flags win over it"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison"),
        help="the folder for results, report and SAEs (default: comparison)",
    )
    parser.add_argument(
        "--report-only",
        type=Path,
        metavar="FOLDER",
        help="train nothing: write the report of FOLDER again, from its results.json",
    )
    options, unknown = parser.parse_known_args(args)
    is_flag = {field.name: field.metadata.get("cmd", True) for field in fields(Comparison)}
    if unknown:
        known = [f"--{name}" for name in is_flag if is_flag[name]]
        require_known(unknown, [*known, "--config", "--output", "--report-only"], "compare")
    # simple-parsing forgets the default of a field that is no flag.
    from_file = {name: getattr(default, name) for name in is_flag if not is_flag[name]}
    options.comparison = replace(options.comparison, **from_file)
    return options
