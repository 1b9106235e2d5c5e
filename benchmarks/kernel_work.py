"""What each Triton launch of a sweep has to do: how many programs do the same, how often they go
through the loops of their machine code, and how much comes from memory more than once.

A launch is that of `tests/ops/aot.py`, the size that of `kernel_configurations.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_configurations import BI, CAUSAL, UNI, Case, CrossSize, RowsSize, SelfSize


class NotModelled(Exception):
    """Why a launch has no prediction, in one line."""


@dataclass(frozen=True)
class Programs:
    """Programs of a launch that do the same.

    Attributes:
        count: How many.
        trips: Of each loop of their way through the code, in order, an outer loop before its inner
            ones; fractions are means over programs.
        way: Which of the ways, the shortest first; None: they end before their work begins.
    """

    count: float
    trips: tuple[float, ...] = ()
    way: int | None = 0


def ceil(value: int, by: int) -> int:
    """A quotient, rounded up."""
    return -(-value // by)


def programs(case: Case, launch: Any) -> list[Programs]:
    """What the programs of a launch do.

    Raises:
        NotModelled: with the reason.
    """
    name = launch.kernel.__name__
    if name not in _RULES:
        raise NotModelled(f"no rule for {name}")
    found = _RULES[name](size_of(case), launch)
    total = 1
    for axis in launch.grid:
        total *= axis
    active = sum(part.count for part in found)
    if active > total:
        raise ValueError(f"{name}: {active} programs of {total}")
    return [*found, Programs(total - active, way=None)] if active < total else found


def size_of(case: Case) -> Any:
    """The dataclass that a case was made from."""
    return case.make.__self__


def _self_units(size: SelfSize, joined: bool) -> Iterator[tuple[str, int, int]]:
    """Kind of a unit, its rows and the length of the text that reads it."""
    bidirectional, causal = BI in size.kinds, CAUSAL in size.kinds
    for T in size.lengths:
        rows = size.queries + (T if bidirectional or joined else 0)
        yield "block", rows, T if causal and not joined else 0
        if UNI in size.kinds:
            yield "text", T, 0
        if causal and not joined:
            yield "causal", T, 0


def _self_forward(size: SelfSize, launch: Any) -> list[Programs]:
    at = launch.constants
    if not at["SINGLE"]:
        raise NotModelled("keys in several tiles")
    joined, heads = at["JOINED"] > 0, at["HEADS"]
    parts: Counter[int] = Counter()
    for unit, rows, _ in _self_units(size, joined):
        small = joined and unit == "text"
        way = 1 if joined and not small else 0
        parts[way] += ceil(rows, at["JOINED"] if small else at["BLOCK_M"]) * (size.heads // heads)
    trips = (float(heads),) if heads > 1 else ()
    return [Programs(count, trips, way) for way, count in parts.items()]


def _self_backward(size: SelfSize, launch: Any) -> list[Programs]:
    at = launch.constants
    if at["HEADS"] > 1:
        raise NotModelled("several heads")
    joined, single = at["JOINED"] > 0, at["SINGLE"]
    parts: Counter[tuple[int, tuple[float, ...]]] = Counter()
    for unit, rows, reader in _self_units(size, joined):
        small = joined and unit == "text"
        for tile in range(1 if single else ceil(rows, at["BLOCK_N"])):
            # a causal text's rows before a tile of its keys do not see them
            hidden = tile * at["BLOCK_N"] if unit == "causal" and not single else 0
            trips = [] if at["WHOLE"] or small else [ceil(rows - hidden, at["BLOCK_M"])]
            if at["HAS_CAUSAL"] and not small:
                read = reader > 0 and tile * at["BLOCK_N"] < size.queries
                trips += [float(read), ceil(reader, at["READER_M"])]
            parts[1 if joined and not small else 0, tuple(trips)] += size.heads
    return [Programs(count, trips, way) for (way, trips), count in parts.items()]


def _self_backward_rows(size: SelfSize, launch: Any) -> list[Programs]:
    at, Q = launch.constants, size.queries
    parts: Counter[float] = Counter()
    for unit, rows, _ in _self_units(size, False):
        for tile in range(ceil(rows, at["BLOCK_M"])):
            seen = rows
            if unit == "causal":
                seen = Q + min(rows, (tile + 1) * at["BLOCK_M"])
            parts[ceil(seen, at["BLOCK_N"])] += size.heads
    return [Programs(count, (trips,)) for trips, count in parts.items()]


def image_rows(size: CrossSize) -> list[int]:
    """Rows that read each image."""
    index = size.index("cpu")
    if index is None:
        return [size.queries] * size.images
    return [size.queries * uses for uses in index.offsets.diff().tolist()]


def _tiles_of_keys(size: CrossSize, launch: Any) -> tuple[float, ...]:
    at = launch.constants
    if at["HEADS"] > 1 or not at["FULL"] or at["SPLIT"]:
        raise NotModelled("several heads, or keys split among programs")
    return (float(size.tokens // at["BLOCK_N"]),)


def _cross_forward(size: CrossSize, launch: Any) -> list[Programs]:
    chunks = sum(ceil(rows, launch.constants["BLOCK_M"]) for rows in image_rows(size))
    return [Programs(chunks * size.heads, _tiles_of_keys(size, launch))]


def _owned(size: CrossSize, launch: Any) -> list[int]:
    """Rows of the images that a launch of a backward pass is for."""
    below, above = launch.numbers.get("below", -1), launch.numbers["above"]
    if launch.constants.get("OWN_KEYS", True):
        return [rows for rows in image_rows(size) if below < rows <= above]
    return [rows for rows in image_rows(size) if rows > above]


def _cross_backward(size: CrossSize, launch: Any) -> list[Programs]:
    at, owned = launch.constants, _owned(size, launch)
    count = len(owned) if at["OWN_KEYS"] else sum(ceil(rows, at["BLOCK_M"]) for rows in owned)
    return [Programs(count * size.heads, _tiles_of_keys(size, launch))]


def _cross_backward_keys(size: CrossSize, launch: Any) -> list[Programs]:
    at = launch.constants
    owned = [rows for rows in image_rows(size) if rows > launch.numbers["above"]]
    trips = sum(ceil(rows, at["BLOCK_M"]) for rows in owned) / max(1, len(owned))
    tiles = ceil(size.tokens, at["BLOCK_N"])
    return [Programs(len(owned) * tiles * size.heads, (trips,))] if owned else []


def _cross_backward_images(size: CrossSize, launch: Any) -> list[Programs]:
    at = launch.constants
    if at["HAS_INDEX"]:
        raise NotModelled("images with several uses, by their number")
    return [Programs(len(_owned(size, launch)) * size.heads, (size.tokens // at["BLOCK_N"],))]


def _straight(size: RowsSize, launch: Any) -> list[Programs]:
    count = 1
    for axis in launch.grid:
        count *= axis
    return [Programs(count)]


def _rows_in_turn(size: RowsSize, launch: Any) -> list[Programs]:
    turns = ceil(size.rows, launch.constants["BLOCK_R"]) / launch.grid[0]
    return [Programs(part.count, (turns,)) for part in _straight(size, launch)]


def _itc_share(size: Any, launch: Any) -> list[Programs]:
    count = 1
    for axis in launch.grid:
        count *= axis
    blocks = ceil(size.batch, launch.constants["BLOCK_I"])
    return [Programs(count, (blocks / launch.grid[-1],))]


def _itc_images(size: Any, launch: Any) -> list[Programs]:
    blocks = ceil(size.batch, launch.constants["BLOCK_T"])
    return [Programs(launch.grid[0] * launch.grid[1], (blocks,))]


_RULES: dict[str, Callable[[Any, Any], list[Programs]]] = {
    "_qformer_attention_fwd_kernel": _self_forward,
    "_qformer_attention_bwd_kernel": _self_backward,
    "_qformer_attention_bwd_dq_kernel": _self_backward_rows,
    "_qformer_cross_attention_fwd_kernel": _cross_forward,
    "_qformer_cross_attention_bwd_kernel": _cross_backward,
    "_qformer_cross_attention_bwd_dkv_kernel": _cross_backward_keys,
    "_qformer_cross_attention_bwd_image_kernel": _cross_backward_images,
    "_dropout_add_layer_norm_fwd_kernel": _straight,
    "_dropout_add_layer_norm_bwd_kernel": _rows_in_turn,
    "_bias_gelu_fwd_kernel": _straight,
    "_bias_gelu_bwd_kernel": _rows_in_turn,
    "_itc_fwd_kernel": _itc_share,
    "_itc_bwd_image_kernel": _itc_images,
    "_itc_bwd_text_kernel": _itc_share,
}


def memory_bytes(case: Case, launches: Sequence[Any]) -> list[float]:
    """From and to memory by each launch: a case's own, and what is read or written again.

    What other programs of the same launch read shortly before is taken to be in the cache.
    """
    first = launches[0].kernel.__name__
    size = size_of(case)
    if first.startswith("_qformer_cross") and size.uses > 1:
        return _moved_by_uses(size, launches)
    if first in ("_dropout_add_layer_norm_bwd_kernel", "_bias_gelu_bwd_kernel"):
        # partial sums of each program
        sums = 3 if "layer_norm" in first else 1
        return [case.bytes + launches[0].grid[0] * sums * size.width * 4.0]
    if len(launches) == 2 and first.startswith("_itc"):
        features = (size.batch * size.queries + size.batch) * size.width * size.dtype.itemsize
        kept = 5 * size.batch**2
        parts = launches[1].grid[-1] * size.batch * size.width * 4
        return [features * 1.5 + kept, features + kept + parts]
    if len(launches) == 2 and first == "_qformer_attention_bwd_dq_kernel":
        # five tensors in and dq out, then four in and two out, of the eight
        return [case.bytes * 6 / 8, case.bytes * 6 / 8]
    if len(launches) > 1:
        raise NotModelled("several launches")
    return [float(case.bytes)]


def _moved_by_uses(size: CrossSize, launches: Sequence[Any]) -> list[float]:
    width = size.heads * size.width * size.dtype.itemsize
    keys = 2 * size.tokens * width
    found = []
    for launch in launches:
        name, at = launch.kernel.__name__, launch.constants
        if name.endswith("_fwd_kernel"):
            all_rows = image_rows(size)
            chunks = [ceil(rows, at["BLOCK_M"]) for rows in all_rows]
            reads = len(chunks) if at["INTERLEAVED"] else sum(chunks)
            found.append(2.0 * sum(all_rows) * width + reads * keys)
        elif name.endswith("_bwd_kernel"):
            owned = _owned(size, launch)
            # q, dout, out and dq; owners write the keys' gradients
            found.append(4.0 * sum(owned) * width + len(owned) * keys * (1 + at["OWN_KEYS"]))
        elif name.endswith("_dkv_kernel"):
            owned = [rows for rows in image_rows(size) if rows > launch.numbers["above"]]
            found.append(2.0 * sum(owned) * width + 2 * len(owned) * keys)
        else:
            raise NotModelled("images with several uses, by their number")
    return found


class PlainLaunches(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what PyTorch itself would launch on a GPU, and the bytes that it reads and writes."""

    _FREE = ("empty", "view", "slice", "select", "expand", "unsqueeze", "detach", "_unsafe_view")
    _FREE += (
        "t",
        "transpose",
        "permute",
        "as_strided",
        "alias",
        "squeeze",
        "empty_strided",
        "split",
    )
    _FREE += ("unbind", "new_empty", "empty_like", "diagonal")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in self._FREE:
            tensors = [
                x for x in torch.utils._pytree.tree_leaves((args, out)) if hasattr(x, "nbytes")
            ]
            on_device = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_meta]
            if on_device:
                self.count += 1
                self.bytes += sum(x.nbytes for x in on_device)
        return out


def cached_bytes(launch: Any, moved: float) -> float | None:
    """Between the second-level cache and the multiprocessors; None: all that the code asks for.

    Row by row, weights are read again and again from the first level, and a quarter of the lanes
    has no column: what comes from further away is what comes from memory.
    """
    name = launch.kernel.__name__
    return moved if "layer_norm" in name or "gelu" in name else None
