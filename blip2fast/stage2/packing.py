"""Sequence packing for a decoder-only language model: samples share rows, no padding.

The rows of a batch, soft prompts and text, are put one behind another into fewer rows of about one
length. A position sees the earlier ones of its own sample, and is counted from its sample's start:

    A A A .        A A A B B | B B B C C      A and B in one row, as in two:   A . . . .
    B B B B   ->                                                               A A . . .
    C . . .                                                                    A A A . .
                                                                               . . . B .
                                                                               . . . B B

Every layer but attention then works on real positions only; attention looks at more (masked) ones,
which is why rows are no longer than it pays. The function is the same, sums are rounded elsewhere.

Shapes: B samples of L positions, R packed rows of P positions, W language model width.
"""

from __future__ import annotations

import heapq
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Target length of a packed row: the mask has its square for each row.
ROW_LENGTH = 512
# Packing is left out where it saves less of all work: on a CPU core (OPT, width 512, 4 blocks,
# 32 samples, forward and backward) 7 % fewer positions took 97 % of the time, 50 % fewer 57 %.
LEAST_SAVING = 0.1
# tests/stage2/test_stage2_packing.py tries each: positions from `position_ids` alone, masks
# [R, 1, P, P]
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
        ValueError: all reasons why.
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
        source: [R * P], the position in the flattened [B * L]; 0 where the row has ended.
        sample: [R, P], which sample it belongs to; -1 where the row has ended.
        position_ids: [R, P], counted from the sample's start.
        place: [B, L], the position in the flattened [R * P]; -1 at padding.
    """

    source: Tensor
    sample: Tensor
    position_ids: Tensor
    place: Tensor

    def rows(self, rows: Tensor) -> Tensor:
        """Positions of the flattened [B * L] in the flattened [R * P].

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
        if implementation == "eager":  # it adds its mask to the scores
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
        width: W of the model's layers, which decides how long rows may be before attention costs
            more than padding did.
        row_length: about the most positions of a row, where no sample is longer.

    Returns:
        The places, or None where it would save less than `LEAST_SAVING` of the operations.
    """
    real = mask != 0
    lengths = real.sum(1).tolist()  # the host waits, as it does for the rows that have labels
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
    """Operations of R rows, in those of a layer's linears on one position.

    A layer's linears take 24 * width ** 2 for a position, its attention 4 * P * width.
    """
    return R * P * (1 + P / (6 * width))


def _cheapest(
    lengths: list[int], width: int, row_length: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Rows `[filled, number]`, and for each sample its row and where in it it starts.

    Numbers of rows are tried from the fewest that `row_length` allows to as many as there are
    samples, at most about 24 of them: samples do not share evenly into every number of rows.
    """
    fewest = min(max(1, -(-sum(lengths) // max(row_length, *lengths))), len(lengths))
    step = 1 + (len(lengths) - fewest) // 24
    layouts = [_spread(lengths, count) for count in range(fewest, len(lengths) + 1, step)]
    return min(layouts, key=lambda found: _cost(len(found[0]), max(found[0])[0], width))


def _spread(lengths: list[int], count: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The longest sample first, each into the row with the most room."""
    rows, starts = [[0, number] for number in range(count)], [(0, 0)] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        filled, number = rows[0]
        starts[sample] = (number, filled)
        heapq.heapreplace(rows, [filled + lengths[sample], number])
    return rows, starts
