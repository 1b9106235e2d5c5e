"""Calls of the ops: what the choice of a backend may depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionCall(NamedTuple):
    """What a choice of backend may depend on.

    Attributes:
        queries: Q.
        keys: The longest text of self-attention; S of cross-attention.
        heads, width: H and D.
        dtype, device: Of the data.
        dropout: Whether weights are dropped.
        key_mask: Whether some keys of cross-attention are hidden.
        lse: Whether the log-sum-exp is asked for.
        cross: Whether this is cross-attention.
        indexed: Whether blocks of cross-attention say which image they read.
        gpu: Index of the CUDA device.
        capability: The GPU's compute capability times 10; 0: unknown, or no GPU.
    """

    queries: int
    keys: int
    heads: int
    width: int
    dtype: torch.dtype
    device: str
    dropout: bool
    key_mask: bool
    lse: bool
    cross: bool
    indexed: bool = False
    gpu: int | None = None
    capability: int = 0


class BiasGeluCall(NamedTuple):
    """What a choice of backend may depend on."""

    dtype: torch.dtype
    device: str
    gpu: int | None = None
    bias: torch.dtype | None = None


class DropoutAddLayerNormCall(NamedTuple):
    """What a choice of backend may depend on."""

    width: int
    dtypes: tuple[torch.dtype, ...]
    device: str
    dropout: bool = False
    gpu: int | None = None
    parameters: torch.dtype = torch.float32


class ITCCall(NamedTuple):
    """What decides whether a backend can run a sweep."""

    images: int
    texts: int
    queries: int
    width: int
    dtype: torch.dtype
    device: str
    legacy_epsilon: float
    ids: bool = False
    gpu: int | None = None
    capability: int = 0  # compute capability times 10; 0: unknown, or no GPU
