"""The fused ops, one file each: check, choose a backend, register with PyTorch."""

from blip2fast.ops.attention_layout import AttentionLayout, KVIndex
from blip2fast.ops.itc import itc_loss
from blip2fast.ops.qformer_attention import qformer_attention, qformer_cross_attention

__all__ = [
    "AttentionLayout",
    "KVIndex",
    "itc_loss",
    "qformer_attention",
    "qformer_cross_attention",
]
