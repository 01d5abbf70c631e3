"""``sae-lens-auxk compare``."""

import shlex
import sys
import warnings
from argparse import ArgumentError, Namespace
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from simple_parsing import ArgumentParser
from tqdm.auto import tqdm

from sae_lens_auxk import processes
from sae_lens_auxk.checks import require_known
from sae_lens_auxk.cli.imports import add_import_flag, import_modules
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.files import RESULTS_FILENAME, read_results
from sae_lens_auxk.compare.locks import claim
from sae_lens_auxk.compare.report import write_report
from sae_lens_auxk.compare.report.summary import answer, troubles
from sae_lens_auxk.compare.run import plan_comparison, run_comparison
from sae_lens_auxk.saelens.names import logger as sae_lens_logger
from sae_lens_auxk_cli import printable, refuse

INTERRUPTED = 130
SMALL_STEP = 2**24
"""Multiplications in an encoder's forward pass: batch size times latents times width."""


def compare(args: Sequence[str], program: Sequence[str] = ("sae-lens-auxk", "compare")) -> int:
    """Train variants side by side, measure them and write a report; see ``--help``.

    Args:
        args: the arguments after the command's name.
        program: the words before them, for the command line in the results.

    Returns:
        The exit status.
    """
    command = shlex.join([*program, *args])
    # Under torchrun, rank 0 prints, and merges the results once all passes are finished.
    waits = processes.n_processes() > 1 and processes.rank() == 0
    if processes.n_processes() > 1:
        processes.see_own_gpu_only()
    if processes.rank() > 0:
        processes.be_quiet()
    # SAELens would warn once per case about what this command does on purpose.
    sae_lens_logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    try:
        options = _parse(args)
        if options.report_only is not None:
            report = _report_again(options.report_only)
        else:
            comparison = resolve(options.comparison)
            if options.dry_run:
                _say(plan_comparison(comparison, options.output))
                return 0
            _use_threads_that_pay(comparison)
            report = run_comparison(comparison, options.output, command, waits, _say)
        # A rank with another status than 0 would make torchrun stop those that are still training.
        return _conclude(report) if processes.rank() == 0 else 0
    # A model or data set that cannot be found raises an OSError. No input raises a TypeError: it
    # would be a bug, whose traceback is worth more than its message.
    except (ValueError, OSError, ArgumentError) as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        print(
            f"interrupted: the finished passes are kept; the same command resumes from there:\n"
            f"  {command}",
            file=sys.stderr,
        )
        return INTERRUPTED


def _say(text: str) -> None:
    if processes.rank() == 0:
        tqdm.write(printable(text))  # beside a bar
        sys.stdout.flush()


def _conclude(report: Path) -> int:
    """Print the answers, the runs that failed, and where the report is; return the exit status."""
    results = read_results(report.parent)
    for question, text in answer(results):
        print(printable(f"{question}: {text}"))
    for trouble in troubles(results):
        print(printable(trouble), file=sys.stderr)
    print(f"report  {report}")
    return int(any(run["status"] == "failed" for run in results["runs"]))


def _report_again(folder: Path) -> Path:
    read_results(folder)  # before anything in the folder is touched
    try:
        with claim(folder):
            return write_report(read_results(folder), folder)
    except (LookupError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / RESULTS_FILENAME} is malformed: {what}") from error


def _use_threads_that_pay(comparison: Resolved) -> None:
    """Use one thread if the steps are so small that more threads cost time.

    On a busy machine, where the threads wait for each other, a small step takes ten times as
    long with more of them.
    """
    n_products = comparison.batch_size * comparison.d_sae * (comparison.d_in or 0)
    if comparison.device == "cpu" and 0 < n_products <= SMALL_STEP:
        torch.set_num_threads(1)


def _parse(args: Sequence[str]) -> Namespace:
    """Parse ``comparison``, ``output`` and ``report_only``.

    Raises:
        ValueError: a flag is unknown, the file of ``--config`` is not allowed, or a module of
            ``--import`` cannot be imported.
        ArgumentError: a flag's value is not allowed.
    """
    first_parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_parser.add_argument("--config", type=Path)
    add_import_flag(first_parser)
    first = first_parser.parse_known_args(args)[0]
    import_modules(first.imports)

    parser = ArgumentParser(
        prog="sae-lens-auxk compare",
        allow_abbrev=False,
        exit_on_error=False,
        description=(
            "Train auxiliary losses side by side on the same activations, measure them, and "
            "write a report. Without arguments: six cases on a small synthetic model, in about 85 "
            "seconds on 2 CPU cores. The same command resumes it if interrupted, and trains again "
            "what failed. The exit status is 1 if a case failed."
        ),
    )
    default = Comparison() if first.config is None else Comparison.from_file(first.config)
    parser.add_arguments(Comparison, dest="comparison", default=default)
    parser.add_argument(
        "--config", type=Path, help="a YAML file with the same fields; flags win over it"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison"),
        help="folder for the results, the report and the SAEs (default: comparison)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be done and what it would cost; train and write nothing",
    )
    instead.add_argument(
        "--report_only",
        type=Path,
        metavar="FOLDER",
        help="train nothing; write the report of FOLDER again from its results.json",
    )
    add_import_flag(parser)
    options, unknown = parser.parse_known_args(args)
    is_flag = {field.name: field.metadata.get("cmd", True) for field in fields(Comparison)}
    if unknown:
        known = [f"--{name}" for name in is_flag if is_flag[name]]
        own = ("--config", "--output", "--dry_run", "--report_only", "--import")
        require_known(unknown, [*known, *own], "compare")
    # simple-parsing forgets the default of a field that is not a flag.
    from_file = {name: getattr(default, name) for name in is_flag if not is_flag[name]}
    options.comparison = replace(options.comparison, **from_file)
    return options
