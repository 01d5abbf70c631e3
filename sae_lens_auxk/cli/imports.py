"""``--import``: register your own losses before a command reads its configs."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path


def add_import_flag(parser: ArgumentParser) -> None:
    """Add ``--import``, whose values are in ``imports``."""
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="import MODULE first, which registers a loss of your own (register_aux_loss); "
        "can be given more than once. The current directory is searched, too",
    )


def import_modules(names: Iterable[str]) -> None:
    """Import modules, from the current directory too, as ``python -m`` does.

    Raises:
        ValueError: a module cannot be imported.
    """
    for name in names:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        try:
            import_module(name)
        # The import runs the user's code, which may raise anything.
        except Exception as error:
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}") from error
