"""Says where a value that is not finite comes from: a parameter, an image, or the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from blip2fast.data.batches import Batch
from blip2fast.training.build import Run
from blip2fast.training.finite import (
    GRADIENT,
    Outcome,
    gather_lists,
    nonfinite_names,
    some_of,
)

ToTokens = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_LOWER_RATE = "lower optim.lr, or use precision bf16 or fp32 instead of fp16"


def explain(
    outcome: Outcome,
    parameters: Mapping[str, Tensor],
    batches: Iterable[dict[str, Tensor]],
    keys: Sequence[str],
    to_tokens: ToTokens,
) -> tuple[str, bool]:
    """Explain a step that was not finite, as a sentence; every process must call this.

    Args:
        outcome: what was found in the step.
        parameters: the trained parameters, and frozen ones, by name.
        batches: the batches of this process in that step, read again.
        keys: their image keys, in order.
        to_tokens: moves a batch to the device, images as tokens in the run's precision.

    Returns:
        The sentence, and whether a parameter is not finite, from which no run recovers.
    """
    losses = [name for name in outcome.nonfinite if name != GRADIENT]
    if len(losses) > 1:
        losses = [name for name in losses if name != "loss"]  # their sum
    # the gradient of a loss that is not finite is not finite either
    where = f"step {outcome.step}: {' and '.join(losses) or 'the gradient'} not finite"
    bad = gather_lists(nonfinite_names(parameters))
    if bad:
        return f"{where}, as parameters are not: {some_of(bad)}: {_LOWER_RATE}", True
    images = gather_lists(_bad_images(batches, keys, to_tokens))
    if images:
        return f"{where}, as the tokens of images are not: {some_of(images)}: repair them", False
    every = gather_lists(keys)
    return (
        f"{where}, from finite images and parameters, in the computation: {_LOWER_RATE}. The "
        f"step's images: {some_of(every, 16)}"
    ), False


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weights that are in this process as floating-point numbers."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        # under ZeRO-3 and offloading they are elsewhere
        if not weight.requires_grad and weight.numel() and weight.device.type != "meta"
    }


def explain_held_out(parts: Run, to_tokens: ToTokens) -> str:
    """Which held-out images have tokens that are not finite, if any, as a clause."""
    if parts.held_out is None:
        return "there are no held-out data"
    bad = []
    for number, key in enumerate(parts.held_out.keys()):
        batch = parts.held_out.images([key], Batch(0, torch.tensor([number]).numpy()))
        bad += _bad_images([batch], [key], to_tokens)
    if bad:
        return f"the tokens of images are not: {some_of(bad)}: repair them"
    return f"all its images are, so it is the computation: {_LOWER_RATE}"


def _bad_images(
    batches: Iterable[dict[str, Tensor]], keys: Sequence[str], to_tokens: ToTokens
) -> list[str]:
    finite: list[bool] = []
    for batch in batches:
        moved = to_tokens(batch)
        # pixels, where the model has its own encoder
        tokens = moved["images"] if "images" in moved else moved["image_embeds"]
        finite += tokens.isfinite().flatten(1).all(1).tolist()
    # texts without an image are given an empty list of tokens
    return [key for key, good in zip(keys, finite, strict=False) if not good]
