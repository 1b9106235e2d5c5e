"""Kinds of calls: those that run the same compiled kernels, in the same tiles, are checked once.

A kind is a line of `name=value`, so that it is readable where it is written down. Nothing here
looks at more than a call: programs that are traced ask, too.
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
    """What every call says."""

    @property
    def device(self) -> str: ...

    @property
    def gpu(self) -> int | None: ...


def device_of(call: _Placed) -> str:
    """Where a call runs: `cuda:0` and so on, or its kind of device."""
    if call.device != "cuda":
        return call.device
    return f"cuda:{0 if call.gpu is None else call.gpu}"


def read_kind(kind: str) -> dict[str, str]:
    """The names and values of a kind."""
    return dict(part.split("=") for part in kind.split())


def _bucket(count: int, most: int) -> int:
    """The least power of two from 16 to `most` that holds `count`; `most` where none does."""
    size = 16
    while size < count and size < most:
        size *= 2
    return size


def _exactly(count: int, most: int) -> int:
    """The same number; of a traced program whose sizes are symbols, one that has become a constant.

    Asked for by halving, which leaves a few guards, not one for each number that it is not.
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
    """Rows of a tile of self-attention; a tile has 64 at most."""
    return _bucket(max(Q, T), 64)


def self_keys(Q: int, T: int) -> int:
    """Keys of a row: up to 128 may fit one tile."""
    return _bucket(Q + T, 256)


def cross_keys(S: int) -> int:
    """A number of image tokens that is tiled as S is, in tiles of 64 or 32 and a rest.

    With few tiles keys are not split among programs, with 8 or more they may be.
    """
    rest = _exactly(S % 64, 63)
    tiles = 0 if S < 64 else 2 if S <= 224 else 4 if S <= 448 else 9
    return 64 * tiles + (rest if rest % 16 == 0 else 16 * (rest // 16) + 1)


def self_kind(call: AttentionCall) -> str:
    """Of a call of `qformer_attention`."""
    Q, T, D = _exactly(call.queries, 256), call.keys, _exactly(call.width, 128)
    return (
        f"dtype={NAMES[call.dtype]} width={D} queries={Q} rows={self_rows(Q, T)} "
        f"keys={self_keys(Q, T)} {_flag('dropout', call.dropout)}"
    )


def cross_kind(call: AttentionCall) -> str:
    """Of a call of `qformer_cross_attention`."""
    Q, D = _exactly(call.queries, 256), _exactly(call.width, 128)
    return (
        f"dtype={NAMES[call.dtype]} width={D} queries={Q} keys={cross_keys(call.keys)} "
        f"{_flag('index', call.indexed)} {_flag('mask', call.key_mask)} "
        f"{_flag('dropout', call.dropout)}"
    )


def attention_kind(call: AttentionCall) -> str:
    """Of a call of either attention."""
    return cross_kind(call) if call.cross else self_kind(call)


def norm_kind(call: DropoutAddLayerNormCall) -> str:
    """Of a call of `dropout_add_layer_norm`."""
    x, total, out, copy = (NAMES[dtype] for dtype in call.dtypes)
    width = _exactly(call.width, 8192)
    return (
        f"x={x} sum={total} out={out} copy={copy} parameters={NAMES[call.parameters]} "
        f"width={width} {_flag('dropout', call.dropout)}"
    )


def gelu_kind(call: BiasGeluCall) -> str:
    """Of a call of `bias_gelu`."""
    # without a bias the kernel has less to do
    bias = call.dtype if call.bias is None else call.bias
    return f"dtype={NAMES[call.dtype]} bias={NAMES[bias]}"


def itc_kind(call: ITCCall) -> str:
    """Of a call of `itc_loss`."""
    Q, D = _exactly(call.queries, 256), _exactly(call.width, 1024)
    return f"dtype={NAMES[call.dtype]} width={D} queries={Q} {_flag('ids', call.ids)}"
