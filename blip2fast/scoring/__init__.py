"""Models on benchmarks: retrieval, captions and answers, resumable and on several processes."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.scoring.models import ModelSource
    from blip2fast.scoring.retrieving import evaluate_retrieval
    from blip2fast.scoring.setup import Setup
    from blip2fast.scoring.writing import evaluate_answers, evaluate_captions

__all__ = [
    "ModelSource",
    "Setup",
    "evaluate_answers",
    "evaluate_captions",
    "evaluate_retrieval",
]

_NAMES = {
    "ModelSource": "models",
    "Setup": "setup",
    "evaluate_answers": "writing",
    "evaluate_captions": "writing",
    "evaluate_retrieval": "retrieving",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
