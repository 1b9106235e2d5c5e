"""Evaluation on held-out data: losses, retrieval and matching, captions and answers."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.evaluation.retrieval import (
        TokenizedTexts,
        encode_all,
        match_logits,
        rerank,
        retrieval_recall,
        swapped_match_accuracy,
    )
    from blip2fast.evaluation.stage1 import evaluate_stage1, held_out_losses
    from blip2fast.evaluation.stage2 import (
        accuracy_by_type,
        continue_texts,
        exact_match,
        generate_texts,
    )

__all__ = [
    "TokenizedTexts",
    "accuracy_by_type",
    "continue_texts",
    "encode_all",
    "evaluate_stage1",
    "exact_match",
    "generate_texts",
    "held_out_losses",
    "match_logits",
    "rerank",
    "retrieval_recall",
    "swapped_match_accuracy",
]

_NAMES = {
    "TokenizedTexts": "retrieval",
    "accuracy_by_type": "stage2",
    "continue_texts": "stage2",
    "encode_all": "retrieval",
    "evaluate_stage1": "stage1",
    "exact_match": "stage2",
    "generate_texts": "stage2",
    "held_out_losses": "stage1",
    "match_logits": "retrieval",
    "rerank": "retrieval",
    "retrieval_recall": "retrieval",
    "swapped_match_accuracy": "retrieval",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
