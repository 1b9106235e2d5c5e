"""Self-attention of a token buffer in Triton, forward."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.launch import FP_FUSION
from blip2fast.kernels.philox import threshold
from blip2fast.kernels.qformer_attention.config import (
    Tiles,
    joined_tile,
    self_forward_tiles,
    self_sizes,
)
from blip2fast.kernels.qformer_attention.layout import AttentionLayout
from blip2fast.kernels.qformer_attention.tiles import (
    base_2_scores,
    load_rows,
    softmax_end,
    softmax_step,
    store_rows,
)
from blip2fast.kernels.qformer_attention.units import find_unit, row_of, visible_pairs


@triton.jit
def _attend(
    block,
    text_row,
    first_row,
    first_key,
    end,
    kind,
    row_tile,
    first_head,
    qkv_ptr,
    philox_ptr,
    out_ptr,
    lse_ptr,
    Q,
    stride_row,
    scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    SINGLE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of a tile of a unit's rows."""
    first_place = first_row + row_tile * BLOCK_M
    if first_place < end:
        place = first_place + tl.arange(0, BLOCK_M)
        row_there = place < end
        row = row_of(place, block, text_row, Q)
        # dropout needs a multiple of 4
        c_begin = first_key // 4 * 4
        if SINGLE:
            key_tiles = 1
        else:
            c_end = tl.where(kind == 2, tl.minimum(end, first_place + BLOCK_M), end)
            key_tiles = tl.cdiv(c_end - c_begin, BLOCK_N)
        for h in tl.range(0, HEADS):
            head = first_head + h
            q = load_rows(qkv_ptr, row * stride_row + head * D, row_there, D, BLOCK_D)
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for i in tl.range(0, key_tiles):
                c0 = c_begin + i * BLOCK_N
                key = c0 + tl.arange(0, BLOCK_N)
                key_there = (key >= first_key) & (key < end)
                key_at = row_of(key, block, text_row, Q) * stride_row + (H + head) * D
                k = load_rows(qkv_ptr, key_at, key_there, D, BLOCK_D)
                v = load_rows(qkv_ptr, key_at + H * D, key_there, D, BLOCK_D)
                visible = visible_pairs(place, key, key_there, Q, kind == 2)
                top, total, mixed = softmax_step(
                    base_2_scores(q, k, visible, scale, PRECISION),
                    v,
                    top,
                    total,
                    mixed,
                    philox_ptr,
                    head,
                    row,
                    c0,
                    SINGLE,
                    THRESHOLD,
                    PRECISION,
                )
            out, lse = softmax_end(top, total, mixed, keep_scale)
            store_rows(out_ptr, (row * H + head) * D, out, row_there, D, BLOCK_D)
            tl.store(lse_ptr + row * H + head, lse, mask=row_there)


@triton.jit(do_not_specialize=["N", "Q", "row_tiles"])
def _qformer_attention_fwd_kernel(
    qkv_ptr,
    cu_seqlens_ptr,
    kinds_ptr,
    blocks_ptr,
    block_text_ptr,
    order_ptr,
    offsets_ptr,
    philox_ptr,
    out_ptr,  # [R, H, D]
    lse_ptr,  # [R, H]
    N,
    Q,
    row_tiles,  # of a unit
    stride_row,
    scale,
    keep_scale,  # 1 / (1 - p)
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_BIDIRECTIONAL: tl.constexpr,
    JOINED: tl.constexpr,  # 0, or the rows and keys of the tile of a UNIMODAL text
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    first_head = program % (H // HEADS) * HEADS
    row_tile = program // (H // HEADS) % row_tiles
    unit = program // (H // HEADS) // row_tiles
    block, text_row, first_row, first_key, end, kind = find_unit(
        unit,
        cu_seqlens_ptr,
        kinds_ptr,
        blocks_ptr,
        block_text_ptr,
        order_ptr,
        offsets_ptr,
        N,
        Q,
        HAS_BIDIRECTIONAL,
        JOINED > 0,
    )
    if JOINED > 0:
        if kind == 0:
            _attend(
                block,
                text_row,
                first_row,
                first_key,
                end,
                kind,
                row_tile,
                first_head,
                qkv_ptr,
                philox_ptr,
                out_ptr,
                lse_ptr,
                Q,
                stride_row,
                scale,
                keep_scale,
                H,
                D,
                JOINED,
                JOINED,
                BLOCK_D,
                HEADS,
                True,
                THRESHOLD,
                PRECISION,
            )
        else:
            _attend(
                block,
                text_row,
                first_row,
                first_key,
                end,
                kind,
                row_tile,
                first_head,
                qkv_ptr,
                philox_ptr,
                out_ptr,
                lse_ptr,
                Q,
                stride_row,
                scale,
                keep_scale,
                H,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                HEADS,
                SINGLE,
                THRESHOLD,
                PRECISION,
            )
    else:
        _attend(
            block,
            text_row,
            first_row,
            first_key,
            end,
            kind,
            row_tile,
            first_head,
            qkv_ptr,
            philox_ptr,
            out_ptr,
            lse_ptr,
            Q,
            stride_row,
            scale,
            keep_scale,
            H,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            HEADS,
            SINGLE,
            THRESHOLD,
            PRECISION,
        )


def self_forward(
    qkv: Tensor,
    layout: AttentionLayout,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-attention of a token buffer.

    Args:
        qkv: `[R, 3, H, D]`, fp16, bf16 or fp32, on a GPU; any row stride, the rest contiguous.
        layout: Which rows attend to which.
        scale: Factor of the scores.
        dropout_p, philox: Of the dropout mask; None: no dropout.
        tiles: Override those of `config.py`.

    Returns:
        `(out [R, H, D], lse [R, H])`, the lse in fp32.
    """
    R, _, H, D = qkv.shape
    qkv = dense_heads(qkv)
    out, lse = qkv.new_empty(R, H, D), qkv.new_empty(R, H, dtype=torch.float32)
    tiles = tiles or self_forward_tiles(layout, qkv)
    # where a text joins a block they are rows of one tile
    row_tiles = triton.cdiv(self_sizes(layout)[0], tiles.block_m)
    programs = (layout.num_blocks + layout.num_texts) * row_tiles * (H // tiles.heads)
    if R == 0 or programs == 0:
        return out, lse
    with torch.cuda.device_of(qkv):
        _qformer_attention_fwd_kernel[(programs,)](
            qkv,
            layout.cu_seqlens,
            layout.kinds,
            layout.blocks,
            layout.block_text,
            layout.order,
            layout.offsets,
            philox,
            out,
            lse,
            layout.num_blocks,
            layout.num_queries,
            row_tiles,
            qkv.stride(0),
            scale,
            1.0 / (1.0 - dropout_p),
            SINGLE=tiles.single,
            HAS_BIDIRECTIONAL=layout.has_bidirectional,
            JOINED=joined_tile(layout, tiles),
            **constants(qkv, tiles, dropout_p, philox),
        )
    return out, lse


def dense_heads(qkv: Tensor) -> Tensor:
    """`[R, 3, H, D]` with each row contiguous; the kernel accepts any row stride."""
    H, D = qkv.shape[-2:]
    return qkv if qkv.stride()[1:] == (H * D, D, 1) else qkv.contiguous()


def constants(
    data: Tensor, tiles: Tiles, dropout_p: float, philox: Tensor | None
) -> dict[str, int | str | None]:
    """The compile-time arguments that all kernels have; `data` is `[..., H, D]`."""
    return {
        "H": data.shape[-2],
        "D": data.shape[-1],
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": tiles.block_d,
        "HEADS": tiles.heads,
        "THRESHOLD": 0 if philox is None else threshold(dropout_p),
        # fp32 matmuls run in fp32, not TF32
        "PRECISION": "ieee" if data.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "maxnreg": tiles.max_registers,
        "enable_fp_fusion": FP_FUSION,
    }
