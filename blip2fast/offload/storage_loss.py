"""How 8- or 4-bit storage of frozen weights changes the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2fast._choices import Storage
from blip2fast.offload.blocks import find_blocks
from blip2fast.offload.quantised import decode, encode, is_encoded


@dataclass(frozen=True)
class StorageLoss:
    """The loss with and without quantised storage.

    Attributes:
        as_is, stored: mean loss over the batches, with the original and with the decoded weights.
    """

    storage: str
    as_is: float
    stored: float

    @property
    def difference(self) -> float:
        return self.stored - self.as_is

    def __str__(self) -> str:
        return (
            f"{self.storage}: loss {self.stored:.4f}, {self.difference:+.4f} against "
            f"{self.as_is:.4f} with the weights as they are"
        )


@torch.no_grad()
def loss_difference(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    storage: Storage,
    blocks: Iterable[nn.Module] | None = None,
) -> StorageLoss:
    """Compare a model's loss with and without 8- or 4-bit storage of its frozen blocks.

    Decodes one block at a time, so there is never a second copy of the model in memory.

    Args:
        model: returns an output with `.loss`: a language model, or a `Blip2Stage2`.
        batches: keyword arguments of the model, at least one batch.
        storage: int8 or int4.
        blocks: by default the blocks that `stream_blocks` finds in the model.

    Raises:
        ValueError: storage "as_is" or unknown, or no batches.
    """
    if storage not in ("int8", "int4"):
        raise ValueError(f"storage {storage!r}: expected int8 or int4, whose loss can differ")
    kept = list(batches)
    if not kept:
        raise ValueError("batches: none given, so there is no loss to compare")
    as_is = _mean_loss(model, kept)
    with as_stored(model, storage, blocks):
        stored = _mean_loss(model, kept)
    return StorageLoss(storage, as_is, stored)


def _mean_loss(model: nn.Module, batches: list[Mapping[str, Any]]) -> float:
    return float(torch.stack([model(**batch).loss.double() for batch in batches]).mean())


@contextmanager
def as_stored(
    model: nn.Module, storage: Storage, blocks: Iterable[nn.Module] | None = None
) -> Iterator[None]:
    """Run each block with its weights quantised and dequantised; restores them after each call."""
    originals: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def before(block: nn.Module, _: Any) -> None:
        originals[id(block)] = kept = []
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if is_encoded(module, name, parameter):
                    kept.append((parameter, parameter.data))
                    decoded = torch.empty_like(parameter.data)
                    parameter.data = decode(storage, encode(storage, parameter.data), decoded)

    def after(block: nn.Module, *_: Any) -> None:
        for parameter, original in originals.pop(id(block)):
            parameter.data = original

    handles = []
    for block in find_blocks(model) if blocks is None else blocks:
        handles.append(block.register_forward_pre_hook(before))
        handles.append(block.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
