"""Records on disk, feature caches, and the batches of a run."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.data.caching import cache_images
    from blip2fast.data.feature_cache import FeatureCache, FeatureCacheWriter
    from blip2fast.data.images import load_image
    from blip2fast.data.importing import import_records
    from blip2fast.data.records import (
        CaptionRecord,
        QuestionRecord,
        SequenceRecord,
        read_captions,
        read_questions,
        read_sequences,
        write_records,
    )
    from blip2fast.data.source_config import RecordSource
    from blip2fast.data.sources import open_records
    from blip2fast.data.table import RecordTable

__all__ = [
    "CaptionRecord",
    "FeatureCache",
    "FeatureCacheWriter",
    "QuestionRecord",
    "RecordSource",
    "RecordTable",
    "SequenceRecord",
    "cache_images",
    "import_records",
    "load_image",
    "open_records",
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
    "RecordSource": "source_config",
    "RecordTable": "table",
    "SequenceRecord": "records",
    "cache_images": "caching",
    "import_records": "importing",
    "load_image": "images",
    "open_records": "sources",
    "read_captions": "records",
    "read_questions": "records",
    "read_sequences": "records",
    "write_records": "records",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
