"""Stage 2: images as soft prompts of a frozen language model (arXiv 2301.12597, section 3.2)."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.stage2.config import Stage2Config, Stage2Output
    from blip2fast.stage2.model import Blip2Stage2
    from blip2fast.stage2.text import Stage2Text

__all__ = [
    "Blip2Stage2",
    "Stage2Config",
    "Stage2Output",
    "Stage2Text",
]

_NAMES = {
    "Blip2Stage2": "model",
    "Stage2Config": "config",
    "Stage2Output": "config",
    "Stage2Text": "text",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
