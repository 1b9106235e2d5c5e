"""The three attention masks of the Q-Former (arXiv 2301.12597, Figure 2).

Rows are what attends, columns are what is attended to; `#` is visible, `.` is not::

    UNIMODAL (ITC)        BIDIRECTIONAL (ITM)   MULTIMODAL_CAUSAL (ITG)
          Q Q t t t             Q Q t t t             Q Q t t t
        Q # # . . .           Q # # # # #           Q # # . . .
        Q # # . . .           Q # # # # #           Q # # . . .
        t . . # # #           t # # # # #           t # # # . .
        t . . # # #           t # # # # #           t # # # # .
        t . . # # #           t # # # # #           t # # # # #

Padding columns are never visible. Shapes: B images, Q queries, T text tokens.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class MaskKind(enum.Enum):
    """Which tokens see which in the Q-Former's self-attention."""

    UNIMODAL = "unimodal"
    BIDIRECTIONAL = "bidirectional"
    MULTIMODAL_CAUSAL = "multimodal_causal"


def qformer_mask(kind: MaskKind, num_queries: int, text_mask: Tensor) -> Tensor:
    """Self-attention mask over Q query rows followed by T text rows.

    Args:
        kind: One of the three masks drawn above.
        num_queries: Q, the number of query rows; 0 for text alone.
        text_mask: `[B, T]`, nonzero where a text token is real.

    Returns:
        `[B, Q+T, Q+T]` bool, true where the row may attend to the column.

    Raises:
        ValueError: `text_mask` is not two-dimensional or `num_queries` is negative.
    """
    if text_mask.dim() != 2:
        raise ValueError(f"text_mask: expected [B, T], got shape {tuple(text_mask.shape)}")
    if num_queries < 0:
        raise ValueError(f"num_queries: expected 0 or more, got {num_queries}")
    B, T = text_mask.shape
    Q, L = num_queries, num_queries + T
    device = text_mask.device
    text_rows = torch.arange(L, device=device) >= Q

    if kind is MaskKind.BIDIRECTIONAL:
        visible = torch.ones(L, L, dtype=torch.bool, device=device)
    elif kind is MaskKind.UNIMODAL:
        visible = text_rows[:, None] == text_rows[None, :]
    else:
        # queries are all before the text, so "not later" shows every query to every text row
        not_later = torch.ones(L, L, dtype=torch.bool, device=device).tril()
        visible = torch.where(text_rows[:, None], not_later, ~text_rows[None, :])

    real = torch.cat([text_mask.new_ones(B, Q).bool(), text_mask.bool()], dim=1)
    return visible[None] & real[:, None, :]
