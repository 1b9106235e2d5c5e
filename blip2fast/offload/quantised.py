"""Frozen weights in 8 or 4 bits, in plain PyTorch.

int8: a row of the weight is its rounded quotient by a scale, the row's largest magnitude / 127.
int4: the same for every group of 64 numbers of a row, / 7, two numbers a byte.

Only matrices of linear layers are encoded; norms, biases and embeddings keep their precision. The
bytes of a weight are a few plain tensors, so that a transformer block stays one flat buffer that
one copy moves, which is why no quantisation library's own weight classes are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Storage = Literal["as_is", "int8", "int4"]
STORAGES: tuple[Storage, ...] = ("as_is", "int8", "int4")
GROUP = 64  # numbers that share a scale in int4


def parts_of(storage: Storage, shape: torch.Size) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of the tensors that stand for an encoded weight [R, K].

    Returns:
        int8: [R, K] int8 and [R, 1] fp32 scales. int4: [R, G, GROUP / 2] uint8 and [R, G, 1] fp32,
        G groups a row.
    """
    rows, columns = shape
    if storage == "int8":
        return [(torch.int8, (rows, columns)), (torch.float32, (rows, 1))]
    groups = -(-columns // GROUP)
    return [(torch.uint8, (rows, groups, GROUP // 2)), (torch.float32, (rows, groups, 1))]


def encode(storage: Storage, weight: Tensor) -> list[Tensor]:
    """The tensors, as `parts_of` names them, that stand for `weight` [R, K]."""
    values = weight.float()
    if storage == "int8":
        scale = _scale(values.abs().amax(dim=1, keepdim=True), 127)
        return [(values / scale).round().to(torch.int8), scale]
    missing = -values.shape[1] % GROUP
    grouped = nn.functional.pad(values, (0, missing)).unflatten(1, (-1, GROUP))
    scale = _scale(grouped.abs().amax(dim=2, keepdim=True), 7)
    levels = ((grouped / scale).round() + 8).to(torch.uint8)
    # the halves of a group share bytes, so that each is decoded in one piece
    low, high = levels.chunk(2, dim=2)
    return [low | (high << 4), scale]


def decode(storage: Storage, parts: list[Tensor], out: Tensor) -> Tensor:
    """Write the weight that `parts` stand for into `out` [R, K], in its dtype."""
    values, scale = parts
    if storage == "int8":
        return torch.mul(values, scale, out=out)
    halves = ((values & 15).to(torch.int8) - 8, (values >> 4).to(torch.int8) - 8)
    columns = out.shape[1]
    if columns % GROUP:
        dense = torch.cat([half * scale for half in halves], dim=2).flatten(1)
        return out.copy_(dense[:, :columns])
    places = out.unflatten(1, (-1, GROUP)).chunk(2, dim=2)
    for half, place in zip(halves, places, strict=True):
        torch.mul(half, scale, out=place)
    return out


def is_encoded(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether 8 and 4 bits apply: the matrix of a linear layer."""
    return (
        name == "weight"
        and parameter.ndim == 2
        and parameter.is_floating_point()
        and not isinstance(module, nn.Embedding)
    )


def _scale(largest: Tensor, levels: int) -> Tensor:
    return torch.where(largest > 0, largest / levels, 1.0)


@dataclass(frozen=True)
class StorageLoss:
    """What storing the frozen weights in fewer bits does to a loss.

    Attributes:
        as_is, stored: mean loss over the batches, with the weights as they are and as decoded.
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
    """The loss of a model whose frozen blocks are stored in 8 or 4 bits, beside its loss now.

    One block at a time is decoded, so a second copy of the model is never held.

    Args:
        model: called with a batch, gives `.loss`: a language model, or a `Blip2Stage2`.
        batches: keyword arguments of the model, at least one.
        storage: int8 or int4.
        blocks: by default the blocks that `stream_blocks` finds in the model.

    Raises:
        ValueError: as_is, an unknown storage, or no batches.
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
    """Let every block compute with its weights encoded and decoded, and keep them as they are."""
    from blip2fast.offload.blocks import find_blocks

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
