"""The CUDA ITC kernels on the host, as in test_emulated_kernels.py, against the definition."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from extension_build import ROOT, build_extension, build_target, needs_compiler
from itc_cases import GRADIENT_SIZES, check_gradient_of_size
from torch import Tensor

from blip2fast.kernels.itc import reference
from blip2fast.kernels.itc.interface import (
    LSE,
    POSITIVE_COUNT,
    POSITIVE_SUM,
    Options,
    Pairs,
    Weights,
)
from blip2fast.kernels.philox import philox_state
from blip2fast.ops.itc import loss as itc

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


def _nan_query(image: Tensor, text: Tensor) -> None:
    image[1, 17] = torch.nan  # alone in its image: others are finite, before and after it


def _two_nan_queries(image: Tensor, text: Tensor) -> None:
    image[2, [9, 22]] = torch.nan
    image[4, 31] = torch.nan


def _nan_image(image: Tensor, text: Tensor) -> None:
    image[3] = torch.nan


def _nan_text(image: Tensor, text: Tensor) -> None:
    text[6] = torch.nan


def _all_nan(image: Tensor, text: Tensor) -> None:
    image[:] = torch.nan


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("queries", [32, 23])
@pytest.mark.parametrize("plant", [_nan_query, _two_nan_queries, _nan_image, _nan_text, _all_nan])
def test_what_is_not_a_number_is_seen(
    kernels: torch._ops._OpNamespace,
    device: ctypes.CDLL,
    plant: Callable[[Tensor, Tensor], None],
    queries: int,
    capability: int,
) -> None:
    """As in the definition: NaN is the greatest, the lowest query with one its argmax."""
    device.blip2fast_emulate(capability)
    image, text, temp = _features(9, 130, 32, 24)
    plant(image, text)
    image = image[:, :queries].contiguous()
    for philox in (philox_state(5, 1), None):
        found = kernels.itc_sweep(image, text, temp, None, None, philox, 0, True)
        wide = (image.double(), text.double(), temp.double())
        expected = reference.sweep(*wide, Pairs(0, None, None), Options(philox, save=True))
        assert found[2].equal(expected.row_index)
        assert found[3].equal(expected.column_index)
        assert found[5].equal(expected.arg)
        for x, y in zip((found[0], found[1], found[4]), (*expected[:2], expected[4]), strict=True):
            if y is not expected.sim:
                # the definition adds 0 * NaN of pairs that are none
                x, y = (torch.cat([v[:POSITIVE_SUM], v[POSITIVE_COUNT:]]) for v in (x, y))
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("name", GRADIENT_SIZES)
def test_gradients_keep_their_bits_whatever_their_size(
    kernels: torch._ops._OpNamespace,
    device: ctypes.CDLL,
    name: str,
    local: bool,
    capability: int,
) -> None:
    device.blip2fast_emulate(capability)
    check_gradient_of_size(kernels, name, local)


@pytest.mark.parametrize("width", [128, 192, 256])
def test_cards_with_99_kb_read_images_again(
    kernels: torch._ops._OpNamespace, device: ctypes.CDLL, width: int
) -> None:
    """Images that do not fit beside the texts come with them; the same bits."""
    image, text, temp = _features(3, 140, 29, width)
    call = (image, text, temp, None, None, None, 0, True)
    expected = kernels.itc_sweep(*call)
    device.blip2fast_emulate(89)
    assert all(x.equal(y) for x, y in zip(kernels.itc_sweep(*call), expected, strict=True))


def test_a_launch_that_fails_says_what_it_asked_for(
    kernels: torch._ops._OpNamespace, device: ctypes.CDLL
) -> None:
    device.blip2fast_emulate(75)
    message = "itc_similarity_kernel: 1 blocks of 256 threads, 98304 bytes of shared memory each: "
    with pytest.raises(RuntimeError, match=message):
        kernels.itc_sweep(*_features(3, 4, 2, 256), None, None, None, 0, True)


SPLITS = """
#include <cstdio>
#include "itc.h"
int main() {
  long blocks, steps, besides, most, splits;
  while (std::scanf("%ld %ld %ld %ld", &blocks, &steps, &besides, &most) == 4) {
    splits = blip2fast::quickest_splits(blocks, steps, besides, most, 132);
    std::printf("%ld\\n", splits);
  }
}
"""


def test_blocks_keep_the_multiprocessors_busy(tmp_path: Path) -> None:
    """The gradient of 1,680 texts once was 266 blocks on 132 multiprocessors: three waves."""
    (tmp_path / "main.cpp").write_text(SPLITS)
    compiler = str(shutil.which("g++") or shutil.which("clang++"))
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    # blocks, their steps, what one costs besides, parts at most; share of the time that is steps
    cases = [
        (14, 1680, 20, 52, 0.85),  # texts' gradients: 1,680, 4,096 and 16,384 pairs
        (32, 4096, 20, 128, 0.9),
        (128, 16384, 20, 512, 0.95),
        (210, 14, 1, 14, 0.7),  # similarities of 1,680, 1,024 and 4,096 pairs, of 105 x 1,680
        (128, 8, 1, 8, 0.85),
        (512, 32, 1, 32, 0.9),
        (14, 14, 1, 14, 0.45),
        (0, 5, 1, 5, 0.0),
        (7, 0, 1, 0, 0.0),
    ]
    given = "".join(f"{' '.join(map(str, case[:4]))}\n" for case in cases)
    run = subprocess.run(
        [tmp_path / "main"], input=given, capture_output=True, text=True, check=True
    )
    for (blocks, steps, besides, most, share), splits in zip(
        cases, map(int, run.stdout.split()), strict=True
    ):
        assert 1 <= splits <= max(most, 1)
        waves = -(-blocks * splits // 132)
        time = waves * (-(-steps // splits) + besides)
        assert blocks * steps / 132 >= share * time, (blocks, steps, splits)


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


def _off(x: Tensor, how: str) -> Tensor:
    """The same numbers where no kernel reads them 16 bytes at a time."""
    if how == "width far apart":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "rows at odd addresses":
        return F.pad(x, (1, 0))[..., 1:]
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)  # begins 2 bytes late


@pytest.mark.parametrize("how", ["width far apart", "rows at odd addresses", "2 bytes late"])
def test_the_backend_takes_any_strides(
    kernels: torch._ops._OpNamespace, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The public operator with `impl="cuda"`, forward and backward."""
    monkeypatch.setattr(torch.ops, "blip2fast_C", kernels)
    image, text, temp = _features(5, 6, 3, 16)

    def run(*features: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in features]
        options = (None, None, philox_state(1), 0, True, False, True, None, "cuda")
        rows, columns, *rest = torch.ops.blip2fast.itc_sweep(*leaves, temp, *options)
        loss = rows[:3].sum() + columns[:3].sum()
        return [rows.detach(), columns.detach(), *rest, *torch.autograd.grad(loss, leaves)]

    expected = run(image, text)
    for x, y in zip(run(_off(image, how), _off(text, how)), expected, strict=True):
        assert torch.equal(x, y)


def test_the_loss_takes_ids_of_any_strides(
    kernels: torch._ops._OpNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "blip2fast_C", kernels)
    monkeypatch.setattr(itc, "choose", lambda op, backends, call, impl: impl)
    image, text, temp = _features(6, 6, 3, 16)
    ids = torch.tensor([[0, 7], [0, 8], [1, 9], [2, 7], [1, 8], [3, 9]])
    outputs = [
        itc.itc_loss(image, text, temp, image_ids=x, philox=philox_state(1), impl="cuda")
        for x in (ids[:, 0], ids[:, 0].contiguous())
    ]
    for x, y in zip(*outputs, strict=True):
        assert torch.equal(x, y)


SWEEP = ("image", "text", "temp", "row_ids", "column_ids", "philox", "first_row", "save")
GRADIENT = (
    "image", "text", "temp", "row_lse", "row_weight", "column_lse", "column_weight", "row_ids",
    "column_ids", "first_row", "local", "sim", "arg",
)  # fmt: skip


def _arguments(kernels: torch._ops._OpNamespace, name: str) -> dict[str, object]:
    """A call of an operator with every tensor that it can have."""
    (image, text, temp), (row_ids, column_ids) = _features(3, 4, 2, 8), _ids(3, 4, True)
    sweep = (image, text, temp, row_ids, column_ids, philox_state(1), 0, True)
    if name == "itc_sweep":
        return dict(zip(SWEEP, sweep, strict=True))
    rows, columns, _, _, sim, arg = kernels.itc_sweep(*sweep)
    sides = rows[0].clone(), rows[:3].clone(), columns[0].clone(), columns[:3].clone()
    call = (image, text, temp, *sides, row_ids, column_ids, 0, True, sim, arg)
    return dict(zip(GRADIENT, call, strict=True))


@pytest.mark.parametrize("name", ["itc_sweep", "itc_sweep_grad"])
def test_every_tensor_is_on_the_device_and_long_enough(
    kernels: torch._ops._OpNamespace, name: str
) -> None:
    """A pointer of another device, or past the end, would be read all the same."""
    op, call = getattr(kernels, name).default, _arguments(kernels, name)
    tensors = {key: x for key, x in call.items() if isinstance(x, Tensor)}
    assert len(tensors) == len(call) - 2
    for key, x in tensors.items():
        if key != "image":  # the others are held against it
            elsewhere = call | {key: x.to("meta")}
            with pytest.raises(RuntimeError, match=f"{key}: expected on the device of the data"):
                # not by the dispatcher, which would look at all the devices itself
                op._op_dk(torch._C.DispatchKey.CPU, *elsewhere.values())
        if key not in ("image", "text"):  # they say how long the others are
            longer = call | {key: torch.cat([x.flatten(), x.flatten()[:1]])}
            with pytest.raises(
                RuntimeError, match=rf"{key}: expected contiguous \w+, \d+ elements"
            ):
                op(*longer.values())


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
