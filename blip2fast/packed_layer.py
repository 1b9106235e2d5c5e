"""A Q-Former layer over a token buffer: its weights read once a step, its blocks in fused ops.

Shapes as in `packed_pass.py`; H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from blip2fast.ops import (
    bias_gelu,
    dropout_add_layer_norm,
    qformer_attention,
    qformer_cross_attention,
)
from blip2fast.packed_pass import Dropout, PackedPass, States, states_dtype
from blip2fast.qformer.fused_linear import FusedLinear, Linear
from blip2fast.qformer.layers import QFormerIntermediate, QFormerLayer, QFormerResidual


class PackedLayer:
    """One layer's weights in the computing precision, and what is done with them.

    Args:
        layer: Whose weights are read.
        heads: H.
        dtype: The computing precision.
        is_last: Whether no layer comes after it, so that no product reads its rows.
    """

    def __init__(
        self, layer: QFormerLayer, heads: int, dtype: torch.dtype, is_last: bool = False
    ) -> None:
        own = layer.attention
        self.heads = heads
        self.has_cross_attention: bool = layer.has_cross_attention
        attention = own.attention
        self.qkv = FusedLinear([attention.query, attention.key, attention.value], dtype)
        self.attention_output = _Residual(own.output, dtype)
        if self.has_cross_attention:
            cross = layer.crossattention
            self.cross_query = Linear(cross.attention.query, dtype)
            self.key_value: tuple[nn.Module, nn.Module] = (
                cross.attention.key,
                cross.attention.value,
            )
            self.cross_output = _Residual(cross.output, dtype)
        self.query_ffn = _FeedForward(layer.intermediate_query, layer.output_query, dtype, is_last)
        self.text_ffn = None
        if layer.has_text:
            self.text_ffn = _FeedForward(layer.intermediate, layer.output, dtype, is_last)

    def run(
        self,
        x: States,
        index: int,
        keys_values: Tensor | None,
        packed: PackedPass,
        blocks: int,
        dropout: Dropout | None,
    ) -> States:
        """`[R, C]` to `[R, C]`, or fewer text rows where the pass keeps some.

        A layout of one block that stands for `blocks` equal ones gives the rows of them all.
        """
        layout = packed.layout
        first_text = layout.num_blocks * layout.num_queries
        places = [None if dropout is None else dropout.place(index, s) for s in range(6)]
        attention_p = 0.0 if dropout is None else dropout.attention_p
        hidden_p = 0.0 if dropout is None else dropout.hidden_p
        qkv = self.qkv(x.rounded).unflatten(-1, (self.heads, -1))  # [R, 3, H, D]
        context = qformer_attention(
            qkv, layout, dropout_p=attention_p, philox=places[0] if attention_p else None
        ).flatten(1)
        residual = x.rows
        if packed.kept_text is not None:
            context = _keep(context, first_text, packed.kept_text)
            residual = _keep(residual, first_text, packed.kept_text)
        x = self.attention_output(context, residual, hidden_p, places[1])
        queries = States(*(rows[:first_text] for rows in x))
        text = States(*(rows[first_text:] for rows in x))
        if self.has_cross_attention and blocks > 0:
            q = self.cross_query(queries.rounded)
            context = qformer_cross_attention(
                q.view(-1, layout.num_queries, self.heads, qkv.shape[-1]),
                _given(keys_values),
                packed.kv_index,
                key_mask=packed.image_mask,
                dropout_p=attention_p,
                philox=places[2] if attention_p else None,
            ).flatten(0, 1)
            residual = queries.rows
            if layout.num_blocks < blocks:
                residual = residual.repeat(blocks, 1)
            queries = self.cross_output(context.flatten(1), residual, hidden_p, places[3])
        if blocks > 0:
            queries = self.query_ffn(queries, hidden_p, places[4])
        if len(text.rows) == 0:
            return queries
        if self.text_ffn is None:
            raise ValueError("the Q-Former has no text feed-forward networks: it takes no text")
        text = self.text_ffn(text, hidden_p, places[5])
        return _join(queries, text) if blocks > 0 else text


class _Residual:
    """Projection, dropout, addition to the branch's input and LayerNorm."""

    def __init__(self, module: QFormerResidual, dtype: torch.dtype, is_last: bool = False) -> None:
        self.dense = Linear(module.dense, dtype)
        self.norm = module.LayerNorm
        # of a copy for the next product
        self.rounded = None if is_last or states_dtype(self.norm, dtype) == dtype else dtype

    def __call__(self, x: Tensor, residual: Tensor, p: float, philox: Tensor | None) -> States:
        product, bias = self.dense.without_bias(x)
        result = dropout_add_layer_norm(
            product,
            residual,
            self.norm.weight,
            self.norm.bias,
            x_bias=bias,
            eps=self.norm.eps,
            dropout_p=p,
            philox=philox if p else None,
            copy_dtype=self.rounded,
        )
        return States(result, result) if isinstance(result, Tensor) else States(*result)


class _FeedForward:
    """Widening, GELU, narrowing, residual and LayerNorm."""

    def __init__(
        self,
        widen: QFormerIntermediate,
        narrow: QFormerResidual,
        dtype: torch.dtype,
        is_last: bool,
    ) -> None:
        self.widen = Linear(widen.dense, dtype)
        self.activation = widen.intermediate_act_fn
        # the exact GELU alone has a fused form
        self.exact_gelu = isinstance(self.activation, GELUActivation | nn.GELU) and (
            getattr(self.activation, "approximate", "none") == "none"
        )
        self.narrow = _Residual(narrow, dtype, is_last)

    def __call__(self, x: States, p: float, philox: Tensor | None) -> States:
        if self.exact_gelu:
            wide = bias_gelu(*self.widen.without_bias(x.rounded))
        else:
            wide = self.activation(self.widen(x.rounded))
        return self.narrow(wide, x.rows, p, philox)


def _join(queries: States, text: States) -> States:
    rows = torch.cat([queries.rows, text.rows])
    if queries.rounded is queries.rows:
        return States(rows, rows)
    return States(rows, torch.cat([queries.rounded, text.rounded]))


def _keep(rows: Tensor, first_text: int, kept: Tensor) -> Tensor:
    """All query rows and some text rows."""
    queries, text = rows[:first_text], rows[first_text:]
    return torch.cat([queries, text.index_select(0, kept)]) if len(kept) else queries


def _given(keys_values: Tensor | None) -> Tensor:
    if keys_values is None:
        raise ValueError("keys_values: queries need the image's keys and values; got none")
    return keys_values
