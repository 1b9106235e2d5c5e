"""Frozen image encoders and language models, and checks of their identity."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.frozen.identity import FrozenIdentity, identify_model
    from blip2fast.frozen.image_encoders import FrozenImageEncoder, load_image_encoder
    from blip2fast.frozen.images import ImageTransform, read_image, transform_for
    from blip2fast.frozen.language_models import load_language_model

__all__ = [
    "FrozenIdentity",
    "FrozenImageEncoder",
    "ImageTransform",
    "identify_model",
    "load_image_encoder",
    "load_language_model",
    "read_image",
    "transform_for",
]

_NAMES = {
    "FrozenIdentity": "identity",
    "FrozenImageEncoder": "image_encoders",
    "ImageTransform": "images",
    "identify_model": "identity",
    "load_image_encoder": "image_encoders",
    "load_language_model": "language_models",
    "read_image": "images",
    "transform_for": "images",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
