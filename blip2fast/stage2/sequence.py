"""The language model's input sequence: soft prompts of images and text embeddings.

Two forms. One image per sample, in front, as in the paper:

    prompts [B, Q, L], input_ids [B, T]  ->  [B, Q + T, L]

Any number of images per sample, at any position: `input_ids` [B, T] holds one `IMAGE_PLACE` per
soft prompt (`Stage2Text` inserts Q of them for every image marker). The prompts [N, Q, L] of all
images, sample by sample, replace these placeholders:

    input_ids  P P P P a cat P P P P a   ->  [B, T, L]      (Q = 4, two images in this sample)

Shapes: B samples, N images of all samples, Q queries, T tokens, L language model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blip2fast.ops.checks import describe, is_float
from blip2fast.ops.tracing import has_values
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.language_model import check_positions, check_text
from blip2fast.stage2.token_rows import IMAGE_PLACE


def read_sequence(
    language_model: PreTrainedModel,
    prompts: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Embeddings of soft prompts and text, with their attention mask.

    Args:
        language_model: the frozen model.
        prompts: [B, Q, L], or [N, Q, L] with `image_counts`.
        input_ids: [B, T], with `IMAGE_PLACE` where soft prompts go if `image_counts` are given.
        attention_mask: [B, T], nonzero where a token (or soft prompt) is real.
        image_counts: [B], number of images of each sample; None: one, in front.

    Returns:
        `(embeds [B, Q + T, L], mask [B, Q + T])`, or `[B, T, L]` and `[B, T]` with `image_counts`.

    Raises:
        ValueError: invalid shapes or ids, mismatched image counts, or a sequence longer than the
            model's position limit.
    """
    if image_counts is not None:
        return _in_place(language_model, prompts, input_ids, attention_mask, image_counts)
    B, Q, _ = prompts.shape
    check_text(language_model, "input_ids", input_ids, attention_mask, B)
    check_positions(language_model, soft_prompts=Q, text_tokens=input_ids.shape[1])
    text = language_model.get_input_embeddings()(input_ids)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    mask = torch.cat([attention_mask.new_ones(B, Q), attention_mask], dim=1)
    return torch.cat([prompts.to(text.dtype), text], dim=1), mask


def _in_place(
    language_model: PreTrainedModel,
    prompts: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_counts: Tensor,
) -> tuple[Tensor, Tensor]:
    if input_ids.dim() != 2 or is_float(input_ids):
        raise ValueError(f"input_ids: expected [B, T] integers, got {describe(input_ids)}")
    B = check_counts(image_counts, len(input_ids), len(prompts))
    is_place = input_ids == IMAGE_PLACE
    _check_places(is_place, image_counts, prompts.shape[1])
    ids = input_ids.masked_fill(is_place, 0)
    check_text(language_model, "input_ids", ids, attention_mask, B)
    # every row has `length` columns; the error message shows the row with the most soft prompts
    length, most = ids.shape[1], int(is_place.sum(1).max()) if ids.numel() else 0
    check_positions(language_model, soft_prompts=most, text_tokens=length - most)
    text = language_model.get_input_embeddings()(ids)
    embeds = text.masked_scatter(is_place.unsqueeze(-1), prompts.to(text.dtype))
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return embeds, mask


def check_counts(image_counts: Tensor, num_texts: int, num_images: int) -> int:
    """Validate `image_counts` [B], which must sum to the number of images; returns B."""
    if image_counts.shape != (num_texts,) or is_float(image_counts):
        raise ValueError(
            f"image_counts: expected [B] = [{num_texts}] integers, got {describe(image_counts)}"
        )
    wanted = int(image_counts.sum())
    if wanted != num_images:
        raise ValueError(
            f"image_counts: the {num_texts} samples have {wanted} images, but {num_images} are "
            "given; give all images of a batch as one list, sample by sample"
        )
    return num_texts


def _check_places(is_place: Tensor, image_counts: Tensor, Q: int) -> None:
    """Require Q placeholders for each image of a row.

    Synchronises a GPU, as the loss does anyway when it selects the rows with labels.
    """
    places = is_place.sum(1)
    wrong = (places != image_counts * Q).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        found, count = int(places[row]), int(image_counts[row])
        raise ValueError(
            f"input_ids: text {row} has {found} places for soft prompts = {found / Q:g} image "
            f"markers of {Q} queries, but image_counts[{row}] is {count}; one marker an image"
        )


def instruction(
    config: Stage2Config, images: int, ids: Tensor | None, mask: Tensor | None
) -> dict[str, Tensor]:
    """The Q-Former's keyword arguments for instructions [N, T'']; empty if not text-conditioned.

    Raises:
        ValueError: instructions are missing, unsupported by the Q-Former, or invalid.
    """
    if not config.text_conditioned:
        if ids is not None or mask is not None:
            raise ValueError(
                "qformer_input_ids: this Q-Former reads images alone; build it with "
                "text_conditioned=True for instructions"
            )
        return {}
    if ids is None:
        raise ValueError(
            "qformer_input_ids: this Q-Former is text-conditioned and needs an instruction for "
            "each image, got none"
        )
    if ids.dim() != 2 or is_float(ids) or ids.shape[0] != images:
        raise ValueError(
            f"qformer_input_ids: expected [{images}, T] integers, one row an image, got "
            f"{describe(ids)}"
        )
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(
            f"qformer_attention_mask: expected the shape of qformer_input_ids {tuple(ids.shape)}, "
            f"got {describe(mask)}"
        )
    if has_values(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise ValueError(
            f"qformer_input_ids: expected ids from 0 to {config.vocab_size - 1}, got "
            f"{int(ids.min())} to {int(ids.max())}; does the tokenizer belong to this Q-Former?"
        )
    queries = mask.new_ones(images, config.num_query_tokens)
    return {"input_ids": ids, "attention_mask": torch.cat([queries, mask], dim=1)}


def empty_text(language_model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Token ids of an empty text: bos, or eos for an encoder; [B, 0 or 1]."""
    config = language_model.config.get_text_config()
    token = config.eos_token_id if language_model.config.is_encoder_decoder else config.bos_token_id
    if isinstance(token, list):
        token = token[0]
    size = (prompts.shape[0], 0 if token is None else 1)
    return torch.full(size, token or 0, dtype=torch.long, device=prompts.device)


def padded_on(side: str, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move all padding of [B, L, C] embeddings to one side.

    "left" is for a decoder-only model, which continues from the last column. The padding also goes
    before the soft prompts: between them and the text, it would push them out of the window of a
    model with sliding-window attention (Gemma 2, Mistral). "right" is for an encoder with relative
    positions, where a gap would shift them.
    """
    real = mask != 0
    order = (real if side == "left" else ~real).int().argsort(dim=1, stable=True)
    return embeds.take_along_dim(order.unsqueeze(-1), dim=1), mask.gather(1, order)
