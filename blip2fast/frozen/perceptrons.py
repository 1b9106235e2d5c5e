"""The perceptrons of a vision model: first layer, activation and second layer in fewer passes.

A module whose forward pass is found to be a chain of its children (`torch.fx`) becomes a `Chain` of
the same children under the same names, so parameters keep their names. A chain computes what the
module computed. Without gradients on a CPU it lets oneDNN apply exact GELU to a product before that
is stored, and needs one temporary tensor for CLIP's quick GELU in place of three.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from transformers.activations import QuickGELUActivation

from blip2fast.frozen.cpu_inference import applies, takes_product
from blip2fast.ops.linear import onednn_product
from blip2fast.qformer.plain import is_exact_gelu, is_plain, is_untouched

_QUICK_GELU = QuickGELUActivation.forward
# None if another library has replaced it by then
_KNOWN = _QUICK_GELU if _QUICK_GELU.__module__ == QuickGELUActivation.__module__ else None


class Chain(nn.Module):
    """The children of a module, each called once, on what the one before it returned.

    Args:
        module: Whose children they are; it is not changed.
        order: Their names, in the order of the calls.
    """

    def __init__(self, module: nn.Module, order: list[str]) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self._order = order
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        """What the last of them returns."""
        called = [getattr(self, name) for name in self._order]
        while called:
            layer = called.pop(0)
            if called and (is_exact_gelu(called[0]) or is_quick_gelu(called[0])):
                x = activated(layer, x, called.pop(0))
            else:
                x = layer(x)
        return x


def chain_perceptrons(model: nn.Module) -> None:
    """Replace the perceptrons with a GELU by chains, in place; what is no chain stays as it is."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            order = _order(module)
            if order is not None:
                setattr(parent, name, Chain(module, order))


def activated(layer: nn.Module, x: Tensor, activation: nn.Module) -> Tensor:
    """`activation(layer(x))`.

    Args:
        layer: A linear layer, or a module that replaces one.
        x: `[..., K]`.
        activation: Exact GELU or quick GELU, or what has taken its place since.
    """
    if not torch.compiler.is_compiling() and applies(x) and is_plain(layer):
        if is_exact_gelu(activation) and takes_product(x, layer.weight, layer.bias):
            return onednn_product(x, layer.weight, layer.bias, gelu=True)
        if is_quick_gelu(activation):
            y = layer(x)
            return (1.702 * y).sigmoid_().mul_(y)
    activated: Tensor = activation(layer(x))
    return activated


def is_quick_gelu(activation: nn.Module) -> bool:
    """Whether an activation is CLIP's `x sigmoid(1.702 x)` and nothing else."""
    return type(activation) is QuickGELUActivation and is_untouched(activation, _KNOWN)


class _Calls(fx.Tracer):
    """Sees the calls of a module's children, not what is in them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _order(module: nn.Module) -> list[str] | None:
    """The names of a perceptron's children in the order of their calls; None: it is no chain."""
    children = list(module.children())
    if (
        isinstance(module, Chain | nn.Sequential)
        or not any(is_exact_gelu(child) or is_quick_gelu(child) for child in children)
        or not any(isinstance(child, nn.Linear) for child in children)
        or not is_untouched(module, type(module).forward)
        or any(True for _ in module.parameters(recurse=False))
        or any(True for _ in module.buffers(recurse=False))
    ):
        return None
    try:
        nodes = list(_Calls().trace(module).nodes)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError):
        return None
    first, *calls, last = nodes
    if first.op != "placeholder" or last.op != "output":
        return None
    given = first
    for call in calls:
        if call.op != "call_module" or call.args != (given,) or call.kwargs or "." in call.target:
            return None
        given = call
    return [str(call.target) for call in calls] if last.args == (given,) else None
