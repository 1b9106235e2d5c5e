"""Dropout masks as a function of seed and position, identical on every backend and device.

Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) with 7 rounds, the
fewest that pass BigCrush. The counter of an element is `(column // 4, row, head, offset)`, the key
the 64-bit seed; the four words of a counter serve four neighbouring columns. An element is kept
if its word is at least `p * 2^32`. No generator state is read, so a backward pass, a replayed
CUDA graph and a recomputed layer reproduce the same mask.
"""

from __future__ import annotations

import subprocess
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from blip2fast._extension import has_op

ROUNDS = 7
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
# int64 temporaries of this many counters fit a CPU core's L2 cache
_CHUNK = 1 << 15
_NATIVE = has_op("philox_keep_mask")
_HAS_TRITON = find_spec("triton") is not None


def philox_state(
    seed: int | None = None, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The seed and offset of a dropout mask, as a `[2]` int64 tensor.

    Args:
        seed: 0 to 2^63 - 1; None draws one from the device's default generator, without a host
            sync.
        offset: 0 to 2^32 - 1, different for each use of a seed (layer, pass).
        device: Where the op runs.

    Raises:
        ValueError: `seed` or `offset` is out of range.
    """
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2^63 - 1, got {seed}")
    if not 0 <= offset < 2**32:
        raise ValueError(f"offset: expected 0 to 2^32 - 1, got {offset}")
    if seed is not None:
        return torch.tensor([seed, offset], device=device)
    drawn = torch.randint(0, 2**63 - 1, (2,), device=device)
    drawn[1].fill_(offset)  # an assignment would copy from the host and synchronise
    return drawn


def with_offset(philox: Tensor, offset: int) -> Tensor:
    """The Philox state `[2]` with the same seed and another offset, without a host sync."""
    moved = philox.clone()
    moved[1].fill_(offset)
    return moved


def threshold(p: float) -> int:
    """The smallest 32-bit word that is kept at dropout probability `p`.

    Raises:
        ValueError: `p` is not in [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p: expected 0 to below 1, got {p}")
    return int(p * 2**32)


def philox_words(philox: Tensor, groups: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
    """Four 32-bit words of each counter.

    Args:
        philox: `[2]` int64, seed and offset.
        groups, rows, heads: int64 counters, 0 to 2^32 - 1, of shapes that broadcast together.

    Returns:
        `[..., 4]` int64 words, 0 to 2^32 - 1.
    """
    return torch.stack(torch.broadcast_tensors(*_words(philox, groups, rows, heads)), dim=-1)


def _words(philox: Tensor, groups: Tensor, rows: Tensor, heads: Tensor) -> tuple[Tensor, ...]:
    """The four words as separate tensors; intermediates are broadcast as late as possible."""
    c0, c1, c2, c3 = groups, rows, heads, philox[1] & _WORD
    k0, k1 = philox[0] & _WORD, (philox[0] >> 32) & _WORD
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ (c1 ^ k0), low_1, high_0 ^ (c3 ^ k1), low_0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `x * constant`, both below 2^32, in int64 that does not overflow."""
    # constants are above 2^31, so this is above -2^63; its low word is that of the full product
    product = x * (constant - 2**32)
    high = (product >> 32).add_(x)  # 2^32 * x was subtracted
    return high, product.bitwise_and_(_WORD)


def keep_mask(
    philox: Tensor, p: float, rows: Tensor, heads: Tensor, columns: int, first_column: int = 0
) -> Tensor:
    """Which elements dropout keeps.

    Args:
        philox: `[2]` int64, seed and offset.
        p: Probability of dropping, 0 to below 1.
        rows, heads: int64, of shapes that broadcast together to `[...]`.
        columns: Number of columns.
        first_column: Index of the first one.

    Returns:
        `[..., columns]` bool.
    """
    least = threshold(p)
    keep: Tensor
    rows, heads = torch.broadcast_tensors(rows, heads)
    device = philox.device
    one_launch = device.type == "cuda" and not torch.compiler.is_compiling() and _launches(device)
    if (device.type != "cpu" and not one_launch) or torch.compiler.is_compiling():
        return _keep(philox, least, rows[..., None], heads[..., None], columns, first_column)
    shape = (*rows.shape, columns)
    rows, heads = rows.flatten().contiguous(), heads.flatten().contiguous()
    if one_launch:
        keep = torch.ops.blip2fast.philox_keep_mask(
            philox, rows, heads, least, columns, first_column
        )
    elif _NATIVE:
        op = torch.ops.blip2fast_C.philox_keep_mask
        keep = op(philox, rows, heads, least, columns, first_column)
    else:
        keep = _keep_in_chunks(philox, least, rows, heads, columns, first_column)
    return keep.view(shape)


def _launches(device: torch.device) -> bool:
    """Whether the Triton kernel computes the mask on this CUDA device."""
    if not _HAS_TRITON:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    # the first check synchronises the host, which would break a graph capture
    return index in _looked_at or (not torch.cuda.is_current_stream_capturing() and _agrees(index))


_looked_at: set[int] = set()


@cache
def _agrees(index: int) -> bool:
    """Whether the compiled kernel's mask matches the formula's; warns on failure."""
    device = torch.device("cuda", index)
    philox = philox_state(2**40 + 5, 2**31 + 3, device)
    rows = torch.arange(77, device=device) * 2**25
    heads, least = rows % 5, threshold(0.3)
    try:
        found = torch.ops.blip2fast.philox_keep_mask(philox, rows, heads, least, 51, 2)
        expected = _keep(philox, least, rows[:, None], heads[:, None], 51, 2)
        wrong = "" if torch.equal(found, expected) else "its mask is not the formula's"
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"dropout masks on cuda:{index} are drawn slowly, by PyTorch: Triton's kernel does not "
            f"run here ({wrong})",
            stacklevel=4,
        )
        return False
    _looked_at.add(index)
    return True


def _keep(
    philox: Tensor, least: int, rows: Tensor, heads: Tensor, columns: int, first_column: int
) -> Tensor:
    """`[..., columns]` from `rows` and `heads` `[..., 1]`."""
    first_group, last_group = first_column // 4, (first_column + columns + 3) // 4
    groups = torch.arange(first_group, last_group, device=philox.device)
    words = torch.broadcast_tensors(*_words(philox, groups, rows, heads))
    kept = torch.stack([word >= least for word in words], dim=-1).flatten(-2)
    start = first_column - 4 * first_group
    return kept[..., start : start + columns]


def _keep_in_chunks(
    philox: Tensor, least: int, rows: Tensor, heads: Tensor, columns: int, first_column: int
) -> Tensor:
    """`[n, columns]` from `rows` and `heads` `[n]`."""
    keep = torch.empty(rows.shape[0], columns, dtype=torch.bool, device=philox.device)
    step = max(1, _CHUNK // (columns // 4 + 2))
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        keep[chunk] = _keep(
            philox, least, rows[chunk, None], heads[chunk, None], columns, first_column
        )
    return keep


torch.library.define(
    "blip2fast::philox_keep_mask",
    "(Tensor philox, Tensor rows, Tensor heads, int least, SymInt columns, SymInt first_column) "
    "-> Tensor",
)


@torch.library.impl("blip2fast::philox_keep_mask", "CompositeExplicitAutograd")
def _keep_mask(
    philox: Tensor, rows: Tensor, heads: Tensor, least: int, columns: int, first_column: int
) -> Tensor:
    # imported on first use: Triton is optional
    from blip2fast.kernels import keep_mask as kernel

    return kernel.keep_mask(philox, least, rows, heads, columns, first_column)


def _keep_mask_fake(
    philox: Tensor, rows: Tensor, heads: Tensor, least: int, columns: int, first_column: int
) -> Tensor:
    return rows.new_empty(rows.shape[0], columns, dtype=torch.bool)


torch.library.register_fake("blip2fast::philox_keep_mask", _keep_mask_fake)
if _NATIVE:
    torch.library.register_fake("blip2fast_C::philox_keep_mask", _keep_mask_fake)
