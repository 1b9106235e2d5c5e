"""Where streamed weights lie, what a pass keeps, and that a block waits for its copy."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch
from streaming_cases import LAYERS, frozen, inputs, loss_and_gradient, opt
from torch import Tensor

from blip2fast.offload import copying, stream_blocks
from blip2fast.offload.blocks import find_blocks
from blip2fast.offload.streaming import BlockStream


@pytest.mark.parametrize("recompute", [True, False])
def test_no_block_is_on_the_device_but_in_the_buffers(recompute: bool) -> None:
    """The blocks have no parameters left; while one runs its weights lie in a buffer."""
    model = frozen(opt)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in find_blocks(model)]
    stream = stream_blocks(model, "cpu", recompute=recompute)
    assert [list(block.parameters()) for block in stream.blocks] == [[]] * LAYERS
    assert not hasattr(stream.blocks[0].fc1, "weight")
    assert stream.host_bytes >= sum(sizes)
    assert 2 * max(sizes) <= stream.device_bytes < 2 * max(sizes) + 2 * 16 * 256
    buffers = {slot.buffer.untyped_storage().data_ptr() for slot in stream._slots}
    seen: list[int] = []
    for block in stream.blocks:
        block.fc1.register_forward_pre_hook(
            lambda module, _: seen.append(module.weight.untyped_storage().data_ptr())
        )
    loss_and_gradient(model)
    assert len(seen) == (2 if recompute else 1) * LAYERS
    assert set(seen) == buffers


class Packed:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output would keep its own graph alive


def test_what_the_forward_pass_keeps() -> None:
    """The inputs of blocks, or all activations: no weights, and no graph that nobody needs."""
    model = frozen(opt)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[str, int] = {}
    stream: BlockStream | None = None
    for way in ("resident", "recomputed", "kept"):
        if way != "resident":
            stream = stream or stream_blocks(model, "cpu")
            stream.recompute = way == "recomputed"
            weights |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        packed: weakref.WeakSet[Packed] = weakref.WeakSet()

        def pack(tensor: Tensor, packed: weakref.WeakSet[Packed] = packed) -> Packed:
            packed.add(kept_one := Packed(tensor))
            return kept_one

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept_one: kept_one.tensor):
            out = model.base_model(**inputs(model), use_cache=False).last_hidden_state
        storages = {p.tensor.untyped_storage().data_ptr(): p.tensor.nbytes for p in packed}
        kept[way] = sum(size for at, size in storages.items() if at not in weights)
        assert out.requires_grad
    hidden, mask, statistics = 3 * 7 * 20 * 4, 3 * 7 * 7 * 4, 2 * 3 * 7 * 4
    # the inputs of the blocks and of the last norm
    inputs_of_blocks = (LAYERS + 1) * hidden
    assert inputs_of_blocks <= kept["recomputed"] <= inputs_of_blocks + mask + statistics
    assert kept["resident"] > 3 * kept["recomputed"]


@pytest.mark.parametrize("recompute", [True, False])
def test_a_stream_that_is_undone_before_the_backward_pass(recompute: bool) -> None:
    model = frozen(opt)
    stream = stream_blocks(model, "cpu", recompute=recompute)
    loss = model(**inputs(model), use_cache=False).logits.square().mean()
    stream.undo()
    with pytest.raises(ValueError, match="the stream was undone; run forward and backward again"):
        loss.backward()


@pytest.mark.parametrize("kind", ["native", "python"])
def test_copiers_copy(kind: str) -> None:
    """Both threads copy whole blocks, in order, also where nobody waits for one."""
    if kind == "native" and copying.why_not_native():
        pytest.skip(copying.why_not_native())
    copier = copying.NativeCopier() if kind == "native" else copying.ThreadCopier()
    slot = copying.Slot(torch.zeros(1 << 22, dtype=torch.uint8))
    sources = [torch.full((size,), 1 + i, dtype=torch.uint8) for i, size in enumerate((1 << 22, 9))]
    for source in sources:
        copier.start(slot, source)
    copier.wait(slot)
    copier.wait(slot)
    assert slot.buffer[:10].tolist() == [2] * 9 + [1]
    assert int(slot.buffer.sum()) == 2 * 9 + (1 << 22) - 9
    copier.close()


def test_the_model_trains_alike_without_the_compiled_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = frozen(opt)
    loss, gradient = loss_and_gradient(model)

    def missing() -> Any:
        raise ImportError("no module")

    monkeypatch.setattr(copying, "_native", missing)
    stream = stream_blocks(model, "cpu")
    assert stream.copier == "python thread"
    found = loss_and_gradient(model)
    assert torch.equal(found[0], loss)
    assert torch.equal(found[1], gradient)


def test_a_block_waits_for_its_copy() -> None:
    """A slow copy delays the block; without the wait it would read the buffer's old weights."""
    model = frozen(opt)
    loss, gradient = loss_and_gradient(model)
    stream = stream_blocks(model, "cpu")

    class Slow(copying.ThreadCopier):
        def start(self, slot: copying.Slot, source: Tensor) -> None:
            self.wait(slot)

            def copy_later() -> None:
                time.sleep(0.01)
                slot.buffer[: len(source)].copy_(source)

            slot.pending = self._pool.submit(copy_later)

    stream._copier = Slow()
    found = loss_and_gradient(model)
    assert torch.equal(found[0], loss)
    assert torch.equal(found[1], gradient)
