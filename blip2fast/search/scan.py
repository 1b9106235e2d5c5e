"""The k best images of a query: by upper bounds first, then by their features.

Images are taken in the order of their bounds and their similarity is computed. Once the k-th best
similarity is no less than the next bound, no image that is left can be among the k best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# images whose features are read at a time, at first and at most
_FIRST, _MOST = 256, 4096
_GROUP = 64


@dataclass(frozen=True)
class Nearest:
    """The best rows of one query.

    Attributes:
        rows: [k] int64, best first; of equal ones the earlier row.
        similarity: [k] fp32.
        exact: whether no other row can be better.
        read: number of rows whose features were read.
    """

    rows: Tensor
    similarity: Tensor
    exact: bool
    read: int


def nearest(
    bounds: Tensor, similarity: Callable[[Tensor], Tensor], k: int, candidates: int | None = None
) -> Nearest:
    """The k rows of the largest similarity.

    Args:
        bounds: [N], no less than each row's similarity.
        similarity: from row numbers [n] to similarities [n].
        k: rows to return, at most N.
        candidates: rows to read at most, no fewer than k are; None: until the result is exact.
    """
    N = len(bounds)
    k = min(k, N)
    limit = N if candidates is None else min(max(candidates, k), N)
    read = min(limit, max(k, _FIRST))
    rows = largest(bounds, read)
    bounds = bounds.clone()
    best_rows, best = _merge(rows, similarity(rows), k)
    bounds[rows] = -torch.inf
    left = (bounds > best[-1]).nonzero().squeeze(1)
    more = min(limit - read, len(left))
    # the bound after the last that may be read says whether one was missed
    left = left[largest(bounds[left], min(more + 1, len(left)))]
    step, start = _FIRST, 0
    while start < more and bounds[left[start]] > best[-1]:
        part = left[start : min(start + step, more)]
        best_rows, best = _merge(
            torch.cat([best_rows, part]), torch.cat([best, similarity(part)]), k
        )
        start, step = start + len(part), min(2 * step, _MOST)
    exact = start == len(left) or bool(bounds[left[start]] <= best[-1])
    return Nearest(best_rows, best, exact, read + start)


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values [N], falling.

    The largest lie in the groups whose largest is largest, so only these are sorted.
    """
    N = len(values)
    groups = N // _GROUP
    if count * 4 > groups:
        return values.topk(count).indices
    whole = groups * _GROUP
    tops = values[:whole].view(groups, _GROUP).amax(1).topk(count).indices
    places = (tops[:, None] * _GROUP + torch.arange(_GROUP)).flatten()
    places = torch.cat([places, torch.arange(whole, N)])
    return places[values[places].topk(count).indices]


def _merge(rows: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best; of equal scores the earlier row."""
    order = rows.argsort()
    rows, scores = rows[order], scores[order]
    best = scores.argsort(descending=True, stable=True)[:k]
    return rows[best], scores[best]
