"""Kinds of calls: calls that run the same compiled kernels in the same tiles share one check.

A kind is a line of `name=value` pairs, so that records are readable. The functions here read only
the call's description, never data: they also run while a program is traced.
"""

from __future__ import annotations

from typing import Protocol

import torch

from blip2fast.ops.calls import AttentionCall, BiasGeluCall, DropoutAddLayerNormCall, ITCCall

NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class _Placed(Protocol):
    """The device fields that every call has."""

    @property
    def device(self) -> str: ...

    @property
    def gpu(self) -> int | None: ...


def device_of(call: _Placed) -> str:
    """The device of a call: `cuda:0` and so on, or just the device type."""
    if call.device != "cuda":
        return call.device
    return f"cuda:{0 if call.gpu is None else call.gpu}"


def read_kind(kind: str) -> dict[str, str]:
    """The names and values of a kind."""
    return dict(part.split("=") for part in kind.split())


def _bucket(count: int, most: int) -> int:
    """`count` rounded up to a power of two of at least 16, capped at `most`."""
    size = 16
    while size < count and size < most:
        size *= 2
    return size


def _exactly(count: int, most: int) -> int:
    """The same number, made a constant if it is a symbolic size of a traced program.

    Found by bisection, which adds a few guards instead of one for each value ruled out.
    """
    if not torch.compiler.is_compiling():
        return count
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if count <= middle:
            high = middle
        else:
            low = middle + 1
    return low


def _flag(name: str, value: bool) -> str:
    return f"{name}=1" if value else f"{name}=0"


def self_rows(Q: int, T: int) -> int:
    """Rows of a self-attention tile, at most 64."""
    return _bucket(max(Q, T), 64)


def self_keys(Q: int, T: int) -> int:
    """Keys of a self-attention row; up to 128 may fit one tile."""
    return _bucket(Q + T, 256)


def cross_keys(S: int) -> int:
    """A representative number of image tokens that is tiled like S: tiles of 64 or 32 and a tail.

    With few tiles the keys are not split among programs; with 8 or more they may be.
    """
    rest = _exactly(S % 64, 63)
    tiles = 0 if S < 64 else 2 if S <= 224 else 4 if S <= 448 else 9
    return 64 * tiles + (rest if rest % 16 == 0 else 16 * (rest // 16) + 1)


def self_kind(call: AttentionCall) -> str:
    """Kind of a `qformer_attention` call."""
    Q, T, D = _exactly(call.queries, 256), call.keys, _exactly(call.width, 128)
    return (
        f"dtype={NAMES[call.dtype]} width={D} queries={Q} rows={self_rows(Q, T)} "
        f"keys={self_keys(Q, T)} {_flag('dropout', call.dropout)}"
    )


def cross_kind(call: AttentionCall) -> str:
    """Kind of a `qformer_cross_attention` call."""
    Q, D = _exactly(call.queries, 256), _exactly(call.width, 128)
    return (
        f"dtype={NAMES[call.dtype]} width={D} queries={Q} keys={cross_keys(call.keys)} "
        f"{_flag('index', call.indexed)} {_flag('mask', call.key_mask)} "
        f"{_flag('dropout', call.dropout)}"
    )


def attention_kind(call: AttentionCall) -> str:
    """Kind of a self- or cross-attention call."""
    return cross_kind(call) if call.cross else self_kind(call)


def norm_kind(call: DropoutAddLayerNormCall) -> str:
    """Kind of a `dropout_add_layer_norm` call."""
    x, total, out, copy = (NAMES[dtype] for dtype in call.dtypes)
    width = _exactly(call.width, 8192)
    return (
        f"x={x} sum={total} out={out} copy={copy} parameters={NAMES[call.parameters]} "
        f"width={width} {_flag('dropout', call.dropout)}"
    )


def gelu_kind(call: BiasGeluCall) -> str:
    """Kind of a `bias_gelu` call."""
    # without a bias the kernel has less to do
    bias = call.dtype if call.bias is None else call.bias
    return f"dtype={NAMES[call.dtype]} bias={NAMES[bias]}"


def itc_kind(call: ITCCall) -> str:
    """Kind of an `itc_loss` call."""
    Q, D = _exactly(call.queries, 256), _exactly(call.width, 1024)
    return f"dtype={NAMES[call.dtype]} width={D} queries={Q} {_flag('ids', call.ids)}"
