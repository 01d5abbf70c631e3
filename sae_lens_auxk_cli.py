"""The command ``sae-lens-auxk``.

A module beside the package, because importing anything of the package registers its architectures,
which takes torch and SAELens and several seconds. Help and a misspelt command need neither.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": "train one SAE: SAELens's own training command with this package's architectures",
    "compare": "train variants side by side, measure them, and write a report",
    "upload": "publish an SAE or a comparison on the Hugging Face Hub, for SAE.from_pretrained",
}

USAGE = """usage: sae-lens-auxk COMMAND [--FIELD VALUE ...]

{commands}

`sae-lens-auxk COMMAND --help` lists what a command takes; for train, give it with an
architecture: `sae-lens-auxk train --architecture auxk-topk --help`. `sae-lens-auxk --version`
says which this is.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status (2 for arguments that are not allowed)."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:10s}{what}" for name, what in COMMANDS.items())
        print(USAGE.format(commands=commands), end="")
        return 0
    if args[0] in ("-V", "--version"):
        print(f"sae-lens-auxk {version('sae-lens-auxk')}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        return refuse(f"{name!r} is not a command: it must be {' or '.join(COMMANDS)}.")
    # Each command is a function of its own name, imported only when it is asked for.
    command = getattr(import_module(f"sae_lens_auxk.cli.{name}"), name)
    return command(rest)


def refuse(message: str) -> int:
    """Print the message to standard error; return the exit status for it, 2."""
    print(f"sae-lens-auxk: error: {printable(message)}", file=sys.stderr)
    return 2


def printable(text: str) -> str:
    """Escape control characters for a terminal; names may come from an untrusted repository.

    Example:
        >>> printable("two\\nlines, \\x1b[31mred")
        'two\\nlines, \\\\x1b[31mred'
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )
