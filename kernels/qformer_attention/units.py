"""Triton functions that find the rows and keys of a unit of self-attention.

A unit is a block (its queries, and the BIDIRECTIONAL text that they see) or a text of another kind.
Its rows and keys are numbered by place: queries 0..Q-1, text from Q on. The place of a key is its
column in the dropout mask, and `c <= r or c < Q` is the causal mask.
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
    order_ptr,
    offsets_ptr,
    N,
    Q,
    HAS_BIDIRECTIONAL: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Find a unit: units 0..N-1 are blocks, the rest are texts.

    With `JOINED`, the first text that sees a block belongs to it as a BIDIRECTIONAL one would, but
    the block's queries do not see it: the unit's kind is MULTIMODAL_CAUSAL.

    Returns:
        `(block, text_row, first_row, first_key, end, kind)`: the block whose queries are seen,
        the text's first row in the token buffer, the first place that is a row, the first that is
        a key, and the end of both; a block's kind is BIDIRECTIONAL, code 1, unless joined. A text
        that belongs to a block has no rows of its own.
    """
    is_text = unit >= N
    text = unit - N
    if HAS_BIDIRECTIONAL:
        seen = tl.load(block_text_ptr + unit, mask=unit < N, other=-1)
        text = tl.where(is_text, text, seen)
    elif JOINED:
        begin = tl.load(offsets_ptr + unit, mask=unit < N, other=0)
        stop = tl.load(offsets_ptr + unit + 1, mask=unit < N, other=0)
        joined = tl.load(order_ptr + begin, mask=begin < stop, other=-1)
        text = tl.where(is_text, text, joined)
    else:
        text = tl.where(is_text, text, -1)
    text_row, length = find_text(text, cu_seqlens_ptr, N * Q)
    kind = tl.load(kinds_ptr + text, mask=is_text, other=1)
    block = tl.where(is_text, tl.load(blocks_ptr + text, mask=is_text, other=0), unit)
    end = Q + length
    first_row = tl.where(is_text, Q, 0)
    if HAS_BIDIRECTIONAL:
        first_row = tl.where(is_text & (kind == 1), end, first_row)
    elif JOINED:
        kind = tl.where(is_text, kind, 2)
        sees = is_text & (kind == 2)
        first_reader = tl.load(offsets_ptr + block, mask=sees, other=0)
        first_reader = tl.load(order_ptr + first_reader, mask=sees, other=-1)
        first_row = tl.where(sees & (first_reader == text), end, first_row)
    first_key = tl.where(kind == 0, Q, 0)
    return block, text_row, first_row, first_key, end, kind


@triton.jit
def row_of(place, block, text_row, Q):
    """The row of the token buffer at each place, int64."""
    in_block = block.to(tl.int64) * Q + place
    return tl.where(place < Q, in_block, text_row.to(tl.int64) + place - Q)


@triton.jit
def visible_pairs(place, key, key_there, Q, causal):
    """Which places see which keys, [M, N]; `causal` is a scalar."""
    seen = (key[None, :] <= place[:, None]) | (key < Q)[None, :] | (causal == 0)
    return key_there[None, :] & seen
