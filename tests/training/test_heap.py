"""What a process does with the memory that it frees."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
from blip2fast._heap import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
for _ in [torch.zeros(24 * 2**18) for _ in range(8)]:  # 192 MiB, freed
    pass
del _
before = faults()
for _ in range(4):
    torch.zeros(24 * 2**18)  # 24 MiB
print(json.dumps([kept, faults() - before]))
"""
PAGES = 4 * 24 * 2**20 // os.sysconf("SC_PAGESIZE")


def _run(which: str, **environment: str) -> tuple[bool | None, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, which],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    kept, faults = json.loads(done.stdout)
    return kept, faults


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    """Hardly a page of it comes from the system; without the setting about half of them do."""
    kept, faults = _run("keep")
    assert kept
    assert faults < PAGES / 100
    assert _run("default")[1] > PAGES / 4


def test_settings_of_the_environment_hold() -> None:
    assert _run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] is False
