"""The ITC sweep in Triton: matmul, max over queries and the statistics of both softmaxes, fused.

A program owns a block of texts and loops over its share of the images. The statistics of its texts
stay in registers; those of each image are written out once. `statistics.join` merges the parts in
a fixed order.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip2fast.kernels.itc import statistics
from blip2fast.kernels.itc.config import TritonConfig, forward_tiles
from blip2fast.kernels.itc.interface import (
    POSITIVE_COUNT,
    POSITIVE_SUM,
    Options,
    Pairs,
    Sweep,
    index_dtype,
)
from blip2fast.kernels.itc.tiles import (
    is_positive,
    load_images,
    load_texts,
    pair_noise,
    similarity_tile,
)
from blip2fast.kernels.launch import FP_FUSION, capability, dense_width


@triton.jit
def _itc_fwd_kernel(
    image_ptr,
    text_ptr,
    temp_ptr,
    row_ids_ptr,
    column_ids_ptr,
    philox_ptr,
    row_values_ptr,  # [text blocks, 6, M]
    row_index_ptr,  # [text blocks, 2, M]
    column_values_ptr,  # [shares, 6, N]
    column_index_ptr,  # [shares, 2, N]
    sim_ptr,
    arg_ptr,
    M,
    N,
    first_row,
    stride_image,
    stride_query,
    stride_text,
    blocks_per_share,
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SAMPLE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    text_block, share = tl.program_id(0), tl.program_id(1)
    j = text_block * BLOCK_T + tl.arange(0, BLOCK_T)
    text_there = j < N
    inv_temp = 1.0 / tl.load(temp_ptr)
    texts = load_texts(text_ptr, j, 0, N, stride_text, D, BLOCK_D)

    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    top_at = tl.full([BLOCK_T], -1, tl.int32)
    key_top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    key_at = tl.full([BLOCK_T], -1, tl.int32)
    total = tl.zeros([BLOCK_T], tl.float32)  # of exp(x - top)
    x_sum = tl.zeros([BLOCK_T], tl.float32)
    positive_sum = tl.zeros([BLOCK_T], tl.float32)
    positive_count = tl.zeros([BLOCK_T], tl.float32)

    row_values = row_values_ptr + text_block.to(tl.int64) * 6 * M
    row_index = row_index_ptr + text_block.to(tl.int64) * 2 * M
    begin = share * blocks_per_share
    end = tl.minimum(begin + blocks_per_share, tl.cdiv(M, BLOCK_I))
    for block in tl.range(begin, end):
        first = block * BLOCK_I
        i = first + tl.arange(0, BLOCK_I)
        image_there = i < M
        images = load_images(
            image_ptr, first, 0, M, stride_image, stride_query, Q, D, BLOCK_I, BLOCK_Q, BLOCK_D
        )
        by_query = similarity_tile(
            texts,
            images,
            text_ptr,
            image_ptr,
            j,
            first,
            N,
            M,
            stride_text,
            stride_image,
            stride_query,
            Q,
            D,
            BLOCK_T,
            BLOCK_I,
            BLOCK_Q,
            BLOCK_D,
            PRECISION,
        )
        there = text_there[:, None] & image_there[None, :]
        if SAVE:
            sim, arg = tl.max(by_query, 2, return_indices=True, return_indices_tie_break_left=True)
            at = i.to(tl.int64)[None, :] * N + j[:, None]
            tl.store(sim_ptr + at, sim, mask=there)
            tl.store(arg_ptr + at, arg.to(tl.uint8), mask=there)
        else:
            sim = tl.max(by_query, 2)
        x = sim * inv_temp
        x_or_0 = tl.where(there, x, 0.0)
        x = tl.where(there, x, float("-inf"))

        # the images, over the texts of this block
        row_top, row_at = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        shift = tl.where(image_there, row_top, 0.0)
        row_lse = shift + tl.log(tl.sum(tl.exp(x - shift[None, :]), 0))
        tl.store(row_values + i, row_lse, mask=image_there)
        tl.store(row_values + M + i, tl.sum(x_or_0, 0), mask=image_there)
        tl.store(row_values + 4 * M + i, row_top, mask=image_there)
        tl.store(row_index + i, text_block * BLOCK_T + row_at, mask=image_there)

        # the texts, over the images of this block
        block_top, block_at = tl.max(x, 1, return_indices=True, return_indices_tie_break_left=True)
        top_at = tl.where(block_top > top, first + first_row + block_at, top_at)
        new_top = tl.maximum(top, block_top)
        shift = tl.where(text_there, new_top, 0.0)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        top = new_top
        x_sum += tl.sum(x_or_0, 1)

        positive = is_positive(i, j, first_row, row_ids_ptr, column_ids_ptr, M, N, HAS_IDS)
        if HAS_IDS:
            belongs = tl.where(positive & there, 1.0, 0.0)
            tl.store(row_values + 2 * M + i, tl.sum(belongs * x_or_0, 0), mask=image_there)
            tl.store(row_values + 3 * M + i, tl.sum(belongs, 0), mask=image_there)
            positive_sum += tl.sum(belongs * x_or_0, 1)
            positive_count += tl.sum(belongs, 1)
        else:
            # at most one: the kernel finds it per text, and the host copies it to the images
            positive_sum += tl.sum(tl.where(positive, x_or_0, 0.0), 1)

        if SAMPLE:
            by_row, by_column = pair_noise(
                philox_ptr, text_block * BLOCK_T, i, first_row, BLOCK_T, BLOCK_I
            )
            row_key, row_at = tl.max(
                tl.where(positive, float("-inf"), x + by_row),
                0,
                return_indices=True,
                return_indices_tie_break_left=True,
            )
            row_at = tl.where(row_key > float("-inf"), text_block * BLOCK_T + row_at, -1)
            tl.store(row_values + 5 * M + i, row_key, mask=image_there)
            tl.store(row_index + M + i, row_at, mask=image_there)
            block_key, block_at = tl.max(
                tl.where(positive, float("-inf"), x + by_column),
                1,
                return_indices=True,
                return_indices_tie_break_left=True,
            )
            key_at = tl.where(block_key > key_top, first + first_row + block_at, key_at)
            key_top = tl.maximum(key_top, block_key)

    values = column_values_ptr + share.to(tl.int64) * 6 * N + j
    tl.store(values, top + tl.log(total), mask=text_there)
    tl.store(values + N, x_sum, mask=text_there)
    tl.store(values + 2 * N, positive_sum, mask=text_there)
    if HAS_IDS:
        tl.store(values + 3 * N, positive_count, mask=text_there)
    tl.store(values + 4 * N, top, mask=text_there)
    tl.store(values + 5 * N, key_top, mask=text_there)
    index = column_index_ptr + share.to(tl.int64) * 2 * N + j
    tl.store(index, top_at, mask=text_there)
    tl.store(index + N, key_at, mask=text_there)


def shares(M: int, N: int, config: TritonConfig) -> tuple[int, int]:
    """The number of parts that the images are split into, and the image blocks per part."""
    blocks = triton.cdiv(M, config.block_i)
    wanted = max(1, config.programs // triton.cdiv(N, config.block_t))
    per_share = triton.cdiv(blocks, min(wanted, blocks))
    return triton.cdiv(blocks, per_share), per_share


def precision(dtype: torch.dtype) -> str:
    """The matmul precision: for fp32 features, PyTorch's default."""
    return "ieee" if dtype == torch.float32 else "tf32"


def sweep(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    pairs: Pairs,
    options: Options,
    config: TritonConfig | None = None,
) -> Sweep:
    """As `reference.sweep`, for fp16, bf16 and fp32 on a GPU; `legacy` is not supported."""
    (M, Q, D), N, device = image.shape, text.shape[0], image.device
    if config is None:
        config = forward_tiles(Q, D, image.dtype.itemsize, capability(device), options.save)
    image, text = dense_width(image), dense_width(text)
    text_blocks = triton.cdiv(N, config.block_t)
    count, per_share = shares(M, N, config)
    rows = torch.zeros(text_blocks, 6, M, device=device)
    row_index = torch.full((text_blocks, 2, M), -1, dtype=torch.int32, device=device)
    columns = torch.zeros(count, 6, N, device=device)
    column_index = torch.empty(count, 2, N, dtype=torch.int32, device=device)
    if options.philox is None:
        rows[:, 5] = -torch.inf
    kept = (M, N) if options.save else (0, 0)
    sim = torch.empty(kept, device=device)
    arg = torch.empty(kept, dtype=index_dtype(Q), device=device)
    has_ids = pairs.row_ids is not None
    with torch.cuda.device_of(image):
        _itc_fwd_kernel[(text_blocks, count)](
            image,
            text,
            temp,
            pairs.row_ids,
            pairs.column_ids,
            options.philox,
            rows,
            row_index,
            columns,
            column_index,
            sim,
            arg,
            M,
            N,
            pairs.first_row,
            image.stride(0),
            image.stride(1),
            text.stride(0),
            per_share,
            Q=Q,
            D=D,
            BLOCK_T=config.block_t,
            BLOCK_I=config.block_i,
            BLOCK_Q=config.block_q,
            BLOCK_D=config.block_d,
            HAS_IDS=has_ids,
            SAMPLE=options.philox is not None,
            SAVE=options.save,
            PRECISION=precision(image.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
    by_image = statistics.join(rows, row_index.long())
    by_text = statistics.join(columns, column_index.long())
    if not has_ids:
        _hand_over_diagonal(by_image[0], by_text[0], pairs.first_row)
    return Sweep(by_image[0], by_text[0], by_image[1], by_text[1], sim, arg)


def _hand_over_diagonal(rows: Tensor, columns: Tensor, first: int) -> None:
    """Without ids, copy the statistic of each image's only positive from the text of its index."""
    own = slice(first, first + rows.shape[1])
    rows[POSITIVE_COUNT].fill_(1)
    columns[POSITIVE_COUNT, own].fill_(1)
    rows[POSITIVE_SUM] = columns[POSITIVE_SUM, own]
