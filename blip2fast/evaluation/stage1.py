"""Evaluation of stage 1 on held-out data: losses, retrieval and matching.

    evaluate_stage1(model, lambda rows: cache.read(rows), num_images, texts)

`held_out_losses` serves both stages. Shapes as in `blip2fast.evaluation.retrieval`. Paper (arXiv
2301.12597): sections 3.1, 3.2 and 4.4 (retrieval).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blip2fast.evaluation.retrieval import (
    ImageReader,
    TokenizedTexts,
    chunks,
    encode_all,
    evaluating,
    rerank,
    retrieval_recall,
    swapped_match_accuracy,
)
from blip2fast.ops.collectives import alone
from blip2fast.stage1.losses import max_query_similarity
from blip2fast.stage1.model import Blip2Stage1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random generators inside the `with` block and restore their states afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class HeldOutMeans:
    """Weighted means of the scalars `loss*` and `accuracy*` over several batches.

    A batch's value is weighted by the number of items that it averages over, which the model's
    output states in `counts` (pairs or words); without `counts`, by the batch's rows. If the total
    `loss` is a sum of other losses, as in stage 1, it is computed as the sum of their means.

    Attributes:
        totals: by name, the sum of value times weight.
        counts: by name, the sum of weights.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, output: Any, rows: int, share: float = 1.0) -> None:
        """Add the output of a batch with `rows` rows; `share` scales its weight."""
        counts = getattr(output, "counts", None)
        for name, value in vars(output).items():
            if not name.startswith(("loss", "accuracy")) or not isinstance(value, Tensor):
                continue
            if counts is not None and name not in counts:
                continue
            weight = share * float(rows if counts is None else counts[name])
            self.totals[name] = self.totals.get(name, 0.0) + weight * value.item()
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """The means by name; 0 where the total weight is 0."""
        means = {name: total / (self.counts[name] or 1) for name, total in self.totals.items()}
        parts = [value for name, value in means.items() if name.startswith("loss_")]
        return {"loss": sum(parts), **means} if parts and "loss" not in means else means


def held_out_means(
    model: nn.Module, batches: Iterable[tuple[Mapping[str, Tensor], float]], seed: int = 0
) -> HeldOutMeans:
    """Like `held_out_losses`, but returns this process's totals and weights before the division.

    Args:
        batches: pairs of keyword arguments for the model's forward and the share of the batch that
            this process counts. A share below 1 marks a batch that every process computes in
            full, without communication.

    Raises:
        ValueError: there is no batch.
    """
    found = HeldOutMeans()
    with evaluating(model) as device, seeded(seed, device):
        for batch, share in batches:
            with alone() if share < 1 else nullcontext():
                output = model(**{name: value.to(device) for name, value in batch.items()})
            found.add(output, len(next(iter(batch.values()))), share)
    if not found.totals:
        raise ValueError("held-out losses need at least one batch, got none")
    return found


def held_out_losses(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], seed: int = 0
) -> dict[str, float]:
    """Mean of every scalar `loss*` and `accuracy*` that the model returns (`HeldOutMeans`).

    ITG and the language-modelling loss do not depend on how samples are batched. ITC and ITM do:
    their negatives come from the same batch, so a smaller batch is easier.

    Stage 1 samples its negatives. Here they are drawn from `seed` and the caller's random state is
    restored, so evaluation is repeatable and does not affect training.

    Args:
        batches: keyword arguments for the model's forward.

    Raises:
        ValueError: there is no batch.
    """
    return held_out_means(model, ((batch, 1.0) for batch in batches), seed).means()


def caption_batch(images: ImageReader, texts: TokenizedTexts, numbers: Tensor) -> dict[str, Tensor]:
    """Arguments of a stage-1 forward pass for the texts at indices `numbers` and their images."""
    return {
        "image_embeds": images(texts.image[numbers]),
        "input_ids": texts.input_ids[numbers],
        "attention_mask": texts.attention_mask[numbers],
    }


def caption_batches(
    images: ImageReader, texts: TokenizedTexts, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of one text per image, for the stage-1 `held_out_losses`.

    Only the first text of each image is used, so no image appears twice in a batch and becomes its
    own false negative. The last batch may be smaller. A single leftover text would have no
    negatives and is added to the batch before it.
    """
    first = {i: j for j, i in reversed(list(enumerate(texts.image.tolist())))}
    numbers = torch.tensor(sorted(first.values()))
    for part in chunks(len(numbers), batch_size, least=2):
        yield caption_batch(images, texts, numbers[part])


def evaluate_stage1(
    model: Blip2Stage1,
    images: ImageReader,
    num_images: int,
    texts: TokenizedTexts,
    *,
    swapped: TokenizedTexts | None = None,
    rerank_k: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Losses, retrieval in both directions and, on request, re-ranked retrieval and ITM accuracy.

    Args:
        model: a `Blip2Stage1`.
        images: reader of the frozen encoder's tokens.
        num_images: I; images are numbered 0..I-1.
        texts: the captions; an image may have several.
        swapped: one hard negative for each of `texts`; None skips ITM accuracy.
        rerank_k: candidates that ITM re-ranks (128 in the paper); 0 skips re-ranking.
        batch_size: images, texts or pairs per forward pass.

    Returns:
        `loss, loss_itc, loss_itm, loss_itg, accuracy_*`, `{i2t,t2i}_r{1,5,10}`,
        `rerank_{i2t,t2i}_r{1,5,10}`, `itm_accuracy` and its parts.
    """
    results = held_out_losses(model, caption_batches(images, texts, batch_size))
    similarity = max_query_similarity(
        *encode_all(model, images, num_images, texts, batch_size), batch_size=batch_size
    )
    results |= retrieval_recall(similarity, similarity, texts.image)
    if rerank_k:
        scores = rerank(model, images, texts, similarity, rerank_k, batch_size)
        reranked = retrieval_recall(*scores, texts.image)
        results |= {f"rerank_{name}": value for name, value in reranked.items()}
    if swapped is not None:
        results |= swapped_match_accuracy(model, images, texts, swapped, batch_size)
    return results
