"""The Q-Former: a drop-in for transformers' modules, its packed form, and patching."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.qformer.model import QFormer
    from blip2fast.qformer.patching import patch, unpatch

__all__ = [
    "QFormer",
    "patch",
    "unpatch",
]

_NAMES = {
    "QFormer": "model",
    "patch": "patching",
    "unpatch": "patching",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
