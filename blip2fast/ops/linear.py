"""Linear layers in fp32 on a CPU with oneDNN, forward and backward.

PyTorch uses MKL there. On AMD's processors oneDNN is quicker: by 5 to 25 % from 16 to 1,024 rows on
one EPYC, 1.7 to 2.2 times on a newer one. On other vendors' nobody has timed it, and PyTorch's own
linear runs. The vendor decides, not a measurement: a busy machine would answer differently from run
to run, and a resumed run must compute what the first one did. `BLIP2FAST_LINEAR` overrules it:
`onednn` takes oneDNN for every product that it supports, small ones too; `pytorch` for none.

oneDNN is called through an operator that belongs to PyTorch's compiler; if that is missing,
PyTorch's own linear runs.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from blip2fast.ops.tracing import has_values

# The first product of a shape costs oneDNN 0.3 to 7 ms more, and text lengths make new shapes every
# step. So training pads rows to multiples of 64 (a step of 8 pairs, ViT-g: 3.9 s without, 3.5 s
# with, 3.2 s with constant lengths, 5.2 s with MKL), and skips products that take MKL under 2 ms.
_ROWS = 64
_WORTH_FLOPS = 5e8
_OPERATOR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


SETTING = "BLIP2FAST_LINEAR"
_SETTINGS = ("auto", "onednn", "pytorch")
# Hygon's processors are AMD's
_TIMED = ("AuthenticAMD", "HygonGenuine")
_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def cpu_vendor() -> str:
    """The processor's vendor as Linux names it, such as `"AuthenticAMD"`; empty if it does not."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    named = (line.partition(":") for line in lines if line.startswith("vendor_id"))
    return next((value.strip() for _, _, value in named), "")


@functools.cache
def is_chosen() -> bool:
    """Whether oneDNN computes what it supports: `BLIP2FAST_LINEAR`, or by the vendor.

    The same in every process of a kind of machine, and asked once for each process.

    Raises:
        ValueError: another value of the environment variable.
    """
    setting = os.environ.get(SETTING, "auto")
    if setting not in _SETTINGS:
        raise ValueError(f"{SETTING}={setting!r}: give one of {', '.join(_SETTINGS)}")
    return setting == "onednn" or (setting == "auto" and cpu_vendor() in _TIMED)


@functools.cache
def is_asked_for() -> bool:
    """Whether oneDNN is to compute whatever it supports, however small."""
    return os.environ.get(SETTING) == "onednn"


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_product` supports the call and is chosen on this machine."""
    return is_supported(x, weight) and is_chosen()


def is_quicker(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` calls oneDNN: it is chosen, and asked for or worth it in training."""
    large = 2 * x.numel() * len(weight) >= _WORTH_FLOPS and weight.numel() > 0
    return (large or is_asked_for()) and takes_onednn(x, weight)


def is_supported(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether `onednn_product` supports the call: of `dtype`, on a CPU, not empty, as it is."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == dtype
        # neither compiled nor recorded: other programs do not know the operator; nor transformed:
        # it has no forward derivative
        and has_values(x)
        and (type(weight) is nn.Parameter or type(weight) is Tensor)
        and x.numel() > 0
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and _OPERATOR is not None
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def onednn_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """`x @ weight.T + bias`, optionally followed by exact GELU; not differentiable.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.
        gelu: Whether to apply GELU.

    Returns:
        `[..., N]`.
    """
    name, algorithm = ("gelu", "none") if gelu else ("none", "")
    y: Tensor = _OPERATOR(x, weight, bias, name, [], algorithm)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(_padded(x), weight, bias)[: len(x)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        d_bias = dy.sum(0) if of_bias else None
        if torch.is_grad_enabled():  # by create_graph=True: PyTorch's products have derivatives
            return dy @ weight if of_x else None, dy.t() @ x if of_weight else None, d_bias
        rows = _padded(dy)
        return (
            onednn_product(rows, weight.t())[: len(x)] if of_x else None,
            onednn_product(rows.t(), _padded(x).t()) if of_weight else None,
            d_bias,
        )


def _padded(x: Tensor) -> Tensor:
    """`[rows, K]`, contiguous, zero-padded to the next multiple of `_ROWS` rows."""
    missing = -len(x) % _ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, with its derivatives; PyTorch computes small products.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.

    Returns:
        `[..., N]`.
    """
    if not is_quicker(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def _flops(x: torch.Size, weight: torch.Size, *others: Any, **named: Any) -> int:
    return 2 * x.numel() * weight[0]


# FlopCounterMode counts only operators that have a registered formula
if _OPERATOR is not None and _OPERATOR not in flop_registry:
    register_flop_formula(_OPERATOR)(_flops)
