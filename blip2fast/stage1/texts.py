"""Texts without padding: token ids end to end, and where each text starts.

`cu_seqlens` (B+1 offsets, the first 0, the last T_total) is the convention of variable-length
attention kernels.
"""

from __future__ import annotations

import torch
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
    check_packed(packed_ids, cu_seqlens)
    lengths = cu_seqlens.long().diff()
    T = int(lengths.max()) if len(lengths) else 0
    column = torch.arange(T, device=packed_ids.device)
    mask = column[None, :] < lengths[:, None]
    input_ids = packed_ids.new_full((len(lengths), T), pad_token_id)
    input_ids[mask] = packed_ids
    return input_ids, mask.long()


def check_packed(packed_ids: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse offsets that do not cover the packed ids; offsets on the CPU keep this free.

    Raises:
        ValueError: naming the offsets.
    """
    if packed_ids.dim() != 1:
        raise ValueError(
            f"input_ids: expected [T_total] with cu_seqlens, got shape {tuple(packed_ids.shape)}"
        )
    bounds = cu_seqlens.tolist()
    if bounds[:1] != [0] or bounds[-1] != len(packed_ids) or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens: expected offsets rising from 0 to {len(packed_ids)}, the number of "
            f"packed tokens, got {bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        )
