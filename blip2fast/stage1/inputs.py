"""Validation of stage-1 inputs; error messages show the offending values.

Checks that would synchronise a GPU run for CPU tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2fast.ops.checks import describe, is_float
from blip2fast.ops.collectives import HostCopy, gather_detached, rank, world_size
from blip2fast.ops.tracing import has_values
from blip2fast.stage1.texts import PackedTexts, PaddedTexts, check_packed


def packed_texts(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    pad_token_id: int,
    vocab_size: int,
    max_positions: int,
) -> PackedTexts:
    """Validate padded `[B, T]` or packed `[T_total]` ids and return packed texts."""
    if input_ids is None:
        raise ValueError("input_ids: expected [B, T] token ids, got none")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask: packed text has no padding; give cu_seqlens alone")
        check_packed(input_ids, cu_seqlens)
        _check_ids(input_ids, vocab_size)
        texts = PackedTexts.of(input_ids.long(), cu_seqlens.cpu().diff())
    else:
        if input_ids.dim() != 2 or is_float(input_ids):
            raise ValueError(f"input_ids: expected [B, T] integers, got {describe(input_ids)}")
        if attention_mask is None:
            attention_mask = input_ids != pad_token_id
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {describe(attention_mask)}"
            )
        if 0 in input_ids.shape:
            raise ValueError(f"input_ids: the batch is empty, got {describe(input_ids)}")
        _check_ids(input_ids, vocab_size)
        _check_padding(attention_mask.bool())
        texts = PackedTexts.from_padded(input_ids.long(), attention_mask)
    if texts.count == 0:
        raise ValueError(f"input_ids: the batch is empty, got {describe(input_ids)}")
    if int(texts.lengths.min()) < 1:
        row = int(texts.lengths.argmin())
        raise ValueError(f"input_ids: text {row} has no token; each needs at least its [CLS]")
    if texts.longest > max_positions:
        raise ValueError(
            f"input_ids: texts of {texts.longest} tokens do not fit the position table of "
            f"{max_positions}; truncate the captions or raise max_position_embeddings"
        )
    return texts


def padded_texts(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    pad_token_id: int,
    vocab_size: int,
    max_positions: int,
) -> PaddedTexts:
    """As `packed_texts`, by shapes alone: the texts stay padded."""
    if cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens: a compiled or transformed model takes padded texts, since shapes must not "
            "depend on their lengths; give input_ids [B, T] and attention_mask"
        )
    if input_ids is None or input_ids.dim() != 2 or is_float(input_ids) or 0 in input_ids.shape:
        got = "none" if input_ids is None else describe(input_ids)
        raise ValueError(f"input_ids: expected [B, T] integers, not empty, got {got}")
    if attention_mask is None:
        attention_mask = input_ids != pad_token_id
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)}, "
            f"got {describe(attention_mask)}"
        )
    if input_ids.shape[1] > max_positions:
        raise ValueError(
            f"input_ids: texts of {input_ids.shape[1]} tokens do not fit the position table of "
            f"{max_positions}; truncate the captions or raise max_position_embeddings"
        )
    return PaddedTexts(input_ids.long(), attention_mask.bool())


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    if is_float(input_ids):
        raise ValueError(f"input_ids: expected integers, got {describe(input_ids)}")
    if not has_values(input_ids) or input_ids.numel() == 0:
        return
    if int(input_ids.max()) >= vocab_size or int(input_ids.min()) < 0:
        raise ValueError(
            f"input_ids: expected ids from 0 to {vocab_size - 1} (vocab_size={vocab_size}), "
            f"got {int(input_ids.min())} to {int(input_ids.max())}; does the tokenizer belong "
            "to this model?"
        )


def _check_padding(real: Tensor) -> None:
    if not has_values(real):
        return
    if not bool(real[:, 0].all()):
        row = int((~real[:, 0]).nonzero()[0])
        raise ValueError(f"attention_mask: text {row} starts with padding; pad on the right")
    holes = (real[:, 1:] & ~real[:, :-1]).any(dim=1)
    if bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"attention_mask: text {row} has a real token after padding; pad on the right"
        )


def check_pairs(image_embeds: Tensor, texts: PackedTexts | PaddedTexts) -> None:
    """Require one text per image."""
    if len(image_embeds) != texts.count:
        raise ValueError(
            f"input_ids: expected one text for each of {len(image_embeds)} images, got "
            f"{texts.count} texts"
        )


def check_training_batch(texts: PackedTexts | PaddedTexts, image_ids: Tensor | None) -> None:
    """Require at least one negative and one token to predict, which the losses need."""
    B = texts.count
    if B * world_size() < 2:
        raise ValueError(
            "batch of 1 pair on 1 process: the contrastive and matching losses need negatives; "
            "use a batch of 2 or more"
        )
    if texts.longest < 2:
        raise ValueError(
            f"input_ids: no text has a token after its first one, so there is none to predict; "
            f"got {B} texts of one token"
        )
    if image_ids is not None and (image_ids.shape not in ((B,), (B, 1)) or is_float(image_ids)):
        raise ValueError(f"image_ids: expected [B] = [{B}] integers, got {describe(image_ids)}")


def sizes_of_ranks(
    image_embeds: Tensor,
    texts: PackedTexts | PaddedTexts,
    image_ids: Tensor | None,
    visible: Tensor | None,
) -> HostCopy:
    """Gather the batch sizes of all ranks, for `check_ranks_agree`.

    A collective: every rank must call it.
    """
    B, S, _ = image_embeds.shape
    own = [[B, S, image_ids is not None, visible is not None, texts.longest]]
    if world_size() == 1:
        return HostCopy(torch.tensor(own))
    device = image_embeds.device
    # from pinned memory the copy to a GPU is asynchronous
    sent = torch.tensor(own, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return HostCopy(gather_detached(sent))


def check_ranks_agree(sizes: HostCopy) -> int:
    """Require equal batch shapes on all ranks; returns the longest T of any rank.

    With mismatched shapes the later collectives would hang or abort, so call this before them.

    Args:
        sizes: Result of `sizes_of_ranks`; the host waits for it here.

    Raises:
        ValueError: on every rank, with the values of all ranks.
    """
    ranks = list(zip(*sizes.tolist(), strict=True))
    names = ("batch size", "image tokens", "image_ids given", "image_attention_mask given")
    for name, values in zip(names, ranks, strict=False):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name}: expected the same on every rank, got {list(values)}; drop the last "
                "partial batch, pad image tokens to one length with a mask, give ids and masks "
                "everywhere"
            )
    return int(max(ranks[-1]))


def check_negatives(negatives: tuple[Tensor, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Validate caller-provided negatives: global batch indices, not the own pair; -1 for none."""
    world_batch = batch * world_size()
    for name, index in zip(("negative_image", "negative_text"), negatives, strict=True):
        if index.shape != (batch,) or is_float(index):
            raise ValueError(f"{name}: expected [B] = [{batch}] integers, got {describe(index)}")
        outside = has_values(index) and bool(((index < -1) | (index >= world_batch)).any())
        if outside:
            raise ValueError(
                f"{name}: expected indices from 0 to {world_batch - 1} (the batch of all ranks), "
                f"or -1 for none, got {index.tolist()[:8]}"
            )
        own = torch.arange(batch, device=index.device) + rank() * batch
        if has_values(index) and bool((index == own).any()):
            rows = (index == own).nonzero().flatten().tolist()
            raise ValueError(f"{name}: rows {rows[:8]} point at their own pair, which matches")
    return negatives[0].long(), negatives[1].long()


def check_new_tokens(max_new_tokens: int, limit: int) -> None:
    """Require `max_new_tokens` from 1 to `limit`, the size of the position table."""
    if not 1 <= max_new_tokens <= limit:
        raise ValueError(f"max_new_tokens: expected 1 to {limit}, got {max_new_tokens}")
