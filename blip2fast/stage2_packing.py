"""Texts of different lengths without their padding, in a decoder-only language model.

The rows of a batch, soft prompts and text, are put one behind another into fewer rows of about one
length. A position sees the earlier ones of its own sample, and is counted from its sample's start:

    A A A .        A A A B B | B B B C C      A and B in one row, as in two:   A . . . .
    B B B B   ->                                                               A A . . .
    C . . .                                                                    A A A . .
                                                                               . . . B .
                                                                               . . . B B

Every layer but attention then works on real positions only; attention looks at more (masked) ones,
which is why a row is not longer than needed. The function is the same, sums are rounded elsewhere.

Shapes: B samples of L positions, R packed rows of P positions, W language model width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blip2fast.stage2_types import Stage2Config

# Positions of a packed row. Padded rows of a caption batch have about 50: at P = 256 attention
# costs a model of width 2560 (OPT-2.7B) 4 * 200 * 2560 more operations for each position, 1.3 % of
# the 24 * 2560 ** 2 of its linears.
ROW_LENGTH = 256
# Packing moves every position once more; it is left out where it saves less than this share.
LEAST_SAVING = 0.05
# tests/test_stage2_packing.py tries each: positions from `position_ids` alone, masks [R, 1, P, P]
FAMILIES = ("opt", "llama", "qwen2", "qwen3", "gemma", "granite", "cohere", "gpt_neox")


def not_packable_reasons(language_model: PreTrainedModel) -> list[str]:
    """Why the rows of a batch cannot share a row in this model; none where they can."""
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
    """Refuse a model in which samples cannot share a row.

    Raises:
        ValueError: all reasons why.
    """
    reasons = not_packable_reasons(language_model)
    if reasons:
        raise ValueError(
            f"pack_padding: {type(language_model).__name__} needs its padding: "
            f"{'; '.join(reasons)}. Set pack_padding=False"
        )


def describe(config: Stage2Config, language_model: PreTrainedModel) -> str:
    """How a stage-2 model treats its language model; for its `extra_repr`."""
    if config.pack_padding:
        padding = f"padding removed: samples share rows of up to {ROW_LENGTH} positions"
    else:
        reasons = not_packable_reasons(language_model)
        padding = f"padding kept: {'; '.join(reasons) if reasons else 'pack_padding is off'}"
    dropout = "as it was trained" if config.llm_dropout else "none"
    return (
        f"num_query_tokens={config.num_query_tokens}, text_conditioned={config.text_conditioned}, "
        f"language model: dropout {dropout}, {padding}"
    )


@dataclass(frozen=True)
class Packed:
    """Where each position of a batch went.

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


def pack(mask: Tensor, row_length: int) -> Packed | None:
    """Put the samples of a batch behind one another.

    The number of rows is the least that `row_length` allows; the longest sample goes first, and
    each into the row with the most room, so that the rows end at about one place.

    Args:
        mask: [B, L], nonzero where a position is real.
        row_length: most positions of a row, where no sample is longer.

    Returns:
        The places, or None where fewer than `LEAST_SAVING` of the positions would be saved.
    """
    real = mask != 0
    lengths = real.sum(1).tolist()  # the host waits, as it does for the rows that have labels
    rows = max(1, -(-sum(lengths) // max(row_length, *lengths)))
    filled, starts = [0] * rows, [(0, 0)] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        row = filled.index(min(filled))
        starts[number] = (row, filled[row])
        filled[row] += lengths[number]
    P = max(filled)
    if rows * P > (1 - LEAST_SAVING) * mask.numel():
        return None
    start = torch.tensor([row * P + at for row, at in starts], device=mask.device)
    position = real.long().cumsum(1) - 1
    place = (start[:, None] + position).masked_fill(~real, -1)
    went, samples = place[real], torch.arange(len(mask), device=mask.device)

    def spread(values: Tensor, empty: int) -> Tensor:
        return torch.full((rows * P,), empty, device=mask.device).scatter(0, went, values[real])

    flat = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    return Packed(
        source=spread(flat, 0),
        sample=spread(samples[:, None].expand_as(mask), -1).view(rows, P),
        position_ids=spread(position, 0).view(rows, P),
        place=place,
    )
