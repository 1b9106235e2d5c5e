"""Packed texts: token ids without padding, and offsets; and padded ones where shapes are fixed.

`cu_seqlens` (B+1 offsets, the first 0, the last T_total) is the convention of variable-length
attention kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def pack_text(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Remove padding from token ids.

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


def check_packed(packed_ids: Tensor, cu_seqlens: Tensor) -> None:
    """Check that the offsets cover the packed ids. Synchronises if the offsets are on a GPU.

    Raises:
        ValueError: if they do not; shows the offsets.
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


@dataclass(frozen=True)
class PackedTexts:
    """B texts, concatenated without padding.

    Attributes:
        ids: `[T_total]` int64, each text as [CLS] words [SEP].
        positions: `[T_total]` int64, position of each token in its text.
        cu_seqlens: `[B+1]` int64, start offset of each text, on the device of `ids`.
        lengths: `[B]` int32 on the CPU, so that reading sizes does not synchronise.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, lengths: Tensor) -> PackedTexts:
        """From packed ids `[T_total]` and the texts' lengths `[B]` on the CPU."""
        lengths = lengths.to(torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(input_ids.device)
        row = torch.arange(len(input_ids), device=input_ids.device)
        text = torch.searchsorted(cu_seqlens[1:], row, right=True)
        return cls(input_ids, row - cu_seqlens[text], cu_seqlens, lengths)

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> PackedTexts:
        """From padded ids and mask, `[B, T]` each; synchronises if they are on an accelerator."""
        ids, cu_seqlens = pack_text(input_ids, attention_mask)
        return cls.of(ids, cu_seqlens.cpu().diff())

    def to(self, device: torch.device) -> PackedTexts:
        """The same texts on a device; the lengths stay on the CPU."""
        if self.ids.device == device:
            return self
        ids, positions, cu_seqlens = (
            x.to(device, non_blocking=True) for x in (self.ids, self.positions, self.cu_seqlens)
        )
        return replace(self, ids=ids, positions=positions, cu_seqlens=cu_seqlens)

    @property
    def count(self) -> int:
        """B, number of texts."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """T, number of tokens in the longest text."""
        return int(self.lengths.max())

    def padded(self, length: int, pad_token_id: int) -> tuple[Tensor, Tensor]:
        """`(ids [B, length], lengths [B])` on the device; `length` must be at least `longest`."""
        column = torch.arange(length, device=self.ids.device)
        lengths = self.cu_seqlens.diff()
        rows = (self.cu_seqlens[:-1, None] + column).clamp(max=len(self.ids) - 1)
        real = column < lengths[:, None]
        return self.ids[rows].masked_fill(~real, pad_token_id), lengths


@dataclass(frozen=True)
class PaddedTexts:
    """B texts, padded on the right.

    Attributes:
        ids: `[B, T]` int64.
        real: `[B, T]` bool, true where a token is real.
    """

    ids: Tensor
    real: Tensor

    @classmethod
    def of(cls, texts: PackedTexts, pad_token_id: int) -> PaddedTexts:
        """From texts without padding."""
        ids, lengths = texts.padded(texts.longest, pad_token_id)
        return cls(ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])

    def to(self, device: torch.device) -> PaddedTexts:
        """The same texts on a device."""
        return PaddedTexts(self.ids.to(device), self.real.to(device))

    @property
    def count(self) -> int:
        """B, number of texts."""
        return self.ids.shape[0]

    @property
    def longest(self) -> int:
        """T, number of columns."""
        return self.ids.shape[1]


def packed(texts: PackedTexts | PaddedTexts) -> PackedTexts:
    """The argument, which must be packed.

    Raises:
        TypeError: it is padded.
    """
    if isinstance(texts, PaddedTexts):
        raise TypeError(
            "texts: expected PackedTexts, got PaddedTexts, which only PaddedReader takes"
        )
    return texts
