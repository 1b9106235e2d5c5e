"""Batches of training samples: which records each step takes.

The samples of a step are a pure function of (seed, step, rank, world size). A resumed run
therefore needs only its step number, and two processes with batch size b see the same samples as
one process with batch size 2b.

Legend: B samples per process and step, S image tokens, E image token width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Protocol, cast

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from blip2fast.data.order import Indices, Mixture, shuffled
from blip2fast.data.records import Record, images_of
from blip2fast.frozen.unusable import UnusableImageError


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


# Draws of a record in the place of an unusable one, and those that avoid the step's own records.
MOST_DRAWS, AVOIDING_DRAWS = 256, 64


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
        epoch, start = self._start(micro_step // self.accumulation)
        start += self.first_place(micro_step)
        return self._batch(epoch, np.arange(start, start + self.batch_size))

    def first_place(self, micro_step: int) -> int:
        """The place of the batch's first sample among all samples of its optimizer step."""
        slice_number = micro_step % self.accumulation
        return (slice_number * self.world_size + self.rank) * self.batch_size

    def replacements(self, micro_step: int, place: int) -> Iterator[int]:
        """Records that may stand in for an unusable one; the first usable one of them does.

        They are drawn by (seed, epoch, sample), from the source of the sample if there is a
        mixture. So they depend on neither the process nor on how the run came to this step. Records
        that the step has anyway are left out, as far as there are others.

        Args:
            micro_step: of the batch.
            place: of the sample in this rank's batch.
        """
        batch = self.batch(micro_step)
        epoch, start = self._start(micro_step // self.accumulation)
        step = self._batch(epoch, np.arange(start, start + self.samples_per_step))
        of_step, known = set(step.indices.tolist()), {int(batch.indices[place])}
        first, count = 0, self.num_records
        if self.mixture is not None:
            first, count = self.mixture.source_of(int(batch.indices[place]))
        # the fourth number separates this stream from those of the captions and the crops
        draws = np.random.default_rng([self.seed, epoch, int(batch.samples[place]), 4])
        for number in range(MOST_DRAWS):
            record = first + int(draws.integers(count))
            if record in known or (number < AVOIDING_DRAWS and record in of_step):
                continue
            known.add(record)
            yield record

    def _start(self, step: int) -> tuple[int, int]:
        """The epoch of an optimizer step, and the place in it of the step's first sample."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch, position * self.samples_per_step

    def _batch(self, epoch: int, places: Indices) -> Batch:
        samples = shuffled(self.seed, epoch, self.num_records, places)
        if self.mixture is None:
            return Batch(epoch, samples)
        return Batch(epoch, self.mixture.records(self.seed, epoch, samples), samples)


# (image keys, batch) -> the image part of a batch: {"image_embeds": [B, S, E]} or {"images": ...};
# records with several images repeat their sample index, once per key
BatchImages = Callable[[Sequence[str], Batch], dict[str, Tensor]]


class SeparateImages(Protocol):
    """Images that are loaded one by one, so that one that cannot be used is known."""

    def load(self, key: str, epoch: int, sample: int) -> Any:
        """Load an image; raises `UnusableImageError`."""
        ...

    def join(self, loaded: Sequence[Any]) -> dict[str, Tensor]:
        """As `BatchImages`, of what `load` returned."""
        ...


@dataclass(frozen=True)
class Unusable:
    """A record that was drawn and cannot be used.

    Attributes:
        place: of its sample, among all samples of the optimizer step.
        record: its number.
        image: the key that cannot be used.
        reason: why.
    """

    place: int
    record: int
    image: str
    reason: str


class PlannedBatches(Dataset[dict[str, Tensor]], Generic[Record]):
    """Dataset whose item i is the batch of micro-step i; for a DataLoader with `batch_size=None`.

    Args:
        records: caption, question or sequence records.
        plan: selects the records of each step.
        read_images: returns the image tensors of a batch.
        make_text: `(records, batch) -> tensors`, the text tensors of a batch, whose `indices` are
            places in `records`.
        replaces: put another record in the place of one with an unusable image
            (`BatchPlan.replacements`); `read_images` must then be `SeparateImages`, too.
    """

    def __init__(
        self,
        records: Sequence[Record],
        plan: BatchPlan,
        read_images: BatchImages,
        make_text: Callable[[Sequence[Record], Batch], dict[str, Tensor]],
        replaces: bool = False,
    ) -> None:
        self.records: Sequence[Record] = records
        self.plan = plan
        self.read_images = read_images
        self.make_text: Callable[[Sequence[Record], Batch], dict[str, Tensor]] = make_text
        self.replaces = replaces

    def keys(self, micro_step: int) -> list[str]:
        """The image keys of a batch, in the order of its images."""
        if self.replaces:
            records = self._usable(micro_step).records
        else:
            records = [self.records[i] for i in self.plan.batch(micro_step).indices]
        return [key for record in records for key in images_of(record)]

    def __getitem__(self, micro_step: int) -> dict[str, Tensor]:
        return self.take(micro_step)[0]

    def take(self, micro_step: int) -> tuple[dict[str, Tensor], list[Unusable]]:
        """The batch of a micro-step, and the records that were replaced in it.

        Raises:
            ValueError: an unusable image and not `replaces`, or nothing to replace it by.
        """
        batch = self.plan.batch(micro_step)
        if self.replaces:
            found = self._usable(micro_step)
            texts = self.make_text(found.records, _within(batch))
            images = cast(SeparateImages, self.read_images).join(found.images)
            return {**images, **texts}, found.replaced
        chosen = [self.records[i] for i in batch.indices]
        owned = [images_of(record) for record in chosen]
        keys = [key for row in owned for key in row]
        counts = [len(row) for row in owned]
        owners = Batch(
            batch.epoch, np.repeat(batch.indices, counts), np.repeat(batch.samples, counts)
        )
        # each record is read once: texts are made of a list of these alone
        texts = self.make_text(chosen, _within(batch))
        try:
            return {**self.read_images(keys, owners), **texts}, []
        except UnusableImageError as error:
            raise UnusableImageError(
                f"{error}; drop its record (`blip2fast data check` names all of them by line), or "
                "set data.on_error: skip"
            ) from None

    def _usable(self, micro_step: int) -> _Usable:
        batch, found = self.plan.batch(micro_step), _Usable([], [], [])
        for place in range(len(batch.indices)):
            self._add_usable(found, micro_step, batch, place)
        return found

    def _add_usable(self, found: _Usable, micro_step: int, batch: Batch, place: int) -> None:
        """Add the record at a place of the batch, or the one that replaces it."""
        images = cast(SeparateImages, self.read_images)
        sample, in_step = int(batch.samples[place]), self.plan.first_place(micro_step) + place
        planned = int(batch.indices[place])
        for index in chain([planned], self.plan.replacements(micro_step, place)):
            record = self.records[index]
            loaded: list[Any] = []
            try:
                for key in images_of(record):
                    loaded.append(images.load(key, batch.epoch, sample))
            except UnusableImageError as error:
                found.replaced.append(Unusable(in_step, index, key, str(error)))
                continue
            found.records.append(record)
            found.images += loaded
            return
        raise ValueError(
            f"none of the {MOST_DRAWS} records drawn in the place of record {planned + 1} can be "
            f"used; the last: {found.replaced[-1].reason}"
        )


@dataclass(frozen=True)
class TakenBatches(Dataset[tuple[dict[str, Tensor], list[Unusable]]]):
    """Dataset whose item is `PlannedBatches.take`, for loaders that are told what is replaced."""

    batches: PlannedBatches[Any]

    def __getitem__(self, micro_step: int) -> tuple[dict[str, Tensor], list[Unusable]]:
        return self.batches.take(micro_step)


@dataclass
class _Usable(Generic[Record]):
    """The records of a batch, all usable, with their loaded images in order."""

    records: list[Record]
    images: list[Any]
    replaced: list[Unusable]


def _within(batch: Batch) -> Batch:
    """A batch whose indices are places in the list of its own records."""
    return Batch(batch.epoch, np.arange(len(batch.indices)), batch.samples)
