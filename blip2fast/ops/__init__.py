"""The fused ops, one file each: check, choose a backend, register with PyTorch."""

from blip2fast.ops.itc import itc_loss

__all__ = ["itc_loss"]
