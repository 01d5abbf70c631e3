"""Python that has imported SAELens and not this package, as often as it is asked for.

Importing SAELens takes seconds, forking a process that did so none.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

_SERVER = """
import json, os, sys, traceback
import sae_lens, sae_lens.synthetic
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    code, args = json.loads(line)
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 1)
        sys.argv[1:] = args
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            status = 1
        sys.stdout.flush()
        os._exit(status)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, text]), file=answers, flush=True)
"""


@cache
def _server() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def run(code: str, *args: Any) -> str:
    """What the code prints, with these arguments in ``sys.argv``; fails where it does."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([dedent(code), [*map(str, args)]]), file=server.stdin, flush=True)
    status, said = json.loads(server.stdout.readline())
    assert status == 0, said
    return said
