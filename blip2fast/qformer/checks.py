"""Input validation shared by both stages: images, masks and state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2fast.ops.checks import describe


def check_state(what: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a state dict with missing, unexpected or mis-shaped tensors.

    Args:
        what: Source of the state dict, for the message.
        state: Tensors by name.
        wanted: The model's tensors, by the same names.

    Raises:
        ValueError: lists the first five mismatches, with both shapes.
    """
    wrong = [
        f"{name}: expected {tuple(value.shape)}, got {tuple(state[name].shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    wrong += [f"{name}: missing" for name in wanted if name not in state]
    wrong += [f"{name}: unknown" for name in state if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{what} does not fit the model's sizes: {'; '.join(wrong[:5])}{more}. "
            "Build the model with the config that the weights were trained with"
        )


def image_tokens(
    image_embeds: Tensor | None, images: Tensor | None, encoder: nn.Module | None, width: int
) -> Tensor:
    """Validated image tokens `[B, S, E]`, passed in or computed by the encoder."""
    if (image_embeds is None) == (images is None):
        given = "neither" if image_embeds is None else "both"
        raise ValueError(f"expected either image_embeds or images, got {given}")
    if images is not None:
        if encoder is None:
            raise ValueError(
                f"images: got {describe(images)}, but the model has no image encoder; build it "
                "with image_encoder=..., or pass image_embeds"
            )
        if images.shape[0] == 0:
            raise ValueError(f"images: the batch is empty, got {describe(images)}")
        trained = any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            image_embeds = encoder(images)
    if image_embeds is None or image_embeds.dim() != 3 or image_embeds.shape[2] != width:
        got = "none" if image_embeds is None else describe(image_embeds)
        raise ValueError(
            f"image_embeds: expected [B, S, {width}] (encoder_hidden_size={width}), got {got}"
        )
    if image_embeds.shape[0] == 0 or image_embeds.shape[1] == 0:
        raise ValueError(f"image_embeds: the batch is empty, got {describe(image_embeds)}")
    return image_embeds


def check_gathered(query_tokens: Tensor) -> None:
    """Refuse parameters that DeepSpeed ZeRO-3 or FSDP has partitioned.

    Raises:
        RuntimeError: if they are partitioned; explains how to gather them.
    """
    check_whole("query_tokens", query_tokens)
    if query_tokens.dim() != 3:
        raise RuntimeError(
            "the parameters are partitioned (DeepSpeed ZeRO-3); outside the engine's forward, "
            "gather them: with deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )


def check_whole(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that FSDP2 holds in parts.

    Raises:
        RuntimeError: says how to gather it.
    """
    if is_sharded(parameter):
        raise RuntimeError(
            f"{name} is a DTensor, which FSDP gathers only for the forward of the module that it "
            "was given: leave it to fully_shard(model), and call the model itself, or name the "
            "method: torch.distributed.fsdp.register_fsdp_forward_method(model, 'encode_image')"
        )


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, as FSDP2 holds it."""
    return type(parameter).__name__ == "DTensor"


def check_recompute(settings: Mapping[str, Any]) -> None:
    """Refuse settings of gradient checkpointing: every layer is recomputed, never reentrantly.

    Raises:
        ValueError: a setting other than the defaults of Hugging Face's `Trainer`.
    """
    given = dict(settings)
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        given |= dict(given.pop(name, None) or {})
    for name, value in given.items():
        if {"every_n_layers": 1, "use_reentrant": False}.get(name, value) != value or (
            name not in ("every_n_layers", "use_reentrant") and value
        ):
            raise ValueError(
                f"gradient checkpointing with {name}={value!r}: every layer is recomputed, without "
                "reentrant autograd, and there are no other settings; leave it out"
            )


def check_image_mask(image_embeds: Tensor, image_attention_mask: Tensor | None) -> Tensor | None:
    """Validate the mask of image tokens and return it as bool `[B, S]`."""
    if image_attention_mask is not None and image_attention_mask.shape != image_embeds.shape[:2]:
        raise ValueError(
            f"image_attention_mask: expected [B, S] = {list(image_embeds.shape[:2])}, got "
            f"{describe(image_attention_mask)}"
        )
    return None if image_attention_mask is None else image_attention_mask.bool()
