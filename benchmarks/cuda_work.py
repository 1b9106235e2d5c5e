"""The kernels of `csrc/` for the kernel model: machine code of `blip2fast/_C.so`, and launches.

Their loads find the second-level cache filled: attention asks a tile ahead, the loss reads what the
kernel before it wrote. Cross-attention is with dropout, the contrastive loss draws negatives;
without, the same code skips what is counted here. What a few blocks do counts as a launch.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from cards import Card
from kernel_configurations import CASES, CrossSize, ITCSize
from kernel_work import NotModelled, Programs, ceil, size_of
from model_rows import Row, launch_row, significant
from predict import Constants, Kernel, predict
from sass import Code

LIBRARY = Path(__file__).parent.parent / "blip2fast" / "_C.so"
_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
_DROPOUT = 0.1
_ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}


class Library:
    """The machine code for one architecture.

    Args:
        path: `_C.so`.
        architecture: `"sm_80"` or `"sm_90a"`.

    Raises:
        NotModelled: the library is not there, or has no CUDA kernels.
    """

    def __init__(self, path: Path, architecture: str) -> None:
        self.path, self.architecture = path, architecture
        if not path.is_file():
            raise NotModelled(f"no {path.name}: build it with nvcc (csrc/README.md)")
        usage = self._dump("--dump-resource-usage")
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
        if not found:
            raise NotModelled(f"{path.name} has no CUDA kernels")
        self.functions = {name: (int(regs), int(stack)) for name, regs, stack in found}

    def kernel(self, part: str, name: str, shared_bytes: int, warps: int, grid: int) -> Kernel:
        """The function in whose mangled name `part` stands."""
        (mangled,) = (x for x in self.functions if part in x)
        text = self._dump("--dump-sass", "-fun", mangled)
        return Kernel(name, Code.of(text), *self.functions[mangled], shared_bytes, warps, grid)

    def _dump(self, *options: str) -> str:
        done = subprocess.run(
            [str(_CUOBJDUMP), *options, "-arch", self.architecture, str(self.path)],
            capture_output=True,
            text=True,
            # without code for a GPU it says so, and fails
            check=False,
        )
        return done.stdout


Launches = list[tuple[Kernel, list[Programs], float]]


def quickest_splits(blocks: int, steps: int, besides: int, most: int, processors: int) -> int:
    """As the function of that name in csrc/itc.h."""
    candidates = range(1, max(1, min(most, 256)) + 1)
    return min(candidates, key=lambda n: ceil(blocks * n, processors) * (ceil(steps, n) + besides))


def itc_forward(library: Library, size: ITCSize, card: Card) -> Launches:
    """Similarities, then statistics of rows and of columns."""
    N, D = size.batch, size.width
    features = (N * size.queries + N) * D * 2
    groups, tiles = ceil(N, 8), ceil(N, 128)
    per_split = ceil(tiles, quickest_splits(groups, tiles, 1, tiles, card.multiprocessors))
    blocks = groups * ceil(tiles, per_split)
    shared = ceil(D, 64) * 256 * 128 + 2 * 6 * 64 * 128
    similarity = library.kernel(
        "itc_similarity_sm90_kernelINS_8BFloat16", "itc_similarity_sm90", shared, 8, blocks
    )
    # the images, 8 pieces of 16 bytes at a time; tiles of texts; their slices of 64 features
    work = Programs(blocks, (ceil(D, 64) * 4, groups * tiles / blocks, ceil(D, 64)))
    rows = library.kernel("itc_rows_kernel", "itc_rows", 0, 4, ceil(N, 4))
    segment = ceil(max(ceil(N, 32), 64), 8) * 8
    segments = ceil(N, segment)
    across = ceil(N, 256) * segments
    columns = library.kernel("itc_columns_kernel", "itc_columns", 0, 4, across)
    return [
        (similarity, [work], features + 5.0 * N * N),
        (rows, [Programs(rows.grid, (N / 256,))], 4.0 * N * N),
        (columns, [Programs(across, (segment / 4,))], 4.0 * N * N + 32.0 * N * segments),
    ]


def itc_backward(library: Library, size: ITCSize, card: Card) -> Launches:
    """Gradients of images, then of texts."""
    N, D = size.batch, size.width
    features = (N * size.queries + N) * D * 2
    shared = 3 * 32 * 256 * 2 + 2 * 128 * 4

    def gradient(of_image: int, grid: int) -> Kernel:
        part = f"itc_gradient_sm90_kernelINS_8BFloat16ELb{of_image}"
        return library.kernel(part, "itc_gradient_sm90", shared, 8, grid)

    splits = quickest_splits(ceil(N, 128), N, 20, N // 32, card.multiprocessors)
    blocks = ceil(N, 128) * splits
    images, texts = gradient(1, ceil(N, 4)), gradient(0, blocks)
    # of the texts' gradients
    parts = 4.0 * splits * N * D

    def trips(steps: float) -> tuple[float, ...]:
        # what is asked for beforehand, twice: a rest, of which there is none, and the rest
        return (0, 1, 0, 1, steps, 1)

    return [
        (images, [Programs(images.grid, trips(ceil(N, 32)))], 1.5 * features + 5.0 * N * N),
        (
            texts,
            [Programs(blocks, trips(N / splits))],
            features + 5.0 * N * N + parts,
        ),
    ]


def cross(library: Library, size: CrossSize, backward: bool) -> Launches:
    """Attention, or its gradients: in one pass where images are read once, else in two, of queries
    and of keys. A warp has a head of a block's queries, or of 16 keys.
    """
    queries, images, _ = size.work()
    once, tiles = size.uses == 1, ceil(size.tokens, 16)
    blocks = size.images * size.uses
    if not backward:
        function, moved = "forward_kernelINS_8BFloat16ELi64ELi2E", 2.0 * queries
    else:
        fused = int(once)
        function = f"backward_queries_kernelINS_8BFloat16ELi64ELi2ELb{fused}"
        moved = 4.0 * queries + fused * images
    # other blocks that read an image are far away
    moved += size.uses * images

    def launch(function: str, warps: int, trips: tuple[float, ...], moved: float) -> Any:
        name = f"cross_attention_{function.partition('_kernel')[0]}"
        kernel = library.kernel(f"cross_attention_{function}", name, 0, WARPS, ceil(warps, WARPS))
        return kernel, [Programs(kernel.grid, trips)], moved

    found = [launch(function, blocks * size.heads, (tiles,), moved)]
    if backward and not once:
        keys = "backward_keys_kernelINS_8BFloat16ELi64E"
        warps = size.images * tiles * size.heads
        found.append(
            launch(keys, warps, (size.uses, ceil(size.queries, 16)), 2.0 * queries + 2 * images)
        )
    return found


WARPS = 4  # of a block of attention


def rows(cards: Sequence[Card], only: Sequence[str], constants: Constants) -> Iterator[Row]:
    """Each case that CUDA kernels are for, on the cards that they have machine code for."""
    constants = replace(constants, memory_cycles=constants.cached_cycles)
    for card in cards:
        if card.capability not in _ARCHITECTURES:
            continue
        library = Library(LIBRARY, _ARCHITECTURES[card.capability])
        for case in CASES:
            size: Any = size_of(case)
            wanted = not only or any(part in case.name for part in only)
            if case.name.startswith("itc_") and card.capability == 90 and wanted:
                of = itc_backward if "backward" in case.name else itc_forward
                # columns' statistics joined; or the scale, texts' parts and the temperature's
                plain = 3 if "backward" in case.name else 1
                yield _row(case, 0.0, card, of(library, size, card), plain, constants)
            elif case.name.startswith("cross_") and wanted:
                found = cross(library, size, "backward" in case.name)
                yield _row(case, _DROPOUT, card, found, 0, constants)


def _row(
    case: Any, dropout_p: float, card: Card, found: Launches, plain: int, constants: Constants
) -> Row:
    about = {"case": case.name, "dropout": dropout_p, "card": card.name, "configuration": "cuda"}
    held, total = [], plain * constants.plain_s
    for kernel, parts, moved in found:
        try:
            prediction = predict(card, kernel, parts, moved, constants)
        except NotModelled as error:
            return about | {"not_modelled": f"{kernel.name}: {error}"}
        held.append(launch_row(kernel, prediction, parts[0]))
        total += prediction.seconds
    floor_s = max(case.flops / card.flops_per_s, case.bytes / card.bytes_per_s)
    return about | {
        "floor_s": significant(floor_s),
        "predicted_s": significant(total),
        "of_floor": significant(floor_s / total),
        "plain_launches": plain,
        "launches": held,
    }
