"""A language model's linear layers while it writes on a CPU: by oneDNN, with packed weights.

A step of writing multiplies few rows by every weight, so it takes as long as the weights take to be
read. For 8 rows by a weight of 512 x 2048 in fp32, of several that do not fit the cache together,
MKL took 0.43 ms, oneDNN 0.29, and 0.18 where it has packed the weight (a core of an EPYC of family
26). Packing takes about as long as a step or two. It is done for each text anew, so that nothing
has to follow the weights of a model that learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2fast.ops.linear import onednn_product, takes_onednn
from blip2fast.qformer.plain import is_own_method, is_plain

# a smaller weight's product takes a few dozen microseconds either way
_WORTH_WEIGHT = 1 << 16
# of copies; larger models multiply by oneDNN without them
_MOST_BYTES = 1 << 30


@contextmanager
def packed_linear_layers(model: nn.Module, rows: int) -> Iterator[list[str]]:
    """In this context the plain linear layers of a model compute by oneDNN, the large ones packed.

    Only in fp32, on a CPU where oneDNN is chosen, and without gradients. Called as ever are layers
    that are not plain, and all that are inside a module with hooks or a replaced `forward`, which
    may bring weights later (offloading).

    Args:
        model: Whose layers they are; it is not changed after the context.
        rows: How many rows most products have.

    Yields:
        The names of these layers.
    """
    layers = {} if torch.is_grad_enabled() else dict(_plain_layers(model))
    size = sum(layer.weight.numel() * layer.weight.itemsize for layer in layers.values())
    try:
        for layer in layers.values():
            weight = layer.weight
            if size <= _MOST_BYTES:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            vars(layer)["forward"] = _forward(layer, weight)
        yield list(layers)
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def _plain_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(closed) and closed:
            continue
        if is_plain(module):
            probe = module.weight.new_zeros(1, module.in_features)
            if module.weight.numel() >= _WORTH_WEIGHT and takes_onednn(probe, module.weight):
                yield name, module
        elif _is_changed(module):
            if not name:
                return
            closed = (*closed, f"{name}.")


def _is_changed(module: nn.Module) -> bool:
    """Whether a call of the module may do more than its class says."""
    own = vars(module)
    replaced = "forward" in own and not is_own_method(module, own["forward"])
    return replaced or bool(own["_forward_hooks"]) or bool(own["_forward_pre_hooks"])


def _forward(layer: nn.Linear, packed: Tensor) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias

    def forward(input: Tensor) -> Tensor:
        usual = (
            type(input) is not Tensor
            or input.dtype is not torch.float32
            or input.ndim < 2
            or not input.numel()
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        )
        return F.linear(input, weight, bias) if usual else onednn_product(input, packed, bias)

    return forward
