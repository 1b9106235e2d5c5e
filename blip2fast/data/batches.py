"""Batches of training samples: which records each step takes.

What a step takes is a pure function of (seed, step, rank, world size), so that a resumed run needs
to know its step and nothing else, and that two processes of batch b see the samples that one
process of batch 2b sees.

Legend: B samples per process and step, S image tokens, E image token width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Dataset

from blip2fast.data.records import Record, images_of


@dataclass(frozen=True)
class Batch:
    """The samples of a step: epoch, and sample indices [B]."""

    epoch: int
    indices: npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Deterministic shuffled batches; every record at most once per epoch.

    An epoch is one permutation, drawn from (seed, epoch), cut into optimizer steps of
    `batch_size * world_size * accumulation` records each, and those into slices: micro-steps of
    all processes. Which records a step takes depends on that product alone. The records that do not
    fill the last step wait for the next epoch, so no step holds a record twice.

    Args:
        num_records: records to draw from.
        batch_size: B, samples per process and micro-step.
        seed: of the permutations.
        rank, world_size: which slice of each micro-step is this process's.
        accumulation: micro-steps per optimizer step.

    Raises:
        ValueError: bad sizes, or a step larger than the data.
    """

    num_records: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_size, self.accumulation) < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size}, accumulation={self.accumulation}, rank="
                f"{self.rank}, world_size={self.world_size}: sizes must be positive and the rank "
                "below the world size"
            )
        if self.samples_per_step > self.num_records:
            raise ValueError(
                f"batch_size {self.batch_size} x {self.world_size} processes x accumulation "
                f"{self.accumulation} = {self.samples_per_step} samples a step, but only "
                f"{self.num_records} records: lower optim.batch_size"
            )

    @property
    def samples_per_step(self) -> int:
        """Samples of all processes in one optimizer step."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return self.num_records // self.samples_per_step

    def batch(self, micro_step: int) -> Batch:
        """The samples of a micro-step (counted from 0, over all epochs) on this rank."""
        step, slice_number = divmod(micro_step, self.accumulation)
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.samples_per_step
        start += (slice_number * self.world_size + self.rank) * self.batch_size
        order = _permutation(self.seed, epoch, self.num_records)
        return Batch(epoch, order[start : start + self.batch_size])


# Two epochs: workers that read ahead cross the border before the main process does.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


# (image keys, batch) -> the image part of a batch: {"image_embeds": [B, S, E]} or {"images": ...};
# where records have several images the sample numbers repeat, one for each key
BatchImages = Callable[[Sequence[str], Batch], dict[str, Tensor]]


class PlannedBatches(Dataset[dict[str, Tensor]], Generic[Record]):
    """Item i is the whole batch of micro-step i; for a DataLoader with `batch_size=None`.

    Args:
        records: caption, question or sequence records.
        plan: which records a step takes.
        read_images: gives the image part of a batch.
        make_text: `(records, batch) -> tensors`, the text part of a batch.
    """

    def __init__(
        self,
        records: Sequence[Record],
        plan: BatchPlan,
        read_images: BatchImages,
        make_text: Callable[[Sequence[Record], Batch], dict[str, Tensor]],
    ) -> None:
        self.records: Sequence[Record] = records
        self.plan = plan
        self.read_images = read_images
        self.make_text: Callable[[Sequence[Record], Batch], dict[str, Tensor]] = make_text

    def __getitem__(self, micro_step: int) -> dict[str, Tensor]:
        batch = self.plan.batch(micro_step)
        owned = [images_of(self.records[i]) for i in batch.indices]
        keys = [key for row in owned for key in row]
        owners = Batch(batch.epoch, np.repeat(batch.indices, [len(row) for row in owned]))
        return {**self.read_images(keys, owners), **self.make_text(self.records, batch)}
