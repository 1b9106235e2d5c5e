"""The Q-Former over a token buffer: queries first, then texts without padding, in one pass.

Computes the same function as `blip2fast.QFormer` with less work: no padding, no materialised mask,
image keys and values computed once per step and passed in, and only the requested rows in the last
layer. It reads the weights of a `QFormer` in place.

Shapes: N query blocks, Q queries, T rows of all texts, R = N*Q + T rows of the buffer, C hidden
width, B images, S image tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2fast.kernels.philox import keep_mask
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex
from blip2fast.ops import (
    bias_gelu,
    dropout_add_layer_norm,
    qformer_attention,
    qformer_cross_attention,
)
from blip2fast.qformer.checks import is_sharded
from blip2fast.qformer.fused_linear import FusedLinear, Linear, image_form, image_keys_values
from blip2fast.qformer.layers import (
    QFormerAttention,
    QFormerEncoder,
    QFormerIntermediate,
    QFormerLayer,
    QFormerMultiHeadAttention,
    QFormerResidual,
)
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.plain import (
    LINEAR_NAMES,
    is_exact_gelu,
    is_plain,
    is_plain_norm,
    is_untouched,
    own_forward,
)

_SITES_A_LAYER = 6
# the modules that the packed form replaces, and what a call of each runs
_NODES: dict[type[nn.Module], Any] = {
    cls: cls.forward
    for cls in (
        QFormer,
        QFormerAttention,
        QFormerEncoder,
        QFormerIntermediate,
        QFormerLayer,
        QFormerMultiHeadAttention,
        QFormerResidual,
    )
} | {nn.Dropout: own_forward(nn.Dropout)}
# the modules that it calls if they are not plain
_CALLED = LINEAR_NAMES | {"intermediate_act_fn"}


@dataclass(frozen=True)
class PackedPass:
    """The attention pattern of one pass over a token buffer.

    Attributes:
        layout: Which rows attend to which.
        kv_index: The image that each query block reads; None: block i reads image i.
        image_mask: `[B, S]` bool, true where an image token is real; None: everywhere.
        kept_text: Text rows to keep in the last layer, int64 `[K]`; None: all.
    """

    layout: AttentionLayout
    kv_index: KVIndex | None = None
    image_mask: Tensor | None = None
    kept_text: Tensor | None = None


@dataclass(frozen=True)
class PassDropout:
    """The dropout of one pass: probabilities, and the seed of the mask at each dropout site.

    Attributes:
        hidden_p, attention_p: Dropout probabilities of hidden states and attention weights.
        philox: `[places, 2]` int64 seeds and offsets, one row per dropout site.
    """

    hidden_p: float
    attention_p: float
    philox: Tensor

    @classmethod
    def of(cls, qformer: QFormer, philox: Tensor, number: int) -> PassDropout | None:
        """The dropout of pass `number` of a step; None if dropout is off.

        Args:
            qformer: Provides the probabilities and the training mode.
            philox: `[2]` int64, the step's seed.
            number: Index of the pass, unique within a step.
        """
        config = qformer.config
        hidden_p, attention_p = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        if not qformer.training or hidden_p == attention_p == 0:
            return None
        places = 1 + _SITES_A_LAYER * config.num_hidden_layers
        offsets = torch.arange(places, device=philox.device) + number * places
        return cls(hidden_p, attention_p, torch.stack([philox[0].expand(places), offsets], 1))

    def place(self, layer: int, site: int) -> Tensor:
        """Seed and offset of one of a layer's six dropout sites."""
        return self.philox[1 + _SITES_A_LAYER * layer + site]


class States(NamedTuple):
    """Hidden states between two blocks, in two precisions.

    The next block uses a LayerNorm output both as its residual and as a GEMM input. As under
    PyTorch autocast, the residual stays in fp32 and the GEMM input is rounded: rounding the
    residuals gives three times the gradient error of rounding the products (docs/precision.md).

    Attributes:
        rows: `[R, C]` in the wider of the compute dtype and the dtype of LayerNorm's weights.
        rounded: `[R, C]` in the compute dtype; `rows` itself if the dtypes are equal.
    """

    rows: Tensor
    rounded: Tensor


def states_dtype(norm: nn.LayerNorm, dtype: torch.dtype) -> torch.dtype:
    """The dtype of `States.rows` after this LayerNorm, for compute dtype `dtype`."""
    return torch.promote_types(norm.weight.dtype, dtype)


class PackedLayer:
    """One layer: its weights in the compute dtype, and its forward over a token buffer.

    Args:
        layer: The layer whose weights are read.
        heads: H.
        dtype: The compute dtype.
        is_last: Whether this is the last layer, whose output needs no rounded copy.
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
        dropout: PassDropout | None,
    ) -> States:
        """`[R, C]` to `[R, C]`, with fewer text rows if the pass has `kept_text`.

        A one-block layout shared by `blocks` equal blocks is expanded to the rows of all blocks.
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
        # dtype of the rounded copy for the next GEMM; None: no copy
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
    """Up-projection, GELU, down-projection, residual and LayerNorm."""

    def __init__(
        self,
        widen: QFormerIntermediate,
        narrow: QFormerResidual,
        dtype: torch.dtype,
        is_last: bool,
    ) -> None:
        self.widen = Linear(widen.dense, dtype)
        self.activation = widen.intermediate_act_fn
        # only the exact GELU has a fused kernel
        self.exact_gelu = is_exact_gelu(self.activation)
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
    """Keep all query rows and the selected text rows."""
    queries, text = rows[:first_text], rows[first_text:]
    return torch.cat([queries, text.index_select(0, kept)]) if len(kept) else queries


def _given(keys_values: Tensor | None) -> Tensor:
    if keys_values is None:
        raise ValueError("keys_values: queries need the image's keys and values; got none")
    return keys_values


class PackedQFormer:
    """The weights of a `QFormer`, fused and cast once per step, for all passes of that step.

    Args:
        qformer: The module whose weights are read. Its own `forward` is not changed.
        dtype: The compute dtype; LayerNorm statistics and softmax are always in fp32.

    Attributes:
        image_form: How image keys and values were last computed (`fused_linear`); empty if not yet.
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

    def image_keys_values(self, image_embeds: Tensor, ln_vision: nn.Module) -> list[Tensor | None]:
        """Keys and values `[B, S, 2, H, D]` per layer; None for layers without cross-attention.

        Args:
            image_embeds: `[B, S, E]`, the encoder's tokens before `ln_vision`.
            ln_vision: Normalises them.
        """
        crossing = [layer for layer in self.layers if layer.has_cross_attention]
        heads = self.config.num_attention_heads
        projections = [layer.key_value for layer in crossing]
        self.image_form = image_form(image_embeds, ln_vision, projections)
        pairs = image_keys_values(image_embeds, ln_vision, projections, heads, self.dtype)
        values = iter(pairs)
        return [next(values) if layer.has_cross_attention else None for layer in self.layers]

    def __call__(
        self,
        queries: Tensor,
        text: Tensor,
        keys_values: list[Tensor | None],
        packed: PackedPass,
        dropout: PassDropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            queries: `[Q, C]`, the learned queries, the same for every block.
            text: `[T, C]`, word plus position embeddings.
            keys_values: `[B, S, 2, H, D]` per layer, from `image_keys_values`; empty if there are
                no query blocks.
            packed: The attention pattern of the pass.
            dropout: None: no dropout.

        Returns:
            `(query states [N, Q, C], text states [T or K, C])`.
        """
        layout = packed.layout
        N, Q = layout.num_blocks, layout.num_queries
        # all blocks have equal states until a layer attends to text or images: compute one block
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

    def _embed(self, rows: Tensor, dropout: PassDropout | None) -> States:
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
    dropout: PassDropout | None,
) -> Callable[[States], States]:
    return lambda x: layer.run(x, index, keys_values, packed, blocks, dropout)


def _one_block(layout: AttentionLayout) -> AttentionLayout:
    """A layout with a single block in place of N equal blocks."""
    joint = (layout.offsets[-1] - layout.offsets[0]).view(1)
    return replace(
        layout,
        num_blocks=1,
        blocks=torch.zeros_like(layout.blocks),
        block_text=layout.block_text.new_full((1,), -1),
        offsets=torch.cat([joint.new_zeros(1), joint]),
    )


def called_node(qformer: QFormer) -> nn.Module | None:
    """The first module whose call does more than the packed form knows of; None: there is none.

    Linear layers, activations and image norms are not looked at: the packed form calls those that
    are not plain.
    """
    config = qformer.config
    dropout = config.hidden_dropout_prob
    draws = dropout > 0 or config.attention_probs_dropout_prob > 0
    stack: list[nn.Module] = [qformer]
    while stack:
        module = stack.pop()
        kind = type(module)
        if kind is nn.LayerNorm:
            if not is_plain_norm(module):
                return module
            continue
        if kind is not nn.ModuleList:
            forward = _NODES.get(kind)
            if forward is None or not is_untouched(module, forward):
                return module
            if draws and module.training is not qformer.training:
                return module
            if kind is nn.Dropout and module.p != dropout:
                return module
            if isinstance(module, QFormerMultiHeadAttention) and not _has_all_heads(module):
                return module
        for name, child in module._modules.items():
            if name not in _CALLED and child is not None:
                stack.append(child)
    return None


def _has_all_heads(attention: QFormerMultiHeadAttention) -> bool:
    """Whether the layers compute every head: pruned ones, and tensor parallelism's, do not."""
    width = attention.config.hidden_size
    layers: tuple[nn.Module, ...] = attention.query, attention.key, attention.value
    for layer in layers:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and is_sharded(weight):
            return False
        rows = len(layer.weight) if is_plain(layer) else getattr(layer, "out_features", width)
        if rows != width:
            return False
    return True


def describe_node(qformer: QFormer, node: nn.Module) -> str:
    """The name and class of a `called_node`."""
    name = next((name for name, module in qformer.named_modules() if module is node), "")
    return (
        f"qformer.{name} ({type(node).__name__}) is not plain" if name else "qformer is not plain"
    )


def _recomputes(qformer: QFormer) -> bool:
    """Whether `QFormer.recompute_layers` was called."""
    layer = qformer.encoder.layer[0]
    return any(
        getattr(layer, name, False)
        for name in ("gradient_checkpointing", "activation_checkpointing")
    )
