"""The processes of an evaluation, as torchrun starts them; one process without a launcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
# One process may wait for another that has much more to do.
_PATIENCE = timedelta(days=7)


class StoppedElsewhereError(SystemExit):
    """Another process found the fault and reports it; this one ends without a word."""

    def __init__(self) -> None:
        super().__init__(1)


@dataclass(frozen=True)
class Processes:
    """This process among those of an evaluation.

    Attributes:
        rank, count: its number, and how many there are.
        local_rank: its number on its machine, which chooses its GPU.
        group: by which they exchange values; None: all processes.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: Any = None

    def device(self, given: str | None) -> torch.device:
        """The device of this process: the given one, else its GPU, else the CPU.

        Raises:
            ValueError: no such device.
        """
        if given is None:
            given = f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(given)
        except RuntimeError as error:
            raise ValueError(f"device {given!r}: {str(error).splitlines()[0]}") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device {given!r}: there are {torch.cuda.device_count()} CUDA devices here; start "
                "at most one process for each"
            )
        return device

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order, in each of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, compute: Callable[[], T]) -> T:
        """Compute a value in every process, or end them all if one of them finds a fault.

        The first process that found one raises its error, the others end silently.

        Raises:
            ValueError, OSError: as `compute`.
            StoppedElsewhereError: another process reports the fault.
        """
        fault: ValueError | OSError | ModuleNotFoundError | None = None
        value: list[T] = []
        try:
            value.append(compute())
        except (ValueError, OSError, ModuleNotFoundError) as error:
            fault = error
        failed = [rank for rank, bad in enumerate(self.gather(fault is not None)) if bad]
        if not failed:
            return value[0]
        if fault is not None and failed[0] == self.rank:
            raise fault
        raise StoppedElsewhereError

    def first(self, compute: Callable[[], T]) -> T:
        """Compute a value in the first process, for all of them; faults as in `agree`."""
        found = self.agree(lambda: compute() if self.rank == 0 else None)
        if self.count == 1:
            return found  # type: ignore[return-value]
        values = [found]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]  # type: ignore[return-value]


def started_processes() -> Processes:
    """The processes that a launcher such as torchrun has started, connected on first use."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    group = None
    if not dist.is_initialized():
        # what is exchanged is on the host
        dist.init_process_group("gloo", timeout=_PATIENCE)
    elif dist.get_backend() != "gloo":
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Processes(dist.get_rank(), count, local_rank, group)
