"""A page in the browser that tries a model: captions, questions, search, attention (gradio)."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.demo_page.models import PageModels, PageParts
    from blip2fast.demo_page.page import build_page, serve_page

__all__ = [
    "PageModels",
    "PageParts",
    "build_page",
    "serve_page",
]

_NAMES = {
    "PageModels": "models",
    "PageParts": "models",
    "build_page": "page",
    "serve_page": "page",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
