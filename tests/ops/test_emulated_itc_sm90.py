"""The ITC kernels of Hopper (wgmma) on the host: numbers, ties, and that a fault would be seen."""

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
from torch import Tensor

from blip2fast.kernels.itc import reference

pytestmark = needs_compiler

Sweep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    build_extension(Path(tmp_path_factory.mktemp("extension")))
    path = str(build_target("emulated/_C.so"))
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.blip2fast_emulated_products.restype = ctypes.c_int64
    return library


def _similarity(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    nothing = (None, None, None, 0, True)
    return torch.ops.blip2fast_emulated.itc_sweep(image, text, torch.tensor(1.0), *nothing)[4:]


@pytest.fixture
def hopper(library: ctypes.CDLL) -> Iterator[Sweep]:
    library.blip2fast_emulate(90)
    yield _similarity
    library.blip2fast_emulate(80)


def _features(
    M: int, N: int, Q: int, D: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(M, Q, D), dim=-1).to(dtype)
    return image, F.normalize(torch.randn(N, D), dim=-1).to(dtype)


# images, texts, queries, width: blocks of 8 images, tiles of 128 texts, slices of 64 features
SHAPES = [
    (1, 1, 32, 16),
    (1, 63, 1, 8),
    (3, 64, 32, 32),
    (8, 65, 31, 64),
    (9, 127, 32, 72),
    (7, 129, 17, 128),
    (2, 200, 32, 136),
    (2, 257, 32, 192),
    (5, 130, 32, 200),
    (10, 131, 32, 256),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity(
    library: ctypes.CDLL, hopper: Sweep, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    M, N, Q, D = shape
    image, text = _features(M, N, Q, D, dtype)
    before = library.blip2fast_emulated_products()
    sim, arg = hopper(image, text)
    # four products a slice, eight warps; every tile of texts meets every eight images
    slices, tiles, groups = -(-D // 64), -(-N // 128), -(-M // 8)
    assert library.blip2fast_emulated_products() - before == 4 * slices * 8 * tiles * groups
    expected, best = reference.similarity(image.double(), text.double())
    # fp32 sums of D products below 1
    torch.testing.assert_close(sim.double(), expected, rtol=0, atol=1e-6)
    assert arg.equal(best)


def test_same_as_on_ampere(library: ctypes.CDLL, hopper: Sweep) -> None:
    image, text = _features(11, 140, 29, 96)
    ours = hopper(image, text)
    before = library.blip2fast_emulated_products()
    library.blip2fast_emulate(80)
    theirs = _similarity(image, text)
    assert library.blip2fast_emulated_products() == before
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_chunks(library: ctypes.CDLL, hopper: Sweep) -> None:
    """Two chunks of rows, of 64 and 2: the second begins where the first ends."""
    image, text = _features(66, 100, 2, 8)
    arguments = (image, text, torch.tensor(0.1), None, None, None, 0, False)
    ours = torch.ops.blip2fast_emulated.itc_sweep(*arguments)
    assert library.blip2fast_emulated_products()
    library.blip2fast_emulate(80)
    theirs = torch.ops.blip2fast_emulated.itc_sweep(*arguments)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_strides(hopper: Sweep) -> None:
    image, text = _features(4, 70, 6, 48)
    wide_image = torch.full((4, 8, 64), torch.nan, dtype=torch.bfloat16)
    wide_text = torch.full((70, 56), torch.nan, dtype=torch.bfloat16)
    wide_image[:, 1:7, 8:56] = image
    wide_text[:, 8:] = text
    apart = hopper(wide_image[:, 1:7, 8:56], wide_text[:, 8:])
    assert all(a.equal(b) for a, b in zip(apart, hopper(image, text), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ties_go_to_the_lowest(hopper: Sweep, dtype: torch.dtype) -> None:
    """For every pair of queries: they alone are best, and equal."""
    pairs = [(low, high) for low in range(32) for high in range(low + 1, 32)]
    image = torch.full((len(pairs), 32, 16), -0.25, dtype=dtype)
    for i, (low, high) in enumerate(pairs):
        image[i, [low, high]] = 0.5
    text = torch.ones(2, 16, dtype=dtype)
    sim, arg = hopper(image, text)
    assert (sim == 8.0).all()
    assert arg.tolist() == [[low, low] for low, _ in pairs]


@pytest.mark.parametrize("queries", [1, 2, 5, 31])
def test_missing_queries_never_win(hopper: Sweep, queries: int) -> None:
    """Where every product is negative a padded zero would be greatest."""
    image = -torch.rand(9, queries, 24).bfloat16() - 0.1
    text = torch.rand(5, 24).bfloat16() + 0.1
    sim, arg = hopper(image, text)
    expected, best = reference.similarity(image.double(), text.double())
    torch.testing.assert_close(sim.double(), expected, rtol=0, atol=1e-5)
    assert (sim < 0).all()
    assert arg.equal(best)


def test_not_a_number_stays_one(hopper: Sweep) -> None:
    image, text = _features(3, 5, 32, 16)
    image[1] = torch.nan
    text[2] = torch.nan
    sim, arg = hopper(image, text)
    wrong = torch.zeros(3, 5, dtype=torch.bool)
    wrong[1] = wrong[:, 2] = True
    assert sim.isnan().equal(wrong)
    assert (arg < 32).all()


# a line of the kernel, what takes its place, what the emulator then says
FAULTS = {
    "no fence of the registers": ("begin_products();", "", "accumulator is not fenced"),
    "products are not committed": ("commit_products();", "", "a copy to memory"),
    "products are not waited for": ("finish_products(c);", "", "products under way"),
    "copies are not waited for": ("copy_wait<kAhead - 1>();", "", "still being copied"),
    "copies waited for too late": (
        "copy_wait<kAhead - 1>();", "copy_wait<kAhead>();", "still being copied",
    ),
    "copies are not published": (
        "publish_copies();\n      // the slice", "// the slice", "not published",
    ),
    "images are not waited for": ("copy_wait<kAhead>();", "", "being copied"),
    "images are not published": (
        "publish_copies();\n  block_barrier", "block_barrier", "not published",
    ),
    "no barrier of the warpgroup": (
        "barrier_wait(kOwnBarrier + group, kWarpgroup);", "", "still being copied",
    ),
    "a stage is overwritten": ("wait_products<1>();", "wait_products<2>();", "a copy to memory"),
    "too few stages": (
        "kAhead = kGroupStages - 2", "kAhead = kGroupStages - 1", "a copy to memory",
    ),
    "a turn is not passed on": (
        "barrier_arrive(kTurnBarrier + 1 - group, kGroups * kWarpgroup);", ";",
        "wait for each other",
    ),
    "one turn too many": (
        "group == 0 || tile + 1 < tiles", "true", "with threads of a barrier missing",
    ),
    "images not in the swizzle": (
        "slice * kImageSlice + swizzled(column, piece)",
        "slice * kImageSlice + column * 128 + piece * 16", "wrong",
    ),
    "texts not in the swizzle": (
        "stage + swizzled(row + member / 8, piece)",
        "stage + (row + member / 8) * 128 + piece * 16", "wrong",
    ),
    "the inner index is not advanced": ("a + 2 * k, b + 2 * k", "a, b", "wrong"),
    "sums are not begun anew": ("slice + k > 0", "true", "wrong"),
    "the last query wins": ("exceeds(value, one.value)", "value >= one.value", "wrong"),
}  # fmt: skip

# of the gradients' kernel, whose results emulated_itc_far.cpp checks
GRADIENT_FAULTS = {
    "no fence of the registers": ("begin_products();", "", "accumulator is not fenced"),
    "products are not committed": ("commit_products();", "", "with products under way"),
    "products are not waited for": (
        "    wait_products<0>();\n  }", "    wait_products<1>();\n  }", "registers were written",
    ),
    "operands are written too early": (
        "commit_products();", "commit_products();\n    a[1][3] ^= 1;", "registers were written",
    ),
    "copies are not waited for": ("copy_wait<1>();", "", "still being copied"),
    "copies waited for too late": ("copy_wait<1>();", "copy_wait<2>();", "still being copied"),
    "copies are not published": ("publish_copies();", "", "not published"),
    "no barrier": ("block_barrier();  // the stage", "// the stage", "nothing was copied to"),
    "features not in the swizzle": (
        "swizzled(row, piece % 8)", "row * 128 + piece % 8 * 16", "wrong",
    ),
    "the second half of the terms is the first": ("16 * k * kSwizzleRow", "0", "wrong"),
    "rows in another order": ("part % 2 * 8 + g", "part / 2 * 8 + g", "wrong"),
}  # fmt: skip

MAIN = """
#include "itc_similarity_sm90.h"
using namespace blip2fast;
constexpr int kImages = 2, kQueries = 32, kTexts = 260, kDim = 256;
// small whole numbers, so that sums are exact; neighbouring queries are equal
float image_value(int i, int q, int d) { return (i * 5003 + q / 2 * 257 + d) * 7919 % 13 - 6.0f; }
float text_value(int j, int d) { return (j * 263 + d * 3) * 7919 % 13 - 6.0f; }
int main() {
  emulated::capability() = 90;
  std::vector<uint16_t> image, text;
  for (int i = 0; i < kImages * kQueries * kDim; ++i)
    image.push_back(pack<Half>(
        image_value(i / (kQueries * kDim), i / kDim % kQueries, i % kDim), 0.0f));
  for (int i = 0; i < kTexts * kDim; ++i)
    text.push_back(pack<Half>(text_value(i / kDim, i % kDim), 0.0f));
  std::vector<float> sim(kImages * kTexts, -1e30f);
  std::vector<uint8_t> arg(sim.size(), 255);
  ItcSweep p = {};
  p.image = image.data(), p.image_row = kQueries * kDim, p.image_query = kDim;
  p.text = text.data(), p.text_row = kDim;
  p.images = p.end = kImages, p.texts = kTexts, p.queries = kQueries, p.dim = kDim;
  p.sim = sim.data(), p.arg = arg.data();
  // one block for both images and all three tiles of texts
  const SimilarityParams params = {p, {1, 3, 1, 3}, similarity_slices(kDim)};
  launch("similarities", itc_similarity_sm90_kernel<Half>, 1, kGroups * kWarpgroup, nullptr, params,
         similarity_sm90_shared(kDim));
  for (int i = 0; i < kImages; ++i) {
    for (int j = 0; j < kTexts; ++j) {
      float best = -1e30f;
      int at = 0;
      for (int q = 0; q < kQueries; ++q) {
        float sum = 0.0f;
        for (int d = 0; d < kDim; ++d) sum += image_value(i, q, d) * text_value(j, d);
        if (sum > best) best = sum, at = q;
      }
      if (sim[i * kTexts + j] != best || arg[i * kTexts + j] != at) emulated::fail("wrong");
    }
  }
}
"""


def _run(folder: Path, main: str, file: str, old: str, new: str) -> tuple[int, str]:
    """Compile `main` with a copy of the kernels that has `new` in place of `old`, and run it."""
    for source in (ROOT / "csrc").glob("itc*"):
        shutil.copy(source, folder)
    source = folder / file
    text = source.read_text()
    assert text.count(old) == 1, f"{file} has this {text.count(old)} times: {old}"
    source.write_text(text.replace(old, new))
    (folder / "main.cpp").write_text(main)
    compiler = shutil.which("g++") or shutil.which("clang++")
    include = [f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'ops'}"]
    flags = ["-std=c++17", "-O1", "-DBLIP2FAST_EMULATED", *include]
    command = [str(compiler), *flags, "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    run = subprocess.run([folder / "main"], capture_output=True, text=True, check=False)
    if run.returncode == 77:
        pytest.skip("the machine does not lend 30 GB of addresses")
    return run.returncode, run.stderr


def test_the_similarities_as_they_are(tmp_path: Path) -> None:
    same = "float c[128] = {};"
    assert _run(tmp_path, MAIN, "itc_similarity_sm90.h", same, same) == (0, "")


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_sees(name: str, tmp_path: Path) -> None:
    old, new, message = FAULTS[name]
    status, said = _run(tmp_path, MAIN, "itc_similarity_sm90.h", old, new)
    assert status != 0
    assert message in said


@pytest.mark.parametrize("name", GRADIENT_FAULTS)
def test_the_emulator_sees_in_gradients(name: str, tmp_path: Path) -> None:
    old, new, message = GRADIENT_FAULTS[name]
    main = (ROOT / "tests" / "ops" / "emulated_itc_far.cpp").read_text()
    status, said = _run(tmp_path, main, "itc_gradient_sm90.h", old, new)
    assert status != 0
    assert message in said
