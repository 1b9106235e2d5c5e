"""CapFilt: synthetic captions, ranked with those of the web (BLIP-2 paper, section 3.4)."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.capfilt.run import Settings, bootstrap_captions

__all__ = [
    "Settings",
    "bootstrap_captions",
]

_NAMES = {
    "Settings": "run",
    "bootstrap_captions": "run",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
