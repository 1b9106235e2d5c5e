"""The backends of the Q-Former's attentions, in order of preference, and why each may not run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blip2fast import _extension
from blip2fast.ops.dispatch import COMPILED_NOT_RUN, Backend

MIN_WIDTH, MAX_WIDTH = 16, 128
MAX_QUERIES, MAX_TEXT_TOKENS, MAX_IMAGE_TOKENS = 256, 512, 16384
_NOT_BUILT = _extension.why_not("qformer_cross_attention_fwd")
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionCall:
    """What a choice of backend may depend on.

    Attributes:
        queries: Q.
        keys: The longest text of self-attention, or S.
        heads, width: H and D.
        dtype, device: Of the data.
        dropout: Whether weights are dropped.
        cross: Whether this is cross-attention.
    """

    queries: int
    keys: int
    heads: int
    width: int
    dtype: torch.dtype
    device: str
    dropout: bool
    cross: bool


def _kernel_reasons(call: AttentionCall) -> list[str]:
    """What the kernels of kernels/ and csrc/ have in common."""
    reasons = []
    if call.device != "cuda":
        reasons.append(f"tensors on {call.device}: needs a CUDA device")
    if not MIN_WIDTH <= call.width <= MAX_WIDTH:
        reasons.append(f"head width {call.width}: only {MIN_WIDTH} to {MAX_WIDTH}")
    if call.queries > MAX_QUERIES:
        reasons.append(f"{call.queries} queries: at most {MAX_QUERIES}")
    most = MAX_IMAGE_TOKENS if call.cross else MAX_TEXT_TOKENS
    if call.keys > most:
        reasons.append(f"{call.keys} {'image' if call.cross else 'text'} tokens: at most {most}")
    return reasons


def _cuda_reasons(call: AttentionCall) -> list[str]:
    reasons = [_NOT_BUILT] if _NOT_BUILT else []
    if not call.cross:
        reasons.append("self-attention: csrc/ has cross-attention alone")
    if call.width % 8:
        reasons.append(f"head width {call.width}: only multiples of 8")
    if call.dtype not in HALVES:
        reasons.append(f"{call.dtype}: only float16 and bfloat16")
    return reasons + _kernel_reasons(call)


def _triton_reasons(call: AttentionCall) -> list[str]:
    return ["not written"]


def _xformers_reasons(call: AttentionCall) -> list[str]:
    return ["not written"]


def _none(call: AttentionCall) -> list[str]:
    return []


def _reference_not_automatic(call: AttentionCall) -> list[str]:
    return ["holds the scores of all pairs in memory: force it with impl='reference'"]


BACKENDS = (
    Backend("cuda", _cuda_reasons, lambda call: [COMPILED_NOT_RUN.format(name="cuda")]),
    Backend("triton", _triton_reasons, lambda call: [COMPILED_NOT_RUN.format(name="triton")]),
    Backend("xformers", _xformers_reasons, lambda call: ["never run"]),
    Backend("sdpa", _none, _none),
    Backend("reference", _none, _reference_not_automatic),
)
