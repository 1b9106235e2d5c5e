"""Retrieval between images and texts with a trained stage-1 model.

Shapes: I images, J texts, Q queries, T text tokens, S image tokens, E image token width,
D feature width. Images are read by an `ImageReader`, a function from image numbers 0..I-1 to the
frozen encoder's tokens; a feature cache, a tensor in memory and a live encoder all qualify.
All fractions lie in [0, 1]. Paper (arXiv 2301.12597): section 3.1 for the similarity and the
matching head, 4.4 for retrieval: candidates by ITC similarity, re-ranked by ITM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2fast.stage1.model import Blip2Stage1

ImageReader = Callable[[Tensor], Tensor]
RECALL_KS = (1, 5, 10)


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenized texts, each with the number of the image that it describes.

    Args:
        input_ids: [J, T] int64, `[CLS] w1 .. wn [SEP]` then padding.
        attention_mask: [J, T], 1 for real tokens.
        image: [J] int64, the image number of each text.
    """

    input_ids: Tensor
    attention_mask: Tensor
    image: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.input_ids.shape)
        if self.input_ids.ndim != 2 or tuple(self.attention_mask.shape) != shape:
            raise ValueError(
                f"input_ids and attention_mask must both be [J, T], got {shape} and "
                f"{tuple(self.attention_mask.shape)}"
            )
        if tuple(self.image.shape) != shape[:1]:
            raise ValueError(
                f"image must name one image for each of the {shape[0]} texts, got shape "
                f"{tuple(self.image.shape)}"
            )

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Switch to eval mode without gradients; yields the model's device, then restores the mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def chunks(count: int, batch_size: int, least: int = 1) -> Iterator[Tensor]:
    """Split indices 0..count-1 into chunks of at most `batch_size`.

    A last chunk shorter than `least` is merged into the one before it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pieces = list(torch.arange(count).split(batch_size))
    if len(pieces) > 1 and len(pieces[-1]) < least:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    yield from pieces


def encode_all(
    model: Blip2Stage1,
    images: ImageReader,
    num_images: int,
    texts: TokenizedTexts,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """ITC features of all images and texts, on the CPU.

    Returns:
        image_features [I, Q, D] and text_features [J, D], both unit-normalised.
    """
    with evaluating(model) as device:
        image_features = [
            model.encode_image(images(rows).to(device))[0].float().cpu()
            for rows in chunks(num_images, batch_size)
        ]
        text_features = [
            model.encode_text(
                texts.input_ids[rows].to(device), texts.attention_mask[rows].to(device)
            )
            .float()
            .cpu()
            for rows in chunks(len(texts), batch_size)
        ]
    return torch.cat(image_features), torch.cat(text_features)


def retrieval_recall(
    score_i2t: Tensor, score_t2i: Tensor, text_image: Tensor, ks: Sequence[int] = RECALL_KS
) -> dict[str, float]:
    """Recall at k in both directions; if an image has several texts, any of them is a hit.

    Ties and NaN count against the model, so that constant or broken scores do not look like
    perfect retrieval.

    Args:
        score_i2t: [I, J] scores that rank the texts of an image.
        score_t2i: [I, J] scores that rank the images of a text.
        text_image: [J] the image number of each text.
        ks: the cut-offs.

    Returns:
        `i2t_r{k}` over the images that have a text, `t2i_r{k}` over the texts.

    Raises:
        ValueError: the shapes disagree.
    """
    num_images, num_texts = score_i2t.shape
    if score_t2i.shape != score_i2t.shape or text_image.shape != (num_texts,):
        raise ValueError(
            f"scores must be [I, J] both and text_image [J], got {tuple(score_i2t.shape)}, "
            f"{tuple(score_t2i.shape)} and {tuple(text_image.shape)}"
        )
    own = text_image[None, :] == torch.arange(num_images)[:, None]
    right_image = score_t2i.gather(0, text_image[None, :])
    rank_t2i = (~(score_t2i < right_image) & ~own).sum(0)
    has_text = own.any(1)
    best_own = score_i2t.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    rank_i2t = (~(score_i2t < best_own) & ~own).sum(1)[has_text]
    recall = {f"i2t_r{k}": (rank_i2t < k).float().mean().item() for k in ks}
    return recall | {f"t2i_r{k}": (rank_t2i < k).float().mean().item() for k in ks}


def match_logits(
    model: Blip2Stage1,
    images: ImageReader,
    texts: TokenizedTexts,
    pairs: tuple[Tensor, Tensor],
    batch_size: int = 64,
) -> Tensor:
    """ITM logits of (image, text) pairs.

    Args:
        pairs: image numbers [P] and text numbers [P].

    Returns:
        [P, 2] on the CPU; class 1 is "match".
    """
    image_rows, text_rows = pairs
    scores = []
    with evaluating(model) as device:
        for rows in chunks(len(image_rows), batch_size):
            chosen = text_rows[rows]
            logits = model.match(
                images(image_rows[rows]).to(device),
                texts.input_ids[chosen].to(device),
                texts.attention_mask[chosen].to(device),
            ).float()
            scores.append(logits.cpu())
    return torch.cat(scores) if scores else torch.empty(0, 2)


def rerank(
    model: Blip2Stage1,
    images: ImageReader,
    texts: TokenizedTexts,
    similarity: Tensor,
    k: int,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Re-rank the top k candidates of each row and column by matching score (paper 4.4).

    A candidate's score is its ITC similarity plus its "match" logit, as in LAVIS. Candidates rank
    above all others, which keep their ITC order.

    Args:
        similarity: [I, J] ITC similarity (cosine).
        k: candidates per query; 128 in the paper.

    Returns:
        score_i2t and score_t2i, [I, J] each, for `retrieval_recall`.

    Raises:
        ValueError: k is not positive.
    """
    if k < 1:
        raise ValueError(f"re-ranking needs k of at least 1 candidate, got k={k}")
    num_images, num_texts = similarity.shape
    candidates_i2t = torch.zeros_like(similarity, dtype=torch.bool)
    candidates_i2t.scatter_(1, similarity.topk(min(k, num_texts), dim=1).indices, True)
    candidates_t2i = torch.zeros_like(candidates_i2t)
    candidates_t2i.scatter_(0, similarity.topk(min(k, num_images), dim=0).indices, True)
    # A pair that is a candidate in both directions is scored once.
    image_rows, text_rows = (candidates_i2t | candidates_t2i).nonzero(as_tuple=True)
    match = torch.zeros_like(similarity)
    logits = match_logits(model, images, texts, (image_rows, text_rows), batch_size)
    match[image_rows, text_rows] = logits[:, 1]
    above_all = 2 * (match.abs().max() + similarity.abs().max()) + 1
    score = similarity + match
    return (
        torch.where(candidates_i2t, score + above_all, similarity),
        torch.where(candidates_t2i, score + above_all, similarity),
    )


def swapped_match_accuracy(
    model: Blip2Stage1,
    images: ImageReader,
    texts: TokenizedTexts,
    swapped: TokenizedTexts,
    batch_size: int = 64,
) -> dict[str, float]:
    """ITM accuracy on true texts and on hard negatives with one attribute swapped.

    Args:
        texts: true texts, [J].
        swapped: the hard negative of each, [J], for the same images.

    Returns:
        `itm_accuracy`: fraction of correct match decisions over the 2J pairs, chance 0.5;
        `itm_true` and `itm_swapped`: the same on each half;
        `itm_ranked`: fraction of texts that score above their hard negative, chance 0.5.

    Raises:
        ValueError: the two lists do not belong to the same images.
    """
    if not torch.equal(texts.image, swapped.image):
        raise ValueError(
            f"swapped texts must stand beside the true ones, image by image: "
            f"{len(texts)} true, {len(swapped)} swapped"
        )
    numbers = torch.arange(len(texts))
    true_score, wrong_score = (
        match_logits(model, images, some, (some.image, numbers), batch_size).diff(dim=1).squeeze(1)
        for some in (texts, swapped)
    )
    right_true = (true_score > 0).float().mean().item()
    right_wrong = (wrong_score <= 0).float().mean().item()
    return {
        "itm_accuracy": (right_true + right_wrong) / 2,
        "itm_true": right_true,
        "itm_swapped": right_wrong,
        "itm_ranked": (true_score > wrong_score).float().mean().item(),
    }
