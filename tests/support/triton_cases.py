"""What the tests of the Triton kernels share: where they run, and a process that interprets them.

They run on a GPU where there is one. Elsewhere the interpreter runs them, which has to be asked
for before Triton is imported: each file runs itself once more in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip2fast.ops.dispatch import HAS_TRITON, INTERPRETED

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# the interpreter computes bf16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
runs_kernels = pytest.mark.skipif(
    not (HAS_TRITON and (GPU or INTERPRETED)), reason="needs a GPU or TRITON_INTERPRET=1"
)
starts_interpreter = pytest.mark.skipif(
    not HAS_TRITON or GPU or INTERPRETED, reason="the other tests of the file run anyway"
)


def run_interpreted(file: str, for_a_gpu: int = 0) -> None:
    """Run a test file under the interpreter: all pass, and only what needs a GPU is skipped.

    Args:
        file: The caller's `__file__`.
        for_a_gpu: How many of its tests need one.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout[-4000:]
    # the test that called this is skipped there
    assert f" {for_a_gpu + 1} skipped" in done.stdout, done.stdout[-4000:]
