"""What op tests share: random rows, errors against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def make_rows(
    *shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Tensor:
    """Random numbers that this dtype holds exactly, as a leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def values_and_grads(function: Function, inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """The output and the gradient of every input, under this gradient of the output."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out))]


def assert_as_exact_as(
    ours: Function,
    theirs: Function,
    inputs: Sequence[Tensor],
    dout: Tensor,
    truth: Function | None = None,
    grad_rounding: float = 0.0,
) -> None:
    """Errors against fp64 are at most twice PyTorch's, plus one rounding.

    Args:
        ours, theirs: Functions of the inputs; `theirs` is PyTorch in the type of the inputs.
        inputs: In the type to test.
        dout: The gradient of the output.
        truth: What fp64 is computed with; by default `theirs`.
        grad_rounding: What the interface rounds further in gradients, relative.
    """
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = values_and_grads(truth or theirs, wide, dout)
    got, rival = (values_and_grads(f, inputs, dout) for f in (ours, theirs))
    for place, (x, y, z) in enumerate(zip(got, rival, exact, strict=True)):
        assert x.shape == z.shape
        assert x.isfinite().all(), f"result {place} is not finite"
        rounding = torch.finfo(x.dtype).eps / 2 + (grad_rounding if place > 0 else 0.0)
        error, allowed = (x.double() - z).norm(), 2 * (y.double() - z).norm() + rounding * z.norm()
        assert error <= allowed, f"result {place}: error {error:.3g}, allowed {allowed:.3g}"


def saved_tensors(function: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps for the backward pass of a call."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return kept
