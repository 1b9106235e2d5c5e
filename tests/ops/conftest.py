"""Every test of an op: memory that nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What `torch.empty` gives is NaN, so that an element that nobody wrote is seen.

    PyTorch does so in its deterministic mode, which the ops must run in anyway.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
