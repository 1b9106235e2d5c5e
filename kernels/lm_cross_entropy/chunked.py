"""Chunked `lm_cross_entropy`: logits, loss and gradient of a few rows at a time.

For one row with logits x, label y and smoothing s the loss is
`lse(x) - (1 - s) * x[y] - s * mean(x)`, its gradient `softmax(x) - (1 - s) * onehot(y) - s / V`.

Gradients are stored without the factor `dloss / count`: it is known only later, and small gradients
would underflow with it in half precision. Shapes: R rows, C hidden width, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# `[m, K]`, `[K, n]` and an offset `[n]` or None to `[m, n]`
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# bytes of logits per chunk, by whether they are on a CPU; the GPU's value was not measured
DEFAULT_BYTES = {True: 128 * 2**20, False: 512 * 2**20}
# V is padded to a multiple of this if rows of logits would otherwise be unaligned on a GPU
ALIGNMENT = 64
FP16_SHIFT = 64


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    chunk_bytes: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    pad: bool | None = None,
    *,
    product: Product | None = None,
) -> tuple[Tensor, ...]:
    """Loss and gradients.

    Args:
        hidden, weight, bias, labels, label_smoothing, ignore_index: As for `lm_cross_entropy`.
        chunk_bytes: Most bytes of logits in memory at once.
        needs_hidden, needs_weight, needs_bias: Which gradients to compute.
        pad: Whether to pad V to a multiple of `ALIGNMENT`; None: if that is faster.
        product: Computes the products instead of PyTorch; of fp32 on a CPU.

    Returns:
        `(loss, correct, count, dhidden, dweight, dbias)`: mean loss, number of labels with the
        largest logit, number of labels not ignored, and the gradients of the *sum* of losses:
        `[R, C]` in the type of hidden, `[V, C]` in `weight_grad_dtype`, `[V]` in fp32 or fp64;
        empty if not needed.
    """
    R, V = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    counts = labels != ignore_index
    # ignored rows then contribute nothing to any matmul, whatever their values
    hidden = hidden.masked_fill(~counts[:, None], 0)
    safe_labels = labels.where(counts, 0)[:, None]
    pad = _pays(hidden, V) if pad is None else pad
    table, offset = _table(weight, bias, hidden.dtype, pad)
    step = max(1, min(R, chunk_bytes // (len(table) * wide.itemsize)))
    logits = hidden.new_empty(step, len(table))
    needs = needs_hidden, needs_weight, needs_bias
    grads = _Gradients(hidden, table, V, step, needs, product)
    losses = hidden.new_empty(R, dtype=wide)
    best = torch.empty_like(counts)
    for start in range(0, R, step):
        rows = slice(start, min(start + step, R))
        padded, label = logits[: rows.stop - start], safe_labels[rows]
        if product is None:
            torch.addmm(offset, hidden[rows], table.T, out=padded)
        else:
            padded = product(hidden[rows], table.T, offset)
        x = padded[:, :V]
        top, of_label = x.amax(1, keepdim=True), x.gather(1, label)
        best[rows] = (of_label >= top)[:, 0]
        loss = of_label.to(wide) * (label_smoothing - 1)
        if label_smoothing > 0:
            loss -= x.sum(1, keepdim=True, dtype=wide) * (label_smoothing / V)
        loss += grads.add(rows, x, top, label, counts[rows], label_smoothing)
        losses[rows] = loss[:, 0]
    count = counts.sum()
    mean = losses.where(counts, 0).sum() / count
    dweight = grads.weight(weight_grad_dtype(hidden.dtype, weight.dtype))
    return mean, (best & counts).sum(), count, grads.hidden, dweight, grads.bias


class _Gradients:
    """Gradients of the sum of losses, accumulated chunk by chunk.

    Attributes:
        hidden, bias: `[R, C]` and `[V]`, empty if not needed.
    """

    def __init__(
        self,
        rows: Tensor,
        table: Tensor,
        V: int,
        step: int,
        needs: tuple[bool, bool, bool],
        product: Product | None,
    ) -> None:
        self.needs, self._rows, self._table, self._V = needs, rows, table, V
        self._product = product
        wide = torch.promote_types(rows.dtype, torch.float32)
        self.hidden = rows.new_empty(rows.shape if needs[0] else (0,))
        self.bias = rows.new_zeros(V if needs[2] else 0, dtype=wide)
        self._weight: Tensor | None = None
        held = step if any(needs) else 0
        # padding columns stay 0
        empty = rows.new_empty if len(table) == V else rows.new_zeros
        self._wide = empty((held, len(table)), dtype=wide)
        self._narrow = self._wide if rows.dtype == wide else empty((held, len(table)))

    def add(
        self, rows: slice, x: Tensor, top: Tensor, label: Tensor, counts: Tensor, smoothing: float
    ) -> Tensor:
        """Add the gradient of a chunk.

        Args:
            rows: The rows of the chunk.
            x: `[n, V]` logits.
            top: `[n, 1]`, maximum of each row.
            label: `[n, 1]`, valid even for ignored rows.
            counts: `[n]` bool, false for ignored rows.
            smoothing: s.

        Returns:
            The log-sum-exp of the logits, `[n, 1]`.
        """
        n, V = x.shape
        wide = self._wide.dtype
        if not any(self.needs):
            return x.to(wide).logsumexp(1, keepdim=True)
        dx = self._wide[:n, :V]
        torch.softmax(x, 1, dtype=wide, out=dx)
        # the largest probability is 1 / sum(exp(x - top))
        lse = top.to(wide) - dx.amax(1, keepdim=True).log()
        if smoothing > 0:
            dx.sub_(smoothing / V)
        dx.scatter_add_(1, label, dx.new_full((), smoothing - 1).expand(n, 1))
        if self.needs[2]:
            self.bias += counts.to(wide) @ dx
        if self._narrow is not self._wide:
            self._narrow[:n, :V] = dx
        narrow = self._narrow[:n]
        if self.needs[0]:
            if self._product is None:
                torch.mm(narrow, self._table, out=self.hidden[rows])
            else:
                self.hidden[rows] = self._product(narrow, self._table, None)
            self.hidden[rows].masked_fill_(~counts[:, None], 0)
        if self.needs[1]:
            self._add_weight(narrow[:, :V].T, self._rows[rows])
        return lse

    def _add_weight(self, dx: Tensor, rows: Tensor) -> None:
        if rows.dtype == self._wide.dtype:
            if self._product is not None:
                part = self._product(dx, rows, None)
                self._weight = part if self._weight is None else self._weight.add_(part)
            elif self._weight is None:
                self._weight = torch.mm(dx, rows)
            else:
                self._weight.addmm_(dx, rows)
            return
        # sums over many rows may overflow fp16, and the loss scale is not applied yet
        shift = FP16_SHIFT if rows.dtype == torch.float16 else 1
        part = torch.mm(dx, rows / shift if shift > 1 else rows)
        if self._weight is not None:
            self._weight.add_(part, alpha=shift)
        elif len(rows) == len(self._rows) and shift == 1:
            self._weight = part
        else:
            self._weight = part.to(self._wide.dtype).mul_(shift)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight gradient `[V, C]` in this dtype; empty if not needed."""
        if not self.needs[1]:
            return self._rows.new_empty(0, dtype=dtype)
        if self._weight is None:
            return self._rows.new_zeros(self._V, self._table.shape[1], dtype=dtype)
        return self._weight.to(dtype)


def weight_grad_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """Dtype in which the unscaled weight gradient is stored: bf16, or fp32 or wider.

    Of bf16 products it is rounded once, as PyTorch's is.
    """
    if torch.bfloat16 in (hidden, weight):
        return torch.bfloat16
    return torch.promote_types(hidden, torch.float32)


def backward(
    dloss: Tensor, count: Tensor, gradients: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, ...]:
    """The gradients from `forward` times `dloss / count`, each in its own dtype."""
    # no labels, no gradient: a NaN loss then leaves the parameters unchanged
    scale = dloss / count.clamp(min=1)
    if dloss.device.type == "cpu":
        # a Python scalar is not rounded, even if the gradient is in 16 bits
        factor = scale.item()
        return tuple(
            x.to(t).mul_(factor) if x.dtype.itemsize < t.itemsize else torch.mul(x, factor).to(t)
            for x, t in zip(gradients, dtypes, strict=True)
        )
    scale = scale[None]
    return tuple((x * scale).to(t) for x, t in zip(gradients, dtypes, strict=True))


def _pays(hidden: Tensor, V: int) -> bool:
    """Whether padding is faster: rows of logits would be unaligned for the tensor cores."""
    return hidden.device.type == "cuda" and hidden.dtype.itemsize == 2 and V % 8 > 0


def _table(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, pad: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias in the matmul's dtype, with V zero-padded to a multiple of `ALIGNMENT`."""
    V, C = weight.shape
    words = -(-V // ALIGNMENT) * ALIGNMENT if pad else V
    offset = weight.new_zeros(words, dtype=dtype)
    if bias is not None:
        offset[:V] = bias
    if words == V:
        return weight.to(dtype), offset
    table = weight.new_zeros(words, C, dtype=dtype)
    table[:V] = weight
    return table, offset
