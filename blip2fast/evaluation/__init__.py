"""Evaluation on held-out data: losses, retrieval and matching, captions and answers."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.evaluation.answer_accuracy import (
        exact_answer,
        normalise,
        vqa_accuracy,
    )
    from blip2fast.evaluation.caption_metrics import (
        CaptionScores,
        score_captions,
        score_tokens,
    )
    from blip2fast.evaluation.caption_words import caption_tokens
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
    "CaptionScores",
    "TokenizedTexts",
    "accuracy_by_type",
    "caption_tokens",
    "continue_texts",
    "encode_all",
    "evaluate_stage1",
    "exact_answer",
    "exact_match",
    "generate_texts",
    "held_out_losses",
    "match_logits",
    "normalise",
    "rerank",
    "retrieval_recall",
    "score_captions",
    "score_tokens",
    "swapped_match_accuracy",
    "vqa_accuracy",
]

_NAMES = {
    "CaptionScores": "caption_metrics",
    "TokenizedTexts": "retrieval",
    "accuracy_by_type": "stage2",
    "caption_tokens": "caption_words",
    "continue_texts": "stage2",
    "encode_all": "retrieval",
    "evaluate_stage1": "stage1",
    "exact_answer": "answer_accuracy",
    "exact_match": "stage2",
    "generate_texts": "stage2",
    "held_out_losses": "stage1",
    "match_logits": "retrieval",
    "normalise": "answer_accuracy",
    "rerank": "retrieval",
    "retrieval_recall": "retrieval",
    "score_captions": "caption_metrics",
    "score_tokens": "caption_metrics",
    "swapped_match_accuracy": "retrieval",
    "vqa_accuracy": "answer_accuracy",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
