"""Linear layers that are not what their class and weight say: every way to change one in place."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


def _bent(y: Tensor) -> Tensor:
    """Another output that a LayerNorm does not straighten."""
    return y + torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)


class Doubled(torch.Tensor):
    """A weight that stands for twice its numbers, as a quantised one stands for other numbers."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            twice = (x.as_subclass(Tensor) * 2 if isinstance(x, cls) else x for x in args)
            return nn.functional.linear(*twice)
        return super().__torch_function__(func, types, args, kwargs or {})


class Sibling(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Wrapper(nn.Module):
    """A module in a layer's place, without a weight of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return _bent(self.inner(x))


class LoadedOnDemand:
    """A device map's hook: the weights lie on the meta device but during a call."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.old = layer, layer.forward
        self.kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
        for name, value in self.kept.items():
            setattr(layer, name, nn.Parameter(value.to("meta"), requires_grad=False))
        layer.forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.kept["weight"].to(x), self.kept["bias"].to(x)
        return nn.functional.linear(x, weight, bias)


def _replace_forward(layer: nn.Linear) -> None:
    old = layer.forward

    @functools.wraps(old)
    def adapted(x: Tensor) -> Tensor:
        return _bent(old(x))

    layer.forward = adapted  # type: ignore[method-assign]


def _as_subclass(layer: nn.Linear) -> None:
    twice = layer.weight.detach().as_subclass(Doubled)
    layer.weight = nn.Parameter(twice, requires_grad=False)


def _sparse(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch calls the layout beta
        sparse = layer.weight.detach().to_sparse_csr()
    layer.weight = nn.Parameter(sparse, requires_grad=False)


def _broadcast_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(layer.bias.detach()[:1] + 0.5)


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _backward_hook(layer: nn.Linear) -> None:
    layer.register_full_backward_hook(lambda _, given, __: (given[0] * 3,))


def _sibling(layer: nn.Linear) -> nn.Module:
    layer.__class__ = Sibling
    return layer


# what happens to a linear layer: in place, or by another module in its place
WRAPPERS: dict[str, Callable[[nn.Linear], nn.Module | None]] = {
    "forward replaced": _replace_forward,
    "forward hook": lambda layer: layer.register_forward_hook(lambda *a: a[2] * 2) and None,
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, a: (a[0] * 2,)) and None,
    "keyword hook": lambda layer: (
        layer.register_forward_hook(lambda _, __, ___, y: _bent(y), with_kwargs=True) and None
    ),
    "backward hook": _backward_hook,
    "subclass": _sibling,
    "wrapper": Wrapper,
    "weight subclass": _as_subclass,
    "sparse": _sparse,
    "broadcast bias": _broadcast_bias,
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", _Halved()),
    "weight norm": parametrizations.weight_norm,
    "parametrised bias": lambda layer: parametrize.register_parametrization(
        layer, "bias", _Halved()
    ),
    "loaded on demand": lambda layer: LoadedOnDemand(layer) and None,
}
# of these, the ones after which the layer returns what it did
SAME_OUTPUT = ("backward hook", "weight norm", "loaded on demand", "sparse")


def wrap(root: nn.Module, path: str, kind: str) -> nn.Module:
    """Change the linear layer at `path` below `root`; returns what is there now."""
    parent, _, name = path.rpartition(".")
    layer = root.get_submodule(path)
    assert type(layer) is nn.Linear
    new = WRAPPERS[kind](layer)
    if isinstance(new, nn.Module):
        setattr(root.get_submodule(parent), name, new)
    return root.get_submodule(path)
