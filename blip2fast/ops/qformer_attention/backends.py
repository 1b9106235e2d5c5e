"""The backends of the Q-Former's attentions, in order of preference, and why each may not run."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from blip2fast._extension import why_not
from blip2fast.kernels.cuda_needs import gpu_reasons
from blip2fast.ops.calls import AttentionCall
from blip2fast.ops.dispatch import (
    ALL_PAIRS,
    HALVES,
    Backend,
    KernelCheck,
    cuda_reasons,
    no_reasons,
    triton_reasons,
)
from blip2fast.ops.kernel_kinds import attention_kind, device_of

MIN_WIDTH, MAX_WIDTH = 16, 128
MAX_QUERIES, MAX_TEXT_TOKENS, MAX_IMAGE_TOKENS = 256, 512, 16384
HAS_XFORMERS = find_spec("xformers") is not None
# csrc/qformer_attention_bindings.cpp defines both
WHY_NO_CUDA = why_not("qformer_cross_attention_fwd") or why_not("qformer_cross_attention_bwd")


def _kernel_reasons(call: AttentionCall) -> list[str]:
    """Why none of the hand-written kernels can run the call."""
    reasons = []
    if not MIN_WIDTH <= call.width <= MAX_WIDTH:
        reasons.append(f"head width {call.width}: only {MIN_WIDTH} to {MAX_WIDTH}")
    if call.queries > MAX_QUERIES:
        reasons.append(f"{call.queries} queries: at most {MAX_QUERIES}")
    most = MAX_IMAGE_TOKENS if call.cross else MAX_TEXT_TOKENS
    if call.keys > most:
        reasons.append(f"{call.keys} {'image' if call.cross else 'text'} tokens: at most {most}")
    return reasons


def _cuda_reasons(call: AttentionCall) -> list[str]:
    if not call.cross:
        return ["only cross-attention is written in CUDA"]
    reasons = _kernel_reasons(call)
    if call.width % 8:
        reasons.append(f"head width {call.width}: only multiples of 8")
    reasons += gpu_reasons("tensors", call.device, call.capability)
    return reasons + cuda_reasons(call.dtype, WHY_NO_CUDA)


def _triton_reasons(call: AttentionCall) -> list[str]:
    return _kernel_reasons(call) + triton_reasons(call.device, call.dtype)


def _xformers_reasons(call: AttentionCall) -> list[str]:
    reasons = []
    if call.device != "cuda":
        reasons.append(f"tensors on {call.device}: its attention has no operator there, only CUDA")
    if call.dtype not in (*HALVES, torch.float32):
        reasons.append(f"{call.dtype}: only float16, bfloat16 and float32")
    if call.dropout:
        reasons.append("dropout: its masks are not those of a seed and a position")
    if call.key_mask:
        reasons.append("key_mask: its masks are block-diagonal, by lengths")
    if call.lse:
        reasons.append("return_lse: it gives none beside a gradient")
    if not HAS_XFORMERS:
        reasons.append("xformers is not installed: pip install xformers")
    return reasons


def _xformers_not_automatic(call: AttentionCall) -> list[str]:
    reasons = ["never run on a GPU: force it with impl='xformers'"]
    if not call.cross:
        reasons.append("its masks need lengths on the host, which waits for them")
    return reasons


_CHECK: KernelCheck[AttentionCall] = KernelCheck(
    "qformer_attention",
    attention_kind,
    device_of,
    "blip2fast.ops.kernel_cases:attention_problem",
)
BACKENDS: tuple[Backend[AttentionCall], ...] = (
    Backend("triton", _triton_reasons, no_reasons, _CHECK),
    # right on an H200, and 1.7 to 3 times slower than Triton's: for where Triton is missing
    Backend("cuda", _cuda_reasons, no_reasons, _CHECK),
    Backend("xformers", _xformers_reasons, _xformers_not_automatic),
    Backend("sdpa", no_reasons, no_reasons),
    Backend("reference", no_reasons, lambda call: [ALL_PAIRS]),
)
