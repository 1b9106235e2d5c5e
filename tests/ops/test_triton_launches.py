"""What every launch of a Triton kernel says, whatever the version's defaults are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from aot import record_launches
from triton.runtime.jit import JITFunction

from blip2fast.kernels.bias_gelu import backward as gelu_backward
from blip2fast.kernels.bias_gelu import forward as gelu_forward
from blip2fast.kernels.dropout_add_layer_norm import backward as norm_backward
from blip2fast.kernels.dropout_add_layer_norm import forward as norm_forward
from blip2fast.kernels.itc import backward as itc_backward
from blip2fast.kernels.itc import forward as itc_forward
from blip2fast.kernels.itc.interface import Options, Pairs, Weights
from blip2fast.kernels.qformer_attention.backward import self_backward
from blip2fast.kernels.qformer_attention.cross_backward import cross_backward
from blip2fast.kernels.qformer_attention.cross_forward import cross_forward
from blip2fast.kernels.qformer_attention.forward import self_forward
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, MaskKind
from blip2fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not launched")
FP32 = torch.float32


def gelu() -> None:
    x, bias = torch.empty(9, 64), torch.empty(64)
    gelu_forward.forward(x, bias)
    gelu_backward.backward(x, x, bias, needs_bias=True)


def layer_norm() -> None:
    x, weight, mean = torch.empty(9, 64), torch.empty(64), torch.empty(9)
    norm_forward.forward(x, x, weight, weight, None, None, 1e-12, 0.0, FP32, None, save=True)
    norm_backward.backward(
        x,
        None,
        x,
        mean,
        mean,
        weight,
        None,
        0.0,
        FP32,
        FP32,
        apart=False,
        needs_parameters=True,
        needs_x_bias=False,
    )


def itc() -> None:
    image, text, temp = torch.empty(3, 4, 32), torch.empty(3, 32), torch.tensor(0.07)
    pairs, weights = Pairs(0, None, None), Weights(torch.empty(3), torch.empty(3, 3))
    itc_forward.sweep(image, text, temp, pairs, Options(None))
    nothing = torch.empty(0)
    itc_backward.sweep_grad(image, text, temp, pairs, (weights, weights), True, (nothing, nothing))


def self_attention() -> None:
    layout = AttentionLayout.build(2, 4, [3, 5], MaskKind.BIDIRECTIONAL)
    qkv = torch.empty(layout.num_rows, 3, 2, 32)
    lse = torch.empty(layout.num_rows, 2)
    self_forward(qkv, layout, 0.2, 0.0, None)
    self_backward(qkv[:, 0], qkv, qkv[:, 0], lse, layout, 0.2, 0.0, None)


def cross_attention() -> None:
    # few blocks and many tokens: keys are split, and parts put together
    q, kv = torch.empty(1, 2, 2, 32), torch.empty(1, 16384, 2, 2, 32)
    cross_forward(q, kv, None, None, 1, 0.2, 0.0, None)
    cross_backward(q, q, kv, q, torch.empty(1, 2, 2), None, None, 0.2, 0.0, None)


# one each way, but for ITC's backward, of either side, and for parts of split keys put together
LAUNCHES = {gelu: 2, layer_norm: 2, itc: 3, self_attention: 2, cross_attention: 3}


@pytest.mark.parametrize("op", LAUNCHES)
def test_fusion_of_multiply_and_add_is_fixed(op: Callable[[], None]) -> None:
    """Whatever TRITON_DEFAULT_FP_FUSION says, backward passes get the forward's numbers again."""
    launches = record_launches(op)
    assert len(launches) == LAUNCHES[op]
    assert all(launch.options["enable_fp_fusion"] is True for launch in launches)


@pytest.mark.parametrize("op", LAUNCHES)
def test_launches_go_to_the_device_of_their_data(
    op: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ITC's went to the current GPU, which in a process with several need not be the data's."""
    guarded: list[Tensor] = []
    launched: list[str] = []

    @contextmanager
    def device_of(data: Tensor) -> Iterator[None]:
        guarded.append(data)
        yield
        guarded.pop()

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel.__name__)
        (data,) = guarded
        assert all(x.device == data.device for x in args if isinstance(x, Tensor))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", run)
    op()
    assert len(launched) == LAUNCHES[op]
