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

from blip2fast._choices import RECALL_KS
from blip2fast.stage1.model import Blip2Stage1

ImageReader = Callable[[Tensor], Tensor]
# candidates that ITM re-ranks (paper, section 4.4)
RERANK_K = 128


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
    ranks_i2t, ranks_t2i = retrieval_ranks(score_i2t, score_t2i, text_image)
    ranks_i2t = ranks_i2t[ranks_i2t >= 0]
    recall = {f"i2t_r{k}": (ranks_i2t < k).float().mean().item() for k in ks}
    return recall | {f"t2i_r{k}": (ranks_t2i < k).float().mean().item() for k in ks}


def retrieval_ranks(
    score_i2t: Tensor, score_t2i: Tensor, text_image: Tensor
) -> tuple[Tensor, Tensor]:
    """How many wrong texts rank above each image's best own text, and wrong images above a text's.

    Args:
        score_i2t, score_t2i, text_image: as in `retrieval_recall`, with its rule for ties and NaN.

    Returns:
        Ranks from 0 of the images [I], -1 for those without a text, and of the texts [J].

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
    ranks_t2i = (~(score_t2i < right_image) & ~own).sum(0)
    best_own = score_i2t.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    ranks_i2t = (~(score_i2t < best_own) & ~own).sum(1)
    return ranks_i2t.masked_fill(~own.any(1), -1), ranks_t2i


def match_logits(
    model: Blip2Stage1,
    images: ImageReader,
    texts: TokenizedTexts,
    pairs: tuple[Tensor, Tensor],
    batch_size: int = 64,
) -> Tensor:
    """ITM logits of (image, text) pairs; an image's keys and values are projected once.

    Args:
        pairs: image numbers [P] and text numbers [P], in any order.
        batch_size: pairs per forward pass, and images whose keys and values are held at a time.

    Returns:
        [P, 2] on the CPU, in the order of the pairs; class 1 is "match".
    """
    order = pairs[0].argsort(stable=True)
    image_rows, text_rows = (rows[order] for rows in pairs)
    logits = torch.empty(len(order), 2)
    with evaluating(model) as device:
        for group in _image_groups(image_rows, batch_size):
            numbers, index = image_rows[group].unique_consecutive(return_inverse=True)
            projected = model.project_images(images(numbers).to(device))
            for rows in chunks(len(index), batch_size):
                chosen = text_rows[group][rows]
                logits[order[group][rows]] = (
                    model.match(
                        projected,
                        texts.input_ids[chosen].to(device),
                        texts.attention_mask[chosen].to(device),
                        image_index=index[rows].to(device),
                    )
                    .float()
                    .cpu()
                )
    return logits


def _image_groups(image_rows: Tensor, batch_size: int) -> Iterator[slice]:
    """Parts of sorted image numbers: whole images of up to `batch_size` pairs together, or one."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    counts = image_rows.unique_consecutive(return_counts=True)[1].tolist()
    start = end = 0
    for count in counts:
        if end > start and end - start + count > batch_size:
            yield slice(start, end)
            start = end
        end += count
    if end > start:
        yield slice(start, end)


@dataclass(frozen=True)
class Candidates:
    """The pairs that ITM re-ranks.

    Attributes:
        of_images: [I, J] bool, the best texts of each image.
        of_texts: [I, J] bool, the best images of each text.
    """

    of_images: Tensor
    of_texts: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Image numbers [P], ascending, and text numbers [P]; a pair of both kinds comes once."""
        images, texts = (self.of_images | self.of_texts).nonzero(as_tuple=True)
        return images, texts


def find_candidates(similarity: Tensor, k: int) -> Candidates:
    """The k most similar texts of each image, and images of each text.

    Args:
        similarity: [I, J] ITC similarity.
        k: candidates per query.

    Raises:
        ValueError: k is not positive.
    """
    if k < 1:
        raise ValueError(f"re-ranking needs k of at least 1 candidate, got k={k}")
    num_images, num_texts = similarity.shape
    of_images = torch.zeros_like(similarity, dtype=torch.bool)
    of_images.scatter_(1, similarity.topk(min(k, num_texts), dim=1).indices, True)
    of_texts = torch.zeros_like(of_images)
    of_texts.scatter_(0, similarity.topk(min(k, num_images), dim=0).indices, True)
    return Candidates(of_images, of_texts)


def reranked_scores(
    similarity: Tensor, candidates: Candidates, match: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores that rank candidates above all others, which keep their ITC order.

    A candidate's score is its ITC similarity plus its "match" logit, as in LAVIS.

    Args:
        similarity: [I, J] ITC similarity.
        candidates: from `find_candidates`.
        match: [P], the "match" logit of each of `candidates.pairs()`.

    Returns:
        score_i2t and score_t2i, [I, J] each, for `retrieval_recall`.
    """
    logits = torch.zeros_like(similarity)
    logits[candidates.pairs()] = match.to(similarity)
    above_all = 2 * (logits.abs().max() + similarity.abs().max()) + 1
    score = similarity + logits + above_all
    return (
        torch.where(candidates.of_images, score, similarity),
        torch.where(candidates.of_texts, score, similarity),
    )


def rerank(
    model: Blip2Stage1,
    images: ImageReader,
    texts: TokenizedTexts,
    similarity: Tensor,
    k: int,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Re-rank the top k candidates of each row and column by matching score (paper 4.4).

    Args:
        similarity: [I, J] ITC similarity (cosine).
        k: candidates per query; 128 in the paper.

    Returns:
        score_i2t and score_t2i, [I, J] each, as `reranked_scores`.

    Raises:
        ValueError: k is not positive.
    """
    candidates = find_candidates(similarity, k)
    logits = match_logits(model, images, texts, candidates.pairs(), batch_size)
    return reranked_scores(similarity, candidates, logits[:, 1])


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
