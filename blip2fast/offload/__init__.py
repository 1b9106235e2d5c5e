"""Frozen language models that do not fit on the device: streaming, 8 and 4 bits, memory plans."""

from blip2fast.offload.storage_loss import StorageLoss, loss_difference
from blip2fast.offload.streaming import BlockStream, stream_blocks

__all__ = ["BlockStream", "StorageLoss", "loss_difference", "stream_blocks"]
