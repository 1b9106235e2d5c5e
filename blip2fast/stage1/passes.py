"""The two passes of a stage-1 step over token buffers: their texts, images and masks.

Pass 1 contains the queries of each image once and each text twice: under the unimodal mask (ITC),
and, without its last token, which predicts nothing, under the multimodal causal mask (ITG). The
queries attend to no text in either, so ITC and ITG share their states. Pass 2 contains 3B
image-text pairs under the bidirectional mask (ITM), with images given by index.

Shapes: B pairs on this rank, T tokens of the longest text, T_total of all texts, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.ops.collectives import rank
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.packed import PackedPass, PackedQFormer, PassDropout
from blip2fast.stage1.modules import TextEmbeddings
from blip2fast.stage1.negatives import NegativeExchange
from blip2fast.stage1.texts import PackedTexts, PaddedTexts, packed


@dataclass(frozen=True)
class ProjectedImages:
    """Image tokens of a step with their projected keys and values.

    Attributes:
        tokens: `[B, S, E]`, the frozen encoder's output before `ln_vision`.
        mask: `[B, S]` bool, true where a token is real; None: everywhere.
        keys_values: `[B, S, 2, H, D]` per layer; None for layers without cross-attention.
    """

    tokens: Tensor
    mask: Tensor | None
    keys_values: list[Tensor | None]


class Reader:
    """Runs the packed Q-Former of stage 1; weights are read once for all passes of a step.

    Args:
        qformer: The module whose weights are read.
        query_tokens: `[1, Q, C]`, the learned queries.
        embeddings: Word and position embeddings.
        ln_vision: Normalises image tokens.
        dtype: The compute dtype.
        pad_token_id: Pads the texts that are exchanged between ranks.

    Attributes:
        packed: The Q-Former's packed form.
        num_queries: Q.
    """

    def __init__(
        self,
        qformer: QFormer,
        query_tokens: Tensor,
        embeddings: TextEmbeddings,
        ln_vision: nn.Module,
        dtype: torch.dtype,
        pad_token_id: int = 0,
    ) -> None:
        self.packed = PackedQFormer(qformer, dtype)
        self.dtype = dtype
        self.num_queries = query_tokens.shape[1]
        self._qformer, self._queries = qformer, query_tokens[0]
        self._embeddings, self._ln_vision = embeddings, ln_vision
        self._pad = pad_token_id

    @property
    def image_form(self) -> str:
        """How image keys and values were last computed."""
        return self.packed.image_form

    def images(self, tokens: Tensor, mask: Tensor | None = None) -> ProjectedImages:
        """Image tokens with their keys and values, computed once for all passes.

        Args:
            tokens: `[B, S, E]`, before `ln_vision`.
            mask: `[B, S]` bool, true where a token is real.
        """
        return ProjectedImages(tokens, mask, self.packed.image_keys_values(tokens, self._ln_vision))

    def run(
        self,
        packed: PackedPass,
        words: tuple[Tensor, Tensor] | None = None,
        keys_values: list[Tensor | None] | None = None,
        philox: Tensor | None = None,
        number: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The query states `[N, Q, C]` and text states `[K, C]` of a pass.

        Args:
            packed: The attention pattern of the pass.
            words: Token ids and positions of all text rows, `[T]` each; None: no text.
            keys_values: From one `ProjectedImages` or several concatenated; None: no image.
            philox: `[2]`, the step's dropout seed; None: no dropout.
            number: Index of the pass in its step, so that each pass draws its own dropout masks.
        """
        text = self._queries.new_empty(0, self._queries.shape[1])
        if words is not None:
            text = self._embeddings(*words)
        dropout = None if philox is None else PassDropout.of(self._qformer, philox, number)
        return self.packed(self._queries, text, keys_values or [], packed, dropout)

    def first_pass(
        self,
        images: ProjectedImages,
        texts: PackedTexts | PaddedTexts,
        philox: Tensor,
        bos_token_id: int | None = None,
    ) -> FirstPass:
        """See `first_pass`."""
        return first_pass(self, images, packed(texts), philox, bos_token_id)

    def second_pass(
        self,
        images: ProjectedImages,
        texts: PackedTexts | PaddedTexts,
        negatives: tuple[Tensor, Tensor],
        philox: Tensor,
        *,
        longest: int,
    ) -> Tensor:
        """See `second_pass`."""
        own = packed(texts)
        return second_pass(
            self, images, own, negatives, philox, longest=longest, pad_token_id=self._pad
        )

    def match(
        self,
        images: ProjectedImages,
        texts: PackedTexts | PaddedTexts,
        image_index: Tensor | None,
        philox: Tensor,
    ) -> Tensor:
        """Query states `[B, Q, C]` of image-text pairs; text i with image `image_index[i]`."""
        index = None
        if image_index is not None:
            index = KVIndex.build(image_index.to(images.tokens.device), len(images.tokens))
        pairs = matching_pass(packed(texts), None, self.num_queries, index, images.mask)
        words = pairs.ids, pairs.positions
        return self.run(pairs.packed, words, images.keys_values, philox)[0]

    def image_queries(self, images: ProjectedImages, philox: Tensor) -> Tensor:
        """Query states `[B, Q, C]` of images without text."""
        tokens = images.tokens
        layout = AttentionLayout.build(len(tokens), self.num_queries, device=tokens.device)
        rows = PackedPass(layout, image_mask=images.mask)
        return self.run(rows, keys_values=images.keys_values, philox=philox)[0]

    def text_cls(self, texts: PackedTexts | PaddedTexts, philox: Tensor) -> Tensor:
        """[CLS] states `[B, C]` of texts without images."""
        own = packed(texts)
        kind, device = MaskKind.UNIMODAL, own.ids.device
        layout = AttentionLayout.build(0, 0, own.lengths, kind, device=device)
        rows = PackedPass(layout, kept_text=own.cu_seqlens[:-1])
        return self.run(rows, (own.ids, own.positions), philox=philox)[1]

    def next_word(self, images: ProjectedImages, ids: Tensor) -> Tensor:
        """States `[B, C]` that predict the token after `ids` `[B, T]`."""
        B, length = ids.shape
        kind, device = MaskKind.MULTIMODAL_CAUSAL, ids.device
        layout = AttentionLayout.build(B, self.num_queries, [length] * B, kind, device=device)
        last = torch.arange(1, B + 1, device=device) * length - 1
        rows = PackedPass(layout, image_mask=images.mask, kept_text=last)
        positions = torch.arange(length, device=device).repeat(B)
        return self.run(rows, (ids.flatten(), positions), images.keys_values)[1]


@dataclass(frozen=True)
class ContrastPass:
    """The token buffer of pass 1, its attention pattern, and the ITG labels.

    Attributes:
        ids, positions: `[T]`, token ids and positions of all text rows.
        packed: The pass; its kept text rows are the B [CLS] rows, then all ITG rows.
        labels: `[T_itg]`, the next token of each ITG row.
    """

    ids: Tensor
    positions: Tensor
    packed: PackedPass
    labels: Tensor


def contrast_pass(
    texts: PackedTexts, num_queries: int, bos_token_id: int | None, image_mask: Tensor | None
) -> ContrastPass:
    """Lay out ITC and ITG of a batch in one buffer.

    Args:
        texts: One per image.
        num_queries: Q.
        bos_token_id: [DEC], the first token of a text in ITG; None: ITC only.
        image_mask: `[B, S]` bool, true where an image token is real.
    """
    B, total, device = texts.count, len(texts.ids), texts.ids.device
    if bos_token_id is None:
        layout = AttentionLayout.build(
            B, num_queries, texts.lengths, MaskKind.UNIMODAL, device=device
        )
        alone = PackedPass(layout, image_mask=image_mask, kept_text=texts.cu_seqlens[:-1])
        return ContrastPass(texts.ids, texts.positions, alone, texts.ids[:0])
    # ITG row k of text b is row k + b of the texts: ITG drops one row of each text before it
    kept = torch.arange(total - B, device=device)
    ends = texts.cu_seqlens[1:] - torch.arange(1, B + 1, device=device)
    rows = kept + torch.searchsorted(ends, kept, right=True)
    positions = texts.positions[rows]
    decoder_ids = texts.ids[rows].masked_fill(positions == 0, bos_token_id)
    layout = AttentionLayout.build(
        B,
        num_queries,
        torch.cat([texts.lengths, texts.lengths - 1]),
        [MaskKind.UNIMODAL] * B + [MaskKind.MULTIMODAL_CAUSAL] * B,
        torch.arange(B).repeat(2),
        device=device,
    )
    cls_rows = texts.cu_seqlens[:-1]
    return ContrastPass(
        ids=torch.cat([texts.ids, decoder_ids]),
        positions=torch.cat([texts.positions, positions]),
        packed=PackedPass(
            layout, image_mask=image_mask, kept_text=torch.cat([cls_rows, kept + total])
        ),
        labels=texts.ids[rows + 1],
    )


@dataclass(frozen=True)
class FirstPass:
    """Hidden states of pass 1, used by ITC and ITG.

    Attributes:
        queries: `[B, Q, C]`.
        cls: `[B, C]`, the [CLS] state of each text.
        itg: `[T_itg, C]`, states that predict a token; empty without ITG.
        labels: `[T_itg]`, the tokens they predict; -100 for rows that count for nothing.
        words: Number of labels that count; None: all.
    """

    queries: Tensor
    cls: Tensor
    itg: Tensor
    labels: Tensor
    words: Tensor | None = None


def first_pass(
    reader: Reader,
    images: ProjectedImages,
    texts: PackedTexts,
    philox: Tensor,
    bos_token_id: int | None = None,
) -> FirstPass:
    """Run pass 1: images and texts separately (ITC), and texts after their images (ITG).

    Dropout masks depend on the row index and ITG rows come last, so the ITC states are the same
    with and without ITG.

    Args:
        reader: The Q-Former.
        images: One per text.
        texts: One per image.
        philox: `[2]`, the step's dropout seed.
        bos_token_id: As in `contrast_pass`.
    """
    B = texts.count
    contrast = contrast_pass(texts, reader.num_queries, bos_token_id, images.mask)
    words = contrast.ids, contrast.positions
    queries, text = reader.run(contrast.packed, words, images.keys_values, philox)
    return FirstPass(queries, text[:B], text[B:], contrast.labels)


@dataclass(frozen=True)
class MatchingPass:
    """Pass 2, or any set of image-text pairs under the bidirectional mask.

    Attributes:
        ids, positions: `[T]`, token ids and positions of all text rows.
        packed: The pass; it keeps no text rows.
    """

    ids: Tensor
    positions: Tensor
    packed: PackedPass


def matching_pass(
    texts: PackedTexts,
    negatives: tuple[Tensor, Tensor] | None,
    num_queries: int,
    kv_index: KVIndex | None,
    image_mask: Tensor | None,
) -> MatchingPass:
    """Lay out image-text pairs: B pairs, or 3B pairs if negatives are given.

    Args:
        texts: One per image.
        negatives: Token ids `[B, T]` and lengths `[B]` of each image's negative text; the pairs are
            then (own image, own text), (negative image, own text), (own image, negative text).
        num_queries: Q.
        kv_index: The image index of each pair; None: pair i has image i.
        image_mask: `[images, S]` bool, true where an image token is real.
    """
    device = texts.ids.device
    ids, positions, lengths = [texts.ids], [texts.positions], [texts.lengths]
    blocks = torch.arange(texts.count)
    kinds = [MaskKind.BIDIRECTIONAL] * texts.count
    pairs = texts.count
    if negatives is not None:
        words, places, pieces, fillers = _rows_of(*negatives)
        ids += [texts.ids, words]
        positions += [texts.positions, places]
        # from the offsets on the device: copying lengths to it would synchronise
        lengths = [texts.cu_seqlens.diff()] * 2 + [pieces]
        pairs = 3 * texts.count
        own = torch.arange(pairs)
        if fillers:  # pieces alternate between a text and its padding
            blocks = torch.cat(
                [own[: 2 * texts.count], own[2 * texts.count :].repeat_interleave(2)]
            )
            kinds = kinds * 2 + [MaskKind.BIDIRECTIONAL, MaskKind.UNIMODAL] * texts.count
        else:
            blocks, kinds = own, kinds * 3
    all_ids = torch.cat(ids)
    longest = max(texts.longest, 0 if negatives is None else negatives[0].shape[1])
    layout = AttentionLayout.build(
        pairs,
        num_queries,
        torch.cat(lengths),
        kinds,
        blocks,
        num_text_rows=len(all_ids),
        max_seqlen=longest,
        device=device,
    )
    none = torch.empty(0, dtype=torch.int64, device=device)
    packed = PackedPass(layout, kv_index, image_mask, kept_text=none)
    return MatchingPass(all_ids, torch.cat(positions), packed)


def second_pass(
    reader: Reader,
    images: ProjectedImages,
    texts: PackedTexts,
    negatives: tuple[Tensor, Tensor],
    philox: Tensor,
    *,
    longest: int,
    pad_token_id: int,
) -> Tensor:
    """Query states `[3B, Q, C]` of the pairs of ITM.

    The pairs are (own image, own text), (negative image, own text), (own image, negative text).

    Args:
        reader: The Q-Former.
        images: One per text.
        texts: One per image.
        negatives: Indices `[B]` int64 of each pair's negative image and negative text in the
            global batch; -1 for none.
        philox: `[2]`, the step's dropout seed.
        longest: The longest T of all ranks.
        pad_token_id: Pads the texts that are exchanged between ranks.
    """
    B, device = texts.count, images.tokens.device
    # a row without a negative (-1) is paired with itself, and the loss ignores it
    own = torch.arange(B, device=device) + rank() * B
    wanted, chosen = NegativeExchange.for_lists(
        [torch.where(index < 0, own, index.long()) for index in negatives], B
    )
    words, lengths = texts.padded(longest, pad_token_id)
    words, lengths = chosen.rows(words), chosen.rows(lengths)
    keys_values, mask, index = images_of_pairs(reader, images, wanted)
    pairs = matching_pass(texts, (words, lengths), reader.num_queries, index, mask)
    states, _ = reader.run(pairs.packed, (pairs.ids, pairs.positions), keys_values, philox, 1)
    return states


def images_of_pairs(
    reader: Reader, images: ProjectedImages, wanted: NegativeExchange
) -> tuple[list[Tensor | None], Tensor | None, KVIndex]:
    """Keys and values for the 3B pairs: this rank's images, then negatives from other ranks.

    Args:
        reader: Projects the image tokens received from other ranks.
        images: This rank's images.
        wanted: The exchange for the negative image of each pair.

    Returns:
        Keys and values, mask, and the image index of each pair, in the order of `matching_pass`.
    """
    keys_values, mask = images.keys_values, images.mask
    B = len(images.tokens)
    own = torch.arange(B, device=images.tokens.device)
    if wanted.ranks == 1:
        return keys_values, mask, KVIndex.build(torch.cat([own, wanted.index, own]), B)
    others = reader.images(wanted.rows(images.tokens))
    joined = [
        None if mine is None or theirs is None else torch.cat([mine, theirs])
        for mine, theirs in zip(keys_values, others.keys_values, strict=True)
    ]
    if mask is not None:
        mask = torch.cat([mask, wanted.rows(mask.to(torch.uint8)).bool()])
    return joined, mask, KVIndex.build(torch.cat([own, own + B, own]), 2 * B)


def _rows_of(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Unpad `[B, T]` ids without a host synchronisation.

    On the CPU the padding is dropped. On an accelerator that would need the number of real tokens
    on the host, so every text keeps T rows and its padding becomes a separate text that no query
    attends to.

    Returns:
        `(ids, positions, piece lengths, whether every second piece is padding)`.
    """
    B, T = padded.shape
    column = torch.arange(T, device=padded.device).expand(B, T)
    if padded.device.type == "cpu":
        real = column < lengths[:, None]
        return padded[real], column[real], lengths.to(torch.int32), False
    pieces = torch.stack([lengths, T - lengths], dim=1).flatten().to(torch.int32)
    return padded.flatten(), column.flatten(), pieces, True
