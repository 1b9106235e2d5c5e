"""Choices that a configuration names, apart from what imports torch, so that a typing error is
found before that is loaded."""

from __future__ import annotations

from typing import Literal

# what becomes of kernels that nobody has checked on this GPU (`blip2fast.ops.set_kernels`)
Kernels = Literal["never", "check", "trust"]

# how the linear layers of a frozen image encoder compute
Quantization = Literal["none", "int8"]

# losses of stage 1
LossName = Literal["itc", "itm", "itg"]
LOSSES: tuple[LossName, ...] = ("itc", "itm", "itg")

# how streamed weights of a frozen language model are stored
Storage = Literal["as_is", "int8", "int4"]
STORAGES: tuple[Storage, ...] = ("as_is", "int8", "int4")

# retrieval is scored at these ranks
RECALL_KS = (1, 5, 10)
