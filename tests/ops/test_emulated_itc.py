"""The CUDA ITC kernels on the host, as in test_emulated_kernels.py, against the definition."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from extension_build import build_extension, build_target, needs_compiler
from torch import Tensor

from blip2fast.kernels.itc import reference
from blip2fast.kernels.itc.interface import LSE, Options, Pairs, Weights
from blip2fast.ops.philox import philox_state

pytestmark = needs_compiler

# images, texts, queries, width, first row, whether pairs have ids
CASES = {
    "one tile": (5, 7, 32, 64, 0, False),
    "a text tile and one, rank 1": (9, 129, 32, 40, 3, False),
    "ids, few queries": (20, 16, 5, 24, 0, True),
    "one text": (9, 1, 1, 8, 0, False),
    "two pairs": (2, 2, 32, 256, 0, False),
    "chunks": (66, 100, 2, 8, 0, False),  # 64 rows at once
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> torch._ops._OpNamespace:
    build_extension(Path(tmp_path_factory.mktemp("extension")))
    torch.ops.load_library(str(build_target("emulated/_C.so")))
    return torch.ops.blip2fast_emulated


@pytest.fixture
def device(kernels: torch._ops._OpNamespace) -> Iterator[ctypes.CDLL]:
    """What the emulated device is, for a test to choose."""
    library = ctypes.CDLL(str(build_target("emulated/_C.so")))
    yield library
    library.blip2fast_emulate(80)


def _features(M: int, N: int, Q: int, D: int, temp: float = 0.07) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(M, Q, D), dim=-1).bfloat16()
    text = F.normalize(torch.randn(N, D), dim=-1).bfloat16()
    return image, text, torch.tensor(temp)


def _ids(M: int, N: int, some: bool) -> tuple[Tensor | None, Tensor | None]:
    return (torch.arange(M) % 5, torch.arange(N) % 7) if some else (None, None)


@pytest.mark.parametrize("name", CASES)
def test_sweep(kernels: torch._ops._OpNamespace, name: str) -> None:
    M, N, Q, D, first, some_ids = CASES[name]
    image, text, temp = _features(M, N, Q, D)
    ids, philox = _ids(M, N, some_ids), philox_state(2**62 + 1, 3)
    out = kernels.itc_sweep(image, text, temp, *ids, philox, first, True)
    wide = (image.double(), text.double(), temp.double())
    expected = reference.sweep(*wide, Pairs(first, *ids), Options(philox, save=True))
    assert out[2].equal(expected.row_index)
    assert out[3].equal(expected.column_index)
    assert out[5].equal(expected.arg)
    for ours, truth in ((out[0], expected.rows), (out[1], expected.columns)):
        # fp32 sums of up to 140 numbers of up to 1 / temp
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)
    # fp32 sums of D products below 1
    torch.testing.assert_close(out[4].double(), expected.sim, rtol=0, atol=1e-6)
    again = kernels.itc_sweep(image, text, temp, *ids, philox, first, False)
    assert all(a.equal(b) for a, b in zip(out[:4], again[:4], strict=True))
    quiet = kernels.itc_sweep(image, text, temp, *ids, None, first, False)
    assert (quiet[2][1] == -1).all()
    assert (quiet[3][1] == -1).all()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_sweep_grad(
    kernels: torch._ops._OpNamespace, device: ctypes.CDLL, name: str, local: bool, capability: int
) -> None:
    device.blip2fast_emulate(capability)
    M, N, Q, D, first, some_ids = CASES[name]
    _check_gradients(kernels, _features(M, N, Q, D), _ids(M, N, some_ids), first, local)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("value", [0.001, 10.0])
def test_temperatures(
    kernels: torch._ops._OpNamespace, device: ctypes.CDLL, capability: int, value: float
) -> None:
    device.blip2fast_emulate(capability)
    image, text, temp = _features(13, 15, 4, 32, value)
    philox = philox_state(5, 1)
    out = kernels.itc_sweep(image, text, temp, None, None, philox, 1, True)
    wide = (image.double(), text.double(), temp.double())
    expected = reference.sweep(*wide, Pairs(1, None, None), Options(philox, save=True))
    for ours, truth in zip(out[:2], expected[:2], strict=True):
        assert ours.isfinite().all()
        # fp32 sums of 32 products below 1, over the temperature, up to 15 of them
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=15 * 2e-7 / value)
    for ours, truth in zip(out[2:4], expected[2:4], strict=True):
        assert ours.equal(truth)
    _check_gradients(kernels, (image, text, temp), (None, None), 1, True)


def _check_gradients(
    kernels: torch._ops._OpNamespace,
    features: tuple[Tensor, Tensor, Tensor],
    ids: tuple[Tensor | None, Tensor | None],
    first: int,
    local: bool,
) -> None:
    """Saved or computed again alike; no further from fp64 than twice PyTorch's in bf16."""
    image, text, temp = features
    M, N = len(image), len(text)
    rows, columns, _, _, sim, arg = kernels.itc_sweep(image, text, temp, *ids, None, first, True)
    weights = torch.randn(3, M) / M, torch.randn(3, N) / N
    sides = (rows[LSE].contiguous(), weights[0], columns[LSE].contiguous(), weights[1])
    arguments = (image, text, temp, *sides, *ids, first, local)
    ours = kernels.itc_sweep_grad(*arguments, sim, arg)
    none = torch.empty(0, 0), torch.empty(0, 0, dtype=torch.uint8)
    again = kernels.itc_sweep_grad(*arguments, *none)
    for a, b in zip(ours, again, strict=True):
        # chunks add up d_text and d_temp in another order
        torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-5 * float(b.abs().max()))

    pairs = Pairs(first, *ids)
    wide = [x.double() for x in (image, text, temp, *sides)]
    two_sides = (Weights(wide[3], wide[4]), Weights(wide[5], wide[6]))
    truth = reference.sweep_grad(
        *wide[:3], pairs, two_sides, local, reference.similarity(*wide[:2])
    )
    narrow_sides = tuple(Weights(s.lse.float(), s.weight.float()) for s in two_sides)
    theirs = _narrow_grad(image, text, temp, pairs, narrow_sides, local)
    for ours_one, truth_one, theirs_one in zip(ours[:2], truth[:2], theirs, strict=True):
        floor = torch.finfo(torch.bfloat16).eps * truth_one.abs().max() / 2
        error = (ours_one - truth_one).abs().max()
        assert error <= 2 * (theirs_one - truth_one).abs().max() + floor
    # an fp32 sum over all pairs, of both signs
    torch.testing.assert_close(ours[2].double(), truth[2], rtol=1e-4, atol=1e-4)


def _narrow_grad(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    pairs: Pairs,
    sides: tuple[Weights, ...],
    local: bool,
) -> list[Tensor]:
    """What PyTorch gives in the features' own type: a product, its greatest values, autograd."""
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    x = (leaves[0] @ leaves[1].T).amax(1) / temp
    wide = x.detach().float()
    positive = pairs.mask(slice(0, len(image)), slice(0, len(text)), image.device)
    by_side = []
    for values, mask, side in (
        (wide, positive, sides[0]),
        (wide.T, None if positive is None else positive.T, sides[1]),
    ):
        dx = (values - side.lse[:, None]).exp() * side.weight[0, :, None] + side.weight[1, :, None]
        by_side.append(dx if mask is None else dx + side.weight[2, :, None] * mask)
    by_row, by_column = by_side[0], by_side[1].T
    both = by_row + by_column
    grads = (by_row, by_column) if local else (both, both)
    return [
        torch.autograd.grad(x, leaf, grad.to(x.dtype), retain_graph=True)[0]
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


def test_ties_go_to_the_lowest(kernels: torch._ops._OpNamespace) -> None:
    image, text, temp = _features(3, 4, 6, 8)
    image, text = image[:1, :1].expand(3, 6, 8).contiguous(), text[:1].expand(4, 8).contiguous()
    _, _, row_index, column_index, _, arg = kernels.itc_sweep(
        image, text, temp, None, None, None, 2, True
    )
    assert (arg == 0).all()
    assert (row_index[0] == 0).all()
    assert (column_index[0] == 2).all()  # counted from the first row


def test_a_row_of_positives_has_no_negative(kernels: torch._ops._OpNamespace) -> None:
    image, text, temp = _features(2, 3, 4, 8)
    ids = torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    philox = philox_state(1)
    rows, _, row_index, column_index, _, _ = kernels.itc_sweep(
        image, text, temp, *ids, philox, 0, False
    )
    assert (row_index[1] == -1).all()
    assert (column_index[1] == -1).all()
    assert rows[-1].isneginf().all()


def test_schemas_tell_the_truth(kernels: torch._ops._OpNamespace) -> None:
    image, text, temp = _features(3, 4, 2, 8)
    arguments = (image, text, temp, None, None, philox_state(1), 0, True)
    torch.library.opcheck(kernels.itc_sweep.default, arguments, test_utils="test_schema")
    rows, columns, _, _, sim, arg = kernels.itc_sweep(*arguments)
    sides = (rows[0].contiguous(), rows[:3].contiguous())
    sides += (columns[0].contiguous(), columns[:3].contiguous())
    arguments = (image, text, temp, *sides, None, None, 0, True, sim, arg)
    torch.library.opcheck(kernels.itc_sweep_grad.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("save", [False, True])
def test_the_public_operator_is_what_its_fake_says(
    kernels: torch._ops._OpNamespace,
    device: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    save: bool,
) -> None:
    """Schema, fake, autograd and compiled shapes of `impl="cuda"`, forward and backward."""
    monkeypatch.setattr(torch.ops, "blip2fast_C", kernels)
    device.blip2fast_emulate(capability)
    image, text, temp = _features(5, 5, 3, 16)
    ids, ops = torch.tensor([0, 1, 2, 1, 4]), torch.ops.blip2fast
    options = (ids, ids, philox_state(1), 0, True, False, save, None, "cuda")
    leaves = tuple(x.clone().requires_grad_() for x in (image, text, temp))
    torch.library.opcheck(ops.itc_sweep.default, (*leaves, *options))
    rows, columns, _, _, sim, arg = ops.itc_sweep(image, text, temp, *options)
    weights = torch.randn(3, 5)
    sides = (rows[LSE].contiguous(), weights, columns[LSE].contiguous(), weights)
    call = (image, text, temp, *sides, ids, ids, 0, True, sim, arg, "cuda")
    torch.library.opcheck(ops.itc_sweep_grad.default, call)


def test_sweep_rejects_what_it_would_misread(kernels: torch._ops._OpNamespace) -> None:
    image, text, temp = _features(3, 4, 33, 8)
    with pytest.raises(RuntimeError, match="queries: expected 1 to 32, got 33"):
        kernels.itc_sweep(image, text, temp, None, None, None, 0, True)
    image, text, temp = _features(3, 4, 2, 264)
    with pytest.raises(RuntimeError, match="multiple of 8 up to 256, got 264"):
        kernels.itc_sweep(image, text, temp, None, None, None, 0, True)
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        kernels.itc_sweep(
            image[..., :8].float().contiguous(), text[:, :8].float().contiguous(), temp,
            None, None, None, 0, True,
        )  # fmt: skip
