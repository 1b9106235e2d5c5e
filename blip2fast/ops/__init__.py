"""The fused ops, one file each: check, choose a backend, register with PyTorch."""

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.ops.bias_gelu import bias_gelu
from blip2fast.ops.dispatch import kernels_set_to, set_kernels
from blip2fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from blip2fast.ops.itc.loss import itc_loss
from blip2fast.ops.kernel_calls import check_kernels, kernel_records
from blip2fast.ops.lm_cross_entropy import lm_cross_entropy
from blip2fast.ops.qformer_attention.attention import qformer_attention, qformer_cross_attention

__all__ = [
    "AttentionLayout",
    "KVIndex",
    "MaskKind",
    "bias_gelu",
    "check_kernels",
    "dropout_add_layer_norm",
    "itc_loss",
    "kernel_records",
    "kernels_set_to",
    "lm_cross_entropy",
    "philox_state",
    "qformer_attention",
    "qformer_cross_attention",
    "set_kernels",
]
