"""Says where a value that is not finite comes from: a parameter, an image, or the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from blip2fast.data.batches import Batch
from blip2fast.offload.streaming import stream_of
from blip2fast.training.build import Run
from blip2fast.training.finite import (
    GRADIENT,
    Outcome,
    gather_lists,
    nonfinite_names,
    some_of,
)

ToTokens = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_OTHER_PRECISION = "use precision bf16 or fp32 instead of fp16"
_LOWER_RATE = f"lower optim.lr, or {_OTHER_PRECISION}"


def explain(
    outcome: Outcome,
    trained: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    batches: Iterable[dict[str, Tensor]],
    keys: Sequence[str],
    to_tokens: ToTokens,
) -> tuple[str, bool]:
    """Explain a step that was not finite, as a sentence; every process must call this.

    Args:
        outcome: what was found in the step.
        trained: the trained parameters, by name.
        frozen: `frozen_weights`.
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
    parameters = _bad_parameters(trained, frozen)
    if parameters:
        return f"{where}, as {parameters}", True
    images = _bad_images(batches, keys, to_tokens)
    if images:
        return f"{where}, as {images}", False
    every = gather_lists(keys)
    return (
        f"{where}, from finite images and parameters, in the computation: {_LOWER_RATE}. The "
        f"step's images: {some_of(every, 16)}"
    ), False


def frozen_weights(parts: Run) -> dict[str, Tensor]:
    """The frozen weights, or the parts of them, that are in the memory of this process.

    Left out are those on a disk (ZeRO-3 on NVMe), and those in 8 or 4 bits, which are finite.
    """
    found: dict[str, Tensor] = {}
    owners = [("", parts.model), ("image_encoder.", parts.image_encoder)]
    for prefix, owner in owners:
        if owner is None:
            continue
        for name, weight in owner.named_parameters():
            own = getattr(weight, "ds_tensor", weight)
            # the status of a partition in memory
            there = getattr(getattr(own, "status", None), "name", "AVAILABLE") == "AVAILABLE"
            if not weight.requires_grad and there and own.numel() and own.device.type != "meta":
                found[prefix + name] = own.detach()
        for name, module in owner.named_modules():
            stream = stream_of(module)
            if stream is not None and stream.storage == "as_is":
                index = stream.blocks.index(module)
                for inner in stream.names(index):
                    found[f"{prefix}{name}.{inner}"] = stream.read(index, inner)
    return found


def explain_held_out(parts: Run, to_tokens: ToTokens) -> str:
    """What is not finite in the held-out data or the frozen weights, if anything, as a clause.

    Every process must call this, after the trained parameters were found to be finite.
    """
    if parts.held_out is None:
        return "there are no held-out data"
    parameters = _bad_parameters({}, frozen_weights(parts))
    if parameters:
        return parameters
    keys = parts.held_out.keys()
    one_by_one = (
        parts.held_out.images([key], Batch(0, torch.tensor([number]).numpy()))
        for number, key in enumerate(keys)
    )
    return (
        _bad_images(one_by_one, keys, to_tokens)
        or f"all its images are, so it is the computation: {_LOWER_RATE}"
    )


def _bad_parameters(trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> str:
    """Which parameters are not finite on some process, as a clause; empty if all are."""
    bad = gather_lists(nonfinite_names(trained))
    if bad:
        return f"parameters are not: {some_of(bad)}: {_LOWER_RATE}"
    # they may be in several memories
    names = [name for name, weight in frozen.items() if nonfinite_names({name: weight})]
    bad = gather_lists(names)
    if bad:
        return f"frozen parameters are not: {some_of(bad)}: repair the files of that model"
    return ""


def _bad_images(
    batches: Iterable[dict[str, Tensor]], keys: Sequence[str], to_tokens: ToTokens
) -> str:
    """Which images are not finite on some process, as a clause; empty if all are."""
    files: list[bool] = []
    tokens: list[bool] = []
    for batch in batches:
        files += _finite(batch)
        tokens += _finite(to_tokens(batch))
    # texts without an image are given an empty list of tokens
    bad = gather_lists(key for key, good in zip(keys, files, strict=False) if not good)
    if bad:
        return f"the tokens of images are not: {some_of(bad)}: repair them"
    bad = gather_lists(key for key, good in zip(keys, tokens, strict=False) if not good)
    if bad:
        return (
            f"the tokens computed of images are not, which are finite themselves: "
            f"{some_of(bad)}: {_OTHER_PRECISION}"
        )
    return ""


def _finite(batch: Mapping[str, Tensor]) -> Iterator[bool]:
    """Whether each image of a batch, in pixels or as tokens, is finite."""
    images = batch["images"] if "images" in batch else batch["image_embeds"]
    yield from images.isfinite().flatten(1).all(1).tolist()
