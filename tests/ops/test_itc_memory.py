"""Peak memory of the contrastive loss at N = 16,384, each measured in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

N, Q, D = 16_384, 32, 16
FEATURE_BYTES = 4 * N * Q * D


def _definition(image: Tensor, text: Tensor, temp: Tensor) -> Tensor:
    """What a user would write: the products of all pairs, then their maximum."""
    sim = (image.view(-1, D) @ text.T).view(N, Q, N).amax(1) / temp
    labels = torch.arange(N)
    both = (torch.nn.functional.cross_entropy(x, labels) for x in (sim, sim.T))
    return sum(both, torch.zeros(())) / 2


def _measure(which: str) -> None:
    """Print the bytes by which a forward and backward pass raises this process's peak."""
    from blip2fast.ops import itc_loss

    torch.set_num_threads(1)

    def step(b: int) -> None:
        image = torch.nn.functional.normalize(torch.randn(b, Q, D), dim=-1).requires_grad_()
        text = torch.nn.functional.normalize(torch.randn(b, D), dim=-1).requires_grad_()
        temp = torch.tensor(0.07, requires_grad=True)
        if which == "definition":
            _definition(image, text, temp).backward()
        else:
            # at this N similarities and queries would be 1.3 GB
            budget = 0 if which == "chunked" else 2**31
            itc_loss(image, text, temp, negatives="none", save_budget_bytes=budget).loss.backward()

    if which != "definition":
        step(64)
    # the peak that a process starts with is that of the process that started it
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmHWM")
    # beyond ten times the features, memory is refused
    limit = 10 * FEATURE_BYTES + _status_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        step(N)
    except RuntimeError as error:
        print("refused", str(error).splitlines()[0])
        return
    print("raised", _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    """Memory of this process: its peak (VmHWM), or what RLIMIT_DATA counts (VmData)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields[name].split()[0])


def _run(which: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, __file__, which], capture_output=True, text=True, check=True
    )
    kind, _, rest = done.stdout.strip().partition(" ")
    return kind, rest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat() -> None:
    """Features, their gradients and less than as much again; the written-out form 34 GB."""
    kind, raised = _run("chunked")
    assert kind == "raised", raised
    assert FEATURE_BYTES < int(raised) < 3 * FEATURE_BYTES
    for other in ("saved", "definition"):
        kind, message = _run(other)
        assert kind == "refused", (other, message)
        assert "can't allocate memory" in message


if __name__ == "__main__":
    _measure(sys.argv[1])
