"""BLIP-2, fast: the Q-Former between a frozen image encoder and a frozen LLM.

`QFormer` takes the place of transformers' Q-Formers, `patch(model)` puts it into a transformers
model; `Blip2Stage1` and `Blip2Stage2` train it, `Blip2` writes (arXiv 2301.12597).

Names are imported when they are first asked for: `blip2fast.ops` needs PyTorch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2fast.inference.model import Blip2
    from blip2fast.ops.itc.loss import ITCLoss
    from blip2fast.qformer.model import QFormer
    from blip2fast.qformer.patching import patch, unpatch
    from blip2fast.stage1.config import Stage1Config, Stage1Output
    from blip2fast.stage1.model import Blip2Stage1
    from blip2fast.stage2.config import Stage2Config, Stage2Output
    from blip2fast.stage2.model import Blip2Stage2

__all__ = [
    "Blip2",
    "Blip2Stage1",
    "Blip2Stage2",
    "ITCLoss",
    "QFormer",
    "Stage1Config",
    "Stage1Output",
    "Stage2Config",
    "Stage2Output",
    "patch",
    "unpatch",
]

__version__ = "0.1.0.dev0"

_PLACES = {
    "Blip2": "inference.model",
    "Blip2Stage1": "stage1.model",
    "Blip2Stage2": "stage2.model",
    "ITCLoss": "ops.itc.loss",
    "QFormer": "qformer.model",
    "Stage1Config": "stage1.config",
    "Stage1Output": "stage1.config",
    "Stage2Config": "stage2.config",
    "Stage2Output": "stage2.config",
    "patch": "qformer.patching",
    "unpatch": "qformer.patching",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("blip2fast.ops")
    if name not in _PLACES:
        raise AttributeError(f"module 'blip2fast' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"blip2fast.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
