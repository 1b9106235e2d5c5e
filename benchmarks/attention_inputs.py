"""Inputs of the attention suite, the same data padded, the true results, and the least work.

Shapes: R rows of the token buffer, N query blocks, n padded problems of L rows, Q queries, B
images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import torch
from comparing import Work
from shapes import BI, CAUSAL, UNI, CrossShape, SelfShape
from torch import Tensor

from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind

# output first, then the gradients, where there are any
Results = list[Tensor]
# scores and sums forward; five products of the same size backward
FORWARD_PRODUCTS, ALL_PRODUCTS = 2, 7


@dataclass(frozen=True)
class Padded:
    """Problems of equal length, as a padded pass has them.

    Attributes:
        rows: `[n, L]` int64, the row of the token buffer, or R for padding.
        visible: `[n, 1 or L, L]` bool, which keys a row sees.
        full: Whether every row sees every key.
    """

    rows: Tensor
    visible: Tensor
    full: bool

    @classmethod
    def build(
        cls, shape: SelfShape, kind: MaskKind | None, first_text_row: int, device: torch.device
    ) -> Padded:
        """The problems of one text kind with their queries; None: queries alone."""
        Q = 0 if kind is UNI else shape.queries
        T = shape.text_tokens if kind else 0
        N, total = shape.blocks, shape.blocks * shape.queries + sum(shape.lengths())
        rows = torch.full((N, Q + T), total)
        rows[:, :Q] = torch.arange(N * Q).view(N, Q)
        if kind:
            lengths = torch.tensor(shape.lengths()[:N])
            starts = first_text_row + lengths.cumsum(0) - lengths
            place = torch.arange(T)
            real = place < lengths[:, None]
            rows[:, Q:] = torch.where(real, starts[:, None] + place, total)
        visible = (rows < total)[:, None, :]
        if kind is CAUSAL:
            pattern = torch.ones(Q + T, Q + T, dtype=torch.bool).tril()
            pattern[:Q, :Q] = True
            visible = visible & pattern
        return cls(rows.to(device), visible.to(device), bool(visible.all()))

    def pad(self, buffer: Tensor) -> Tensor:
        """`[R, ...]` to `[n, L, ...]`, with zeros."""
        return torch.cat([buffer, torch.zeros_like(buffer[:1])])[self.rows]

    def unpad_into(self, buffer: Tensor, padded: Tensor) -> None:
        """Write the real rows of `[n, L, ...]` to their places in `[R, ...]`."""
        real = self.rows < len(buffer)
        buffer[self.rows[real]] = padded[real]


class SelfInputs:
    """Data of one self-attention call.

    Args:
        shape: Its sizes.
        dtype, device: Of the data.
        train: Whether gradients are computed.
        seed: Of the data.
    """

    def __init__(
        self, shape: SelfShape, dtype: torch.dtype, device: torch.device, train: bool, seed: int
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        lengths = shape.lengths()
        kinds = [kind for kind in shape.kinds for _ in range(shape.blocks)]
        blocks = list(range(shape.blocks)) * len(shape.kinds)
        self.layout = AttentionLayout.build(
            shape.blocks, shape.queries, torch.tensor(lengths), kinds, blocks, device=device
        )
        R, H, D = self.layout.num_rows, shape.heads, shape.width
        qkv = torch.randn(R, 3, H, D, generator=generator, device=device).to(dtype)
        self.train = train
        self.qkv = qkv.requires_grad_(train)
        self.dout = torch.randn(R, H, D, generator=generator, device=device).to(dtype)
        self.padded = padded_problems(shape, device)

    @cached_property
    def truth(self) -> Results:
        """Output `[R, H, D]` and gradient `[R, 3, H, D]`, written out in fp32."""
        data = [p.pad(self.qkv.detach().float()).requires_grad_() for p in self.padded]
        outputs = [
            written_out(x.permute(2, 0, 3, 1, 4), p.visible[:, None])
            for x, p in zip(data, self.padded, strict=True)
        ]
        results = [self.unpad([out.detach() for out in outputs])]
        if self.train:
            douts = [p.pad(self.dout.float()) for p in self.padded]
            results.append(self.unpad(list(torch.autograd.grad(outputs, data, douts))))
        return results

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """Padded `[n, L, ...]` of every problem to one `[R, ...]`."""
        buffer = parts[0].new_full((self.layout.num_rows, *parts[0].shape[2:]), torch.nan)
        for problem, part in zip(self.padded, parts, strict=True):
            problem.unpad_into(buffer, part)
        return buffer


@functools.cache
def padded_problems(shape: SelfShape, device: torch.device) -> list[Padded]:
    """One set of problems for every text kind; the queries go with the text that sees them."""
    first, problems = shape.blocks * shape.queries, []
    per_kind = sum(shape.lengths()[: shape.blocks])
    for place, kind in enumerate(shape.kinds):
        problems.append(Padded.build(shape, kind, first + place * per_kind, device))
    if not {BI, CAUSAL} & set(shape.kinds):
        problems.append(Padded.build(shape, None, 0, device))
    return problems


def written_out(qkv: Tensor, visible: Tensor | None, dropout_p: float = 0.0) -> Tensor:
    """Masked attention as a formula: `[3, n, H, L, D]` to `[n, L, H, D]`; `visible` broadcasts."""
    q, k, v = qkv
    return attend(q, k, v, visible, dropout_p).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout_p: float) -> Tensor:
    """`softmax(q k / sqrt(D)) v` of `[n, H, L, D]`, with what is not visible left out."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(q.dtype).min)
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout_p, dropout_p > 0)
    return weights @ v


class CrossInputs:
    """Data of one cross-attention call; arguments as in `SelfInputs`."""

    def __init__(
        self, shape: CrossShape, dtype: torch.dtype, device: torch.device, train: bool, seed: int
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        N, Q, H, D = shape.blocks, shape.queries, shape.heads, shape.width
        B, S = shape.num_images(), shape.image_tokens
        query = torch.randn(N, Q, H, D, generator=generator, device=device).to(dtype)
        merged = torch.randn(
            B, S, shape.layers, 2, H, D, generator=generator, device=device, dtype=dtype
        )
        index = shape.index()
        self.train = train
        self.q = query.requires_grad_(train)
        self.kv = merged[:, :, shape.layers // 2].requires_grad_(train)
        self.index = None if index is None else KVIndex.build(torch.tensor(index).to(device), B)
        self.dout = torch.randn(N, Q, H, D, generator=generator, device=device).to(dtype)

    @cached_property
    def truth(self) -> Results:
        """Output `[N, Q, H, D]`, and the gradients of q and kv, written out in fp32."""
        q, kv = (x.detach().float().requires_grad_() for x in (self.q, self.kv))
        out = cross_written_out(q, kv, self.rows(), 0.0)
        gradients = torch.autograd.grad(out, (q, kv), self.dout.float()) if self.train else ()
        return [out.detach(), *gradients]

    def rows(self) -> Tensor | None:
        """The image of each block, for indexing."""
        return None if self.index is None else self.index.index.long()


def gathered(q: Tensor, kv: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[N, H, Q or S, D]`; those of an image are copied for each use."""
    k, v = (kv if index is None else kv[index]).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def cross_written_out(q: Tensor, kv: Tensor, index: Tensor | None, dropout_p: float) -> Tensor:
    """Cross-attention as a formula, `[N, Q, H, D]`."""
    return attend(*gathered(q, kv, index), None, dropout_p).transpose(1, 2)


def visible_pairs(shape: SelfShape) -> int:
    """How many pairs of a query or text row with a key the masks let through."""
    N, Q = shape.blocks, shape.queries
    pairs = N * Q * Q
    for kind, T in zip(
        (kind for kind in shape.kinds for _ in range(N)), shape.lengths(), strict=True
    ):
        if kind is UNI:
            pairs += T * T
        else:
            pairs += T * Q + (T * T + Q * T if kind is BI else T * (T + 1) // 2)
    return pairs


def self_work(shape: SelfShape, itemsize: int, train: bool) -> Work:
    """qkv in, output out; backward qkv, output and its gradient in, the gradient of qkv out."""
    rows = shape.blocks * shape.queries + sum(shape.lengths())
    row = shape.heads * shape.width * itemsize
    products = ALL_PRODUCTS if train else FORWARD_PRODUCTS
    flops = 2 * products * visible_pairs(shape) * shape.heads * shape.width
    return Work(flops, rows * row * (12 if train else 4), input_bytes=4 * rows * row)


def cross_work(shape: CrossShape, itemsize: int, train: bool) -> Work:
    """Keys and values of an image once each way, however many blocks read it."""
    C, S = shape.heads * shape.width, shape.image_tokens
    rows = shape.blocks * shape.queries
    queries, images = rows * C * itemsize, 2 * shape.num_images() * S * C * itemsize
    products = ALL_PRODUCTS if train else FORWARD_PRODUCTS
    moved = 6 * queries + 3 * images if train else 2 * queries + images
    return Work(2 * products * rows * S * C, moved, input_bytes=2 * queries + images)
