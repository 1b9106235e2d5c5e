"""Records on disk, feature caches, and the batches of a run."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.data.caching import cache_images
    from blip2fast.data.feature_cache import FeatureCache, FeatureCacheWriter
    from blip2fast.data.images import load_image
    from blip2fast.data.records import (
        CaptionRecord,
        QuestionRecord,
        SequenceRecord,
        read_captions,
        read_questions,
        read_sequences,
        write_records,
    )

__all__ = [
    "CaptionRecord",
    "FeatureCache",
    "FeatureCacheWriter",
    "QuestionRecord",
    "SequenceRecord",
    "cache_images",
    "load_image",
    "read_captions",
    "read_questions",
    "read_sequences",
    "write_records",
]

_NAMES = {
    "CaptionRecord": "records",
    "FeatureCache": "feature_cache",
    "FeatureCacheWriter": "feature_cache",
    "QuestionRecord": "records",
    "SequenceRecord": "records",
    "cache_images": "caching",
    "load_image": "images",
    "read_captions": "records",
    "read_questions": "records",
    "read_sequences": "records",
    "write_records": "records",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
