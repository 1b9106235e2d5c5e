"""The Q-Former over a token buffer: queries first, then texts without padding, in one pass.

The same function as `blip2fast.QFormer` with less work: nothing is padded, no mask is written out,
the image's keys and values come from outside (once for all passes of a step), and the last layer
computes only the rows that are asked for. The weights are those of a `QFormer`, read in place.

Shapes: N query blocks, Q queries, T rows of all texts, R = N*Q + T rows of the buffer, C hidden
width, B images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2fast.kernels.philox import keep_mask
from blip2fast.kernels.qformer_attention.layout import AttentionLayout
from blip2fast.packed_layer import PackedLayer
from blip2fast.packed_pass import Dropout, PackedPass, States, states_dtype
from blip2fast.qformer.fused_linear import image_form, image_keys_values
from blip2fast.qformer.layers import QFormerLayer
from blip2fast.qformer.model import QFormer


class PackedQFormer:
    """A step's reading of a `QFormer`'s weights: joined and cast once, used by all its passes.

    Args:
        qformer: Whose weights are read. Its own `forward` stays what it is.
        dtype: The computing precision; statistics and softmax are in fp32 whatever it is.

    Attributes:
        image_form: How the image's keys and values were computed last (`fused_weights`), or empty.
    """

    def __init__(self, qformer: QFormer, dtype: torch.dtype) -> None:
        self.qformer = qformer
        self.config = qformer.config
        self.dtype = dtype
        self.image_form = ""
        last = len(qformer.encoder.layer) - 1
        self.layers = [
            PackedLayer(
                cast(QFormerLayer, layer), self.config.num_attention_heads, dtype, index == last
            )
            for index, layer in enumerate(qformer.encoder.layer)
        ]

    def image_keys_values(
        self, image_embeds: Tensor, ln_vision: nn.LayerNorm
    ) -> list[Tensor | None]:
        """Each layer's keys and values `[B, S, 2, H, D]`, None where it has no cross-attention.

        Args:
            image_embeds: `[B, S, E]`, the encoder's tokens before `ln_vision`.
            ln_vision: Normalises them.
        """
        crossing = [layer for layer in self.layers if layer.has_cross_attention]
        heads = self.config.num_attention_heads
        projections = [layer.key_value for layer in crossing]
        self.image_form = image_form(image_embeds, projections)
        pairs = image_keys_values(image_embeds, ln_vision, projections, heads, self.dtype)
        values = iter(pairs)
        return [next(values) if layer.has_cross_attention else None for layer in self.layers]

    def __call__(
        self,
        queries: Tensor,
        text: Tensor,
        keys_values: list[Tensor | None],
        packed: PackedPass,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            queries: `[Q, C]`, the learned queries, the same for every block.
            text: `[T, C]`, embedded words plus positions.
            keys_values: Each layer's `[B, S, 2, H, D]`, from `image_keys_values`; empty without
                query blocks.
            packed: What the pass sees.
            dropout: None to drop nothing.

        Returns:
            `(query states [N, Q, C], text states [T or K, C])`.
        """
        layout = packed.layout
        N, Q = layout.num_blocks, layout.num_queries
        # until a layer shows them text or images, equal queries have equal states
        shared = N > 1 and not layout.has_bidirectional and not (dropout and dropout.hidden_p)
        shared = shared and not (dropout and dropout.attention_p)
        shared = shared and self.layers[0].has_cross_attention
        blocks = 1 if shared else N
        rows = torch.cat([queries.to(text.dtype).repeat(blocks, 1), text])
        x = self._embed(rows, dropout)
        for index, layer in enumerate(self.layers):
            step = replace(packed, kept_text=None)
            if shared and index == 0:
                step = replace(step, layout=_one_block(layout))
            if index == len(self.layers) - 1:
                step = replace(step, kept_text=packed.kept_text)
            image = keys_values[index] if keys_values else None
            run = _bound(layer, index, image, step, N, dropout)
            if torch.is_grad_enabled() and _recomputes(self.qformer):
                x = checkpoint(run, x, use_reentrant=False)
            else:
                x = run(x)
        queries, text = x.rows[: N * Q], x.rows[N * Q :]
        return queries.view(N, Q, queries.shape[1]), text

    def _embed(self, rows: Tensor, dropout: Dropout | None) -> States:
        norm = self.qformer.layernorm
        with torch.autocast(rows.device.type, enabled=False):
            x = F.layer_norm(
                rows.to(norm.weight.dtype), norm.normalized_shape, norm.weight, norm.bias, norm.eps
            ).to(states_dtype(norm, self.dtype))
        if dropout is not None and dropout.hidden_p > 0:
            row = torch.arange(len(x), device=x.device)
            keep = keep_mask(
                dropout.philox[0], dropout.hidden_p, row, row.new_zeros(()), x.shape[1]
            )
            x = x * keep / (1 - dropout.hidden_p)
        return States(x, x.to(self.dtype))


def _bound(
    layer: PackedLayer,
    index: int,
    keys_values: Tensor | None,
    packed: PackedPass,
    blocks: int,
    dropout: Dropout | None,
) -> Callable[[States], States]:
    return lambda x: layer.run(x, index, keys_values, packed, blocks, dropout)


def _one_block(layout: AttentionLayout) -> AttentionLayout:
    """The layout in which one block stands for all of them, and every joint text sees it."""
    joint = (layout.offsets[-1] - layout.offsets[0]).view(1)
    return replace(
        layout,
        num_blocks=1,
        blocks=torch.zeros_like(layout.blocks),
        block_text=layout.block_text.new_full((1,), -1),
        offsets=torch.cat([joint.new_zeros(1), joint]),
    )


def _recomputes(qformer: QFormer) -> bool:
    """Whether `QFormer.recompute_layers` was called."""
    layer = qformer.encoder.layer[0]
    return any(
        getattr(layer, name, False)
        for name in ("gradient_checkpointing", "activation_checkpointing")
    )
