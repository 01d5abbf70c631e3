"""How a command says that it cannot do what it was asked."""

import sys


def refuse(message: str) -> int:
    """Print the message to standard error; return the exit status for it, 2."""
    print(f"sae-lens-auxk: error: {message}", file=sys.stderr)
    return 2
