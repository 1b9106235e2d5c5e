"""Streaming of frozen transformer blocks: weights on the host, a few buffers on the device.

    stream = stream_blocks(language_model, device="cuda", buffers=2)
    ...                                      # train through the model, evaluate, generate
    stream.undo()

The weights of a block are one flat buffer in host memory. Before the block runs, they are copied to
a device buffer; while it runs, the next block is prefetched into another one. The backward pass
fetches the blocks again in reverse order and computes gradients with respect to their inputs only,
because the weights are frozen. With `recompute`, the forward pass saves only the inputs of blocks,
and the backward pass recomputes each block. Without it, all activations are saved, and weights that
autograd would save are replaced by their location in the block.

The device holds two blocks at a time (`buffers`), and with int8 or int4 the decoded weights of one
block. Embeddings, the final norm, the head, and weights shared between blocks stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blip2fast._choices import Storage
from blip2fast.frozen.identity import mark_encoded, note_identity
from blip2fast.offload.blocks import BlockLayout, find_blocks, lay_out, own_parameters
from blip2fast.offload.copying import Copier, Slot, copier_for, host_buffer
from blip2fast.offload.recompute import Pass, recomputed

_MARK = "_block_stream"  # attribute of a streamed module


@dataclass
class Fetches:
    """Copy counters, for tests and benchmarks.

    Attributes:
        forward, backward: number of copies of each block for that pass.
        late: number of copies that were not prefetched before the block was needed.
        most_live: peak number of blocks on the device, including those being copied.
    """

    forward: list[int]
    backward: list[int]
    late: int = 0
    most_live: int = 0


@dataclass
class _Block:
    """A block: its module, its weights on the host, and the first block of its stack."""

    module: nn.Module
    layout: BlockLayout
    host: Tensor
    first: int


@dataclass(frozen=True)
class _KeptWeight:
    """Replaces a weight saved by autograd: its block, buffer and view."""

    index: int
    decoded: bool
    dtype: torch.dtype
    view: tuple[tuple[int, ...], tuple[int, ...], int]


def stream_blocks(
    language_model: nn.Module,
    device: torch.device | str | None = None,
    buffers: int = 2,
    storage: Storage = "as_is",
    blocks: Sequence[nn.Module] | None = None,
    recompute: bool = True,
) -> BlockStream:
    """Move a frozen model's blocks to host memory and stream them; the rest goes to the device.

    Parameters on the meta device only reserve space in the host buffers; fill it with
    `BlockStream.write`.

    Args:
        language_model: any frozen model of `transformers` blocks; modified in place.
        device: compute device; by default CUDA if available.
        buffers: device buffers for blocks, at least 2: one is computed from while another is
            filled.
        storage: "as_is", "int8" or "int4"; see `blip2fast.offload.quantised`.
        blocks: in execution order; by default those of `find_blocks`.
        recompute: recompute blocks in the backward pass, which needs the least memory; else save
            their activations.

    Returns:
        The stream; it lives as long as the model, or until `undo`.

    Raises:
        ValueError: fewer than two buffers, an unknown storage or device, no blocks, or a model that
            is not frozen, already streamed, uses gradient checkpointing, is partitioned by ZeRO-3,
            or is quantised by a library.
    """
    if buffers < 2:
        raise ValueError(f"buffers {buffers}: expected at least 2, one to compute and one to fill")
    modules = find_blocks(language_model) if blocks is None else list(dict.fromkeys(blocks))
    if not modules:
        raise ValueError("blocks: none given")
    _refuse_unsuitable(language_model, modules)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if storage != "as_is":
        note_identity(language_model)  # its original values are not available afterwards
    stream = BlockStream(language_model, modules, torch.device(device), buffers, storage)
    stream.recompute = recompute
    return stream


def stream_of(module: nn.Module) -> BlockStream | None:
    """The stream that a block belongs to; None if it is not streamed."""
    stream: BlockStream | None = vars(module).get(_MARK)
    return stream


class BlockStream:
    """Streams the blocks of a model; created by `stream_blocks`.

    Attributes:
        device: compute device of the blocks.
        storage: storage format of their weights.
        recompute: whether the backward pass recomputes blocks; may be changed between steps.
        fetches: copy counters.
        host_bytes, device_bytes: memory allocated for blocks, in bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        device: torch.device,
        buffers: int,
        storage: Storage,
    ) -> None:
        layouts = [lay_out(own, storage) for own in own_parameters(model, modules)]
        self._copier: Copier = copier_for(device)
        self.device, self.storage, self.recompute = device, storage, True
        self._model = model
        self._blocks: list[_Block] = []
        stacks = _stacks(model, modules)
        for module, layout, first in zip(modules, layouts, stacks, strict=True):
            host = host_buffer(layout.nbytes, pinned=device.type == "cuda")
            self._blocks.append(_Block(module, layout, host, first))
            _take_parameters(layout, host)
        size = max(block.layout.nbytes for block in self._blocks)
        dense = max(block.layout.dense_nbytes for block in self._blocks)
        if _is_real(model):
            model.to(device)
        self._slots = [
            Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(buffers)
        ]
        self._scratch = torch.empty(dense, dtype=torch.uint8, device=device)
        self._uses = 0
        self._decoded: int | None = None  # index of the block in the scratch buffer
        self.fetches = Fetches([0] * len(modules), [0] * len(modules))
        self.host_bytes = sum(len(block.host) for block in self._blocks)
        self.device_bytes = buffers * size + dense
        self._handles: list[Any] = []
        for index, block in enumerate(self._blocks):
            forward = block.module.forward
            block.module.forward = partial(self._run, index, forward)
            vars(block.module)[_MARK] = self
            mark_encoded(block.module, storage != "as_is")
            self._handles += [
                block.module.register_state_dict_post_hook(partial(self._add_weights, index)),
                block.module.register_load_state_dict_pre_hook(partial(self._take_weights, index)),
            ]

    @property
    def blocks(self) -> list[nn.Module]:
        """The streamed modules, in execution order."""
        return [block.module for block in self._blocks]

    @property
    def copier(self) -> str:
        """The copier in use: a CUDA stream, a C++ thread or a Python thread."""
        return self._copier.name

    def names(self, index: int) -> list[str]:
        """Names of a block's streamed weights."""
        return list(self._blocks[index].layout.weights)

    def write(self, index: int, name: str, weight: Tensor) -> None:
        """Replace a weight of block `index`, named as in the block."""
        block = self._blocks[index]
        self._forget()
        block.layout.write(block.host, name, weight)

    def read(self, index: int, name: str) -> Tensor:
        """A weight of block `index` on the host, decoded if it is stored in 8 or 4 bits."""
        block = self._blocks[index]
        scratch = torch.empty(block.layout.dense_nbytes, dtype=torch.uint8)
        return block.layout.read(block.host, scratch, name)

    def reset_fetches(self) -> None:
        """Reset the counters."""
        self.fetches = Fetches([0] * len(self._blocks), [0] * len(self._blocks))

    def undo(self) -> None:
        """Stop streaming: restore the blocks' parameters on the device.

        Weights stored in 8 or 4 bits are restored as decoded.
        """
        self._forget()
        self._copier.close()
        for handle in self._handles:
            handle.remove()
        for index, block in enumerate(self._blocks):
            for name, stored in block.layout.weights.items():
                weight = self.read(index, name).to(self.device, copy=True)
                parameter = nn.Parameter(weight, requires_grad=False)
                for module, attribute in stored.places:
                    module.register_parameter(attribute, parameter)
            block.host = torch.empty(0, dtype=torch.uint8)
            del block.module.forward, vars(block.module)[_MARK]
            mark_encoded(block.module, False)
        self._slots, self._scratch = [], torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def resident(self, index: int, needed_by: Pass = "inference") -> Iterator[None]:
        """Put block `index`'s weights on the device in this context; prefetches the next ones."""
        slot = self._bring(index, needed_by)
        layout = self._blocks[index].layout
        try:
            for name, stored in layout.weights.items():
                weight = layout.read(slot.buffer, self._scratch, name)
                for module, attribute in stored.places:
                    module.__dict__[attribute] = weight
            self._decoded = index
            yield
        finally:
            for stored in layout.weights.values():
                for module, attribute in stored.places:
                    module.__dict__.pop(attribute, None)

    def _bring(self, index: int, needed_by: Pass) -> Slot:
        """Fetch block `index` into a slot, and prefetch the next ones."""
        if not self._slots:
            raise ValueError("the stream was undone; run forward and backward again without it")
        slot = self._fetch(index, needed_by)
        following = self._following(index, needed_by)
        for number in following:
            if all(each.block != number for each in self._slots):
                self._start(number, needed_by, keep=[index, *following])
        self._copier.wait(slot)
        return slot

    def _following(self, index: int, needed_by: Pass) -> list[int]:
        """The blocks to prefetch while this one computes, in order.

        A forward pass prefetches nothing past its last block: the backward pass starts with blocks
        that are still resident. Inference wraps around to the start of the stack, for the next
        token.
        """
        ahead, number = len(self._slots) - 1, len(self._blocks)
        step = -1 if needed_by == "backward" else 1
        wanted = [index + step * distance for distance in range(1, ahead + 1)]
        if needed_by == "inference":
            first = self._blocks[-1].first
            wanted = [w if w < number else first + (w - number) for w in wanted]
        return [w for w in dict.fromkeys(wanted) if 0 <= w < number and w != index]

    def _fetch(self, index: int, needed_by: Pass) -> Slot:
        slot = next((each for each in self._slots if each.block == index), None)
        if slot is None:
            self.fetches.late += 1
            slot = self._start(index, needed_by, keep=[])
        slot.last_used = self._uses = self._uses + 1
        return slot

    def _start(self, index: int, needed_by: Pass, keep: Sequence[int]) -> Slot:
        """Copy a block into the least recently used slot that holds none of `keep`."""
        free = (slot for slot in self._slots if slot.block not in keep)
        slot = min(free, key=lambda each: each.last_used)
        slot.block = index
        self._copier.start(slot, self._blocks[index].host)
        counts = self.fetches.backward if needed_by == "backward" else self.fetches.forward
        counts[index] += 1
        live = sum(each.block is not None for each in self._slots)
        self.fetches.most_live = max(self.fetches.most_live, live)
        return slot

    def _forget(self) -> None:
        """Invalidate all slots."""
        for slot in self._slots:
            self._copier.finish(slot)
            slot.block = None
        self._decoded = None

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The block's forward with streamed weights, checkpointed if `recompute` is set."""
        if self.recompute:
            resident = partial(self.resident, index)
            return recomputed(self._blocks[index].module, forward, resident, args, kwargs)
        if not torch.is_grad_enabled():
            with self.resident(index):
                return forward(*args, **kwargs)
        hooks = torch.autograd.graph.saved_tensors_hooks(partial(self._pack, index), self._unpack)
        with self.resident(index, "forward"), hooks:
            return forward(*args, **kwargs)

    def _pack(self, index: int, tensor: Tensor) -> Tensor | _KeptWeight:
        """Pack hook: replaces a weight with its location; other tensors are saved as usual."""
        at = tensor.untyped_storage().data_ptr()
        slot = next(slot for slot in self._slots if slot.block == index)
        for buffer, decoded in ((slot.buffer, False), (self._scratch, True)):
            if len(buffer) and at == buffer.untyped_storage().data_ptr():
                view = (tensor.size(), tensor.stride(), int(tensor.storage_offset()))
                return _KeptWeight(index, decoded, tensor.dtype, view)
        return tensor.detach()  # saving an output itself would keep its graph alive

    def _unpack(self, kept: Tensor | _KeptWeight) -> Tensor:
        """Unpack hook: fetches the block of a saved weight again."""
        if isinstance(kept, Tensor):
            return kept
        buffer = self._bring(kept.index, "backward").buffer
        if kept.decoded:
            layout = self._blocks[kept.index].layout
            if self._decoded != kept.index:
                for name in layout.weights:
                    layout.read(buffer, self._scratch, name)
                self._decoded = kept.index
            buffer = self._scratch
        return buffer.view(kept.dtype).as_strided(*kept.view)

    def _add_weights(
        self, index: int, _: nn.Module, state: dict[str, Any], prefix: str, __: Any
    ) -> None:
        for name, stored in self._blocks[index].layout.weights.items():
            weight = self.read(index, name)
            for full in _full_names(self._blocks[index].module, stored.places, name):
                state[prefix + full] = weight

    def _take_weights(
        self, index: int, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any
    ) -> None:
        block = self._blocks[index]
        for name, stored in block.layout.weights.items():
            for full in _full_names(block.module, stored.places, name):
                if prefix + full in state:
                    self.write(index, name, state.pop(prefix + full))


def _refuse_unsuitable(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    for module in modules:
        name = type(module).__name__
        if stream_of(module) is not None:
            raise ValueError(f"{name}: is streamed already; undo that stream first")
        if "forward" in vars(module):
            raise ValueError(
                f"{name}: its forward has been replaced (recomputed layers, another offload?); "
                "stream the model as it was loaded: a stream recomputes its blocks anyway"
            )
        for weight, parameter in module.named_parameters():
            if type(parameter) is not nn.Parameter and not hasattr(parameter, "ds_id"):
                raise ValueError(
                    f"{name}: {weight} is a {type(parameter).__qualname__} of "
                    f"{type(parameter).__module__}, whose form only that library can copy: leave "
                    "the model on the device, or stream it as it was before, with storage int8 or "
                    "int4"
                )
            if parameter.requires_grad:
                raise ValueError(
                    f"{name}: is trained, and streaming gives no gradients to weights: call "
                    "requires_grad_(False) on the model"
                )
            if hasattr(parameter, "ds_id"):
                raise ValueError(
                    f"{name}: partitioned by DeepSpeed ZeRO-3; stream with ZeRO 0 to 2"
                )


def _take_parameters(layout: BlockLayout, host: Tensor) -> None:
    """Move parameters from the modules into the host buffer."""
    for name, stored in layout.weights.items():
        module, attribute = stored.places[0]
        parameter = module.get_parameter(attribute)
        if parameter.device.type != "meta":
            layout.write(host, name, parameter.detach())
        for module, attribute in stored.places:
            del module._parameters[attribute]


def _full_names(block: nn.Module, places: list[tuple[nn.Module, str]], name: str) -> list[str]:
    """All names of a weight in its block; several if it is tied."""
    if len(places) == 1:
        return [name]
    prefixes = {id(module): prefix for prefix, module in block.named_modules()}
    return [f"{prefixes[id(module)]}.{attribute}".lstrip(".") for module, attribute in places]


def _stacks(model: nn.Module, modules: Sequence[nn.Module]) -> list[int]:
    """For each block, the index of the first block in its stack (encoder or decoder)."""
    paths = {id(module): name.rpartition(".")[0] for name, module in model.named_modules()}
    first: dict[str, int] = {}
    return [first.setdefault(paths.get(id(m), ""), number) for number, m in enumerate(modules)]


def _is_real(model: nn.Module) -> bool:
    return all(p.device.type != "meta" for p in model.parameters())
