"""Validation of the arguments of the Q-Former's attentions."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.ops.checks import FLOATS, check_device, describe


def check_self(qkv: Tensor, layout: AttentionLayout) -> None:
    """Raise `ValueError` unless `qkv` fits `layout`."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected [R, 3, H, D], got shape {list(qkv.shape)}")
    _check_float("qkv", qkv)
    if qkv.shape[0] != layout.num_rows:
        raise ValueError(
            f"qkv: expected {layout.num_rows} rows ({layout.num_blocks} blocks of "
            f"{layout.num_queries} queries, then {layout.num_text_rows} text rows), got "
            f"{qkv.shape[0]}: build the layout from the same token buffer"
        )
    check_device("layout", layout.kinds, qkv)


def check_cross(
    q: Tensor,
    kv: Tensor,
    index: KVIndex | None,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
) -> int:
    """Raise `ValueError` unless the inputs fit together; returns the number of blocks N."""
    if q.dim() != 4:
        raise ValueError(f"q: expected [N, Q, H, D], got shape {list(q.shape)}")
    if kv.dim() != 5 or kv.shape[2] != 2 or kv.shape[3:] != q.shape[2:]:
        raise ValueError(
            f"kv: expected [B, S, 2, H, D] with H, D = {list(q.shape[2:])} as in q, got shape "
            f"{list(kv.shape)}"
        )
    _check_float("q", q)
    if kv.dtype != q.dtype:
        raise ValueError(f"kv: expected {q.dtype} like q, got {kv.dtype}: convert one of them")
    check_device("kv", kv, q)
    B, S = kv.shape[:2]
    blocks = B
    if index is not None:
        check_device("kv_index", index.index, q)
        if index.offsets.shape != (B + 1,):
            raise ValueError(
                f"kv_index: built for {index.offsets.shape[0] - 1} images, kv has {B}: "
                "KVIndex.build(index, num_images)"
            )
        blocks = index.index.shape[0]
    if q.shape[0] not in (1, blocks):
        remedy = (
            "pass kv_index, the image that each block reads"
            if index is None
            else "kv_index needs one image for each block"
        )
        raise ValueError(f"q: expected {blocks} blocks, or 1 for all, got {q.shape[0]}: {remedy}")
    if key_lengths is not None and key_mask is not None:
        raise ValueError("key_lengths and key_mask both say which keys are real: pass one")
    if key_lengths is not None:
        if key_lengths.shape != (B,) or key_lengths.is_floating_point():
            raise ValueError(f"key_lengths: expected {B} integers, got {describe(key_lengths)}")
        check_device("key_lengths", key_lengths, q)
    if key_mask is not None:
        if key_mask.shape != (B, S) or key_mask.dtype != torch.bool:
            raise ValueError(
                f"key_mask: expected bool {[B, S]}, true where an image token is real, got "
                f"{describe(key_mask)}"
            )
        check_device("key_mask", key_mask, q)
    return blocks


def build_index(kv_index: KVIndex | Tensor | None, kv: Tensor) -> KVIndex | None:
    """The `kv_index` argument as a `KVIndex`."""
    if kv_index is None or isinstance(kv_index, KVIndex):
        return kv_index
    if kv_index.is_floating_point() or kv_index.dtype == torch.bool:
        raise ValueError(f"kv_index: expected integers, got {describe(kv_index)}")
    return KVIndex.build(kv_index, kv.shape[0])


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: expected heads and head width above 0, got {list(x.shape)}")
