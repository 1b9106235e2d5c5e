"""The accelerators' path of `sdpa`: no scores where only PyTorch's attention is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import (
    CROSS_CASES,
    SELF_CASES,
    make_index,
    make_key_mask,
    make_q_kv,
    make_qkv,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blip2fast.kernels.qformer_attention import padded as _attention_padded


class Operations(TorchDispatchMode):
    """Names of what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def self_call(with_lse: bool) -> tuple[Tensor, Tensor | None]:
    case = SELF_CASES["all kinds"]
    qkv = make_qkv(case, torch.float32)
    return _attention_padded.self_attention(qkv, case.layout(), 0.25, 0.0, None, with_lse)


def cross_call(with_lse: bool) -> tuple[Tensor, Tensor | None]:
    case = CROSS_CASES["masked"]
    q, kv = make_q_kv(case, torch.float32)
    index, mask = make_index(case), make_key_mask(case)
    assert index is not None
    return _attention_padded.cross_attention(q, kv, index.index, mask, 0.25, 0.0, None, with_lse)


@pytest.mark.parametrize("call", [self_call, cross_call])
def test_scores_are_computed_for_the_lse_alone(
    call: Callable[[bool], tuple[Tensor, Tensor | None]],
) -> None:
    with Operations() as asked:
        out, lse = call(True)
    with Operations() as unasked:
        plain, nothing = call(False)
    assert "logsumexp.default" in asked.names
    assert not {"logsumexp.default", "bmm.default"} & unasked.names
    assert any("attention" in name for name in unasked.names)
    assert lse is not None
    assert nothing is None
    assert torch.equal(plain, out)
