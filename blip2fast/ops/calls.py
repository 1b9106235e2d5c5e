"""Descriptions of op calls, from which a backend is chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionCall(NamedTuple):
    """An attention call, described for the choice of a backend.

    Attributes:
        queries: Q.
        keys: Length of the longest text (self-attention) or S (cross-attention).
        heads, width: H and D.
        dtype, device: Of the data.
        dropout: Whether dropout is applied to the attention weights.
        key_mask: Whether cross-attention has a key mask.
        lse: Whether the log-sum-exp is returned.
        cross: Whether this is cross-attention.
        indexed: Whether cross-attention has a `kv_index`.
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
    """A `bias_gelu` call, described for the choice of a backend."""

    dtype: torch.dtype
    device: str
    gpu: int | None = None
    bias: torch.dtype | None = None


class DropoutAddLayerNormCall(NamedTuple):
    """A `dropout_add_layer_norm` call, described for the choice of a backend."""

    width: int
    dtypes: tuple[torch.dtype, ...]
    device: str
    dropout: bool = False
    gpu: int | None = None
    parameters: torch.dtype = torch.float32


class ITCCall(NamedTuple):
    """An ITC sweep, described for the choice of a backend."""

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
