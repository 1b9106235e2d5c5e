"""Cross-attention without keys and values: their projections are absorbed into queries and output.

`q (W_K x + b_K)^T = (q W_K) x^T + constant`, and `sum_s p_s (W_V x_s + b_V)` is
`(sum_s p_s x_s) W_V^T + b_V`: attention runs on the raw image tokens. This takes fewer FLOPs when
few queries attend to an image once: 0.69 instead of 1.14 GFLOP per layer and image for BLIP-2's 32
queries on ViT-g. It takes more when several passes share an image's keys and values, as in
training.

Shapes: B images, L queries, S image tokens, E image token width, C hidden width, H heads, D head
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2fast.ops.tracing import is_recording
from blip2fast.qformer.plain import is_plain

# Absorption's GEMMs are narrower. On a CPU (benchmarks/README.md, "Q-Former, forward") in fp32, at
# 0.61 of the operations (BLIP-2's own shape) it is on par or up to 1.2 times slower; at 0.5 it was
# 1.4 times faster on one machine and 1.1 times slower on another; at 0.3 it is faster or on par. In
# bf16 it is 1.05 to 1.36 times faster at all three. No GPU was timed.
_FEWER_OPERATIONS = 0.6
_FEWER_OPERATIONS_CPU_BF16 = 0.65


def is_cheaper(
    query: Tensor, tokens: Tensor, heads: int, key: nn.Module, value: nn.Module, weights: bool
) -> bool:
    """Whether to expect absorption to be faster than projection for a call.

    The threshold is 0.6 of projection's operations; 0.65 in bf16 on a CPU. Never while a program is
    recorded: it would hold for one number of images and tokens, and ONNX's optimiser drops reshapes
    of its form that look alike in the example.

    Args:
        query: `[B or 1, L, C]`, projected queries.
        tokens: `[B or 1, S, E]`.
        heads: H.
        key, value: The layers that would project the tokens.
        weights: Whether attention weights must be returned.
    """
    if torch.is_grad_enabled() or weights or not (is_plain(key) and is_plain(value)):
        return False
    if is_recording() or not (_readable(key, tokens) and _readable(value, tokens)):
        return False
    blocks, L, C = query.shape
    images, S, E = tokens.shape
    uses = max(blocks, images)
    projected = 4 * images * S * E * C + 4 * uses * L * S * C
    absorbed = 2 * (blocks + uses) * L * C * E + 4 * uses * heads * L * S * E
    bf16 = tokens.dtype == torch.bfloat16 and tokens.device.type == "cpu"
    return absorbed < (_FEWER_OPERATIONS_CPU_BF16 if bf16 else _FEWER_OPERATIONS) * projected


def _readable(layer: nn.Linear, tokens: Tensor) -> bool:
    """Whether the weight is where the tokens are, and of their dtype unless autocast casts both."""
    weight = layer.weight
    if weight.device != tokens.device:
        return False
    return weight.dtype == tokens.dtype or torch.is_autocast_enabled(tokens.device.type)


def absorbed_attention(
    query: Tensor, tokens: Tensor, key: nn.Linear, value: nn.Linear, mask: Tensor | None
) -> Tensor:
    """Attention of queries to image tokens without computing keys and values.

    Args:
        query: `[B or 1, H, L, D]`.
        tokens: `[B or 1, S, E]`.
        key, value: Layers from E to H*D.
        mask: Boolean (true: may be seen) or additive, broadcastable to `[B, H, L, S]`.

    Returns:
        `[B, H, L, D]`; fully masked rows are zero.
    """
    blocks, H, L, D = query.shape
    S, E = tokens.shape[1:]
    B = max(blocks, len(tokens))
    # [H, blocks * L, D] @ [H, D, E]
    folded = (query * D**-0.5).transpose(0, 1).reshape(H, -1, D) @ key.weight.view(H, D, E)
    folded = folded.view(H, blocks, L, E).transpose(0, 1).reshape(blocks, H * L, E)
    scores = (folded @ tokens.transpose(1, 2)).view(B, H, L, S)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if mask is None:
        weights = scores.softmax(-1, dtype=dtype)
        seen = None
    else:
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        scores = scores.to(dtype)
        if mask.dtype != torch.bool:
            scores = scores + mask
        scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
        seen = weights.sum(-1, keepdim=True)
    read = weights.to(tokens.dtype).view(B, H * L, S) @ tokens  # [B, H * L, E]
    read = read.view(B, H, L, E).transpose(0, 1).reshape(H, B * L, E)
    output = (read @ value.weight.view(H, D, E).transpose(1, 2)).view(H, B, L, D).transpose(0, 1)
    if value.bias is None:
        return output
    bias = value.bias.view(H, 1, D)
    return output + (bias if seen is None else bias * seen.to(bias.dtype))
