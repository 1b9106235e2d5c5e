"""Gradient checkpointing of a frozen block: only its inputs are saved.

Unlike `torch.utils.checkpoint`, the gradient is computed inside the recomputation, so the block's
weights are needed only during that call and nothing of the recomputed graph outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

# inference: no backward pass will follow
Pass = Literal["inference", "forward", "backward"]
Resident = Callable[[Pass], AbstractContextManager[None]]
_TENSOR = object()  # placeholder for a tensor in a list of other arguments


def recomputed(
    block: nn.Module,
    forward: Callable[..., Any],
    resident: Resident,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Checkpointed `forward(*args, **kwargs)` of a frozen block, with gradients to its inputs.

    Args:
        block: its training mode decides whether the RNG state is saved.
        forward: the block's forward.
        resident: context manager that makes its weights resident, given the pass that needs them.
        args, kwargs: arguments of the forward; may be nested.

    Raises:
        ValueError: a KV cache is passed while gradients are needed.
    """
    leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        with resident("inference"):
            return forward(*args, **kwargs)
    if any(isinstance(leaf, Cache) for leaf in leaves):
        raise ValueError(
            f"{type(block).__name__}: a streamed block got a cache of keys and values while "
            "gradients are computed, and would extend it twice: call the model with "
            "use_cache=False, or under no_grad"
        )
    # tensors are saved by autograd, which detects in-place changes
    fixed = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    produced: list[Any] = []

    def compute(inputs: Sequence[Tensor]) -> list[Tensor]:
        given, named = tree_unflatten(_filled(fixed, inputs), structure)
        with torch.enable_grad():
            outputs, outer = tree_flatten(forward(*given, **named))
        produced[:] = [[_TENSOR if isinstance(x, Tensor) else x for x in outputs], outer]
        return [x for x in outputs if isinstance(x, Tensor)]

    draws = any(module.training for module in block.modules())
    outputs = _Recomputed.apply(compute, resident, draws, *tensors)
    rest, outer = produced
    return tree_unflatten(_filled(rest, outputs), outer)


class _Recomputed(torch.autograd.Function):
    """Autograd function of `recomputed`; its inputs and outputs are flat lists of tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[Sequence[Tensor]], list[Tensor]],
        resident: Resident,
        draws: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.compute, ctx.resident, ctx.needed = compute, resident, ctx.needs_input_grad[3:]
        kind = next(t.device for t in tensors if t.requires_grad)
        ctx.autocast = {
            "device_type": kind.type,
            "dtype": torch.get_autocast_dtype(kind.type),
            "enabled": torch.is_autocast_enabled(kind.type),
        }
        ctx.random = _random_states(kind) if draws else None
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with resident("forward"):
            outputs = compute(_detached(tensors, ctx.needed))
        given = tuple(output.detach() for output in outputs)
        still = [g for g, output in zip(given, outputs, strict=True) if not output.requires_grad]
        ctx.mark_non_differentiable(*still)
        return given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = _detached(ctx.saved_tensors, ctx.needed)
        with ctx.resident("backward"), torch.autocast(**ctx.autocast), _drawn_again(ctx.random):
            pairs = [
                (output, gradient)
                for output, gradient in zip(ctx.compute(inputs), gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            found: Iterator[Tensor | None] = iter(())
            if pairs:
                found = iter(
                    torch.autograd.grad(
                        [output for output, _ in pairs],
                        [tensor for tensor in inputs if tensor.requires_grad],
                        [gradient for _, gradient in pairs],
                        allow_unused=True,
                    )
                )
            del pairs
        passed_on = (next(found, None) if tensor.requires_grad else None for tensor in inputs)
        return None, None, None, *passed_on


def _filled(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    given = iter(tensors)
    return [next(given) if leaf is _TENSOR else leaf for leaf in leaves]


def _detached(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]


def _random_states(device: torch.device) -> tuple[torch.device, Tensor, Tensor | None]:
    on_gpu = device.type == "cuda"
    return device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None


def _drawn_again(
    states: tuple[torch.device, Tensor, Tensor | None] | None,
) -> AbstractContextManager[None]:
    """Context manager that restores the RNG state of the forward pass."""
    return nullcontext() if states is None else _random_state(*states)


@contextmanager
def _random_state(device: torch.device, cpu: Tensor, cuda: Tensor | None) -> Iterator[None]:
    with torch.random.fork_rng([] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
