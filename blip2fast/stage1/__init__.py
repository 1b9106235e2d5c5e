"""Stage 1: the Q-Former learns from image-text pairs (arXiv 2301.12597, section 3.1)."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.stage1.config import Stage1Config, Stage1Output
    from blip2fast.stage1.contrast import StepContrast, step_contrast
    from blip2fast.stage1.model import Blip2Stage1
    from blip2fast.stage1.pretrained import initialise_from_bert, stage1_from_retrieval

__all__ = [
    "Blip2Stage1",
    "Stage1Config",
    "Stage1Output",
    "StepContrast",
    "initialise_from_bert",
    "stage1_from_retrieval",
    "step_contrast",
]

_NAMES = {
    "Blip2Stage1": "model",
    "Stage1Config": "config",
    "Stage1Output": "config",
    "StepContrast": "contrast",
    "initialise_from_bert": "pretrained",
    "stage1_from_retrieval": "pretrained",
    "step_contrast": "contrast",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
