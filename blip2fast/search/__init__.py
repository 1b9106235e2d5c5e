"""Search of images by text or image: an index on disk, exact or bounded."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.search.index import IndexWriter, SearchIndex
    from blip2fast.search.retriever import Blip2Retriever, Hit, Hits

__all__ = [
    "Blip2Retriever",
    "Hit",
    "Hits",
    "IndexWriter",
    "SearchIndex",
]

_NAMES = {
    "Blip2Retriever": "retriever",
    "Hit": "retriever",
    "Hits": "retriever",
    "IndexWriter": "index",
    "SearchIndex": "index",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
