"""BLIP-2, fast: the Q-Former between a frozen image encoder and a frozen LLM.

`QFormer` takes the place of transformers' Q-Formers, `patch(model)` puts it into a transformers
model; `Blip2Stage1` and `Blip2Stage2` train it, `Blip2` writes (arXiv 2301.12597).
"""

from blip2fast.blip2 import Blip2
from blip2fast.ops.itc import ITCLoss
from blip2fast.patching import patch, unpatch
from blip2fast.qformer import QFormer
from blip2fast.stage1 import Blip2Stage1
from blip2fast.stage1_types import Stage1Config, Stage1Output
from blip2fast.stage2 import Blip2Stage2
from blip2fast.stage2_types import Stage2Config, Stage2Output

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
