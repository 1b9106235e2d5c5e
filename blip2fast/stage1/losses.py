"""Reference stage-1 losses (arXiv 2301.12597, section 3.1) in plain PyTorch, for any device.

Shapes: b images on this rank, N images on all ranks, Q queries, D feature width, T text tokens,
V words. Similarities, softmaxes and losses are computed in fp32 (fp64 where the inputs are).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.precision import wide
from blip2fast.ops.collectives import GradMode, gather_detached, gather_with_grad, rank


def l2_normalize(x: Tensor) -> Tensor:
    """L2-normalise the last dimension in fp32 or fp64; half precision has an error of 4e-3."""
    return F.normalize(wide(x), dim=-1)


def max_query_similarity(
    image_features: Tensor, text_features: Tensor, batch_size: int | None = None
) -> Tensor:
    """`sim[i, j] = max_q <image[i, q], text[j]>`; the lowest query index wins a tie.

    Args:
        image_features: `[M, Q, D]`, normalised.
        text_features: `[N, D]`, normalised.
        batch_size: Images per chunk, so that `[M, Q, N]` is not materialised; None: all at once.

    Returns:
        `[M, N]`, fp32 or fp64.
    """
    if batch_size is not None:
        parts = image_features.split(batch_size)
        return torch.cat([max_query_similarity(part, text_features) for part in parts])
    M, Q, D = image_features.shape
    with torch.autocast(image_features.device.type, enabled=False):
        per_query = wide(image_features).reshape(M * Q, D) @ wide(text_features).T
        # max with an index, not amax: amax splits the gradient between ties
        return per_query.view(M, Q, -1).max(dim=1).values


def itc_logits(
    image_features: Tensor, text_features: Tensor, temp: Tensor, grad_mode: GradMode = "local"
) -> tuple[Tensor, Tensor]:
    """ITC logits: similarities of this rank's images and texts with all ranks', over temperature.

    Args:
        image_features: `[b, Q, D]`, normalised.
        text_features: `[b, D]`, normalised.
        temp: Scalar temperature, learned.
        grad_mode: `"local"`: gathered features carry no gradient (as in LAVIS); `"full"`: they do.

    Returns:
        `(sim_i2t, sim_t2i)`, each `[b, N]`: image i against every text, text i against every
        image.

    Raises:
        ValueError: shapes do not match, or `grad_mode` is unknown.
    """
    _check_features(image_features, text_features)
    if grad_mode not in ("local", "full"):
        raise ValueError(f"grad_mode: expected 'local' or 'full', got {grad_mode!r}")
    gather = gather_detached if grad_mode == "local" else gather_with_grad
    image_all, text_all = gather(image_features), gather(text_features)
    sim_i2t = max_query_similarity(image_features, text_all) / wide(temp)
    sim_t2i = max_query_similarity(image_all, text_features).T / wide(temp)
    return sim_i2t, sim_t2i


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.dim() != 3:
        shape = tuple(image_features.shape)
        raise ValueError(f"image_features: expected [b, Q, D], got shape {shape}")
    if text_features.shape != (image_features.shape[0], image_features.shape[2]):
        expected = [image_features.shape[0], image_features.shape[2]]
        raise ValueError(
            f"text_features: expected [b, D] = {expected} to go with image_features "
            f"{tuple(image_features.shape)}, got {tuple(text_features.shape)}"
        )


def counted_pairs(negatives: tuple[Tensor, Tensor]) -> Tensor:
    """Which of ITM's 3b pairs count towards the loss, `[3b]` bool.

    A negative pair counts if its negative exists. A matching pair counts if its image or its text
    has a negative; otherwise it would only teach the model to predict "match".

    Args:
        negatives: Negative image and text of each pair, `[b]`; below 0 for none.
    """
    of_text, of_image = (index >= 0 for index in negatives)
    return torch.cat([of_text | of_image, of_text, of_image])


def itm_loss(
    itm_logits: Tensor,
    negatives: tuple[Tensor, Tensor] | None = None,
    similarities: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Image-text matching loss over b matching pairs followed by 2b that do not match.

    The mean over the counted pairs (`counted_pairs`); 0, with zero gradient, if none is counted.

    Args:
        itm_logits: `[3b, 2]`; class 1 is "match".
        negatives: Negative image and text of each pair, `[b]`; below 0 for none. None:
            every pair has both.
        similarities: A scalar that is finite only if the similarities that the negatives were
            sampled from are. If it is not finite and a negative is missing, the loss is NaN,
            because the missing negative is then an effect of the non-finite similarities.

    Returns:
        `(loss, accuracy)`: scalars; the accuracy has no gradient.
    """
    pairs = itm_logits.shape[0]
    labels = (torch.arange(pairs, device=itm_logits.device) < pairs // 3).long()
    logits = wide(itm_logits)
    if negatives is None:
        right = itm_logits.detach().argmax(-1) == labels
        return F.cross_entropy(logits, labels), right.sum() / pairs
    counted = counted_pairs(negatives)
    right = (itm_logits.detach().argmax(-1) == labels) & counted
    number = counted.sum().clamp(min=1)
    loss = F.cross_entropy(logits, labels.masked_fill(~counted, -100), reduction="sum") / number
    # excluded pairs must not hide non-finite logits: 0 * inf and 0 * NaN are NaN
    hidden = (logits.detach() * 0).sum()
    if similarities is not None:
        hidden = hidden + (similarities.detach() * 0).masked_fill(counted.all(), 0)
    return loss + hidden, right.sum() / number


def itg_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The generation loss of logits that a head has computed: the definition of `lm_cross_entropy`.

    Args:
        logits: `[K, V]`.
        labels: `[K]`, or -100 for rows that are ignored.
        label_smoothing: As in `Stage1Config`.

    Returns:
        `(loss, right)`: the mean loss, and the number of labels whose logit is the largest.
    """
    loss = F.cross_entropy(wide(logits), labels, label_smoothing=label_smoothing)
    return loss, (logits.detach().argmax(-1) == labels).sum()


def itc_loss_of_logits(
    logits: tuple[Tensor, Tensor], image_ids: Tensor | None, label_smoothing: float
) -> Tensor:
    """The contrastive loss of materialised logits: the definition of `itc_loss`.

    Args:
        logits: From `itc_logits`, `[b, N]` each.
        image_ids: `[b]`; pairs of equal ids are positives of each other. None: each pair alone.
        label_smoothing: As in `Stage1Config`.
    """
    b, N = logits[0].shape
    own = torch.arange(b, device=logits[0].device) + rank() * b
    rows = own if image_ids is None else image_ids.reshape(-1)
    columns = gather_detached(rows)
    positive = (rows[:, None] == columns[None, :]).to(logits[0].dtype)
    target = (1 - label_smoothing) * positive / positive.sum(1, keepdim=True) + label_smoothing / N
    sides = [-(target * side.log_softmax(-1)).sum(-1).mean() for side in logits]
    return (sides[0] + sides[1]) / 2
