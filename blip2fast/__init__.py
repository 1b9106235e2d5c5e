"""BLIP-2, fast: the Q-Former between a frozen image encoder and a frozen LLM.

`QFormer` replaces transformers' Q-Formers, and `patch(model)` swaps it into a transformers model;
`Blip2Stage1` and `Blip2Stage2` train it, `Blip2` generates text (arXiv 2301.12597). All names and
subpackages, such as `blip2fast.ops`, are imported on first use.
"""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast import capfilt as capfilt
    from blip2fast import checkpoints as checkpoints
    from blip2fast import data as data
    from blip2fast import demo_page as demo_page
    from blip2fast import evaluation as evaluation
    from blip2fast import frozen as frozen
    from blip2fast import inference as inference
    from blip2fast import offload as offload
    from blip2fast import ops as ops
    from blip2fast import published as published
    from blip2fast import qformer as qformer
    from blip2fast import reporting as reporting
    from blip2fast import scenes as scenes
    from blip2fast import scoring as scoring
    from blip2fast import search as search
    from blip2fast import stage1 as stage1
    from blip2fast import stage2 as stage2
    from blip2fast import training as training
    from blip2fast.inference.model import Blip2
    from blip2fast.ops.itc.loss import ITCLoss
    from blip2fast.qformer.model import QFormer
    from blip2fast.qformer.patching import patch, unpatch
    from blip2fast.search.retriever import Blip2Retriever
    from blip2fast.stage1.config import Stage1Config, Stage1Output
    from blip2fast.stage1.model import Blip2Stage1
    from blip2fast.stage2.config import Stage2Config, Stage2Output
    from blip2fast.stage2.model import Blip2Stage2

__all__ = [
    "Blip2",
    "Blip2Retriever",
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

_NAMES = {
    "Blip2": "inference.model",
    "Blip2Retriever": "search.retriever",
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
_ROOMS = (
    "capfilt",
    "checkpoints",
    "data",
    "demo_page",
    "evaluation",
    "frozen",
    "inference",
    "offload",
    "ops",
    "published",
    "qformer",
    "reporting",
    "scenes",
    "scoring",
    "search",
    "stage1",
    "stage2",
    "training",
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES, _ROOMS)
