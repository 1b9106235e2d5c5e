"""Weights that make the mean over the words of a whole optimizer step.

A step consists of passes, one per micro-step and process, and DeepSpeed averages their losses.
Texts differ in length, so the mean of the passes' means over words is not the mean over all words.
Here each pass's mean is weighted by its share of the step's words. ITM is weighted likewise by
counted pairs: a pass whose pairs all share one image id has none.

Legend: A micro-steps per optimizer step, W processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2fast.ops.collectives import gather_detached, rank, world_size
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2

Weights = dict[str, float | Tensor]


def pass_weights(
    model: Blip2Stage1 | Blip2Stage2, batches: Sequence[Mapping[str, Tensor]], device: torch.device
) -> list[Weights]:
    """The weight of each loss and accuracy in each pass of this process.

    Every process must call this with the same number of batches. The counts are read from texts on
    the CPU; with several processes they are exchanged on the device, and the host does not wait.

    Args:
        batches: the A micro-batches of an optimizer step, on the CPU.
        device: the device of this process.

    Returns:
        For each batch, weights by the names of the model's output; the names that are missing have
        weight 1. Values are scalars on the device, or numbers with one process.
    """
    rows = []
    for batch in batches:
        ids = batch.get("image_ids")
        low, high = (0, 1) if ids is None else (int(ids.min()), int(ids.max()))
        rows.append([model.num_target_words(batch), low, high])
    alone = world_size() == 1
    own = torch.tensor(rows, dtype=torch.float64, pin_memory=not alone and device.type == "cuda")
    if not alone:
        own = own.to(device, non_blocking=True)
    words, lowest, highest = gather_detached(own).view(-1, *own.shape).unbind(-1)
    by_words = words[rank()] * (words.numel() / words.sum().clamp(min=1))
    has_negatives = (highest.amax(0) > lowest.amin(0)).double()
    by_pairs = has_negatives * (len(rows) / has_negatives.sum().clamp(min=1))
    weights: list[Weights] = []
    for of_words, of_pairs in zip(*(each.unbind() for each in (by_words, by_pairs)), strict=True):
        word, pair = (float(x) if alone else x for x in (of_words, of_pairs))
        if isinstance(model, Blip2Stage1):
            named = {"loss_itg": word, "accuracy_itg": word}
            weights.append({**named, "loss_itm": pair, "accuracy_itm": pair})
        else:
            weights.append({"loss": word})
    return weights


def weighted(output: Any, weights: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """The losses and accuracies of a model's output, weighted; `loss` is the weighted total."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if name.startswith(("loss", "accuracy")) and value is not None:
            weight = weights.get(name, 1.0)
            if isinstance(weight, Tensor):
                weight = weight.to(value.dtype)
            found[name] = value * weight
    parts = [value for name, value in found.items() if name.startswith("loss_")]
    if parts and weights:
        found["loss"] = sum(parts[1:], parts[0])
    return found
