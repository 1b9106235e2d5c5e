"""Gradient checkpointing of single layers, in evaluation mode too; what is frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_forward(layer: nn.Module) -> None:
    """Let a layer save its inputs only, and run again in the backward pass.

    transformers' own switch works in training mode only, which a frozen model is not in.
    """
    if "forward" not in vars(layer):
        layer.forward = partial(_recomputed, layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # without dropout no random numbers are drawn, so the RNG state need not be saved
    draws = any(module.training for module in layer.modules())
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)


def recompute_encoder(encoder: nn.Module | None) -> None:
    """Enable gradient checkpointing of an image encoder's blocks, if it is one that has it."""
    recompute = getattr(encoder, "recompute_blocks", None)
    if recompute is not None:
        recompute()


def is_unfrozen(module: nn.Module) -> bool:
    """Whether any parameter of a module requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())
