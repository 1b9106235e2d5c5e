"""Writes trained weights as a file of LAVIS: its names, under the key "model"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from blip2fast.data.manifest import write_through
from blip2fast.frozen.lavis_files import VisionWeights, vision_to_lavis
from blip2fast.published.parts import Named, language_kind
from blip2fast.published.reading import PROJECTIONS
from blip2fast.published.report import Report
from blip2fast.published.weights import NEW_IN_STAGE1, Weights
from blip2fast.stage1.lavis import TIED, to_lavis_name
from blip2fast.stage1.modules import with_scalar_temp
from blip2fast.stage2.convert import stage1_names


def write_lavis(
    weights: Weights, vision: VisionWeights | None, named: Named, partial: Path, path: Path
) -> Report:
    """Write a `.pth` file that LAVIS's `load_checkpoint` and `load_from_pretrained` read.

    Args:
        weights: of either stage.
        vision: the image encoder, written too where there is one.
        named: `language_model` tells the projection's name where the weights do not.
        partial: the file to write.
        path: its final name, for messages.

    Raises:
        ValueError: the kind of the language model is unknown.
    """
    state = _names(weights, named)
    if vision is not None:
        state |= vision_to_lavis(vision)
    write_through(partial, lambda file: torch.save({"model": state}, file))
    missing = []
    if weights.stage == 1:
        absent = [p for p in NEW_IN_STAGE1 if not any(n.startswith(p) for n in weights.tensors)]
        missing = [to_lavis_name(name).rstrip(".") for name in absent]
    notes = ["LAVIS adds 1e-5 to ln_vision's variance, whatever it was trained with"]
    if vision is None:
        notes.append("no image encoder: LAVIS loads its own ViT, frozen as it was")
    if weights.stage == 2:
        notes.append("no language model: LAVIS loads it by its name")
    return Report(
        f"{weights.source!r}, {weights.what}, to {str(path)!r}, a file of LAVIS",
        len(weights.tensors) + (0 if vision is None else len(vision.tensors)),
        missing,
        {},
        notes=notes,
    )


def _names(weights: Weights, named: Named) -> dict[str, Tensor]:
    state = {
        to_lavis_name(stage1_names(name)): value
        for name, value in with_scalar_temp(weights.parameters()).items()
    }
    numbers = torch.arange(weights.sizes.get("max_position_embeddings", 512))
    state["Qformer.bert.embeddings.position_ids"] = numbers[None]
    if weights.stage == 1:
        return state | {tied: state[own] for tied, own in TIED.items() if own in state}
    own = weights.names.get("language_projection.weight", "")
    if weights.layout == "lavis":
        return _renamed(state, "language_projection.", own.removesuffix("weight"))
    kind = language_kind(weights, named.language_model)
    if kind is None:
        raise ValueError(
            f"{weights.source} does not tell its language model, after which LAVIS names the "
            "projection: give --language-model"
        )
    projection = next((p for p, each in PROJECTIONS.items() if each == kind), "llm_proj.")
    return _renamed(state, "language_projection.", projection)


def _renamed(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: value
        for name, value in state.items()
    }
