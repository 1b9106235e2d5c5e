"""Attention of query blocks to image tokens in Triton, backward: no atomics, sums in a fixed order.

If all the rows that read an image fit one tile, one program holds them and loops over the keys:
keys and values are read once, every weight is computed once. For an image with more readers, one
kernel owns chunks of rows (dq), and a second owns tiles of keys and sums over the readers in order.
`cross_backward_images.py` is another kernel for images with few readers.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.launch import dense_width
from blip2fast.kernels.qformer_attention.config import (
    CrossTiles,
    cross_backward_tiles,
    splits,
)
from blip2fast.kernels.qformer_attention.cross_backward_images import (
    _qformer_cross_attention_bwd_image_kernel,
)
from blip2fast.kernels.qformer_attention.cross_forward import (
    chunks,
    key_strides,
    query_strides,
    unpack,
)
from blip2fast.kernels.qformer_attention.forward import constants
from blip2fast.kernels.qformer_attention.layout import KVIndex
from blip2fast.kernels.qformer_attention.tiles import (
    gradient_tile,
    load_lse,
    load_rows,
    store_rows,
)
from blip2fast.kernels.qformer_attention.uses import (
    find_chunk,
    gradients_of_keys,
    load_keys,
    place_rows,
    rows_of_image,
    store_key_gradients,
)


@triton.jit(do_not_specialize=["N", "B", "Q", "S", "below", "above", "tiles_of_split"])
def _qformer_cross_attention_bwd_kernel(
    q_ptr,
    kv_ptr,
    dout_ptr,  # [N, Q, H, D]
    out_ptr,  # [N, Q, H, D]
    lse_ptr,  # [N, Q, H]
    delta_ptr,  # [N, Q, H], written unless OWN_KEYS
    index_ptr,
    order_ptr,
    offsets_ptr,
    key_mask_ptr,
    philox_ptr,
    dq_ptr,  # [splits, N, Q, H, D]
    dkv_ptr,  # [B, S, 2, H, D], written if OWN_KEYS
    N,
    B,
    Q,
    S,
    below,
    above,
    tiles_of_split,
    stride_q_block,
    stride_q_query,
    stride_q_head,
    stride_image,
    stride_token,
    stride_kv,
    stride_head,
    scale,
    keep_scale,  # 1 / (1 - p)
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    OWN_KEYS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With OWN_KEYS: one program per image with more than `below` and at most `above` rows.

    Otherwise: one program per chunk of images with more than `above` rows.
    """
    program = tl.program_id(0)
    split = tl.program_id(1)
    first_head = program % (H // HEADS) * HEADS
    part = program // (H // HEADS)
    if OWN_KEYS:
        image = part
        first, end = rows_of_image(image, offsets_ptr, Q, HAS_INDEX)
        if (end - first <= below) | (end - first > above):
            return
    else:
        image, first, end = find_chunk(
            part, index_ptr, order_ptr, offsets_ptr, B, N, Q, BLOCK_M, HAS_INDEX, INTERLEAVED
        )
        begin, _ = rows_of_image(image, offsets_ptr, Q, HAS_INDEX)
        if (first >= end) | (end - begin <= above):
            return
    there, block, query, row = place_rows(first, end, order_ptr, Q, BLOCK_M, HAS_INDEX)
    first_tile = split * tiles_of_split
    if SPLIT:
        end_tile = tl.minimum(first_tile + tiles_of_split, tl.cdiv(S, BLOCK_N))
    else:
        end_tile = S // BLOCK_N
    for h in tl.range(0, HEADS):
        head = first_head + h
        q_at = block * stride_q_block + query * stride_q_query + head * stride_q_head
        q = load_rows(q_ptr, q_at, there, D, BLOCK_D)
        at = row * H + head
        dout = load_rows(dout_ptr, at * D, there, D, BLOCK_D)
        out = load_rows(out_ptr, at * D, there, D, BLOCK_D)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        # every split computes the same value
        if not OWN_KEYS and split == 0:
            tl.store(delta_ptr + at, delta, mask=there)
        lse = load_lse(lse_ptr, at, there)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if FULL:
            for tile in tl.range(first_tile, end_tile):
                dq = gradients_of_keys(
                    q,
                    dout,
                    lse,
                    delta,
                    dq,
                    row,
                    kv_ptr,
                    key_mask_ptr,
                    philox_ptr,
                    dkv_ptr,
                    image,
                    tile * BLOCK_N,
                    head,
                    S,
                    stride_image,
                    stride_token,
                    stride_kv,
                    stride_head,
                    scale,
                    keep_scale,
                    H,
                    D,
                    BLOCK_N,
                    BLOCK_D,
                    HAS_MASK,
                    not SPLIT,
                    OWN_KEYS,
                    THRESHOLD,
                    PRECISION,
                )
        if TAIL > 0:
            dq = gradients_of_keys(
                q,
                dout,
                lse,
                delta,
                dq,
                row,
                kv_ptr,
                key_mask_ptr,
                philox_ptr,
                dkv_ptr,
                image,
                end_tile * BLOCK_N,
                head,
                S,
                stride_image,
                stride_token,
                stride_kv,
                stride_head,
                scale,
                keep_scale,
                H,
                D,
                TAIL,
                BLOCK_D,
                HAS_MASK,
                False,
                OWN_KEYS,
                THRESHOLD,
                PRECISION,
            )
        dq_at = (split.to(tl.int64) * N * Q + row) * H + head
        store_rows(dq_ptr, dq_at * D, dq * scale, there, D, BLOCK_D)


@triton.jit(do_not_specialize=["Q", "S", "above"])
def _qformer_cross_attention_bwd_dkv_kernel(
    q_ptr,
    kv_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    order_ptr,
    offsets_ptr,
    key_mask_ptr,
    philox_ptr,
    dkv_ptr,
    Q,
    S,
    above,
    stride_q_block,
    stride_q_query,
    stride_q_head,
    stride_image,
    stride_token,
    stride_kv,
    stride_head,
    scale,
    keep_scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of keys of an image with more than `above` rows."""
    program = tl.program_id(0)
    head, image = program % H, program // H
    first_key = tl.program_id(1) * BLOCK_N
    first, end = rows_of_image(image, offsets_ptr, Q, HAS_INDEX)
    if end - first <= above:
        return
    k, v, key_there = load_keys(
        kv_ptr,
        key_mask_ptr,
        image,
        first_key,
        head,
        S,
        stride_image,
        stride_token,
        stride_kv,
        stride_head,
        D,
        BLOCK_N,
        BLOCK_D,
        HAS_MASK,
        False,
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for position in tl.range(first, end, BLOCK_M):
        there, block, query, row = place_rows(position, end, order_ptr, Q, BLOCK_M, HAS_INDEX)
        q_at = block * stride_q_block + query * stride_q_query + head * stride_q_head
        q = load_rows(q_ptr, q_at, there, D, BLOCK_D)
        at = row * H + head
        dout = load_rows(dout_ptr, at * D, there, D, BLOCK_D)
        dropped, d_scores = gradient_tile(
            q,
            k,
            v,
            dout,
            load_lse(lse_ptr, at, there),
            tl.load(delta_ptr + at, mask=there, other=0.0),
            key_there[None, :],
            philox_ptr,
            head,
            row,
            first_key,
            scale,
            keep_scale,
            THRESHOLD,
            PRECISION,
        )
        dv = tl.dot(tl.trans(dropped), dout, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(d_scores), q, dk, input_precision=PRECISION)
    store_key_gradients(dkv_ptr, image, first_key, head, S, dk * scale, dv, H, D, BLOCK_D)


def cross_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    index: KVIndex | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    philox: Tensor | None,
    tiles: tuple[CrossTiles, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `cross_forward`'s `q` and `kv`.

    Args:
        dout: `[N, Q, H, D]`, the gradient of `out`.
        q, kv, index, key_mask, scale, dropout_p, philox: As passed to `cross_forward`.
        out, lse: As returned by it.
        tiles: Override those of `config.py`: first for images whose rows fit one tile, in order of
            increasing rows, and last for all other images; with the same `block_n` if keys are
            split, which they are not where a tile has `uses`.

    Returns:
        `dq`, of the shape of `q`, and `dkv [B, S, 2, H, D]`, contiguous.
    """
    N, Q, H, D = out.shape
    B, S = kv.shape[:2]
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    if out.numel() == 0 or dkv.numel() == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), dkv.zero_()
    *owners, chunked = tiles or cross_backward_tiles(q, kv, N)
    owned = [(tiles, rows_owned(tiles, Q)) for tiles in owners]
    if rows_owned(chunked, Q) and chunked.uses:
        # its program takes any number of rows
        owned.append((chunked, N * Q))
    if index is None:
        # every image has Q rows
        owned = [(tiles, rows) for tiles, rows in owned if rows >= Q][:1]
    above = owned[-1][1] if owned else -1
    q, kv, dout = dense_width(q), dense_width(kv), dout.contiguous()
    row_programs = chunks(N, B, Q, chunked.block_m, index) * (H // chunked.heads)
    first = owned[0][0] if owned else chunked
    programs = B * (H // first.heads) if owned else row_programs
    count, tiles_of_split = splits(programs, triton.cdiv(S, first.block_n), first.full)
    if any(owner.uses for owner, _ in owned):
        count = 1
    shared = q.shape[0] != N
    # parts of dq, and contributions to shared queries, are summed before rounding
    dq_type = torch.float32 if count > 1 or shared else q.dtype
    dq = torch.empty(count, N, Q, H, D, dtype=dq_type, device=q.device)
    statistics = (out.contiguous(), lse.contiguous(), torch.empty_like(lse))
    uses = unpack(index, key_mask)
    strides = (*query_strides(q, N), *key_strides(kv))
    factors = (scale, 1.0 / (1.0 - dropout_p))
    has = {"HAS_INDEX": index is not None, "HAS_MASK": key_mask is not None}

    def launch(tiles: CrossTiles, programs: int, below: int, above: int, own_keys: bool) -> None:
        _qformer_cross_attention_bwd_kernel[(programs, count)](
            *(q, kv, dout, *statistics, *uses, philox, dq, dkv),
            *(N, B, Q, S, below, above, tiles_of_split, *strides, *factors),
            FULL=tiles.full,
            TAIL=0 if count > 1 else tiles.tail,
            SPLIT=count > 1,
            OWN_KEYS=own_keys,
            INTERLEAVED=tiles.interleaved,
            **has,
            **constants(q, tiles, dropout_p, philox),
        )

    def launch_images(tiles: CrossTiles, below: int, above: int) -> None:
        sums = torch.empty(N, H, 2, tiles.block_m, dtype=torch.float32, device=q.device)
        options = constants(q, tiles, dropout_p, philox)
        del options["HEADS"]
        _qformer_cross_attention_bwd_image_kernel[(B * H,)](
            *(q, kv, dout, *statistics[:2], sums, *uses[1:], philox, dq, dkv),
            *(Q, S, below, above, *strides, *factors),
            FULL=tiles.full,
            TAIL=tiles.tail,
            USES=1 if index is None else tiles.uses,
            **has,
            **options,
        )

    with torch.cuda.device_of(q):
        below = -1
        for owner, rows in owned:
            # no image has more rows than there are
            if below < N * Q:
                if owner.uses:
                    launch_images(owner, below, rows)
                else:
                    launch(owner, B * (H // owner.heads), below, rows, True)
            below = rows
        if above < N * Q and not (owned and index is None):
            launch(chunked, row_programs, -1, above, False)
            options = constants(q, chunked, dropout_p, philox)
            del options["HEADS"]
            _qformer_cross_attention_bwd_dkv_kernel[(B * H, triton.cdiv(S, chunked.block_n))](
                *(q, kv, dout, *statistics[1:], *uses[1:], philox, dkv),
                *(Q, S, above, *strides, *factors),
                **has,
                **options,
            )
    dq = dq.sum((0, 1), keepdim=True)[0] if shared else dq.sum(0) if count > 1 else dq[0]
    return dq.to(q.dtype), dkv


def rows_owned(tiles: CrossTiles, Q: int) -> int:
    """The most rows that an image has whose owner these tiles are for; 0 or more."""
    if tiles.uses:
        # one block a tile of rows
        return tiles.uses * Q if tiles.block_m >= Q else 0
    return tiles.block_m
