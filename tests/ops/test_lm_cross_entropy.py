"""The LM loss in chunks of rows against cross-entropy of all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from glue_cases import assert_as_exact_as, make_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blip2fast.kernels.lm_cross_entropy import chunked as _lm_chunks
from blip2fast.ops import lm_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")
C, V = 12, 37
# three rows of fp32 logits
CHUNK = 3 * V * 4


def make_inputs(R: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden, weight, bias."""
    return [make_rows(*s, seed=i, dtype=dtype) for i, s in enumerate([(R, C), (V, C), (V,)])]


def make_labels(R: int, ignored: bool = True) -> Tensor:
    labels = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(3))
    if ignored and R > 1:
        labels[1::4] = -100
    return labels


def plain(labels: Tensor, smoothing: float, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def loss_of(labels: Tensor, smoothing: float, *inputs: Tensor, **options: Any) -> Tensor:
    return lm_cross_entropy(*inputs, labels, label_smoothing=smoothing, **options)[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("options", [{"impl": "reference"}, {}, {"chunk_bytes": 6 * V * 4}])
def test_definition_is_pytorchs(options: dict[str, Any], smoothing: float) -> None:
    R = 8
    inputs, labels = make_inputs(R), make_labels(R)
    loss, correct = lm_cross_entropy(*inputs, labels, label_smoothing=smoothing, **options)
    expected = plain(labels, smoothing, *inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(3 * loss, inputs),
        torch.autograd.grad(3 * expected, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
    hidden, weight, bias = inputs
    assert correct == (F.linear(hidden, weight, bias).argmax(1) == labels).sum()
    assert not correct.requires_grad


@pytest.mark.parametrize("options", [{"impl": "reference"}, {"chunk_bytes": 2 * V * 8}])
def test_gradcheck(options: dict[str, Any]) -> None:
    labels = make_labels(5)
    assert torch.autograd.gradcheck(partial(loss_of, labels, 0.1, **options), make_inputs(5))
    hidden, weight, _ = make_inputs(5)
    assert torch.autograd.gradcheck(
        lambda h, w: lm_cross_entropy(h, w, None, labels, **options)[0], (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize("R", [1, 2, 3, 4, 50])
def test_error_is_within_twice_pytorchs(R: int, chunk: int | None, dtype: torch.dtype) -> None:
    labels = make_labels(R)
    ours = partial(loss_of, labels, 0.1, chunk_bytes=chunk)
    dout = torch.tensor(3.0, dtype=torch.float64)
    assert_as_exact_as(ours, partial(plain, labels, 0.1), make_inputs(R, dtype), dout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [10**6, 300])
def test_padded_vocabulary(chunk: int, dtype: torch.dtype) -> None:
    """Rows of logits padded to an aligned length give what unpadded ones give."""
    inputs = [x.detach() for x in make_inputs(9, dtype)]
    run = partial(_lm_chunks.forward, *inputs, make_labels(9), 0.1, -100, chunk, True, True, True)
    for got, expected in zip(run(pad=True), run(pad=False), strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2e-2
        assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def test_wide_weight_beside_narrow_hidden() -> None:
    """The products are in bf16, the gradient of an fp32 weight is summed and kept in fp32."""
    hidden, weight, bias = make_inputs(20, torch.float32)
    labels = make_labels(20)
    half = hidden.detach().bfloat16().requires_grad_()
    loss = loss_of(labels, 0.1, half, weight, bias, chunk_bytes=CHUNK)
    grads = torch.autograd.grad(loss, (half, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    exact = torch.autograd.grad(plain(labels, 0.1, hidden, weight, bias), (hidden, weight, bias))
    narrow = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    rival = torch.autograd.grad(plain(labels, 0.1, *narrow), narrow)
    for got, theirs, wanted in zip(grads, rival, exact, strict=True):
        assert (got - wanted).norm() <= 2 * (theirs - wanted).norm()


def test_autocast() -> None:
    """Under autocast the products are in its type, as those of a linear layer are."""
    hidden, weight, bias = make_inputs(20, torch.float32)
    labels = make_labels(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(labels, 0.1, hidden, weight, bias)
    expected = loss_of(labels, 0.1, hidden.bfloat16(), weight, bias)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)
    assert inside != loss_of(labels, 0.1, hidden, weight, bias)
    dhidden, dweight = torch.autograd.grad(inside, (hidden, weight))
    assert (dhidden.dtype, dweight.dtype) == (torch.float32, torch.float32)


def test_small_gradients_survive_fp16() -> None:
    """Gradients wait without their factor 1 / R, which alone would make small ones vanish."""
    hidden, weight, bias = make_inputs(300, torch.float16)
    labels = make_labels(300, ignored=False)
    loss = loss_of(labels, 0.1, hidden, weight, bias, chunk_bytes=CHUNK)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    scale = 2.0**-9
    wanted = torch.autograd.grad(plain(labels, 0.1, *exact) * scale, exact)
    got = torch.autograd.grad(loss * scale, (hidden, weight, bias))
    # the weight's and the bias's are above fp16's least normal number; what rounds is the product
    for x, y in zip(got[1:], wanted[1:], strict=True):
        assert (x.double() - y).norm() <= 2e-2 * y.norm()


def test_large_sums_stay_finite_in_fp16() -> None:
    """One word that is the label of every row: its sum over rows leaves fp16's range."""
    R = 4096
    hidden = torch.full((R, C), 30.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(V, C, dtype=torch.float16, requires_grad=True)
    loss, _ = lm_cross_entropy(hidden, weight, None, torch.zeros(R, dtype=torch.int64))
    (dweight,) = torch.autograd.grad(loss, weight)
    exact = weight.detach().double().requires_grad_()
    labels = torch.zeros(R, dtype=torch.int64)
    bias = torch.zeros(V, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(plain(labels, 0.1, hidden.double(), exact, bias), exact)
    torch.testing.assert_close(dweight.double(), wanted, rtol=4e-3, atol=0)


@pytest.mark.parametrize("R", [0, 4])
def test_without_a_label_that_counts(R: int) -> None:
    """The mean of nothing is NaN, as PyTorch's; no gradient reaches anything."""
    inputs = make_inputs(R, torch.float32)
    loss, correct = lm_cross_entropy(*inputs, torch.full((R,), -100))
    assert loss.isnan()
    assert correct == 0
    for x, grad in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, bias = make_inputs(8, torch.float32)
    labels = make_labels(8)
    expected = loss_of(labels, 0.1, hidden, weight, bias)
    spoilt = hidden.detach().masked_fill((labels == -100)[:, None], torch.nan).requires_grad_()
    loss = loss_of(labels, 0.1, spoilt, weight, bias)
    assert torch.equal(loss, expected)
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    for x, y in zip(torch.autograd.grad(loss, (spoilt, weight, bias)), wanted, strict=True):
        assert torch.equal(x, y)


class _Largest(TorchDispatchMode):
    """The products with the words, and the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.elements = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        matrices = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        # a sum over rows is a product with one row
        self.products += func.overloadpacket in matrices and min(args[-2].shape) > 1
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize(
    ("needs", "products"),
    [((True, True, True), 3), ((True, False, False), 2), ((False, False, False), 1)],
)
def test_memory_and_products(needs: tuple[bool, bool, bool], products: int) -> None:
    """No tensor of all logits; one product a chunk for each gradient, none for a frozen weight."""
    R = 30
    inputs = [x.detach() for x in make_inputs(R, torch.float32)]
    with _Largest() as seen:
        _lm_chunks.forward(*inputs, make_labels(R), 0.1, -100, CHUNK, *needs)
    assert seen.elements == max(V * C, R * C) < R * V
    assert seen.products == products * R // 3


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, bias = make_inputs(8, torch.float32)
    labels = make_labels(8)
    loss = loss_of(labels, 0.1, hidden, weight.detach(), bias.detach())
    (expected,) = torch.autograd.grad(plain(labels, 0.1, hidden, weight, bias), hidden)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


def test_backward_twice_gives_the_same() -> None:
    inputs, labels = make_inputs(8, torch.float32), make_labels(8)
    loss = loss_of(labels, 0.1, *inputs)
    first = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(2 * loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
def test_opcheck(dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> None:
    inputs = [
        x.detach().requires_grad_(n) for x, n in zip(make_inputs(7, dtype), needs, strict=True)
    ]
    arguments = (*inputs, make_labels(7), 0.1, -100, CHUNK, *needs)
    torch.library.opcheck(torch.ops.blip2fast.lm_cross_entropy.default, arguments)


def test_compiles_into_one_graph_for_all_sizes() -> None:
    def step(labels: Tensor, *inputs: Tensor) -> Tensor:
        return loss_of(labels, 0.1, *inputs)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for R in (5, 9):
        inputs, labels = make_inputs(R, torch.float32), make_labels(R)
        got, expected = compiled(labels, *inputs), step(labels, *inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, labels: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return loss_of(labels, 0.1, hidden, weight, bias)

    rows = torch.export.Dim("rows", min=2)
    shapes = {"labels": {0: rows}, "hidden": {0: rows}, "weight": None, "bias": None}
    inputs = [x.detach() for x in make_inputs(5, torch.float32)]
    program = torch.export.export(Module(), (make_labels(5), *inputs), dynamic_shapes=shapes)
    other, labels = [x.detach() for x in make_inputs(8, torch.float32)], make_labels(8)
    torch.testing.assert_close(program.module()(labels, *other), loss_of(labels, 0.1, *other))


h, w, y = torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(h[0], w, None, y), r"hidden: expected \[rows, width\].*got \[4\]"),
        (lambda f: f(h, w[:, :3], None, y), r"weight: expected shape \[6, 4\], got \[6, 3\]"),
        (lambda f: f(h, w[:0], None, y), r"weight: expected \[V, C\], V above 0, got \[0, 4\]"),
        (lambda f: f(h, w, h[0], y), r"bias: expected shape \[6\], got \[4\]"),
        (lambda f: f(h, w, None, y[:2]), r"labels: expected \[R\] = \[3\] int64 .*got .*\[2\]"),
        (lambda f: f(h, w, None, y.int()), "labels: expected .*got torch.int32"),
        (lambda f: f(h, w, None, y + 6), r"labels: expected 0 to 5 or ignore_index=-100, got \[6"),
        (lambda f: f(h, w, None, y - 1), r"labels: expected 0 to 5 .*got \[-1, -1, -1\]"),
        (lambda f: f(h, w, None, y, label_smoothing=1.5), "label_smoothing: expected 0 to 1, got"),
        (lambda f: f(h, w, None, y, chunk_bytes=0), "chunk_bytes: expected above 0, got 0"),
        (lambda f: f(h, w, None, y, impl="triton"), "impl: expected 'auto' or one of"),
    ],
)
def test_bad_input(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lm_cross_entropy)
