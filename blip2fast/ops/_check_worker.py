"""Worker process that checks kernels: `python -m blip2fast.ops._check_worker`.

Reads a JSON list of requests from standard input and writes one line of JSON when a check starts
and one when it ends. A broken kernel can only take down this process: an exception is reported and
ends it, a signal ends it without a report, and the parent kills it on a hang (`kernel_checks.py`).
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
    """Run the checks requested on standard input."""
    # kernels may print: keep their output out of the JSON lines
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        first = (str(error).strip() or "no message").splitlines()[0]
        _write(channel, {"raised": name, "message": first})
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell
    # the rival may be a nondeterministic PyTorch function
    warnings.filterwarnings("ignore", message=".*deterministic")
    for number, request in enumerate(json.load(sys.stdin)):
        if hasattr(signal, "alarm"):
            # ends a hang even if the parent process is gone
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
