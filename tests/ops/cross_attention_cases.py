"""Cross-attention for the kernels written in CUDA: cases by name, and what results are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import reference
from blip2fast.kernels.qformer_attention.layout import KVIndex


@dataclass(frozen=True)
class Case:
    """N blocks of Q queries, S keys, H heads of width D; B images where blocks share them."""

    N: int
    Q: int
    S: int
    H: int
    D: int
    B: int | None = None
    index: tuple[int, ...] | None = None
    p: float = 0.0
    masked: bool = False
    layers: int = 1
    shared: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "window": Case(N=5, Q=3, S=15, H=2, D=64),
    "one query, one key": Case(N=3, Q=1, S=1, H=1, D=64),
    "full tile": Case(N=2, Q=16, S=64, H=1, D=64, dtype=torch.float16),
    "BLIP-2": Case(N=1, Q=32, S=257, H=1, D=64, p=0.1),
    "two tiles and one": Case(N=1, Q=33, S=33, H=1, D=64, p=0.1),
    "narrow heads": Case(N=2, Q=5, S=17, H=3, D=16, p=0.3, masked=True),
    "odd width": Case(N=2, Q=20, S=9, H=1, D=48, masked=True, dtype=torch.float16),
    "wide heads": Case(N=1, Q=20, S=33, H=2, D=128, p=0.2),
    "width 80": Case(N=1, Q=9, S=16, H=1, D=80, masked=True),
    "shared images": Case(N=4, Q=8, S=20, H=2, D=64, index=(2, 0, 2, 2), B=4, p=0.1, masked=True),
    "shared, wide": Case(N=3, Q=17, S=18, H=1, D=128, index=(1, 1, 1), B=2),
    "a layer's slice": Case(N=2, Q=8, S=20, H=2, D=64, layers=3),
    "shared queries": Case(N=4, Q=8, S=7, H=2, D=64, index=(0, 1, 0, 1), B=2, shared=True),
}


class Tensors(NamedTuple):
    """What a case is computed of; `d_out` is the gradient of the output."""

    q: Tensor
    kv: Tensor
    index: KVIndex | None
    mask: Tensor | None
    philox: Tensor | None
    d_out: Tensor


class Inputs(NamedTuple):
    case: Case
    tensors: Tensors


class Results(NamedTuple):
    """Output and gradients in the shapes of `Tensors`."""

    out: Tensor
    lse: Tensor
    d_q: Tensor
    d_kv: Tensor


def make_inputs(case: Case, device: str = "cpu") -> Tensors:
    """Drawn on the CPU, from one seed."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    images = case.B or case.N
    q = normal(1 if case.shared else case.N, case.Q, case.H, case.D)
    kv = normal(images, case.S, case.layers, 2, case.H, case.D)[:, :, case.layers - 1]
    mask = None
    if case.masked:
        mask = torch.rand(images, case.S, generator=generator) > 0.4
        mask[0] = False  # a block that sees nothing
        mask = mask.to(device)
    index = None
    if case.index is not None:
        index = KVIndex.build(torch.tensor(case.index, device=device), images)
    philox = philox_state(2**62 + 5, 9, device) if case.p else None
    return Tensors(q, kv, index, mask, philox, normal(case.N, case.Q, case.H, case.D))


def _narrow(
    q: Tensor, kv: Tensor, image: Tensor, mask: Tensor | None, keep: Tensor | None, p: float
) -> Tensor:
    """The definition in the inputs' own dtype, the rival."""
    k, v = kv[image].permute(2, 0, 3, 1, 4)
    visible = None if mask is None else mask[image][:, None, None, :]
    out, _, _ = reference.attend(q.transpose(1, 2) * q.shape[-1] ** -0.5, k, v, visible, keep, p)
    return out.transpose(1, 2)


def check_cross_attention(
    run: Callable[[Inputs], Results],
    case: Case,
    device: str = "cpu",
    *,
    lse_error: float,
    cancelled: float,
) -> None:
    """Errors against fp64 are at most twice PyTorch's in the case's type, plus one rounding.

    Args:
        run: What is tested.
        case, device: Of what, and where.
        lse_error: What an lse may be off by.
        cancelled: What sums of gradients that cancel leave, a unit of the output's gradient.
    """
    q, kv, index, mask, philox, d_out = tensors = make_inputs(case, device)
    ours = run(Inputs(case, tensors))
    exact = [x.double().requires_grad_() for x in (q, kv)]
    where = None if index is None else index.index
    truth, truth_lse = reference.qformer_cross_attention(
        *exact, where, mask, case.D**-0.5, case.p, philox
    )
    truth.backward(d_out.double())
    keep = None
    if philox is not None:
        keep = reference.cross_attention_keep(case.N, case.Q, case.H, case.S, philox, case.p)
    image = torch.arange(len(kv), device=device) if index is None else index.index.long()
    rival = [x.clone().requires_grad_() for x in (q, kv)]
    narrow = _narrow(*rival, image, mask, keep, case.p)
    narrow.backward(d_out)

    truths = (truth.detach(), *(x.grad for x in exact))
    rivals = (narrow.detach(), *(x.grad for x in rival))
    names = ("out", "d_q", "d_kv")
    for name, x, y, z in zip(names, (ours.out, ours.d_q, ours.d_kv), rivals, truths, strict=True):
        assert x.dtype == case.dtype, name
        # one rounding of the largest value
        floor = torch.finfo(case.dtype).eps / 2 * z.abs().max() + cancelled * d_out.abs().max()
        error, allowed = (x - z).abs().max(), 2 * (y - z).abs().max() + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    assert ours.lse.isneginf().equal(truth_lse.isneginf())
    seen = ~ours.lse.isneginf()
    torch.testing.assert_close(ours.lse[seen].double(), truth_lse[seen], rtol=0, atol=lse_error)
    assert bool((ours.out[~seen] == 0).all())
