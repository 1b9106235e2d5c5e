"""Finds losses and gradients that are not finite, before a step can change the parameters.

Whether a step updates the parameters is decided on the device: AdamW's fused update does nothing
where `found_inf` is 1. The host reads the outcome a step later, or at once where it waits anyway
(on a CPU, and before it logs, saves or evaluates), so a step costs no wait.

DeepSpeed checks gradients too, except those of ZeRO stage 0 in fp32, which are checked and clipped
here. It leaves out the update, and AdamW does not count the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip2fast.ops.collectives import HostCopy
from blip2fast.training.engine_state import optimizer_shards, scale_of_norm

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

GRADIENT = "gradient"


@dataclass(frozen=True)
class Outcome:
    """What the processes of a run found in an optimizer step.

    Attributes:
        step: the number of the step, from 1.
        nonfinite: the losses that are not finite on some process, and `gradient`.
        rescaled: gradients overflowed in fp16, and the loss scale was lowered: part of training
            with a loss scale.
        stop: a process was asked to stop.
        news: a process replaced samples of the step.
    """

    step: int
    nonfinite: tuple[str, ...]
    rescaled: bool
    stop: bool
    news: bool = False


class StepGate:
    """Decides of each optimizer step whether it updates the parameters.

    Args:
        engine: its AdamW is fused.
        device: the device of this process.
        stays_closed: after a value that is not finite, let no later step pass either, so that the
            parameters stay as they were when the host learns of it.
        clip_norm: the largest norm of gradients that only this gate sees (fp32, ZeRO 0); 0: any.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        device: torch.device,
        stays_closed: bool,
        clip_norm: float = 0.0,
    ) -> None:
        self._engine, self._device, self._stays_closed = engine, device, stays_closed
        self._clip_norm = clip_norm
        # neither the engine nor a wrapper of AdamW looks at these gradients
        self._own_gradients = engine.optimizer is engine.basic_optimizer
        on_host = all(shard.device.type == "cpu" for shard in optimizer_shards(engine))
        self._offloaded = on_host and device.type != "cpu"
        self._lags = device.type != "cpu"
        self._closed = torch.zeros((), device=device)
        self._names: list[str] = []
        self._unread: list[tuple[int, HostCopy, bool, bool]] = []
        self._step, self._found = 0, self._closed
        self._norm: Tensor | None = None
        self._scale = 1.0

    def judge(
        self, step: int, losses: Mapping[str, Tensor], stop: bool, news: bool = False
    ) -> Tensor:
        """Decide of the step that the engine takes next, and clip its gradient.

        Every process must call this.

        Args:
            step: the number of the step, from 1.
            losses: sums over the passes of the step, by name.
            stop: whether this process was asked to stop.
            news: whether this process replaced samples.

        Returns:
            A bool scalar: whether a loss is not finite on any process.
        """
        self._names, self._scale = sorted(losses), scale_of_norm(self._engine)
        found = [losses[name].isfinite().logical_not().view(()) for name in self._names]
        found.append(self._clip())
        found += [torch.full((), flag, device=self._device) for flag in (stop, news)]
        flags = torch.stack(found).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        closed = flags[:-2].amax()
        if self._stays_closed:
            closed = self._closed = torch.maximum(self._closed, closed)
        # an offloaded AdamW would read the copy before it has arrived
        self._engine.basic_optimizer.found_inf = closed.cpu() if self._offloaded else closed
        self._step, self._found = step, flags
        return flags[: len(self._names)].amax() > 0

    def gradient_norm(self) -> Tensor | None:
        """The norm of the last step's gradient before clipping, on the device; None: not known.

        It is not finite where the step was not.
        """
        if self._own_gradients:
            return self._norm
        norm = self._engine.get_global_grad_norm()
        if norm is None:
            return None
        return torch.as_tensor(norm, dtype=torch.float32, device=self._device) / self._scale

    def record(self, lowest_scale: bool) -> None:
        """Note the outcome after the engine's step.

        Args:
            lowest_scale: in fp16, the loss scale was at its minimum before the step.
        """
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        scaled = overflow and self._engine.fp16_enabled() and not lowest_scale
        self._unread.append((self._step, HostCopy(self._found), overflow, scaled))

    def outcomes(self, wait: bool) -> list[Outcome]:
        """The outcomes not returned before, without that of the last step unless `wait` is set.

        They are the same on every process.
        """
        # DeepSpeed has waited for the overflows that it reports
        wait = wait or not self._lags or any(o and not s for *_, o, s in self._unread)
        count = len(self._unread) - (0 if wait else 1)
        ready, self._unread = self._unread[:count], self._unread[count:]
        return [self._outcome(*each) for each in ready]

    def _outcome(self, step: int, copy: HostCopy, overflow: bool, scaled: bool) -> Outcome:
        *found, gradient, stop, news = copy.tolist()
        names = [name for name, flag in zip(self._names, found, strict=True) if flag]
        if gradient or (overflow and not scaled):
            names.append(GRADIENT)
        return Outcome(step, tuple(names), scaled and not names, bool(stop), bool(news))

    def _clip(self) -> Tensor:
        """Clip the gradient where the engine does not; whether it is not finite, a bool scalar."""
        trained = []
        if self._own_gradients:
            trained = [p for p in self._engine.module.parameters() if p.grad is not None]
        if not trained:
            return torch.zeros((), dtype=torch.bool, device=self._device)
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if self._clip_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, self._clip_norm, self._norm)
        return self._norm.isfinite().logical_not()


def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold a value that is not finite; waits for the device once."""
    names = [name for name, value in tensors.items() if value.is_floating_point()]
    if not names:
        return []
    finite = torch.stack([tensors[name].isfinite().all() for name in names]).tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]


def gather_lists(own: Iterable[str]) -> list[str]:
    """The strings of all processes, without duplicates; every process must call this."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, list(own))
    return list(dict.fromkeys(name for names in every for name in names))


def some_of(names: list[str], count: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
