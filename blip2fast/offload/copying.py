"""Prefetching: copies of whole blocks from host memory into device buffers.

Three implementations of one interface: on CUDA, a separate stream with one asynchronous copy from
pinned memory; on the CPU, the C++ thread of `csrc/block_stream.cpp`; and a Python thread if that
module was not built.
"""

from __future__ import annotations

import importlib
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class Slot:
    """A buffer that holds one block at a time.

    Attributes:
        buffer: uint8, on the device.
        block: index of the block in the slot or being copied into it; None if empty.
        last_used: use counter; the least recently used slot is filled next.
        pending: copier-specific handle of the copy in flight.
        ready: CUDA event, recorded after the copy.
    """

    buffer: Tensor
    block: int | None = None
    last_used: int = -1
    pending: Any = None
    ready: Any = None


class Copier(Protocol):
    """Fills slots; `start`, then `wait` before the slot is read."""

    name: str

    def start(self, slot: Slot, source: Tensor) -> None:
        """Begin to copy `source` [n] uint8 into the first n bytes of the slot.

        The copy is ordered after work already queued, which may still read the slot. Later work
        must call `wait` before it reads the slot.
        """

    def wait(self, slot: Slot) -> None:
        """Make subsequent computation wait for the copy."""

    def finish(self, slot: Slot) -> None:
        """Block the host until the copy is complete."""

    def close(self) -> None:
        """Wait for copies in flight and release the copier's thread, if any."""


class ThreadCopier:
    """A Python thread; PyTorch's copy releases the GIL."""

    name = "python thread"

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="block-copies")

    def start(self, slot: Slot, source: Tensor) -> None:
        self.wait(slot)  # an earlier copy that was never waited for must not finish after this one
        slot.pending = self._pool.submit(slot.buffer[: len(source)].copy_, source)

    def wait(self, slot: Slot) -> None:
        if isinstance(slot.pending, Future):
            slot.pending.result()
        slot.pending = None

    finish = wait

    def close(self) -> None:
        self._pool.shutdown()


class NativeCopier:
    """A C++ thread; starting and finishing a copy never takes the GIL."""

    name = "c++ thread"

    def __init__(self) -> None:
        self._thread = _native().HostCopier()

    def start(self, slot: Slot, source: Tensor) -> None:
        size = len(source)
        if not (source.is_contiguous() and slot.buffer.is_contiguous()):
            raise ValueError("a block and its slot must be contiguous")
        if slot.buffer.device.type != "cpu" or size > len(slot.buffer):
            raise ValueError(
                f"a copy of {size} bytes into {len(slot.buffer)} on {slot.buffer.device}: expected "
                "room for it, on the CPU"
            )
        self.wait(slot)  # an earlier copy that was never waited for must not finish after this one
        # keep a reference to the source until the copy is done
        ticket = self._thread.start(slot.buffer.data_ptr(), source.data_ptr(), size)
        slot.pending = (ticket, source)

    def wait(self, slot: Slot) -> None:
        if slot.pending is not None:
            self._thread.wait(slot.pending[0])
        slot.pending = None

    finish = wait

    def close(self) -> None:
        self._thread.close()


class CudaCopier:
    """A separate CUDA stream, synchronised with the compute stream by events."""

    name = "cuda stream"

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def start(self, slot: Slot, source: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            slot.buffer[: len(source)].copy_(source, non_blocking=True)
        slot.ready = torch.cuda.Event()
        slot.ready.record(self._stream)

    def wait(self, slot: Slot) -> None:
        if slot.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.ready)

    def finish(self, slot: Slot) -> None:
        if slot.ready is not None:
            slot.ready.synchronize()

    def close(self) -> None:
        self._stream.synchronize()


def why_not_native() -> str:
    """Why the C++ thread is not available; empty if it is."""
    try:
        _native()
    except ImportError as error:
        return f"blip2fast._block_stream was not built: {error}"
    return ""


def copier_for(device: torch.device) -> Copier:
    """The copier for a device.

    Raises:
        ValueError: a device that is neither CUDA nor the CPU.
    """
    if device.type == "cuda":
        return CudaCopier(device)
    if device.type == "cpu":
        return ThreadCopier() if why_not_native() else NativeCopier()
    raise ValueError(f"device {str(device)!r}: blocks are streamed to a CUDA device or the CPU")


def host_buffer(nbytes: int, pinned: bool) -> Tensor:
    """Host memory for a block, [nbytes] uint8.

    Args:
        pinned: page-lock it, for asynchronous copies to CUDA. It is registered after allocation,
            because PyTorch rounds its own pinned allocations up to a power of two.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if pinned and nbytes:
        runtime = torch.cuda.cudart()
        fault = int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0))
        if fault:
            warnings.warn(
                f"{nbytes} bytes of host memory could not be pinned (CUDA error {fault}; see "
                "`ulimit -l`): this block's copies will not run beside the computation",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer


def _native() -> Any:
    return importlib.import_module("blip2fast._block_stream")
