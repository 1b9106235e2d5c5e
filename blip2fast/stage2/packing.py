"""Sequence packing for a decoder-only language model: samples share rows, no padding.

The sequences of a batch (soft prompts and text) are concatenated into fewer rows of similar length.
A position attends only to earlier positions of its sample; position ids restart at each sample:

    A A A .        A A A B B | B B B C C      A and B in one row, as in two:   A . . . .
    B B B B   ->                                                               A A . . .
    C . . .                                                                    A A A . .
                                                                               . . . B .
                                                                               . . . B B

All layers except attention then compute real positions only. Attention computes more (masked)
pairs, which limits the useful row length. Results are the same up to rounding.

Shapes: B samples of L positions, R packed rows of P positions, W language model width.
"""

from __future__ import annotations

import heapq
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Target length of a packed row: its mask has ROW_LENGTH ** 2 elements.
ROW_LENGTH = 512
# Packing is skipped if it saves a smaller fraction of the operations: on a CPU core (OPT, width
# 512, 4 blocks, 32 samples, forward and backward) 7 % fewer positions took 97 % of the time, 50 %
# fewer 57 %.
LEAST_SAVING = 0.1
# Families that take positions from `position_ids` only and masks [R, 1, P, P]; each is tested in
# tests/stage2/test_stage2_packing.py
FAMILIES = ("opt", "llama", "qwen2", "qwen3", "gemma", "granite", "cohere", "gpt_neox")


def not_packable_reasons(language_model: PreTrainedModel) -> list[str]:
    """Why samples cannot be packed into one row in this model; empty if they can."""
    config = language_model.config
    if config.is_encoder_decoder:
        return ["an encoder-decoder counts positions by columns"]
    reasons = []
    if config.model_type not in FAMILIES:
        reasons.append(f"{config.model_type!r} is not one of the families tried: {FAMILIES}")
    if "position_ids" not in inspect.signature(language_model.forward).parameters:
        reasons.append("it takes no position_ids")
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        reasons.append(f"attention {implementation!r} takes no mask of pairs; load it with 'sdpa'")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        reasons.append(f"a mask of pairs would replace the one of its layers of {sorted(kinds)}")
    return reasons


def check_packable(language_model: PreTrainedModel) -> None:
    """Require a model that supports packing.

    Raises:
        ValueError: if it does not; lists all reasons.
    """
    reasons = not_packable_reasons(language_model)
    if reasons:
        raise ValueError(
            f"pack_padding: {type(language_model).__name__} needs its padding: "
            f"{'; '.join(reasons)}. Set pack_padding=False"
        )


@dataclass(frozen=True)
class PackedRows:
    """The positions of a batch after packing.

    Attributes:
        source: [R * P], source index in the flattened [B * L]; 0 after the end of a row.
        sample: [R, P], index of the sample; -1 after the end of a row.
        position_ids: [R, P], counted from the sample's start.
        place: [B, L], packed index in the flattened [R * P]; -1 at padding.
    """

    source: Tensor
    sample: Tensor
    position_ids: Tensor
    place: Tensor

    def rows(self, rows: Tensor) -> Tensor:
        """Map indices into the flattened [B * L] to indices into the flattened [R * P].

        Raises:
            ValueError: one of them is padding.
        """
        found = self.place.flatten()[rows]
        if bool((found < 0).any()):
            raise ValueError(
                f"labels: {int((found < 0).sum())} of {found.numel()} would be predicted from "
                "padding; set them to -100, or train with pack_padding=False"
            )
        return found

    def inputs(self, embeds: Tensor, implementation: str) -> dict[str, Tensor]:
        """The model's arguments for [B, L, W] embeddings."""
        R, P = self.sample.shape
        row = torch.arange(P, device=embeds.device)
        seen = (self.sample[:, :, None] == self.sample[:, None, :]) & (row[:, None] >= row)
        mask = seen[:, None]
        if implementation == "eager":  # eager attention takes an additive mask
            lowest = torch.finfo(embeds.dtype).min
            mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, lowest)
        return {
            "inputs_embeds": embeds.flatten(0, 1)[self.source].view(R, P, -1),
            "attention_mask": mask,
            "position_ids": self.position_ids,
        }


def pack(mask: Tensor, width: int, row_length: int) -> PackedRows | None:
    """Pack the samples of a batch into fewer rows.

    Args:
        mask: [B, L], nonzero where a position is real.
        width: W of the model's layers, for the cost of attention relative to the linear layers.
        row_length: approximate maximum row length, unless a sample is longer.

    Returns:
        The packed rows, or None if packing would save less than `LEAST_SAVING` of the operations.
    """
    real = mask != 0
    lengths = real.sum(1).tolist()  # synchronises, as selecting the rows with labels does
    rows, starts = _cheapest(lengths, width, row_length)
    R, P = len(rows), max(filled for filled, _ in rows)
    B, L = mask.shape
    saved = 1 - _cost(R, P, width) / _cost(B, L, width)
    if saved < LEAST_SAVING:
        return None
    start = torch.tensor([number * P + at for number, at in starts], device=mask.device)
    position = real.long().cumsum(1) - 1
    place = (start[:, None] + position).masked_fill(~real, -1)
    went, samples = place[real], torch.arange(len(mask), device=mask.device)

    def spread(values: Tensor, empty: int) -> Tensor:
        return torch.full((R * P,), empty, device=mask.device).scatter(0, went, values[real])

    flat = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    return PackedRows(
        source=spread(flat, 0),
        sample=spread(samples[:, None].expand_as(mask), -1).view(R, P),
        position_ids=spread(position, 0).view(R, P),
        place=place,
    )


def _cost(R: int, P: int, width: int) -> float:
    """Cost of R rows of P positions, in units of a layer's linear FLOPs for one position.

    Per position, a layer's linears take 24 * width ** 2 FLOPs and its attention 4 * P * width.
    """
    return R * P * (1 + P / (6 * width))


def _cheapest(
    lengths: list[int], width: int, row_length: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The cheapest layout: rows `[filled, number]`, and per sample its row and start offset.

    Tries about 24 row counts at most, from the minimum that `row_length` allows to one row per
    sample, because samples do not divide evenly into every row count.
    """
    fewest = min(max(1, -(-sum(lengths) // max(row_length, *lengths))), len(lengths))
    step = 1 + (len(lengths) - fewest) // 24
    layouts = [_spread(lengths, count) for count in range(fewest, len(lengths) + 1, step)]
    return min(layouts, key=lambda found: _cost(len(found[0]), max(found[0])[0], width))


def _spread(lengths: list[int], count: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Greedy layout in `count` rows: longest sample first, each into the least filled row."""
    rows, starts = [[0, number] for number in range(count)], [(0, 0)] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        filled, number = rows[0]
        starts[sample] = (number, filled)
        heapq.heapreplace(rows, [filled + lengths[sample], number])
    return rows, starts
