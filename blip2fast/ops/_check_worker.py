"""The process that checks kernels: `python -m blip2fast.ops._check_worker`.

It reads a list of requests from standard input, as JSON, and writes a line of JSON where one
begins and where it ends. What a kernel breaks, it breaks here: an exception is told and ends the
process, a signal ends it untold, and a hang is ended from outside (`kernel_checks.py`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from blip2fast.ops.kernel_proof import check


def main() -> None:
    """Serve the requests on standard input."""
    # what a kernel prints must not get between the lines
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        first = (str(error).strip() or "no message").splitlines()[0]
        _write(channel, {"raised": name, "message": first})
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell
    # a rival may be a PyTorch function that is not deterministic
    warnings.filterwarnings("ignore", message=".*deterministic")
    for number, request in enumerate(json.load(sys.stdin)):
        if hasattr(signal, "alarm"):
            # should nobody be left to end a hang
            signal.alarm(int(request["limit_s"]) + 30)
        _write(channel, {"began": number})
        started = time.perf_counter()
        found = check(request)
        seconds = time.perf_counter() - started
        _write(channel, {"number": number, "seconds": round(seconds, 3), **found})


def _write(channel: TextIO, line: Mapping[str, Any]) -> None:
    channel.write(json.dumps(line) + "\n")
    channel.flush()


if __name__ == "__main__":
    main()
