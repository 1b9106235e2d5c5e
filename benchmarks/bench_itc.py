"""The contrastive loss over all pairs, forward, and with gradients and hard negatives.

One rank; N images of Q queries and N texts, D features each. Everybody computes the same function:
the greatest similarity over queries, cross-entropy both ways with label smoothing, gradients from
both directions, one negative a row. What runs out of memory is reported as that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import Contender, Provider, Work
from shapes import ITC_SHAPES, ITCShape, cells
from torch import Tensor

from blip2fast.ops import itc_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# relative norm from fp32 features; a GPU's fp32 products may be TF32
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
TEMP = 0.07
OURS = ("auto", "cuda", "triton", "chunked", "reference")
# image features and text features to similarities `[N, N]`, images by texts
Similarity = Callable[[Tensor, Tensor], Tensor]


class Inputs:
    """One set of normalised features.

    Attributes:
        image, text, temp: Leaves that want a gradient where the backward pass is timed.
    """

    def __init__(
        self, shape: ITCShape, dtype: torch.dtype, device: torch.device, train: bool, seed: int
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def unit(*size: int) -> Tensor:
            x = F.normalize(torch.randn(*size, generator=generator, device=device), dim=-1)
            return x.to(dtype).requires_grad_(train)

        self.image = unit(shape.batch, shape.queries, shape.width)
        self.text = unit(shape.batch, shape.width)
        self.temp = torch.tensor(TEMP, device=device).requires_grad_(train)
        self.train = train

    def finish(self, loss: Tensor) -> list[Tensor]:
        """The loss, and the gradients where they are timed."""
        if not self.train:
            return [loss]
        return [loss.detach(), *torch.autograd.grad(loss, (self.image, self.text, self.temp))]

    @cached_property
    def truth(self) -> list[Tensor]:
        """By the form that the tests hold against the definition, from the same numbers in fp32."""
        leaves = [x.detach().float().requires_grad_(self.train) for x in self.leaves()]
        loss = itc_loss(*leaves, grad_mode="full", negatives="none", impl="chunked").loss
        if not self.train:
            return [loss]
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image features, text features and temperature."""
        return self.image, self.text, self.temp


def work(shape: ITCShape, itemsize: int, train: bool) -> Work:
    """One product of all queries with all texts forward, two more backward."""
    N, Q, D = shape.batch, shape.queries, shape.width
    features = (N * Q + N) * D * itemsize
    products = 3 if train else 1
    return Work(products * 2 * N * N * Q * D, features * (2 if train else 1), features)


def providers(compiled: bool) -> dict[str, Provider[Inputs]]:
    """Who computes it, ours first."""
    found = {f"blip2fast {impl}": _ours(impl) for impl in OURS}
    found["torch matmul, amax"] = _theirs(product_and_maximum)
    if compiled:
        found["torch.compile of it"] = _theirs(torch.compile(product_and_maximum))
    found["LAVIS's formula"] = _theirs(broadcast_product)
    found["late-interaction-kernels"] = _late_interaction
    return found


def _ours(impl: str) -> Provider[Inputs]:
    def provider(inputs: Inputs) -> Contender:
        negatives = "sample" if inputs.train else "none"

        def call() -> list[Tensor]:
            output = itc_loss(*inputs.leaves(), grad_mode="full", negatives=negatives, impl=impl)
            return inputs.finish(output.loss)

        return Contender({"": call})

    return provider


def _theirs(similarity: Similarity) -> Provider[Inputs]:
    def provider(inputs: Inputs) -> Contender:
        def call() -> list[Tensor]:
            sim = similarity(inputs.image, inputs.text).float() / inputs.temp
            labels = torch.arange(len(sim), device=sim.device)
            both = [F.cross_entropy(x, labels, label_smoothing=0.1) for x in (sim, sim.T)]
            if inputs.train:
                with torch.no_grad():
                    others = sim.detach().clone().fill_diagonal_(-torch.inf)
                    for x in (others, others.T):
                        draw(x.softmax(1))
            return inputs.finish((both[0] + both[1]) / 2)

        return Contender({"": call})

    return provider


def draw(probabilities: Tensor) -> Tensor:
    """One column of each row, by the rule of `multinomial(1)`, whose check waits for the device.

    A wait breaks the capture of a graph, and with it the default generator of the process.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(1)


def product_and_maximum(image: Tensor, text: Tensor) -> Tensor:
    """One product of all queries with all texts, then the greatest of each image's."""
    N, Q, D = image.shape
    return (image.view(N * Q, D) @ text.T).view(N, Q, -1).amax(1)


def broadcast_product(image: Tensor, text: Tensor) -> Tensor:
    """A product a pair of image and text, as LAVIS writes it (once, where LAVIS has it twice)."""
    return torch.matmul(image[:, None], text[:, :, None]).squeeze(-1).max(-1).values


def _late_interaction(inputs: Inputs) -> Contender:
    if inputs.image.device.type != "cuda":
        raise NotImplementedError("late-interaction-kernels: kernels for a CUDA device")
    from late_interaction_kernels import maxsim

    # a text is a query of one token, an image a document of Q tokens
    return _theirs(lambda image, text: maxsim(text[:, None], image).T)(inputs)


def agree(inputs: Inputs, results: list[Tensor]) -> None:
    """Raise AssertionError where the loss or a gradient is not what fp32 gives."""
    tolerance = TOLERANCE[inputs.image.dtype]
    assert len(results) == len(inputs.truth)
    for which, (found, expected) in enumerate(zip(results, inputs.truth, strict=True)):
        error = float((found.float() - expected).norm() / expected.norm())
        assert error < tolerance, f"result {which}: relative error {error:.1e}"


def variants() -> list[Any]:
    """Shapes by dtype and direction; on a GPU bf16 alone."""
    params = []
    for cell in cells(ITC_SHAPES):
        (name,) = cell.values
        # bf16 products on a CPU are no one's choice beyond the smallest
        dtypes = {"cuda": ["bf16"], "cpu": ["fp32"]}.get(ITC_SHAPES[name].where, list(DTYPES))
        params += [
            pytest.param(name, dtype, direction, marks=cell.marks, id=f"{name}-{dtype}-{direction}")
            for dtype in dtypes
            for direction in ("forward", "train")
        ]
    return params


@pytest.mark.parametrize(("name", "dtype", "direction"), variants())
def bench_itc(
    name: str,
    dtype: str,
    direction: str,
    device: torch.device,
    compiled: bool,
    compare: Callable[..., None],
) -> None:
    shape, kind, train = ITC_SHAPES[name], DTYPES[dtype], direction == "train"
    compare(
        providers(compiled),
        lambda seed: Inputs(shape, kind, device, train, seed),
        agree,
        work=work(shape, kind.itemsize, train),
        dtype=kind,
    )
