"""Fixtures of several test files; one thread a process."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from stage1_cases import REFERENCE_CASES, SMALL, ReferenceCase, load_reference, make_batch
from torch import Tensor

from blip2fast.ops import linear as onednn_linear
from blip2fast.stage1.config import Stage1Config

# on a GPU, products under deterministic algorithms (tests/ops/conftest.py) need it from the start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# tests run side by side, one process a core
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=REFERENCE_CASES)
def reference(request: pytest.FixtureRequest) -> ReferenceCase:
    return load_reference(request.param)


@pytest.fixture
def small_config() -> Stage1Config:
    return replace(SMALL)


@pytest.fixture
def small_batch() -> dict[str, Tensor]:
    """Six image-text pairs of unequal length for the small configuration."""
    return make_batch(SMALL, batch=6)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that oneDNN computes, which is chosen on any machine."""
    if onednn_linear._OPERATOR is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    happened: list[int] = []
    operator = onednn_linear._OPERATOR

    def counted(*given: Any) -> Tensor:
        happened.append(1)
        return operator(*given)

    monkeypatch.setattr(onednn_linear, "_OPERATOR", counted)
    monkeypatch.setattr(onednn_linear, "is_chosen", lambda: True)
    return happened


@pytest.fixture
def own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's `F.linear`: ZeRO-3 replaces it for a whole process, which subclasses do not see."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
