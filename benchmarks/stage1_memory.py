"""The peak of a stage-1 step on a CPU, in a process of its own: NAME SHAPE DTYPE -> one JSON line.

Counted beyond weights and inputs: activations, gradients, the optimiser's state, temporary copies.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from comparing import is_out_of_memory
from shapes import STAGE1_MEMORY_SHAPES
from stage1_contenders import make_batch, make_models, step_provider
from timing import peak_bytes

# left to the rest of the machine
_SPARE_BYTES = 1 << 30


def available_bytes() -> int:
    """Memory that the system could still hand out."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


def peak_of(name: str, shape: str, dtype: str) -> dict[str, Any]:
    """Run a contender's steps in a new process.

    Returns:
        `peak_bytes`, or `does_not_run`: the reason.

    Raises:
        RuntimeError: the process failed otherwise.
    """
    command = [sys.executable, __file__, name, shape, dtype]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode < 0:
        return {"does_not_run": f"out of memory: ended by signal {-done.returncode}"}
    if done.returncode > 0:
        raise RuntimeError(done.stderr.strip()[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure in this process."""
    name, shape_name, dtype_name = sys.argv[1:]
    shape, device = STAGE1_MEMORY_SHAPES[shape_name], torch.device("cpu")
    batch = make_batch(shape, device)
    model = make_models(shape, device, (name,))[name]
    contender = step_provider(model, batch, getattr(torch, dtype_name))(None)

    def two_steps() -> None:  # the second finds the optimiser's state there
        contender.run()
        contender.run()

    most = max(0, available_bytes() - _SPARE_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    try:
        print(json.dumps({"peak_bytes": peak_bytes(two_steps, device)}))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps({"does_not_run": f"out of memory: {most / 1e9:.0f} GB were free"}))


if __name__ == "__main__":
    main()
