"""Reference for `lm_cross_entropy`, with the logits of all rows at once.

Shapes: R rows, C hidden width, V vocabulary size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.precision import wide_dtype


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Loss with all logits in memory; arguments and result as in `lm_cross_entropy`."""
    dtype = hidden.dtype
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits.to(wide_dtype(logits.dtype))
    loss = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    with torch.no_grad():
        counts = labels != ignore_index
        of_label = logits.gather(1, labels.where(counts, 0)[:, None])
        return loss, ((of_label >= logits.amax(1, keepdim=True))[:, 0] & counts).sum()
