"""The dropout masks of a stage-1 step, exported and put into the textbook's padded passes.

`Blip2Stage1` draws its masks from a seed and an element's place in its token buffers. Here they
are computed from that definition, laid out as the textbook's passes need them, and handed to
PyTorch's dropout and attention in the order in which transformers' Q-Former calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.philox import keep_mask
from blip2fast.stage1.config import Stage1Config

SITES = 6  # a layer's places of dropout, in the order of `PackedQFormer`


@dataclass(frozen=True)
class PaddedPass:
    """One pass of the textbook, and where its rows stand in a token buffer.

    Attributes:
        number: The pass of the step whose masks are used: 0 contrast, 1 matching.
        queries: `[b, Q]` buffer rows of the queries; `[b, 0]` for text alone.
        text: `[b, T]` buffer rows of the text, -1 where the buffer has none (padding).
        first_text: The buffer's first text row.
        kept: `[b, T]` rows among the text that the last layer keeps, -1 where it keeps none.
    """

    number: int
    queries: Tensor
    text: Tensor
    first_text: int
    kept: Tensor


@dataclass(frozen=True)
class Masks:
    """The masks of a step.

    Attributes:
        config: Probabilities and sizes.
        philox: `[2]` the step's seed.
    """

    config: Stage1Config
    philox: Tensor

    def place(self, number: int, index: int) -> Tensor:
        places = 1 + SITES * self.config.num_hidden_layers
        return torch.stack([self.philox[0], torch.tensor(number * places + index)])

    def hidden(self, number: int, index: int, rows: Tensor) -> Tensor:
        """`[b, L, C]` factors of hidden states; rows of -1 keep everything."""
        p, C = self.config.hidden_dropout_prob, self.config.hidden_size
        keep = keep_mask(self.place(number, index), p, rows.clamp(min=0), torch.tensor(0), C)
        return (keep | (rows < 0)[..., None]).double() / (1 - p)

    def weights(self, number: int, index: int, rows: Tensor, columns: Tensor) -> Tensor:
        """`[b, H, L, M]` factors of attention weights, keys standing at `columns` `[M]`."""
        p = self.config.attention_probs_dropout_prob
        heads = torch.arange(self.config.num_attention_heads)[:, None]
        width = int(columns.max()) + 1
        keep = keep_mask(self.place(number, index), p, rows.clamp(min=0)[:, None], heads, width)
        return keep[..., columns].double() / (1 - p)

    def of_pass(self, padded: PaddedPass, image_tokens: int) -> Iterator[Tensor]:
        """Every mask of a pass, in the order of transformers' Q-Former."""
        config, n = self.config, padded.number
        Q, T = padded.queries.shape[1], padded.text.shape[1]
        rows = torch.cat([padded.queries, padded.text], dim=1)
        columns = torch.arange(Q + T)
        if Q == 0:  # text alone stands where text stands: behind the queries
            columns = columns + config.num_query_tokens
        yield self.hidden(n, 0, rows)
        for layer in range(config.num_hidden_layers):
            first = 1 + SITES * layer
            last = layer == config.num_hidden_layers - 1
            text = padded.text - padded.first_text * (padded.text >= 0)
            if last:
                text = padded.kept
            behind = torch.where(text < 0, text, text + padded.first_text)
            yield self.weights(n, first, rows, columns)
            yield self.hidden(n, first + 1, torch.cat([padded.queries, behind], dim=1))
            if Q and layer % config.cross_attention_frequency == 0:
                keys = torch.arange(image_tokens)
                yield self.weights(n, first + 2, padded.queries, keys)
                yield self.hidden(n, first + 3, padded.queries)
            if Q:
                yield self.hidden(n, first + 4, padded.queries)
            if T:
                yield self.hidden(n, first + 5, text)


@contextmanager
def dropping(masks: Iterator[Tensor]) -> Iterator[None]:
    """PyTorch's dropout and attention take their masks from here, in order."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * next(masks).to(x.dtype)

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return (scores.softmax(-1) * next(masks).to(q.dtype)) @ v

    with (
        patch.object(F, "dropout", dropout),
        patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


def passes_of(
    lengths: Tensor, negative_text: Tensor, queries: int, text_width: int
) -> list[PaddedPass]:
    """The textbook's six passes: image, text, three of matching, generation.

    Args:
        lengths: `[B]` tokens of each text.
        negative_text: `[B]`.
        queries: Q.
        text_width: T, the padded width.
    """
    B, total = len(lengths), int(lengths.sum())
    starts = lengths.cumsum(0) - lengths
    column = torch.arange(text_width)
    query_rows = torch.arange(B * queries).view(B, queries)
    none = torch.empty(B, 0, dtype=torch.long)

    def rows(first: Tensor, count: Tensor) -> Tensor:
        return (first[:, None] + column).masked_fill(column >= count[:, None], -1)

    nothing = torch.full((B, text_width), -1)
    cls_only = nothing.clone()
    cls_only[:, 0] = torch.arange(B)
    unimodal = rows(B * queries + starts, lengths)
    # generation drops each text's last token and follows all of the unimodal texts
    causal_starts = starts - torch.arange(B)
    causal = rows(B * queries + total + causal_starts, lengths - 1)
    kept = rows(B + causal_starts, lengths - 1)
    image = PaddedPass(0, query_rows, none, B * queries, none)
    text = PaddedPass(0, none, unimodal, B * queries, cls_only)
    generation = PaddedPass(0, query_rows, causal, B * queries, kept)
    first_text = 3 * B * queries
    of_negative = lengths[negative_text]
    texts = [
        (starts, lengths),
        (total + starts, lengths),
        (2 * total + of_negative.cumsum(0) - of_negative, of_negative),
    ]
    matching = [
        PaddedPass(
            1, query_rows + k * B * queries, rows(first_text + start, count), first_text, nothing
        )
        for k, (start, count) in enumerate(texts)
    ]
    return [image, text, *matching, generation]
