"""Texts without padding: token ids end to end, and where each text starts.

`cu_seqlens` (B+1 offsets, the first 0, the last T_total) is the convention of variable-length
attention kernels.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_text(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, nonzero where a token is real.

    Returns:
        `(packed_ids [T_total], cu_seqlens [B+1] int32)`.
    """
    real = attention_mask.bool()
    cu_seqlens = torch.zeros(len(real) + 1, dtype=torch.int32, device=real.device)
    cu_seqlens[1:] = real.sum(1).cumsum(0)
    return input_ids[real], cu_seqlens


def unpack_text(packed_ids: Tensor, cu_seqlens: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad packed texts to the longest of them.

    Args:
        packed_ids: `[T_total]`.
        cu_seqlens: `[B+1]`, non-decreasing offsets from 0 to T_total.
        pad_token_id: Fills the rest.

    Returns:
        `(input_ids [B, T], attention_mask [B, T])`.

    Raises:
        ValueError: the offsets do not cover `packed_ids`.
    """
    offsets = cu_seqlens.long()
    if packed_ids.dim() != 1:
        raise ValueError(
            f"input_ids: expected [T_total] with cu_seqlens, got shape {tuple(packed_ids.shape)}"
        )
    bounds = offsets.tolist()
    if bounds[:1] != [0] or bounds[-1] != len(packed_ids) or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens: expected offsets rising from 0 to {len(packed_ids)}, the number of "
            f"packed tokens, got {bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        )
    lengths = offsets.diff()
    T = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    column = torch.arange(T, device=packed_ids.device)
    mask = column[None, :] < lengths[:, None]
    input_ids = packed_ids.new_full((len(lengths), T), pad_token_id)
    input_ids[mask] = packed_ids
    return input_ids, mask.long()


def pad_text(
    input_ids: Tensor, attention_mask: Tensor, length: int, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Pad `[B, T]` ids and mask on the right to `[B, length]`; `length` is T or more."""
    extra = length - input_ids.shape[1]
    return F.pad(input_ids, (0, extra), value=pad_token_id), F.pad(attention_mask, (0, extra))
