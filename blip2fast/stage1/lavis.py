"""Renames stage-1 parameters to and from LAVIS's names.

LAVIS wraps a BERT language model: its word embeddings, layers and generation head live under
`Qformer.bert` and `Qformer.cls`. The tensors are the same; only the names differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# (LAVIS prefix, our prefix); the first match is used
_PREFIXES = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.", "embeddings."),
    ("Qformer.bert.", "qformer."),
    ("Qformer.cls.predictions.", "lm_head."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
)

# LAVIS checkpoint entries that we drop: the position-id buffer and the image encoder
_IGNORED = ("Qformer.bert.embeddings.position_ids", "visual_encoder.")

# LAVIS saves tied tensors under both names
TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


def from_lavis_name(name: str) -> str:
    """Our name for a LAVIS parameter."""
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
            break
    return re.sub(r"\.(attention|crossattention)\.self\.", r".\1.attention.", name)


def to_lavis_name(name: str) -> str:
    """LAVIS's name for one of our parameters."""
    name = re.sub(r"\.(attention|crossattention)\.attention\.", r".\1.self.", name)
    for theirs, ours in _PREFIXES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def from_lavis(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a LAVIS stage-1 state dict.

    Args:
        state_dict: Parameters under LAVIS's names, for example a checkpoint's `["model"]`; its
            image encoder is dropped.

    Returns:
        The same tensors under our names.

    Raises:
        ValueError: a tied tensor was saved twice with different values.
    """
    renamed = {}
    for name, value in state_dict.items():
        if name in TIED:
            twin = state_dict.get(TIED[name])
            if twin is not None and not torch.equal(value, twin):
                raise ValueError(
                    f"{name} and {TIED[name]} are one tied tensor in BLIP-2, but differ in this "
                    "state dict"
                )
        elif not name.startswith(_IGNORED):
            renamed[from_lavis_name(name)] = value
    return renamed
