"""Which modules may be read instead of called.

The fused paths use the weights of a module without calling it. That is right only if a call would
be the `forward` of its class on ordinary tensors and nothing else: no hook, no replaced `forward`,
no subclass, no weight that is a tensor subclass. Everything else (a LoRA wrapper, a quantised or
parametrised layer, a module that a device map loads on demand) is called.

These checks run for every layer of every forward, so they read instance dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _modules
from transformers.activations import GELUActivation

from blip2fast.ops.checks import FLOATS

# Hooks that leave inputs and outputs as they are. DeepSpeed ZeRO gathers partitioned weights (its
# engine keeps the Q-Former unpartitioned), transformers records outputs only where it was asked to,
# and PyTorch's tracker tells FlopCounterMode the name of the module that runs.
_OBSERVERS = ("deepspeed", "transformers.utils.output_capturing", "torch.utils.module_tracker")
_CALL = nn.Module.__call__


def own_forward(cls: type[nn.Module]) -> Any:
    """`cls.forward`, or None if something has replaced it on the class."""
    code = getattr(cls.forward, "__code__", None)
    there = cls.__init__.__code__.co_filename
    return cls.forward if code is not None and code.co_filename == there else None


# of the linear layers of a Q-Former, whatever module has taken their place
LINEAR_NAMES = frozenset(("query", "key", "value", "dense"))
_LINEAR = own_forward(nn.Linear)
_LAYER_NORM = own_forward(nn.LayerNorm)
_GELU = own_forward(nn.GELU)
_GELU_OF_TRANSFORMERS = own_forward(GELUActivation)


def is_untouched(module: nn.Module, forward: Any) -> bool:
    """Whether calling the module runs `forward`, that of its class, and no hook.

    Args:
        module: Any module.
        forward: From `own_forward(type(module))`.
    """
    own = module.__dict__
    if type(module).forward is not forward or nn.Module.__call__ is not _CALL:
        return False
    if "forward" in own and not is_own_method(module, own["forward"]):
        return False
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    ):
        return all(_observes(hook) for hook in _hooks(module))
    return True


def is_own_method(module: nn.Module, method: Any) -> bool:
    """Whether a method is `forward` of the module's class, as accelerate leaves it behind."""
    function = getattr(method, "__func__", None)
    return function is type(module).forward and method.__self__ is module


def is_ordinary(x: Any) -> bool:
    """Whether a weight is a `Parameter` or `Tensor` itself, dense, and of a float type.

    Subclasses and numbers of 8 bits stand for others, which only their layer knows; sparse layouts
    have few operators.
    """
    return (
        (type(x) is nn.Parameter or type(x) is Tensor)
        and x.dtype in FLOATS
        and x.layout is torch.strided
    )


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is an `nn.Linear` whose call is fully defined by its weight and bias."""
    if type(module) is not nn.Linear or not is_untouched(module, _LINEAR):
        return False
    weight, bias = module.weight, module.bias
    if not is_ordinary(weight):
        return False
    # a call broadcasts a bias
    return bias is None or (is_ordinary(bias) and bias.shape == weight.shape[:1])


def is_plain_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether a module is an `nn.LayerNorm` whose call is fully defined by its weight and bias."""
    return (
        type(module) is nn.LayerNorm
        and is_untouched(module, _LAYER_NORM)
        and is_ordinary(module.weight)
        and is_ordinary(module.bias)
    )


def is_exact_gelu(activation: Any) -> bool:
    """Whether an activation is the exact GELU and nothing else."""
    if type(activation) is GELUActivation:
        return activation.act is F.gelu and is_untouched(activation, _GELU_OF_TRANSFORMERS)
    if type(activation) is nn.GELU:
        return activation.approximate == "none" and is_untouched(activation, _GELU)
    return False


def not_plain(root: nn.Module) -> list[str]:
    """Names of the modules in linear layers' places that must be called, not read."""
    names = []
    inside: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if inside and name.startswith(inside):
            continue
        linear = hasattr(module, "in_features") or name.rpartition(".")[2] in LINEAR_NAMES
        if linear and not is_plain(module):
            names.append(f"{name} ({_what(module)})")
            inside = (*inside, f"{name}.")
    return names


def describe_called(root: nn.Module) -> str:
    """The first four of `not_plain`, for a `repr`; empty if there is none."""
    called = not_plain(root)
    more = f" and {len(called) - 4} more" if len(called) > 4 else ""
    return ", ".join(called[:4]) + more


def input_dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    """The dtype that a module takes: that of its first floating-point parameter, else x's."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return x.dtype


def _what(module: nn.Module) -> str:
    """What a module that is called is: its class and, for a plain class, what it carries."""
    kind, weight = type(module), getattr(module, "weight", None)
    name = kind.__name__
    if kind is not nn.Linear:
        # adapters' classes are often named like the one that they replace
        return f"{kind.__module__}.{name}" if name == "Linear" else name
    if weight is not None and not is_ordinary(weight):
        return f"{name}, weight {_what_weight(weight)}"
    bias = getattr(module, "bias", None)
    if bias is not None and is_untouched(module, _LINEAR):
        return f"{name}, bias {_what_weight(bias)}"
    return f"{name}, forward replaced" if "forward" in vars(module) else f"{name}, hooks"


def _what_weight(weight: Any) -> Any:
    """What is not plain about a weight or bias: its dtype, layout, shape or class."""
    if weight.dtype not in FLOATS:
        return weight.dtype
    if weight.layout is not torch.strided:
        return weight.layout
    return f"of shape {list(weight.shape)}" if is_ordinary(weight) else type(weight).__name__


def _hooks(module: nn.Module) -> Iterator[Any]:
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from getattr(module, kind).values()
        yield from getattr(_modules, f"_global{kind}").values()


def _observes(hook: Any) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith(_OBSERVERS)
