"""Trained models, and checkpoints that runs resume from."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.checkpoints.files import last_checkpoint
    from blip2fast.checkpoints.trained import (
        Description,
        load_trained,
        read_description,
        read_parameters,
        save_model,
    )

__all__ = [
    "Description",
    "last_checkpoint",
    "load_trained",
    "read_description",
    "read_parameters",
    "save_model",
]

_NAMES = {
    "Description": "trained",
    "last_checkpoint": "files",
    "load_trained": "trained",
    "read_description": "trained",
    "read_parameters": "trained",
    "save_model": "trained",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
