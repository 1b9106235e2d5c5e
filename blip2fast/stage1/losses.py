"""The three stage-1 losses, as defined (arXiv 2301.12597, section 3.1): plain PyTorch, any device.

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
    """Vectors `[..., D]` over their length; half precision would be off by 4e-3."""
    return F.normalize(wide(x), dim=-1)


def max_query_similarity(
    image_features: Tensor, text_features: Tensor, batch_size: int | None = None
) -> Tensor:
    """`sim[i, j] = max_q <image[i, q], text[j]>`; the lowest query index wins a tie.

    Args:
        image_features: `[M, Q, D]`, normalised.
        text_features: `[N, D]`, normalised.
        batch_size: Images at a time, so that `[M, Q, N]` is never held; None: all.

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
    """Similarities of this rank's images and texts with those of all ranks, over temperature.

    Args:
        image_features: `[b, Q, D]`, normalised.
        text_features: `[b, D]`, normalised.
        temp: Scalar temperature, learned.
        grad_mode: `"local"`: features of other places in the gathered batch carry no gradient
            (what LAVIS trains with); `"full"`: they do.

    Returns:
        `(sim_i2t, sim_t2i)`, each `[b, N]`: image i against every text, text i against every
        image.

    Raises:
        ValueError: shapes do not fit together, or `grad_mode` is unknown.
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


def positive_pairs(
    batch: int, world_batch: int, image_ids: Tensor | None, device: torch.device
) -> Tensor:
    """`[b, N]` bool: true where image i and text j belong together.

    Without `image_ids` that is the own pair alone; with them, every pair of equal id.
    """
    if image_ids is not None:
        return image_ids.view(-1, 1) == gather_detached(image_ids.view(-1)).view(1, -1)
    own = torch.arange(batch, device=device) + rank() * batch
    return own[:, None] == torch.arange(world_batch, device=device)[None, :]


def itc_loss(
    sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor, label_smoothing: float = 0.1
) -> Tensor:
    """Image-text contrastive loss: cross-entropy both ways, averaged.

    The target of a row is `(1 - s) * positives / count + s / N` with s the label smoothing; with
    one positive in a row this is PyTorch's `cross_entropy(..., label_smoothing=s)`.

    Args:
        sim_i2t, sim_t2i: `[b, N]` similarities over temperature.
        positives: `[b, N]` bool, at least one in each row.
        label_smoothing: s, between 0 and 1.

    Returns:
        Scalar loss, mean over this rank's rows.
    """
    weight = positives.to(sim_i2t.dtype)
    target = (1 - label_smoothing) * weight / weight.sum(1, keepdim=True)
    target = target + label_smoothing / positives.shape[1]
    return (F.cross_entropy(sim_i2t, target) + F.cross_entropy(sim_t2i, target)) / 2


def sample_hard_negatives(
    sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one hard negative per row from the softmax of its similarities, positives excluded.

    Args:
        sim_i2t, sim_t2i: `[b, N]` similarities over temperature.
        positives: `[b, N]` bool, what must not be drawn.

    Returns:
        `(negative_image, negative_text)`, each `[b]` int64, indices into the gathered batch:
        the negative image of text j is drawn from its text-to-image row, the negative text of
        image i from its image-to-text row.

    Raises:
        ValueError: a row has no negative (every image of the batch is a positive of it).
    """
    without = positives.all(dim=1)
    if bool(without.any()):
        rows = without.nonzero().flatten().tolist()
        raise ValueError(
            f"no negative exists for rows {rows[:8]} of {len(positives)}: every one of the "
            f"{positives.shape[1]} pairs in the batch shares their image id; use a larger batch "
            "or one with more than one image"
        )
    with torch.no_grad():
        t2i = sim_t2i.masked_fill(positives, -torch.inf).softmax(dim=1)
        i2t = sim_i2t.masked_fill(positives, -torch.inf).softmax(dim=1)
        return t2i.multinomial(1).squeeze(1), i2t.multinomial(1).squeeze(1)


def top1_accuracy(similarity: Tensor, positives: Tensor) -> Tensor:
    """Share of rows of `[b, N]` whose best column is a positive; scalar fp32."""
    best = similarity.argmax(dim=1, keepdim=True)
    return positives.gather(1, best).float().mean()


def itm_loss(
    itm_logits: Tensor, negatives: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Image-text matching loss over b matching pairs followed by 2b that do not match.

    Args:
        itm_logits: `[3b, 2]`; class 1 is "match".
        negatives: Negative image and text of each pair, `[b]`; where one is below 0 there was none
            to draw, and its pair counts for nothing.

    Returns:
        `(loss, accuracy)`: scalars; the accuracy without gradient.
    """
    pairs = itm_logits.shape[0]
    labels = (torch.arange(pairs, device=itm_logits.device) < pairs // 3).long()
    if negatives is not None:
        missing = torch.cat([labels[: pairs // 3] < 0, negatives[0] < 0, negatives[1] < 0])
        labels = labels.masked_fill(missing, -100)
    counted = labels >= 0
    right = (itm_logits.detach().argmax(-1) == labels) & counted
    return F.cross_entropy(wide(itm_logits), labels), right.sum() / counted.sum()


def itg_labels(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Targets of the text generation loss: the next token, -100 where that is padding.

    Args:
        input_ids: `[B, T]`.
        attention_mask: `[B, T]`, nonzero where a token is real.

    Returns:
        `[B, T-1]` int64, the target of positions 0 to T-2.
    """
    return input_ids[:, 1:].masked_fill(~attention_mask[:, 1:].bool(), -100)


def itg_loss(itg_logits: Tensor, labels: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Image-grounded text generation loss: next-token cross-entropy with label smoothing.

    Args:
        itg_logits: `[B, T-1, V]`.
        labels: `[B, T-1]`, -100 where ignored.
        label_smoothing: Between 0 and 1.

    Returns:
        Scalar, mean over the labels that are not ignored.
    """
    return F.cross_entropy(
        wide(itg_logits).flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing
    )
