"""Decisions that all processes of a run make alike; every process must call these."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_Result = TypeVar("_Result")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedFault(ValueError):
    """A fault that every process of the run knows, with the same message."""


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process."""
    found = torch.tensor([int(flag)], device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def first_process(flag: bool, device: torch.device) -> bool:
    """The `flag` of rank 0."""
    found = torch.tensor([int(flag)], device=device)
    dist.broadcast(found, 0)
    return bool(found.item())


def together(work: Callable[[], _Result]) -> _Result:
    """Do `work` on every process; where one fails, all fail, and name its machine.

    Otherwise a process whose machine lacks a file would end alone, and the others would wait for
    it until a collective times out. `work` must not contain collectives.

    Returns:
        The result on this process.

    Raises:
        SharedFault: `work` raised a ValueError, OSError or ImportError on a process of several.
            Alone, a process raises its own error.
    """
    if not _are_several():
        return work()
    fault = None
    try:
        result = work()
    except (ValueError, OSError, ImportError) as error:
        fault = str(error)
    message = _by_machine(_gather(fault))
    if message:
        raise SharedFault(message)
    return result


def check_alike(values: Mapping[str, Any], remedy: str) -> None:
    """Check that all processes have the same values.

    Args:
        values: by name; they can be pickled.
        remedy: what to do where they differ, for the error message.

    Raises:
        SharedFault: a value differs from that of rank 0; each is named with its machine.
    """
    if not _are_several():
        return
    every = _gather(dict(values))
    (_, first), *others = every
    for number, (host, found) in enumerate(others, 1):
        names = [name for name in sorted({*first, *found}) if first.get(name) != found.get(name)]
        if names:
            told = "; ".join(
                f"{name} is {first.get(name)!r} on {_place(every[0][0], [0])}, "
                f"{found.get(name)!r} on {_place(host, [number])}"
                for name in names
            )
            raise SharedFault(f"the machines differ: {told}. {remedy}")


def processes_by_machine() -> tuple[int, int]:
    """The number of machines of the run, and of its processes on this machine.

    They are told apart by name and boot, so it does not matter what a launcher states.
    """
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    if not _are_several():
        return 1, 1
    machines = [(host, other) for host, other in _gather(boot)]
    return len(set(machines)), machines.count(machines[dist.get_rank()])


def _are_several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _gather(own: Any) -> list[tuple[str, Any]]:
    """The host and the object of each process, by rank."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (socket.gethostname(), own))
    return every


def _by_machine(faults: list[tuple[str, str | None]]) -> str:
    """The distinct faults, each with the machines that have it; without, where all have it."""
    messages = list(dict.fromkeys(fault for _, fault in faults if fault is not None))
    if len(messages) == 1 and all(fault is not None for _, fault in faults):
        return messages[0]
    lines = []
    for message in messages:
        having: dict[str, list[int]] = {}
        for rank, (host, fault) in enumerate(faults):
            if fault == message:
                having.setdefault(host, []).append(rank)
        where = ", ".join(_place(host, ranks) for host, ranks in having.items())
        lines.append(f"on {where}: {message}")
    return "\n".join(lines)


def _place(host: str, ranks: list[int]) -> str:
    of = ", ".join(str(rank) for rank in ranks)
    return f"{host} ({'process' if len(ranks) == 1 else 'processes'} {of})"
