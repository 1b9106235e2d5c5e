"""Replaces the Q-Formers inside transformers models with blip2fast's, and restores them.

Both Q-Formers have the same module tree. Only inner nodes are replaced (attention blocks, layers,
the Q-Former itself). The leaves (`nn.Linear`, `nn.LayerNorm`, `nn.Embedding`, or an adapter's
replacement for one) are shared by both trees. So no parameter is copied, state dict keys do not
change, an optimizer built before the swap stays valid, and the two trees need no synchronisation.
"""

import os
from collections.abc import Iterator
from functools import partial, update_wrapper
from typing import Any, TypeVar

import torch
from torch import nn

from blip2fast._imports import needs
from blip2fast.qformer.layers import (
    QFormerAttention,
    QFormerEmbeddings,
    QFormerEncoder,
    QFormerIntermediate,
    QFormerLayer,
    QFormerMultiHeadAttention,
    QFormerResidual,
)
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.plain import is_own_method

with needs("replace transformers' Q-Formers", "tokenizers"):
    import transformers
    from transformers import (
        Blip2QFormerModel,
        InstructBlipQFormerModel,
        InstructBlipVideoQFormerModel,
        PreTrainedModel,
    )

Model = TypeVar("Model", bound=nn.Module)

# where transformers' code is, and that of its decorators in PyTorch
_PUBLISHED = tuple(f"{package.__path__[0]}{os.sep}" for package in (transformers, torch))
_ORIGINALS = (Blip2QFormerModel, InstructBlipQFormerModel, InstructBlipVideoQFormerModel)
_INNER_NODES = (
    QFormer,
    QFormerAttention,
    QFormerEmbeddings,
    QFormerEncoder,
    QFormerIntermediate,
    QFormerLayer,
    QFormerMultiHeadAttention,
    QFormerResidual,
    nn.ModuleList,
)
# State of an inner node besides its children. The hook dicts are shared rather than copied, so a
# handle obtained before the swap still removes its hook afterwards. The last entry tells
# transformers that its output-capturing hooks are already installed.
_STATE = (
    "training",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_output_capturing_hooks_installed",
)


def patch(model: Model) -> Model:
    """Replaces every transformers Q-Former inside a model with a `QFormer` on the same parameters.

    Works on any module that contains a `Blip2QFormerModel`, `InstructBlipQFormerModel` or
    `InstructBlipVideoQFormerModel` at any depth: the BLIP-2, InstructBLIP and InstructBLIP-Video
    models, Granite Speech, Granite Vision, or your own. Outputs do not change. Training mode,
    gradient checkpointing, and hooks carry over, those of a device map too.

    Args:
        model: modified in place, unless it is itself a Q-Former: then use the returned module.

    Returns:
        The patched model.

    Raises:
        ValueError: if the model contains no Q-Former, is already patched, or contains a Q-Former
            that cannot be replaced without changing its behaviour. The model is then unchanged.
    """
    if _patched(model):
        raise ValueError(f"{type(model).__name__} is patched already: call unpatch(model) first")
    originals = [module for module in model.modules() if isinstance(module, _ORIGINALS)]
    if not originals:
        names = ", ".join(cls.__name__ for cls in _ORIGINALS)
        raise ValueError(f"{type(model).__name__} holds no transformers Q-Former ({names})")
    return _swap(model, {original: _replacement(original) for original in originals})


def unpatch(model: Model) -> Model:
    """Restores the original Q-Formers; they keep the current parameter values.

    Args:
        model: the return value of `patch`, modified in place unless it is itself a Q-Former.

    Returns:
        The restored model.

    Raises:
        ValueError: if the model was not patched, or modules were added inside its Q-Former.
    """
    patched = _patched(model)
    if not patched:
        raise ValueError(f"{type(model).__name__} is not patched: there is nothing to undo")
    swaps: dict[nn.Module, nn.Module] = {}
    for qformer in patched:
        original: PreTrainedModel = vars(qformer)["_replaced"]
        # The original's buffers were not in the model, so `.to(device)` did not move them. A device
        # map moves none, and keeps parameters on the meta device.
        mapped = any("_hf_hook" in vars(module) for module in qformer.modules())
        _carry(list(_inner_nodes(qformer, original)))
        for node in original.modules():
            for name, buffer in node._buffers.items():
                if buffer is not None and not mapped:
                    node._buffers[name] = buffer.to(qformer.device)
        swaps[qformer] = original
    return _swap(model, swaps)


def _patched(model: nn.Module) -> list[QFormer]:
    return [
        module
        for module in model.modules()
        if isinstance(module, QFormer) and "_replaced" in vars(module)
    ]


def _swap(model: Model, swaps: dict[nn.Module, nn.Module]) -> Model:
    """Replaces each key of `swaps` with its value, wherever it occurs in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swaps:
                setattr(parent, name, swaps[child])
    return swaps.get(model, model)  # type: ignore[return-value]


def _replacement(original: PreTrainedModel) -> QFormer:
    """A `QFormer` that shares the leaves of `original`."""
    _check_replaceable(original)
    with torch.device("meta"):
        qformer = QFormer(original.config)
    _carry([(theirs, ours) for ours, theirs in _inner_nodes(qformer, original)])
    # Not registered as a submodule: its parameters are already in the model.
    object.__setattr__(qformer, "_replaced", original)
    return qformer


def _check_replaceable(original: PreTrainedModel) -> None:
    name = type(original).__name__
    if type(original) not in _ORIGINALS:
        raise ValueError(f"{name} is a subclass of a transformers Q-Former: its code would be lost")
    attention = original.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(
            f"{name} runs attn_implementation={attention!r}, and QFormer has 'sdpa' and 'eager': "
            "call set_attn_implementation('sdpa') on it first"
        )
    for path, module in original.named_modules():
        if type(module).__module__ == type(original).__module__ and not _is_published(module):
            raise ValueError(
                f"forward of the class {type(module).__name__} was replaced, and its code would be "
                "lost: put the class's own back first"
            )
        if "forward" not in vars(module) or len(module._modules) == 0:
            continue
        if not (_has_device_hook(module) or is_own_method(module, vars(module)["forward"])):
            where = f"{name}.{path}" if path else name
            raise ValueError(
                f"forward of {where} was replaced on the instance, and its code would be lost: "
                "patch first, then replace it"
            )


def _is_published(module: nn.Module) -> bool:
    """Whether `forward` of a class of transformers is the published one, decorators included."""
    forward: Any = type(module).forward
    while forward is not None:
        code = getattr(forward, "__code__", None)
        if code is None or not code.co_filename.startswith(_PUBLISHED):
            return False
        forward = getattr(forward, "__wrapped__", None)
    return True


def _inner_nodes(qformer: nn.Module, original: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs of corresponding inner nodes of both trees, parents first."""
    if qformer._modules.keys() != original._modules.keys():
        differing = sorted(qformer._modules.keys() ^ original._modules.keys())
        raise ValueError(
            f"{type(qformer).__name__} and {type(original).__name__} differ in the modules "
            f"{differing}: remove what was added to the Q-Former first"
        )
    yield qformer, original
    for name, child in qformer._modules.items():
        if isinstance(child, _INNER_NODES):
            yield from _inner_nodes(child, original.get_submodule(name))


def _has_device_hook(module: nn.Module) -> bool:
    """Whether accelerate replaced the module's forward, to move inputs and load weights."""
    own = vars(module)
    forward = own.get("forward")
    return "_hf_hook" in own and isinstance(forward, partial) and forward.args == (module,)


def _move_device_hook(source: nn.Module, target: nn.Module) -> None:
    """Moves accelerate's hook, which wraps the forward of the module that it is on."""
    wrapped = source.__dict__.pop("forward")
    source.__dict__.pop("_old_forward")
    vars(target)["_hf_hook"] = source.__dict__.pop("_hf_hook")
    old = vars(target)["_old_forward"] = target.forward
    vars(target)["forward"] = update_wrapper(partial(wrapped.func, target), old)


def _carry(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Moves leaves and state from the first node of each pair to the second."""
    inner = {node for pair in pairs for node in pair}
    for source, target in pairs:
        if _has_device_hook(source):
            _move_device_hook(source, target)
        for name, child in source._modules.items():
            if child not in inner:
                target._modules[name] = child
        for name in _STATE:
            if name in vars(source):
                object.__setattr__(target, name, vars(source)[name])
            elif name in vars(target):
                object.__delattr__(target, name)
