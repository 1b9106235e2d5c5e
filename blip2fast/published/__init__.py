"""Weights that others published: transformers' models and LAVIS's files, both ways."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.published.converting import convert
    from blip2fast.published.reading import open_weights
    from blip2fast.published.weights import Weights

__all__ = ["Weights", "convert", "open_weights"]

_NAMES = {"Weights": "weights", "convert": "converting", "open_weights": "reading"}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
