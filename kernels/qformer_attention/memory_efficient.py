"""The backend `xformers`: its memory-efficient attention under its own block-diagonal masks.

Those masks are built from lengths on the host, which needs a sync. Shapes: R rows of the
token buffer, N query blocks, Q queries, B images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip2fast.kernels.qformer_attention.layout import KIND_CODES, AttentionLayout, MaskKind


def self_attention(qkv: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """`[R, H, D]` from `qkv` `[R, 3, H, D]`.

    Segments that fully see themselves take one call; a causal text sees the block's queries, then
    itself, which is a causal mask aligned to the bottom right corner.
    """
    # imported on first use: xformers is optional
    from xformers.ops.fmha.attn_bias import (
        BlockDiagonalCausalFromBottomRightMask,
        BlockDiagonalMask,
    )

    whole, causal = _segments(layout)
    rows, outputs = [], []
    for segments, mask in (
        ([(keys, keys) for keys in whole], BlockDiagonalMask),
        (causal, BlockDiagonalCausalFromBottomRightMask),
    ):
        if not segments:
            continue
        asking, asked = ([part[i] for part in segments] for i in range(2))
        q_rows, k_rows = torch.cat(asking).to(qkv.device), torch.cat(asked).to(qkv.device)
        bias = mask.from_seqlens([len(x) for x in asking], [len(x) for x in asked])
        k, v = qkv[:, 1:][k_rows].unbind(1)
        rows.append(q_rows)
        outputs.append(attend(qkv[:, 0][q_rows][None], k[None], v[None], bias, scale)[0])
    if not rows:
        return qkv[:, 0]
    return torch.cat(outputs)[torch.cat(rows).argsort()]


def cross_attention(q: Tensor, kv: Tensor, kv_index: Tensor | None, scale: float) -> Tensor:
    """`[N, Q, H, D]` from `q` `[N or 1, Q, H, D]` and `kv` `[B, S, 2, H, D]`."""
    read = kv if kv_index is None else kv[kv_index.long()]
    k, v = read.unbind(2)
    return attend(q.expand(len(read), -1, -1, -1), k, v, None, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float) -> Tensor:
    """xformers' attention of `[m, L, H, D]` to `[m, M, H, D]` under one of its masks."""
    from xformers.ops import memory_efficient_attention

    output: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    return output


def _segments(layout: AttentionLayout) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Segments of rows that all see each other; and rows and keys of each causal text."""
    N, Q = layout.num_blocks, layout.num_queries
    bounds, kinds = layout.cu_seqlens.tolist(), layout.kinds.tolist()
    blocks = layout.blocks.tolist()
    queries = [torch.arange(block * Q, (block + 1) * Q) for block in range(N)]
    whole, causal = [], []
    with_text = set()
    for text, kind in enumerate(kinds):
        rows = torch.arange(N * Q + bounds[text], N * Q + bounds[text + 1])
        if kind == KIND_CODES[MaskKind.UNIMODAL]:
            whole.append(rows)
        elif kind == KIND_CODES[MaskKind.BIDIRECTIONAL]:
            whole.append(torch.cat([queries[blocks[text]], rows]))
            with_text.add(blocks[text])
        else:
            causal.append((rows, torch.cat([queries[blocks[text]], rows])))
    whole += [rows for block, rows in enumerate(queries) if block not in with_text]
    return [rows for rows in whole if len(rows)], [part for part in causal if len(part[0])]
