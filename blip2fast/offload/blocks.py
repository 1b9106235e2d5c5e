"""The transformer blocks of a model, and the layout of a block's weights in one buffer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from blip2fast._choices import STORAGES, Storage
from blip2fast.offload.quantised import decode, encode, is_encoded, parts_of

ALIGNMENT = 256  # bytes; as CUDA's own allocations, so that views are aligned for every kernel


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: outermost checkpointable layers, encoder before decoder.

    Raises:
        ValueError: the model has none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers could recompute "
            "(GradientCheckpointingLayer); name its blocks: blocks=model.layers"
        )
    return list(found.values())


def own_parameters(
    model: nn.Module, blocks: Iterable[nn.Module]
) -> list[dict[str, list[tuple[nn.Module, str]]]]:
    """For each block, the parameters that are not shared outside it.

    A parameter shared between two blocks, or between a block and the rest of the model, is
    excluded.

    Returns:
        For each block, a dict from parameter name to its locations (module, attribute); several if
        it is tied within the block.
    """
    users: Counter[int] = Counter()
    places: list[dict[int, tuple[str, list[tuple[nn.Module, str]]]]] = []
    inside: set[int] = set()
    for block in blocks:
        held: dict[int, tuple[str, list[tuple[nn.Module, str]]]] = {}
        for prefix, module in block.named_modules():
            inside.add(id(module))
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{prefix}.{name}" if prefix else name
                held.setdefault(id(parameter), (full, []))[1].append((module, name))
        users.update(held.keys())
        places.append(held)
    for module in model.modules():
        if id(module) not in inside:
            users.update(id(p) for p in module.parameters(recurse=False))
    return [
        {name: where for key, (name, where) in held.items() if users[key] == 1} for held in places
    ]


@dataclass(frozen=True)
class Part:
    """A plain tensor inside a flat byte buffer."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in `buffer` (uint8), without a copy."""
        flat = buffer[self.offset : self.offset + self.nbytes]
        return flat.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class StoredWeight:
    """The layout of one parameter in its block's buffer.

    Attributes:
        places: its locations (module, attribute).
        parts: its tensors in the block's buffer; one if the weight is not quantised.
        dense: the decoded weight in the scratch buffer; None if the weight is not quantised.
    """

    places: list[tuple[nn.Module, str]]
    parts: list[Part]
    dense: Part | None


@dataclass(frozen=True)
class BlockLayout:
    """The layout of a block's weights in one flat buffer.

    Attributes:
        weights: layouts by parameter name in the block.
        nbytes: size of the buffer.
        dense_nbytes: size of the scratch buffer for decoded weights.
    """

    weights: dict[str, StoredWeight]
    storage: Storage
    nbytes: int
    dense_nbytes: int

    def write(self, buffer: Tensor, name: str, weight: Tensor) -> None:
        """Store a weight in the buffer, quantised if the layout says so.

        Raises:
            ValueError: a value of a weight to be quantised is not finite.
        """
        stored = self.weights[name]
        try:
            tensors = [weight] if stored.dense is None else encode(self.storage, weight)
        except ValueError as error:
            raise ValueError(f"{name}, to be stored in {self.storage}: {error}") from None
        for part, tensor in zip(stored.parts, tensors, strict=True):
            part.view(buffer).copy_(tensor)

    def read(self, buffer: Tensor, scratch: Tensor, name: str) -> Tensor:
        """A weight: a view of `buffer`, or if quantised, decoded into `scratch`."""
        stored = self.weights[name]
        parts = [part.view(buffer) for part in stored.parts]
        if stored.dense is None:
            return parts[0]
        return decode(self.storage, parts, stored.dense.view(scratch))


def lay_out(own: dict[str, list[tuple[nn.Module, str]]], storage: Storage) -> BlockLayout:
    """Lay out the parameters of a block, as returned by `own_parameters`.

    Raises:
        ValueError: an unknown storage.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage {storage!r}: expected one of {', '.join(STORAGES)}")
    weights: dict[str, StoredWeight] = {}
    end = dense_end = 0
    for name, places in own.items():
        module, attribute = places[0]
        parameter = module.get_parameter(attribute)
        shape = parameter.shape
        encoded = storage != "as_is" and is_encoded(module, attribute, parameter)
        kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]] = (
            parts_of(storage, shape) if encoded else [(parameter.dtype, tuple(shape))]
        )
        parts = []
        for dtype, part_shape in kinds:
            parts.append(Part(end, dtype, part_shape))
            end = _aligned(end + parts[-1].nbytes)
        dense = Part(dense_end, parameter.dtype, tuple(shape)) if encoded else None
        dense_end = dense_end if dense is None else _aligned(dense_end + dense.nbytes)
        weights[name] = StoredWeight(places, parts, dense)
    return BlockLayout(weights, storage, end, dense_end)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
