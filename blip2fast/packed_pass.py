"""What a pass of the Q-Former over a token buffer sees, drops and carries from layer to layer.

Shapes: N query blocks, Q queries, T rows of all texts, R = N*Q + T rows of the buffer, C hidden
width, B images, S image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.qformer.model import QFormer

_SITES_A_LAYER = 6


@dataclass(frozen=True)
class PackedPass:
    """What one pass over a token buffer sees.

    Attributes:
        layout: Which rows attend to which.
        kv_index: The image that each query block reads; None: block i reads image i.
        image_mask: `[B, S]` bool, true where an image token is real; None: everywhere.
        kept_text: Text rows wanted of the last layer, int64 `[K]`; None: all.
    """

    layout: AttentionLayout
    kv_index: KVIndex | None = None
    image_mask: Tensor | None = None
    kept_text: Tensor | None = None


@dataclass(frozen=True)
class Dropout:
    """The dropout of one pass: its two probabilities and a mask's seed for each place.

    Attributes:
        hidden_p, attention_p: Probabilities of dropping, of states and of attention weights.
        philox: `[places, 2]` int64 seeds and offsets.
    """

    hidden_p: float
    attention_p: float
    philox: Tensor

    @classmethod
    def of(cls, qformer: QFormer, philox: Tensor, number: int) -> Dropout | None:
        """The dropout of pass `number` of a step, or None where the Q-Former drops nothing.

        Args:
            qformer: Says the probabilities, and whether it is being trained.
            philox: `[2]` int64, the step's seed.
            number: Another for each pass of a step.
        """
        config = qformer.config
        hidden_p, attention_p = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        if not qformer.training or hidden_p == attention_p == 0:
            return None
        places = 1 + _SITES_A_LAYER * config.num_hidden_layers
        offsets = torch.arange(places, device=philox.device) + number * places
        return cls(hidden_p, attention_p, torch.stack([philox[0].expand(places), offsets], 1))

    def place(self, layer: int, site: int) -> Tensor:
        """The seed and offset of one of a layer's six places of dropout."""
        return self.philox[1 + _SITES_A_LAYER * layer + site]


class States(NamedTuple):
    """Rows between two blocks.

    LayerNorm's results are added to by the next block and read by its products. Under autocast
    PyTorch keeps the former in fp32 and rounds for the latter, and so do we: rounded residuals
    cost gradients three times the error of rounded products (docs/precision.md).

    Attributes:
        rows: `[R, C]` in the wider type of the products and of LayerNorm's weights.
        rounded: `[R, C]` in the computing precision; `rows` itself where the types are the same.
    """

    rows: Tensor
    rounded: Tensor


def states_dtype(norm: nn.LayerNorm, dtype: torch.dtype) -> torch.dtype:
    """The type of `States.rows`: that of this LayerNorm's results where products are of `dtype`."""
    return torch.promote_types(norm.weight.dtype, dtype)
