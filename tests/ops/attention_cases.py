"""What the tests of the Q-Former's attentions share: cases by name, inputs, errors of PyTorch.

Shapes: R rows of the token buffer, N query blocks, Q queries, B images, S image tokens, H heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind

U, B, C = MaskKind.UNIMODAL, MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL


@dataclass(frozen=True)
class SelfCase:
    """A token buffer; `kinds`, `lengths` and `blocks` as for `AttentionLayout.build`."""

    num_blocks: int
    num_queries: int
    lengths: tuple[int, ...] = ()
    kinds: tuple[MaskKind, ...] | MaskKind = ()
    blocks: tuple[int, ...] | None = None
    H: int = 2
    D: int = 16
    p: float = 0.0

    def layout(self) -> AttentionLayout:
        """How its rows see each other."""
        return AttentionLayout.build(
            self.num_blocks, self.num_queries, self.lengths, self.kinds, self.blocks
        )


# lengths 0, 1, odd, a tile of 16, 32 or 64 and one more
SELF_CASES = {
    "queries": SelfCase(3, 4),
    "queries, a tile and one": SelfCase(2, 33, H=1, D=64),
    "one query": SelfCase(2, 1),
    "text alone": SelfCase(0, 4, (5, 0, 1, 17), U),
    "causal text without queries": SelfCase(2, 0, (3, 5), C),
    "pairs": SelfCase(3, 4, (5, 0, 16), B),
    "pairs, some blocks alone": SelfCase(4, 3, (5, 2), B, (3, 1)),
    "captions": SelfCase(3, 5, (7, 1, 33), C),
    "captions of one block": SelfCase(2, 3, (4, 2, 6), C, (1, 1, 1)),
    "all kinds": SelfCase(4, 3, (3, 0, 5, 1, 0, 7), (U, C, B, C, B, U), (0, 0, 1, 2, 2, 99)),
    "pair and caption share a block": SelfCase(2, 3, (4, 2), (B, C), (1, 1)),
    "only empty texts": SelfCase(2, 3, (0, 0, 0), (U, C, B), (0, 0, 1)),
    "nothing": SelfCase(0, 4),
    "odd width": SelfCase(2, 3, (5, 2), (U, C), D=20, H=3),
    "wide": SelfCase(2, 5, (65,), (B,), (0,), D=128, H=1),
    "dropout": SelfCase(3, 5, (7, 2, 4, 9), (U, B, C, U), (0, 1, 0, 0), p=0.3),
    "dropout, pairs": SelfCase(3, 4, (5, 0, 16), B, p=0.5),
}


@dataclass(frozen=True)
class CrossCase:
    """N blocks of Q queries and B images of S tokens, one layer of several where `layers` > 1.

    Attributes:
        index: Which image each block reads; None: its own.
        masked: Hide keys, of image 0 all.
        shared: One block of queries for all.
        p: Dropout probability.
    """

    N: int
    Q: int
    B: int
    S: int
    index: tuple[int, ...] | None = None
    H: int = 2
    D: int = 16
    masked: bool = False
    shared: bool = False
    layers: int = 1
    p: float = 0.0


CROSS_CASES = {
    "own image": CrossCase(3, 4, 3, 17),
    "one token": CrossCase(2, 3, 2, 1),
    "a window": CrossCase(9, 3, 9, 15),
    "257 tokens": CrossCase(2, 33, 2, 257, H=1, D=64),
    "one image once, one three times, one nine": CrossCase(
        13, 2, 4, 6, (1, 3, 3, 2, 3, 3, 2, 3, 3, 3, 2, 3, 3)
    ),
    "every image twice": CrossCase(6, 3, 3, 7, (0, 1, 2, 0, 1, 2)),
    "masked": CrossCase(4, 3, 3, 9, (0, 2, 2, 1), masked=True),
    "masked, own image": CrossCase(3, 3, 3, 9, masked=True),
    "a layer's slice": CrossCase(4, 3, 2, 9, (1, 0, 1, 1), layers=3),
    "shared queries": CrossCase(4, 3, 4, 9, shared=True),
    "shared queries, shared images": CrossCase(5, 3, 3, 9, (1, 1, 0, 1, 0), shared=True),
    "no block": CrossCase(0, 3, 2, 9, ()),
    "no query": CrossCase(2, 0, 2, 9),
    "no token": CrossCase(2, 3, 2, 0),
    "wide": CrossCase(2, 5, 1, 65, (0, 0), D=128, H=1),
    "dropout": CrossCase(4, 3, 3, 9, (0, 2, 2, 1), masked=True, p=0.3),
    "dropout, own image": CrossCase(3, 17, 3, 33, p=0.5, layers=2),
    "dropout, shared queries": CrossCase(5, 3, 2, 9, (1, 1, 0, 1, 1), shared=True, p=0.4),
}


def philox_of(p: float) -> Tensor | None:
    """A seed of more than 32 bits, where there is dropout."""
    return philox_state(2**40 + 7, 5) if p else None


def make_qkv(case: SelfCase, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`[R, 3, H, D]`, rows further apart than they are long."""
    rows, width = case.layout().num_rows, 3 * case.H * case.D
    wide = _normal((rows, width + 8), dtype, seed)
    return wide[:, :width].unflatten(1, (3, case.H, case.D))


def make_q_kv(case: CrossCase, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`[N or 1, Q, H, D]` and `[B, S, 2, H, D]`, the last of the layers."""
    q = _normal((1 if case.shared else case.N, case.Q, case.H, case.D), dtype, seed)
    shape = (case.B, case.S, case.layers, 2, case.H, case.D)
    return q, _normal(shape, dtype, seed + 1)[:, :, -1]


def make_index(case: CrossCase) -> KVIndex | None:
    """The images of a case's blocks."""
    return None if case.index is None else KVIndex.build(case.index, case.B)


def make_key_mask(case: CrossCase, seed: int = 0) -> Tensor | None:
    """`[B, S]`: of image 0 nothing is seen, of the others two thirds."""
    if not case.masked:
        return None
    visible = torch.rand(case.B, case.S, generator=torch.Generator().manual_seed(seed)) < 2 / 3
    visible[0] = False
    return visible


def _normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def narrow_self(qkv: Tensor, layout: AttentionLayout, p: float, philox: Tensor | None) -> Tensor:
    """PyTorch's attention in the inputs' type under the mask written out: the rival."""
    q, k, v = qkv.permute(1, 2, 0, 3)
    visible, _ = reference.visible_pairs(layout)
    keep = None if philox is None else reference.self_attention_keep(layout, len(q), philox, p)
    return _narrow(q[None], k[None], v[None], visible, keep, p)[0].transpose(0, 1)


def narrow_cross(
    q: Tensor, kv: Tensor, case: CrossCase, mask: Tensor | None, philox: Tensor | None
) -> Tensor:
    """PyTorch's attention in the inputs' type, of gathered keys and values: the rival."""
    image = torch.arange(case.B) if case.index is None else torch.tensor(case.index).long()
    k, v = kv[image].permute(2, 0, 3, 1, 4)
    visible, blind = None, None
    if mask is not None:
        blind = ~mask[image].any(1)[:, None, None, None]
        visible = mask[image][:, None, None, :] | blind
    keep = None
    if philox is not None:
        keep = reference.cross_attention_keep(case.N, case.Q, case.H, case.S, philox, case.p)
    out = _narrow(q.transpose(1, 2).expand(case.N, -1, -1, -1), k, v, visible, keep, case.p)
    out = out if blind is None else out.masked_fill(blind, 0)
    return out.transpose(1, 2)


def _narrow(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, keep: Tensor | None, p: float
) -> Tensor:
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    out, _, _ = reference.attend(q * q.shape[-1] ** -0.5, k, v, visible, keep, p)
    return out


def value_and_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 9
) -> list[Tensor]:
    """The output, and the gradient of every input under a random gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    dout = _normal(out.shape, inputs[0].dtype, seed).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_exact(ours: Sequence[Tensor], rival: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Errors against fp64 are at most twice PyTorch's in this type, plus one rounding.

    Args:
        ours, rival: An output and its gradients, in the type that is tested.
        truth: The same in fp64.
    """
    for place, (x, y, z) in enumerate(zip(ours, rival, truth, strict=True)):
        name = ("output", "first gradient", "second gradient")[place]
        assert x.shape == z.shape, name
        assert x.dtype == y.dtype, name
        if z.numel() == 0:
            continue
        error, other = ((w.double() - z).abs().max().item() for w in (x, y))
        # one rounding of the largest value
        floor = torch.finfo(x.dtype).eps / 2 * z.abs().max().item()
        assert error <= 2 * other + floor, f"{name}: {error:.3g}, PyTorch {other:.3g} + {floor:.3g}"
