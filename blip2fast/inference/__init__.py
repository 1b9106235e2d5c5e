"""Captions, answers and conversations about images."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.inference.chat import Chat
    from blip2fast.inference.inputs import EncodedImages, GenerationOptions
    from blip2fast.inference.model import Blip2

__all__ = [
    "Blip2",
    "Chat",
    "EncodedImages",
    "GenerationOptions",
]

_NAMES = {
    "Blip2": "model",
    "Chat": "chat",
    "EncodedImages": "inputs",
    "GenerationOptions": "inputs",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
