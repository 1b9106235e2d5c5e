"""Triton functions that find the rows and keys of a unit of self-attention.

A unit is a block (its queries, and the BIDIRECTIONAL text that they see) or a text of another kind.
Its rows and keys are numbered by place: queries 0..Q-1, text from Q on. The place of a key is its
column in the dropout mask, and `c <= r` is the causal mask.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_text(text, cu_seqlens_ptr, first_text_row):
    """Row of the token buffer where a text starts, and its length; 0 rows where `text` is -1."""
    there = text >= 0
    start = tl.load(cu_seqlens_ptr + text, mask=there, other=0)
    end = tl.load(cu_seqlens_ptr + text + 1, mask=there, other=0)
    return first_text_row + start, end - start


@triton.jit
def find_unit(
    unit,
    cu_seqlens_ptr,
    kinds_ptr,
    blocks_ptr,
    block_text_ptr,
    N,
    Q,
    HAS_BIDIRECTIONAL: tl.constexpr,
):
    """Find a unit: units 0..N-1 are blocks, the rest are texts.

    Returns:
        `(block, text_row, first_row, first_key, end, kind)`: the block whose queries are seen,
        the text's first row in the token buffer, the first place that is a row, the first that is
        a key, and the end of both; a block's kind is BIDIRECTIONAL, code 1. A BIDIRECTIONAL text
        has no rows of its own: they belong to its block.
    """
    is_text = unit >= N
    text = unit - N
    if HAS_BIDIRECTIONAL:
        seen = tl.load(block_text_ptr + unit, mask=unit < N, other=-1)
        text = tl.where(is_text, text, seen)
    else:
        text = tl.where(is_text, text, -1)
    text_row, length = find_text(text, cu_seqlens_ptr, N * Q)
    kind = tl.load(kinds_ptr + text, mask=is_text, other=1)
    block = tl.where(is_text, tl.load(blocks_ptr + text, mask=is_text, other=0), unit)
    end = Q + length
    first_row = tl.where(is_text, Q, 0)
    if HAS_BIDIRECTIONAL:
        first_row = tl.where(is_text & (kind == 1), end, first_row)
    first_key = tl.where(kind == 0, Q, 0)
    return block, text_row, first_row, first_key, end, kind


@triton.jit
def row_of(place, block, text_row, Q):
    """The row of the token buffer at each place, int64."""
    in_block = block.to(tl.int64) * Q + place
    return tl.where(place < Q, in_block, text_row.to(tl.int64) + place - Q)
