"""Frozen language models that do not fit on the device: block streaming, 8- and 4-bit storage."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.offload.loading import load_partitioned, load_streamed
    from blip2fast.offload.storage_loss import StorageLoss, loss_difference
    from blip2fast.offload.streaming import BlockStream, stream_blocks

__all__ = [
    "BlockStream",
    "StorageLoss",
    "load_partitioned",
    "load_streamed",
    "loss_difference",
    "stream_blocks",
]

_NAMES = {
    "BlockStream": "streaming",
    "StorageLoss": "storage_loss",
    "load_partitioned": "loading",
    "load_streamed": "loading",
    "loss_difference": "storage_loss",
    "stream_blocks": "streaming",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
