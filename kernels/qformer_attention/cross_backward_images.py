"""Attention of query blocks to image tokens in Triton, backward, a program for each image and head.

A tile of rows is one block that reads the image, one use of it, and up to four dq stay in registers
while the program loops over the keys once: keys and values are read once and every weight is
computed once. With more uses it computes dq, then dk and dv. Scores are computed with keys as rows,
so that the products that sum over rows take weights from the registers that hold them.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from blip2fast.kernels.qformer_attention.tiles import kept, load_lse, load_rows, store_rows
from blip2fast.kernels.qformer_attention.uses import load_keys, store_key_gradients


@triton.jit
def _block_of(use, order_ptr, HAS_INDEX: tl.constexpr):
    """The block of a use, int64."""
    block = use
    if HAS_INDEX:
        block = tl.load(order_ptr + use)
    return block.to(tl.int64)


@triton.jit
def _load_products(
    q_ptr,
    dout_ptr,
    order_ptr,
    use,
    head,
    Q,
    stride_q_block,
    stride_q_query,
    stride_q_head,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    """A use's q and dout [BLOCK_M, BLOCK_D]."""
    block = _block_of(use, order_ptr, HAS_INDEX)
    query = tl.arange(0, BLOCK_M)
    there = query < Q
    q_at = block * stride_q_block + head.to(tl.int64) * stride_q_head
    q = load_rows(q_ptr + q_at, query.to(tl.int64) * stride_q_query, there, D, BLOCK_D)
    at = (block * Q * H + head) * D
    return q, load_rows(dout_ptr + at, query * H * D, there, D, BLOCK_D)


@triton.jit
def _load_use(
    q_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    row_sums_ptr,
    order_ptr,
    use,
    head,
    Q,
    stride_q_block,
    stride_q_query,
    stride_q_head,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    """Load a use's q and dout [BLOCK_M, BLOCK_D], and store its lse in base 2 and delta."""
    q, dout = _load_products(
        q_ptr,
        dout_ptr,
        order_ptr,
        use,
        head,
        Q,
        stride_q_block,
        stride_q_query,
        stride_q_head,
        H,
        D,
        BLOCK_M,
        BLOCK_D,
        HAS_INDEX,
    )
    block = _block_of(use, order_ptr, HAS_INDEX)
    query = tl.arange(0, BLOCK_M)
    there = query < Q
    first = block * Q * H + head
    at = query * H
    out = load_rows(out_ptr + first * D, at * D, there, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = load_lse(lse_ptr + first, at, there)
    sums_ptr = row_sums_ptr + (block * H + head) * 2 * BLOCK_M
    tl.store(sums_ptr + query, lse)
    tl.store(sums_ptr + BLOCK_M + query, delta)
    return q, dout


@triton.jit
def _add_use(
    k,
    v,
    visible,
    q,
    dout,
    dq,
    dk,
    dv,
    row_sums_ptr,
    order_ptr,
    philox_ptr,
    use,
    head,
    first_key,
    Q,
    scale,
    keep_scale,
    H: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    MASKED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a use by a tile of keys to dq [BLOCK_D, M], dk and dv [N, BLOCK_D], without scale."""
    BLOCK_M: tl.constexpr = q.shape[0]
    block = _block_of(use, order_ptr, HAS_INDEX)
    query = tl.arange(0, BLOCK_M)
    sums_ptr = row_sums_ptr + (block * H + head) * 2 * BLOCK_M
    lse = tl.load(sums_ptr + query)
    delta = tl.load(sums_ptr + BLOCK_M + query)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
    weights = tl.exp2(scores - lse[None, :])
    if MASKED:
        weights = tl.where(visible[:, None], weights, 0.0)
    d_weights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dropped = weights
    if THRESHOLD > 0:
        row = (block * Q).to(tl.int32) + query
        keep = tl.trans(kept(philox_ptr, head, row, first_key, k.shape[0], THRESHOLD))
        factor = tl.where(keep, keep_scale, 0.0)
        dropped = weights * factor
        d_weights = d_weights * factor
    d_scores = (weights * (d_weights - delta[None, :])).to(q.dtype)
    dv = tl.dot(dropped.to(q.dtype), dout, dv, input_precision=PRECISION)
    dk = tl.dot(d_scores, q, dk, input_precision=PRECISION)
    dq = tl.dot(tl.trans(k), d_scores, dq, input_precision=PRECISION)
    return dq, dk, dv


@triton.jit
def _store_dq(
    dq_ptr,
    dq,
    order_ptr,
    use,
    head,
    Q,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    """Store a use's dq, given transposed and without scale, [BLOCK_D, M]."""
    query = tl.arange(0, dq.shape[1])
    first = _block_of(use, order_ptr, HAS_INDEX) * Q * H + head
    values = tl.trans(dq * scale)
    store_rows(dq_ptr + first * D, query * H * D, values, query < Q, D, dq.shape[0])


@triton.jit
def _image_gradients(
    q_ptr,
    kv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    row_sums_ptr,
    order_ptr,
    key_mask_ptr,
    philox_ptr,
    dq_ptr,
    dkv_ptr,
    image,
    first,
    head,
    Q,
    S,
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
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    USES: tl.constexpr,
):
    """The gradients of an image that `USES` blocks read, from `first` on in their order."""
    q0, dout0 = _load_use(
        q_ptr,
        dout_ptr,
        out_ptr,
        lse_ptr,
        row_sums_ptr,
        order_ptr,
        first,
        head,
        Q,
        stride_q_block,
        stride_q_query,
        stride_q_head,
        H,
        D,
        BLOCK_M,
        BLOCK_D,
        HAS_INDEX,
    )
    dq0 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    if USES > 1:
        q1, dout1 = _load_use(
            q_ptr,
            dout_ptr,
            out_ptr,
            lse_ptr,
            row_sums_ptr,
            order_ptr,
            first + 1,
            head,
            Q,
            stride_q_block,
            stride_q_query,
            stride_q_head,
            H,
            D,
            BLOCK_M,
            BLOCK_D,
            HAS_INDEX,
        )
        dq1 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    if USES > 2:
        q2, dout2 = _load_use(
            q_ptr,
            dout_ptr,
            out_ptr,
            lse_ptr,
            row_sums_ptr,
            order_ptr,
            first + 2,
            head,
            Q,
            stride_q_block,
            stride_q_query,
            stride_q_head,
            H,
            D,
            BLOCK_M,
            BLOCK_D,
            HAS_INDEX,
        )
        dq2 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    if USES > 3:
        q3, dout3 = _load_use(
            q_ptr,
            dout_ptr,
            out_ptr,
            lse_ptr,
            row_sums_ptr,
            order_ptr,
            first + 3,
            head,
            Q,
            stride_q_block,
            stride_q_query,
            stride_q_head,
            H,
            D,
            BLOCK_M,
            BLOCK_D,
            HAS_INDEX,
        )
        dq3 = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    # what another thread stored is loaded below
    tl.debug_barrier()
    end_tile = S // BLOCK_N if FULL else 0
    # first, because its products would keep q and dout in registers throughout the loop
    if TAIL > 0:
        tail_c0 = end_tile * BLOCK_N
        tail_start = tl.where(tail_c0 < S, first, 0)
        tail_k, tail_v, tail_there = load_keys(
            kv_ptr,
            key_mask_ptr,
            image,
            tail_c0,
            head,
            S,
            stride_image,
            stride_token,
            stride_kv,
            stride_head,
            D,
            TAIL,
            BLOCK_D,
            HAS_MASK,
            False,
        )
        tail_dk = tl.zeros([TAIL, BLOCK_D], tl.float32)
        tail_dv = tl.zeros([TAIL, BLOCK_D], tl.float32)
        dq0, tail_dk, tail_dv = _add_use(
            tail_k,
            tail_v,
            tail_there,
            q0,
            dout0,
            dq0,
            tail_dk,
            tail_dv,
            row_sums_ptr,
            order_ptr,
            philox_ptr,
            tail_start,
            head,
            tail_c0,
            Q,
            scale,
            keep_scale,
            H,
            HAS_INDEX,
            True,
            THRESHOLD,
            PRECISION,
        )
        if USES > 1:
            dq1, tail_dk, tail_dv = _add_use(
                tail_k,
                tail_v,
                tail_there,
                q1,
                dout1,
                dq1,
                tail_dk,
                tail_dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                tail_start + 1,
                head,
                tail_c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                True,
                THRESHOLD,
                PRECISION,
            )
        if USES > 2:
            dq2, tail_dk, tail_dv = _add_use(
                tail_k,
                tail_v,
                tail_there,
                q2,
                dout2,
                dq2,
                tail_dk,
                tail_dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                tail_start + 2,
                head,
                tail_c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                True,
                THRESHOLD,
                PRECISION,
            )
        if USES > 3:
            dq3, tail_dk, tail_dv = _add_use(
                tail_k,
                tail_v,
                tail_there,
                q3,
                dout3,
                dq3,
                tail_dk,
                tail_dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                tail_start + 3,
                head,
                tail_c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                True,
                THRESHOLD,
                PRECISION,
            )
        store_key_gradients(
            dkv_ptr, image, tail_c0, head, S, tail_dk * scale, tail_dv, H, D, BLOCK_D
        )
    for i in tl.range(0, end_tile):
        c0 = i * BLOCK_N
        # always `first`, but the compiler cannot tell: what is loaded again needs no registers
        start = tl.where(c0 < S, first, 0)
        k, v, there = load_keys(
            kv_ptr,
            key_mask_ptr,
            image,
            c0,
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
            True,
        )
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dq0, dk, dv = _add_use(
            k,
            v,
            there,
            q0,
            dout0,
            dq0,
            dk,
            dv,
            row_sums_ptr,
            order_ptr,
            philox_ptr,
            start,
            head,
            c0,
            Q,
            scale,
            keep_scale,
            H,
            HAS_INDEX,
            HAS_MASK,
            THRESHOLD,
            PRECISION,
        )
        if USES > 1:
            dq1, dk, dv = _add_use(
                k,
                v,
                there,
                q1,
                dout1,
                dq1,
                dk,
                dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                start + 1,
                head,
                c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                HAS_MASK,
                THRESHOLD,
                PRECISION,
            )
        if USES > 2:
            dq2, dk, dv = _add_use(
                k,
                v,
                there,
                q2,
                dout2,
                dq2,
                dk,
                dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                start + 2,
                head,
                c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                HAS_MASK,
                THRESHOLD,
                PRECISION,
            )
        if USES > 3:
            dq3, dk, dv = _add_use(
                k,
                v,
                there,
                q3,
                dout3,
                dq3,
                dk,
                dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                start + 3,
                head,
                c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                HAS_MASK,
                THRESHOLD,
                PRECISION,
            )
        store_key_gradients(dkv_ptr, image, c0, head, S, dk * scale, dv, H, D, BLOCK_D)
    start = tl.where(S > 0, first, 0)
    _store_dq(dq_ptr, dq0, order_ptr, start, head, Q, scale, H, D, HAS_INDEX)
    if USES > 1:
        _store_dq(dq_ptr, dq1, order_ptr, start + 1, head, Q, scale, H, D, HAS_INDEX)
    if USES > 2:
        _store_dq(dq_ptr, dq2, order_ptr, start + 2, head, Q, scale, H, D, HAS_INDEX)
    if USES > 3:
        _store_dq(dq_ptr, dq3, order_ptr, start + 3, head, Q, scale, H, D, HAS_INDEX)


@triton.jit
def _gradients_of_many_uses(
    q_ptr,
    kv_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    row_sums_ptr,
    order_ptr,
    key_mask_ptr,
    philox_ptr,
    dq_ptr,
    dkv_ptr,
    image,
    first,
    uses,
    head,
    Q,
    S,
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
    """The gradients of an image that any number of blocks read: dq of each, then dk and dv."""
    for use in tl.range(first, first + uses):
        q, dout = _load_use(
            q_ptr,
            dout_ptr,
            out_ptr,
            lse_ptr,
            row_sums_ptr,
            order_ptr,
            use,
            head,
            Q,
            stride_q_block,
            stride_q_query,
            stride_q_head,
            H,
            D,
            BLOCK_M,
            BLOCK_D,
            HAS_INDEX,
        )
        # what another thread stored is loaded below
        tl.debug_barrier()
        dq = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        for c0 in tl.range(0, S, BLOCK_N):
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            k, v, there = load_keys(
                kv_ptr,
                key_mask_ptr,
                image,
                c0,
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
            dq, _, _ = _add_use(
                k,
                v,
                there,
                q,
                dout,
                dq,
                dk,
                dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                use,
                head,
                c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                True,
                THRESHOLD,
                PRECISION,
            )
        _store_dq(dq_ptr, dq, order_ptr, use, head, Q, scale, H, D, HAS_INDEX)
    for c0 in tl.range(0, S, BLOCK_N):
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        k, v, there = load_keys(
            kv_ptr,
            key_mask_ptr,
            image,
            c0,
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
        for use in tl.range(first, first + uses):
            dq = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
            q, dout = _load_products(
                q_ptr,
                dout_ptr,
                order_ptr,
                use,
                head,
                Q,
                stride_q_block,
                stride_q_query,
                stride_q_head,
                H,
                D,
                BLOCK_M,
                BLOCK_D,
                HAS_INDEX,
            )
            _, dk, dv = _add_use(
                k,
                v,
                there,
                q,
                dout,
                dq,
                dk,
                dv,
                row_sums_ptr,
                order_ptr,
                philox_ptr,
                use,
                head,
                c0,
                Q,
                scale,
                keep_scale,
                H,
                HAS_INDEX,
                True,
                THRESHOLD,
                PRECISION,
            )
        store_key_gradients(dkv_ptr, image, c0, head, S, dk * scale, dv, H, D, BLOCK_D)


@triton.jit(do_not_specialize=["Q", "S", "below", "above"])
def _qformer_cross_attention_bwd_image_kernel(
    q_ptr,
    kv_ptr,
    dout_ptr,  # [N, Q, H, D]
    out_ptr,  # [N, Q, H, D]
    lse_ptr,  # [N, Q, H]
    row_sums_ptr,  # [N, H, 2, BLOCK_M], written: lse in base 2, and delta
    order_ptr,
    offsets_ptr,
    key_mask_ptr,
    philox_ptr,
    dq_ptr,  # [N, Q, H, D]
    dkv_ptr,  # [B, S, 2, H, D]
    Q,
    S,
    below,
    above,
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
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    USES: tl.constexpr,
):
    """An image with more than `below` rows and at most `above`.

    Of `USES` blocks at most every dq stays in registers.
    """
    program = tl.program_id(0)
    head, image = program % H, program // H
    first, uses = image, 1
    if HAS_INDEX:
        first = tl.load(offsets_ptr + image)
        uses = tl.load(offsets_ptr + image + 1) - first
        if (uses * Q <= below) | (uses * Q > above):
            return
    if not HAS_INDEX:
        _image_gradients(
            q_ptr,
            kv_ptr,
            dout_ptr,
            out_ptr,
            lse_ptr,
            row_sums_ptr,
            order_ptr,
            key_mask_ptr,
            philox_ptr,
            dq_ptr,
            dkv_ptr,
            image,
            first,
            head,
            Q,
            S,
            stride_q_block,
            stride_q_query,
            stride_q_head,
            stride_image,
            stride_token,
            stride_kv,
            stride_head,
            scale,
            keep_scale,
            H,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            FULL,
            TAIL,
            HAS_INDEX,
            HAS_MASK,
            THRESHOLD,
            PRECISION,
            1,
        )
    else:
        if USES == 1:
            if uses == 1:
                _image_gradients(
                    q_ptr,
                    kv_ptr,
                    dout_ptr,
                    out_ptr,
                    lse_ptr,
                    row_sums_ptr,
                    order_ptr,
                    key_mask_ptr,
                    philox_ptr,
                    dq_ptr,
                    dkv_ptr,
                    image,
                    first,
                    head,
                    Q,
                    S,
                    stride_q_block,
                    stride_q_query,
                    stride_q_head,
                    stride_image,
                    stride_token,
                    stride_kv,
                    stride_head,
                    scale,
                    keep_scale,
                    H,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    FULL,
                    TAIL,
                    HAS_INDEX,
                    HAS_MASK,
                    THRESHOLD,
                    PRECISION,
                    1,
                )
        if USES >= 2:
            if uses == 2:
                _image_gradients(
                    q_ptr,
                    kv_ptr,
                    dout_ptr,
                    out_ptr,
                    lse_ptr,
                    row_sums_ptr,
                    order_ptr,
                    key_mask_ptr,
                    philox_ptr,
                    dq_ptr,
                    dkv_ptr,
                    image,
                    first,
                    head,
                    Q,
                    S,
                    stride_q_block,
                    stride_q_query,
                    stride_q_head,
                    stride_image,
                    stride_token,
                    stride_kv,
                    stride_head,
                    scale,
                    keep_scale,
                    H,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    FULL,
                    TAIL,
                    HAS_INDEX,
                    HAS_MASK,
                    THRESHOLD,
                    PRECISION,
                    2,
                )
        if USES >= 3:
            if uses == 3:
                _image_gradients(
                    q_ptr,
                    kv_ptr,
                    dout_ptr,
                    out_ptr,
                    lse_ptr,
                    row_sums_ptr,
                    order_ptr,
                    key_mask_ptr,
                    philox_ptr,
                    dq_ptr,
                    dkv_ptr,
                    image,
                    first,
                    head,
                    Q,
                    S,
                    stride_q_block,
                    stride_q_query,
                    stride_q_head,
                    stride_image,
                    stride_token,
                    stride_kv,
                    stride_head,
                    scale,
                    keep_scale,
                    H,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    FULL,
                    TAIL,
                    HAS_INDEX,
                    HAS_MASK,
                    THRESHOLD,
                    PRECISION,
                    3,
                )
        if USES >= 4:
            if uses == 4:
                _image_gradients(
                    q_ptr,
                    kv_ptr,
                    dout_ptr,
                    out_ptr,
                    lse_ptr,
                    row_sums_ptr,
                    order_ptr,
                    key_mask_ptr,
                    philox_ptr,
                    dq_ptr,
                    dkv_ptr,
                    image,
                    first,
                    head,
                    Q,
                    S,
                    stride_q_block,
                    stride_q_query,
                    stride_q_head,
                    stride_image,
                    stride_token,
                    stride_kv,
                    stride_head,
                    scale,
                    keep_scale,
                    H,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    FULL,
                    TAIL,
                    HAS_INDEX,
                    HAS_MASK,
                    THRESHOLD,
                    PRECISION,
                    4,
                )
        # one use is not compiled for where several are: few images have it
        if (uses == 0) | (uses > USES) | ((uses == 1) & (USES > 1)):
            _gradients_of_many_uses(
                q_ptr,
                kv_ptr,
                dout_ptr,
                out_ptr,
                lse_ptr,
                row_sums_ptr,
                order_ptr,
                key_mask_ptr,
                philox_ptr,
                dq_ptr,
                dkv_ptr,
                image,
                first,
                uses,
                head,
                Q,
                S,
                stride_q_block,
                stride_q_query,
                stride_q_head,
                stride_image,
                stride_token,
                stride_kv,
                stride_head,
                scale,
                keep_scale,
                H,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                HAS_INDEX,
                HAS_MASK,
                THRESHOLD,
                PRECISION,
            )
