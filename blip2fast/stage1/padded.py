"""The passes of stage 1 by calling the Q-Former, on padded texts and dense masks.

The same function as `passes.py` in more arithmetic, for where modules must be called (hooks, FSDP,
a device map or adapters inside the Q-Former) and where shapes may not depend on values
(`torch.compile`, `torch.func`). Dropout draws from PyTorch's generator.

Shapes: B pairs on this rank, T text tokens, Q queries, S image tokens, E their width, C hidden
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.ops.collectives import rank
from blip2fast.qformer.masks import qformer_mask
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.plain import input_dtype
from blip2fast.stage1.modules import TextEmbeddings
from blip2fast.stage1.negatives import NegativeExchange
from blip2fast.stage1.passes import FirstPass, ProjectedImages
from blip2fast.stage1.texts import PackedTexts, PaddedTexts


class PaddedReader:
    """Runs the Q-Former of stage 1 by calling it; the methods are those of `passes.Reader`.

    Args:
        qformer: The Q-Former, which is called.
        query_tokens: `[1, Q, C]`, the learned queries.
        embeddings: Word and position embeddings.
        ln_vision: Normalises image tokens.
        dtype: The compute dtype.
        pad_token_id: Pads texts.
        why: What keeps the packed form from running, for the model's `repr`.
        repeatable: Whether a pass with the same `philox` must have the same dropout.
    """

    def __init__(
        self,
        qformer: QFormer,
        query_tokens: Tensor,
        embeddings: TextEmbeddings,
        ln_vision: nn.Module,
        dtype: torch.dtype,
        pad_token_id: int,
        why: str,
        repeatable: bool = False,
    ) -> None:
        self.dtype = dtype
        self.image_form = f"the Q-Former called on padded texts ({why})"
        self.num_queries = query_tokens.shape[1]
        self._qformer, self._queries = qformer, query_tokens
        self._embeddings, self._ln_vision = embeddings, ln_vision
        self._pad, self._repeatable = pad_token_id, repeatable

    def images(self, tokens: Tensor, mask: Tensor | None = None) -> ProjectedImages:
        """Image tokens `[B, S, E]` and, in place of keys and values, their normalised form."""
        return ProjectedImages(tokens, mask, [self._normalised(tokens)])

    def first_pass(
        self,
        images: ProjectedImages,
        texts: PackedTexts | PaddedTexts,
        philox: Tensor,
        bos_token_id: int | None = None,
    ) -> FirstPass:
        """As `passes.first_pass`; of texts that came padded every row is kept, labels say which."""
        padded = self._padded(texts)
        with self._drawn(philox):
            queries = self._joint(None, images, self._images(images), padded.ids.shape[0])
            cls = self._alone(padded)
            if bos_token_id is None:
                return FirstPass(queries, cls, cls[:0], padded.ids.new_empty(0))
            ids, real = padded.ids[:, :-1], padded.real[:, :-1]
            start = torch.full_like(ids[:, :1], bos_token_id)
            ids = torch.cat([start, ids[:, 1:]], dim=1)
            states = self._joint(
                (ids, real), images, self._images(images), causal=True, text_rows=True
            )
        labels, seen = padded.ids[:, 1:], padded.real[:, 1:]
        if isinstance(texts, PackedTexts):
            return FirstPass(queries, cls, states[seen], labels[seen])
        labels = labels.masked_fill(~seen, -100)
        return FirstPass(queries, cls, states.flatten(0, 1), labels.flatten(), seen.sum())

    def second_pass(
        self,
        images: ProjectedImages,
        texts: PackedTexts | PaddedTexts,
        negatives: tuple[Tensor, Tensor],
        philox: Tensor,
        *,
        longest: int,
    ) -> Tensor:
        """As `passes.second_pass`: query states `[3B, Q, C]` of the pairs of ITM."""
        padded = self._padded(texts)
        B, device = padded.count, images.tokens.device
        missing = longest - padded.longest
        ids = F.pad(padded.ids, (0, missing), value=self._pad)
        real = F.pad(padded.real, (0, missing))
        own = torch.arange(B, device=device) + rank() * B
        wanted, chosen = NegativeExchange.for_lists(
            [torch.where(index < 0, own, index.long()) for index in negatives], B
        )
        other_ids, other_real = chosen.rows(ids), chosen.rows(real.to(torch.uint8)).bool()
        states, mask = self._images(images), images.mask
        if wanted.ranks == 1:
            others = states[wanted.index]
        else:
            others = self._normalised(wanted.rows(images.tokens))
        if mask is not None:
            mask = torch.cat([mask, wanted.rows(mask.to(torch.uint8)).bool(), mask])
        pairs = ProjectedImages(images.tokens, mask, [])
        return self._joint(
            (torch.cat([ids, ids, other_ids]), torch.cat([real, real, other_real])),
            pairs,
            torch.cat([states, others, states]),
        )

    def match(
        self,
        images: ProjectedImages,
        texts: PackedTexts | PaddedTexts,
        image_index: Tensor | None,
        philox: Tensor,
    ) -> Tensor:
        """As `passes.Reader.match`: query states `[B, Q, C]` of image-text pairs."""
        padded, states, mask = self._padded(texts), self._images(images), images.mask
        if image_index is not None:
            index = image_index.to(states.device).long()
            states, mask = states[index], None if mask is None else mask[index]
        pairs = ProjectedImages(images.tokens, mask, [])
        return self._joint((padded.ids, padded.real), pairs, states)

    def image_queries(self, images: ProjectedImages, philox: Tensor) -> Tensor:
        """Query states `[B, Q, C]` of images without text."""
        return self._joint(None, images, self._images(images), images.tokens.shape[0])

    def text_cls(self, texts: PackedTexts | PaddedTexts, philox: Tensor) -> Tensor:
        """[CLS] states `[B, C]` of texts without images."""
        return self._alone(self._padded(texts))

    def next_word(self, images: ProjectedImages, ids: Tensor) -> Tensor:
        """States `[B, C]` that predict the token after `ids` `[B, T]`."""
        text = ids, torch.ones_like(ids, dtype=torch.bool)
        states = self._joint(text, images, self._images(images), causal=True, text_rows=True)
        return states[:, -1]

    def _padded(self, texts: PackedTexts | PaddedTexts) -> PaddedTexts:
        return PaddedTexts.of(texts, self._pad) if isinstance(texts, PackedTexts) else texts

    def _normalised(self, tokens: Tensor) -> Tensor:
        return self._ln_vision(tokens.to(input_dtype(self._ln_vision, tokens))).to(self.dtype)

    def _images(self, images: ProjectedImages) -> Tensor:
        (states,) = images.keys_values
        if states is None:
            raise ValueError("keys_values: expected normalised image tokens, got none")
        return states

    def _alone(self, texts: PaddedTexts) -> Tensor:
        """[CLS] states of texts that see neither queries nor images."""
        output = self._qformer(
            query_embeds=self._embeddings(texts.ids), query_length=0, attention_mask=texts.real
        )
        states: Tensor = output.last_hidden_state[:, 0]
        return states

    def _joint(
        self,
        text: tuple[Tensor, Tensor] | None,
        images: ProjectedImages,
        tokens: Tensor,
        count: int = 0,
        *,
        causal: bool = False,
        text_rows: bool = False,
    ) -> Tensor:
        """States of the queries, or of the text, of image-text pairs or of images alone.

        Args:
            text: Ids and mask `[n, T]`; None: images alone.
            images: Its mask is used.
            tokens: `[n, S, E]`, the normalised tokens of each pair's image.
            count: n, without text.
            causal: Whether the text sees the queries and its past, and queries no text; otherwise
                all see all.
            text_rows: Whether to return the states of the text.
        """
        Q, mask = self.num_queries, None
        if text is None:
            rows = self._queries.expand(count, -1, -1)
        else:
            ids, real = text
            words = self._embeddings(ids)
            queries = self._queries.to(words.dtype).expand(ids.shape[0], -1, -1)
            rows = torch.cat([queries, words], dim=1)
            kind = MaskKind.MULTIMODAL_CAUSAL if causal else MaskKind.BIDIRECTIONAL
            mask = qformer_mask(kind, Q, real)
        output = self._qformer(
            query_embeds=rows,
            query_length=Q,
            attention_mask=mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=images.mask,
        )
        states: Tensor = output.last_hidden_state
        return states[:, Q:] if text_rows else states[:, :Q]

    @contextmanager
    def _drawn(self, philox: Tensor) -> Iterator[None]:
        """Within the block, dropout is a function of the seed if passes must be repeatable."""
        if not self._repeatable or not self._qformer.training:
            yield
            return
        devices = [philox.device] if philox.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(philox[0]))
            yield
