"""Python that has imported SAELens and not this package, as often as it is asked for.

Importing SAELens takes seconds, forking a process that did so none. It is offline.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

_SERVER = """
import json, os, signal, sys, tempfile, traceback
import sae_lens, sae_lens.synthetic
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    code, args = json.loads(line)
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        if not (child := os.fork()):
            signal.alarm(500)  # before pytest's faulthandler_timeout, which ends the whole run
            os.dup2(said.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv[1:] = args
            status = 0
            try:
                exec(code, {"__name__": "__main__"})
            except SystemExit as end:
                if isinstance(end.code, int):
                    status = end.code
                elif end.code is not None:
                    print(end.code, file=sys.stderr)
                    status = 1
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        errors.seek(0)
        print(json.dumps([status, said.read(), errors.read()]), file=answers, flush=True)
"""


@cache
def _server() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "MPLBACKEND": "Agg"},
    )


def run(code: str, *args: Any) -> str:
    """What the code prints, with these arguments in ``sys.argv``; fails where it does."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with suppress(BrokenPipeError):
        print(json.dumps([dedent(code), [*map(str, args)]]), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, f"the process that imports SAELens ended with {server.wait()}"
    status, said, errors = json.loads(answer)
    assert status == 0, f"ended with {status}:\n{said[-3000:]}\n{errors[-3000:]}"
    return said
