"""What a run's time goes to: parts that are entered and left, so that every moment belongs to one.

A clock is read at each change of part, a few dozen times a step. On CUDA events are recorded in its
place, and nothing waits for the device before the end: a part then has the time until the device
came to what follows, so that of a part which waits on the host only what the device did not hide.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# what no part claims
REST = "rest"


class PartClock:
    """Seconds of each part between `start` and `stop`; they add up to the whole.

    Args:
        device: where the work is done.
        now: seconds from any origin, on a CPU.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu, self._now = device.type == "cuda", now
        self._open = [REST]
        self._marks: list[tuple[str, Any]] = []
        self._runs = False

    def start(self) -> None:
        """Begin; what was counted before is forgotten."""
        self._marks, self._runs = [], True
        self._mark()

    def stop(self) -> None:
        """End."""
        self._mark()
        self._runs = False

    def enter(self, part: str) -> None:
        """A part begins; that around it is interrupted."""
        self._open.append(part)
        self._mark()

    def leave(self) -> None:
        """It ends, and that around it goes on."""
        self._open.pop()
        self._mark()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """A part that lasts as long as the `with` block."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.during(part):
                return function(*args, **kwargs)

        return call

    def waits(self, part: str, items: Iterator[Any]) -> Iterator[Any]:
        """The same items; waiting for each is a part."""
        while True:
            with self.during(part):
                found = list(itertools.islice(items, 1))
            if not found:
                return
            yield found[0]

    @contextmanager
    def watching(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within the `with` block the calls of these modules are parts."""
        hooks = [hook for part, module in parts.items() for hook in self.watch(part, module)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def watch(self, part: str, module: nn.Module) -> list[RemovableHandle]:
        """From now on the calls of a module are a part, until the hooks are removed."""
        return [
            module.register_forward_pre_hook(lambda *_: self.enter(part)),
            module.register_forward_hook(lambda *_: self.leave(), always_call=True),
        ]

    def seconds(self) -> dict[str, float]:
        """Of each part, in the order in which they were first entered; what is left comes last."""
        found: dict[str, float] = {}
        if self._on_gpu:
            torch.cuda.synchronize()
        for (part, begun), (_, ended) in itertools.pairwise(self._marks):
            found[part] = found.get(part, 0.0) + self._between(begun, ended)
        rest = found.pop(REST, None)
        return found if rest is None else {**found, REST: rest}

    def whole(self) -> float:
        """Seconds from `start` to `stop`."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._between(self._marks[0][1], self._marks[-1][1])

    def _between(self, begun: Any, ended: Any) -> float:
        if self._on_gpu:
            return float(begun.elapsed_time(ended)) / 1e3
        return float(ended - begun)

    def _mark(self) -> None:
        if not self._runs:
            return
        if not self._on_gpu:
            self._marks.append((self._open[-1], self._now()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((self._open[-1], event))
