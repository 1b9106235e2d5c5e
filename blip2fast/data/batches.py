"""Batches of training samples: which records each step takes.

The samples of a step are a pure function of (seed, step, rank, world size). A resumed run
therefore needs only its step number, and two processes with batch size b see the same samples as
one process with batch size 2b.

Legend: B samples per process and step, S image tokens, E image token width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from blip2fast.data.order import Indices, Mixture, shuffled
from blip2fast.data.records import Record, images_of


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-step.

    Attributes:
        epoch: their epoch.
        indices: [B] records.
        samples: [B] numbers of the samples within the epoch, by which what is random about them is
            drawn; the records, unless a record may come several times in an epoch.
    """

    epoch: int
    indices: Indices
    samples: Indices = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if self.samples is None:
            object.__setattr__(self, "samples", self.indices)


@dataclass(frozen=True)
class BatchPlan:
    """Deterministic shuffled batches that use every record at most once per epoch.

    Each epoch is one permutation, seeded by (seed, epoch); see `blip2fast.data.order`. It is cut
    into optimizer steps of `batch_size * world_size * accumulation` records, and each step into
    micro-steps across all processes. The records of a step depend on that product alone. Records
    left over for an incomplete last step are skipped until the next epoch, so no step contains a
    record twice.

    Args:
        num_records: records to draw from.
        batch_size: B, samples per process and micro-step.
        seed: seed of the permutations.
        rank, world_size: select this process's slice of each micro-step.
        accumulation: micro-steps per optimizer step.
        mixture: sources with weights; an epoch then has as many samples as there are records, but
            takes from each source by its weight, and a step may contain a record twice.

    Raises:
        ValueError: invalid sizes, or a step larger than the dataset.
    """

    num_records: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    mixture: Mixture | None = None

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
        """Samples per optimizer step, over all processes."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.num_records // self.samples_per_step

    def batch(self, micro_step: int) -> Batch:
        """This rank's samples of a micro-step, counted from 0 over all epochs."""
        step, slice_number = divmod(micro_step, self.accumulation)
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.samples_per_step
        start += (slice_number * self.world_size + self.rank) * self.batch_size
        places = np.arange(start, start + self.batch_size)
        samples = shuffled(self.seed, epoch, self.num_records, places)
        if self.mixture is None:
            return Batch(epoch, samples)
        return Batch(epoch, self.mixture.records(self.seed, epoch, samples), samples)


# (image keys, batch) -> the image part of a batch: {"image_embeds": [B, S, E]} or {"images": ...};
# records with several images repeat their sample index, once per key
BatchImages = Callable[[Sequence[str], Batch], dict[str, Tensor]]


class PlannedBatches(Dataset[dict[str, Tensor]], Generic[Record]):
    """Dataset whose item i is the batch of micro-step i; for a DataLoader with `batch_size=None`.

    Args:
        records: caption, question or sequence records.
        plan: selects the records of each step.
        read_images: returns the image tensors of a batch.
        make_text: `(records, batch) -> tensors`, the text tensors of a batch, whose `indices` are
            places in `records`.
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

    def keys(self, micro_step: int) -> list[str]:
        """The image keys of a batch, in the order of its images."""
        indices = self.plan.batch(micro_step).indices
        return [key for i in indices for key in images_of(self.records[i])]

    def __getitem__(self, micro_step: int) -> dict[str, Tensor]:
        batch = self.plan.batch(micro_step)
        chosen = [self.records[i] for i in batch.indices]
        owned = [images_of(record) for record in chosen]
        keys = [key for row in owned for key in row]
        counts = [len(row) for row in owned]
        owners = Batch(
            batch.epoch, np.repeat(batch.indices, counts), np.repeat(batch.samples, counts)
        )
        # each record is read once: texts are made of a list of these alone
        texts = self.make_text(chosen, Batch(batch.epoch, np.arange(len(chosen)), batch.samples))
        return {**self.read_images(keys, owners), **texts}
