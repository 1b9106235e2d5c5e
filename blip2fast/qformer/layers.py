"""The layers of the Q-Former (arXiv 2301.12597, section 3.1), post-norm as in BERT.

One layer; every `cross_attention_frequency`-th has cross-attention::

    queries [B, Q, C] --+                    +-- queries -- cross-attention -- query FFN --+
                        +-- self-attention --+              (image tokens)                 +--
    text    [B, T, C] --+                    +-- text ----------------------- text FFN ----+

Module and parameter names match transformers' Q-Formers, so checkpoints load unchanged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from blip2fast.ops import linear as onednn_linear
from blip2fast.ops.tracing import has_tangents, is_recording
from blip2fast.qformer import absorption
from blip2fast.qformer.plain import input_dtype, is_exact_gelu, is_plain

# attention weights that may be held for the backward pass: 64 MiB in fp32
_WEIGHTS = 1 << 24


def linear(
    layer: nn.Module, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`activation(layer(x))`, by oneDNN where that is quicker; inference fuses exact GELU.

    Args:
        layer: A linear layer, or a module that replaces one.
        x: `[..., K]`.
        activation: None: the identity.
    """
    y: Tensor | None = None
    if not torch.compiler.is_compiling() and is_plain(layer) and _has_one_dtype(layer):
        if torch.is_grad_enabled():
            if onednn_linear.is_quicker(x, layer.weight):
                y = onednn_linear.linear(x, layer.weight, layer.bias)
        elif onednn_linear.takes_onednn(x, layer.weight):
            gelu = activation is not None and is_exact_gelu(activation)
            if gelu or activation is None:
                return onednn_linear.onednn_product(x, layer.weight, layer.bias, gelu)
    if y is None:  # ZeRO-3 gathers a partitioned weight where its layer is called
        y = layer(x)
    return y if activation is None else activation(y)


def _has_one_dtype(layer: nn.Linear) -> bool:
    return layer.bias is None or layer.bias.dtype is layer.weight.dtype


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    explicit: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention; a fully masked row gives zeros, not NaN.

    Args:
        query: `[B, H, L, D]`.
        key: `[B, H, S, D]`; any operand may have batch 1 and is then broadcast without a copy.
        value: as key.
        mask: boolean (True: may be seen) or additive, broadcastable to `[B, H, L, S]`.
        dropout: probability that an attention weight is dropped.
        explicit: compute the attention weights explicitly and return them, as for forward-mode AD,
            of which SDPA has no form.

    Returns:
        The output `[B, H, L, D]` and the weights `[B, H, L, S]`, None unless `explicit`.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    if explicit or has_tangents() or _explicit_is_quicker(query, key):
        return _explicit_attention(query, key, value, mask, dropout)
    if torch.compiler.is_compiling() or not is_recording():
        # TorchScript's ONNX would write the batch size of the example into the program
        batch = max(query.shape[0], key.shape[0], 1 if mask is None else mask.shape[0])
        query, key, value = (
            x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (query, key, value)
        )
    blind = None
    # What a fully masked row gives depends on the kernel: 16-bit SDPA on a GPU (H200, PyTorch 2.11)
    # returns garbage, and runtimes of recorded programs have kernels of their own.
    if mask is not None and mask.dtype == torch.bool:
        if query.device.type != "cpu" or is_recording():
            blind = ~mask.any(-1, keepdim=True)
            mask = mask | blind
    elif mask is not None and is_recording():
        blind = (mask == -torch.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(blind, 0.0)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return output if blind is None else output.masked_fill(blind, 0.0), None


def _explicit_is_quicker(query: Tensor, key: Tensor) -> bool:
    """Whether gradients of 16-bit attention are computed on a CPU, where SDPA's are slow."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad)
        and not torch.compiler.is_compiling()
        and not is_recording()
        and max(len(query), len(key)) * query.shape[1] * query.shape[2] * key.shape[2] <= _WEIGHTS
    )


def _explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    # In half precision, a score plus the lowest finite value (a common mask) can give -inf.
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    if mask is None:
        # a CPU's softmax adds up in fp32 in any case, and has less to write and to keep
        weights = scores.softmax(-1, dtype=None if scores.device.type == "cpu" else dtype)
    else:
        scores = scores.to(dtype)
        # The lowest finite score, not -inf: a fully masked row then gives no NaN, and its weights
        # are zeroed afterwards.
        lowest = torch.finfo(dtype).min
        if mask.dtype == torch.bool:
            hidden = ~mask
            scores = scores.masked_fill(hidden, lowest)
        else:
            hidden = mask == float("-inf")
            scores = (scores + mask).masked_fill(hidden, lowest)
        weights = scores.softmax(-1).masked_fill(hidden, 0.0)
    weights = F.dropout(weights.to(value.dtype), dropout, training=dropout > 0.0)
    return weights @ value, weights


class QFormerMultiHeadAttention(nn.Module):
    """Multi-head attention of `[B, L, C]` over itself, or over image tokens `[B, S, E]`."""

    def __init__(self, config: PreTrainedConfig, is_cross_attention: bool = False) -> None:
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is not a multiple of "
                f"num_attention_heads {config.num_attention_heads}"
            )
        self.config = config
        self.is_cross_attention = is_cross_attention
        self.head_dim = config.hidden_size // config.num_attention_heads
        width = config.encoder_hidden_size if is_cross_attention else config.hidden_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(width, config.hidden_size)
        self.value = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the attended values `[B, L, C]` and the weights `[B, H, L, S]` if asked for.

        With `encoder_hidden_states` and their mask, the rows attend to those, else to themselves.
        """
        attended_states, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            attended_states, mask = encoder_hidden_states, encoder_attention_mask
        explicit = output_attentions or self.config._attn_implementation == "eager"
        query = linear(self.query, hidden_states)
        heads = self.config.num_attention_heads
        if self.is_cross_attention and absorption.is_cheaper(
            query, attended_states, heads, self.key, self.value, explicit
        ):
            output = absorption.absorbed_attention(
                self._split_heads(query), attended_states, self.key, self.value, mask
            )
            return output.transpose(1, 2).flatten(2), None
        output, weights = attention(
            self._split_heads(query),
            self._split_heads(linear(self.key, attended_states)),
            self._split_heads(linear(self.value, attended_states)),
            mask,
            self.config.attention_probs_dropout_prob if self.training else 0.0,
            explicit,
        )
        return output.transpose(1, 2).flatten(2), weights

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, L, D]


class QFormerResidual(nn.Module):
    """Projection, dropout, addition to the branch's input and LayerNorm."""

    def __init__(self, config: PreTrainedConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(linear(self.dense, hidden_states)) + residual)


class QFormerAttention(nn.Module):
    """Attention with its output projection, residual and LayerNorm."""

    def __init__(self, config: PreTrainedConfig, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.attention = QFormerMultiHeadAttention(config, is_cross_attention)
        self.output = QFormerResidual(config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Tensor:
        output, _ = self.attention(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_attentions=output_attentions,
        )
        return self.output(output, hidden_states)


class QFormerIntermediate(nn.Module):
    """The first half of a feed-forward network: up-projection and activation."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        act = config.hidden_act
        self.intermediate_act_fn = ACT2FN[act] if isinstance(act, str) else act

    def forward(self, hidden_states: Tensor) -> Tensor:
        return linear(self.dense, hidden_states, self.intermediate_act_fn)


class QFormerLayer(GradientCheckpointingLayer):
    """One Q-Former layer; see the diagram in the module docstring."""

    def __init__(self, config: PreTrainedConfig, index: int, has_text: bool) -> None:
        super().__init__()
        self.has_text = has_text
        # BLIP-2's layers name what they hand on, InstructBLIP's do not
        self.names_states = isinstance(config, Blip2QFormerConfig)
        self.has_cross_attention = index % config.cross_attention_frequency == 0
        self.attention = QFormerAttention(config)
        if self.has_cross_attention:
            self.crossattention = QFormerAttention(config, is_cross_attention=True)
        if has_text:
            self.intermediate = QFormerIntermediate(config)
            self.output = QFormerResidual(config, config.intermediate_size)
        self.intermediate_query = QFormerIntermediate(config)
        self.output_query = QFormerResidual(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        query_length: int = 0,
        output_attentions: bool = False,
    ) -> Tensor:
        """Maps `[B, Q+T, C]` to the same shape; the first `query_length` rows are queries.

        Masks must be in the form that `masks.prepare_mask` returns.
        """
        hidden_states = self._attend(
            self.attention,
            hidden_states,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
        )
        if query_length == 0:
            return self.output(self.intermediate(hidden_states), hidden_states)

        queries, text = hidden_states[:, :query_length], hidden_states[:, query_length:]
        if self.has_cross_attention:
            queries = self._attend(
                self.crossattention,
                queries,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                output_attentions=output_attentions,
            )
        queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1] == 0:
            return queries
        text = self.output(self.intermediate(text), text)
        # With a query batch of 1, cross-attention has expanded the queries but not the text.
        return torch.cat([queries, text.expand(queries.shape[0], -1, -1)], dim=1)

    def _attend(self, block: nn.Module, hidden_states: Tensor, **given: Any) -> Tensor:
        """Calls an attention block with transformers' arguments, which hooks see."""
        output: Tensor
        if self.names_states:
            output = block(hidden_states=hidden_states, **given)
        else:
            output = block(hidden_states, **given)
        return output


class QFormerEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: PreTrainedConfig, has_text: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            QFormerLayer(config, index, has_text) for index in range(config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **given: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Arguments as `QFormerLayer.forward`; states are positional for reentrant checkpointing.

        Called like transformers' encoder, and with its output, for the hooks on it.
        """
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, encoder_hidden_states, **given)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


class QFormerEmbeddings(nn.Module):
    """Word and position embeddings after the queries, then LayerNorm and dropout (InstructBLIP).

    BLIP-2 itself keeps the embeddings outside its Q-Former.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, width, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
    ) -> Tensor:
        """Embeds token ids `[B, T]` after queries `[B, Q, C]`, either optional: `[B, Q+T, C]`."""
        if input_ids is None:
            embeds = query_embeds
        else:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
            embeds = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
            if query_embeds is not None:
                embeds = torch.cat([query_embeds.expand(embeds.shape[0], -1, -1), embeds], dim=1)
        if embeds is None:
            raise ValueError("input_ids and query_embeds are both None: give at least one of them")
        return self.dropout(self.layernorm(embeds.to(input_dtype(self.layernorm, embeds))))
