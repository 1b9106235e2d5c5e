"""Dropout masks: Philox's published words, positions, shares, seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip2fast.kernels import philox
from blip2fast.kernels.philox import keep_mask, philox_state, philox_words, threshold, with_offset


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # known answers of Random123 for philox4x32 with 7 rounds
        ((0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_published_words(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    group, row, head, offset = counter
    seed = key[0] | key[1] << 32
    # as signed 64 bits
    state = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, offset])
    found = philox_words(state, *(torch.tensor(x) for x in (group, row, head)))
    assert " ".join(f"{word:08x}" for word in found.tolist()) == words


def _python_word(seed: int, offset: int, column: int, row: int, head: int) -> int:
    """One word in Python's own integers."""
    c0, c1, c2, c3 = column // 4, row, head, offset
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c0, c1, c2, c3)[column % 4]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**32 - 1),
    row=st.integers(0, 2**32 - 1),
    head=st.integers(0, 2**32 - 1),
    first=st.integers(0, 9),
    columns=st.integers(0, 11),
    p=st.floats(0, 0.999),
)
def test_mask_of_any_position(
    seed: int, offset: int, row: int, head: int, first: int, columns: int, p: float
) -> None:
    state = philox_state(seed, offset)
    mask = keep_mask(state, p, torch.tensor([row]), torch.tensor([head]), columns, first)
    words = [_python_word(seed, offset, first + c, row, head) for c in range(columns)]
    assert mask.tolist() == [[word >= int(p * 2**32) for word in words]]


def test_threshold_is_the_share_dropped() -> None:
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"dropout_p: expected 0 to below 1, got {p}"):
            threshold(p)


def _mask(state: Tensor, p: float = 0.3, rows: int = 200, heads: int = 4) -> Tensor:
    return keep_mask(state, p, torch.arange(rows), torch.arange(heads)[:, None], 64)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_kept_is_within_its_binomial_bound(p: float) -> None:
    mask = _mask(philox_state(5), p)
    # of all, of each head, of each of the four words
    for part in (mask, *mask, *(mask[..., word::4] for word in range(4))):
        share = part.double().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / part.numel()) ** 0.5


def test_masks_of_other_seeds_offsets_heads_and_rows_are_unlike() -> None:
    """Independent masks agree in p^2 + (1-p)^2 of their places: 0.5 at p = 0.5."""
    base = _mask(philox_state(1, 0), 0.5)
    others = [
        _mask(state, 0.5)
        for state in (philox_state(1, 1), philox_state(2, 0), philox_state(1 + 2**32, 0))
    ]
    others += [base.roll(1, 0), base.roll(1, 1), base.roll(1, 2), base.roll(4, 2)]
    for other in others:
        agree = (base == other).double().mean().item()
        assert abs(agree - 0.5) < 5 * (0.25 / base.numel()) ** 0.5
    assert base.equal(_mask(philox_state(1, 0), 0.5))


def test_a_part_of_the_columns_is_that_part_of_the_mask() -> None:
    rows, heads = torch.arange(3), torch.zeros(1, dtype=torch.int64)
    whole = keep_mask(philox_state(3), 0.4, rows, heads, 40)
    for first, columns in ((0, 1), (3, 9), (5, 30), (39, 1)):
        part = keep_mask(philox_state(3), 0.4, rows, heads, columns, first)
        assert part.equal(whole[:, first : first + columns])


def test_in_chunks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heads = torch.arange(50), torch.arange(50) % 3
    whole = philox._keep_in_chunks(philox_state(3), threshold(0.4), rows, heads, 10, 3)
    monkeypatch.setattr(philox, "_CHUNK", 16)
    again = philox._keep_in_chunks(philox_state(3), threshold(0.4), rows, heads, 10, 3)
    assert again.equal(whole)


def test_state() -> None:
    assert philox_state(2**63 - 1, 2**32 - 1).tolist() == [2**63 - 1, 2**32 - 1]
    assert with_offset(philox_state(4, 1), 9).tolist() == [4, 9]
    torch.manual_seed(0)
    first = philox_state(offset=3)
    assert first[1] == 3
    assert not philox_state().equal(first)
    torch.manual_seed(0)
    assert philox_state(offset=3).equal(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), r"seed: expected 0 to 2\^63 - 1, got -1"),
        ((2**63,), r"seed: expected 0 to 2\^63 - 1, got 9223372036854775808"),
        ((1, 2**32), r"offset: expected 0 to 2\^32 - 1, got 4294967296"),
    ],
)
def test_state_refusals(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        philox_state(*arguments)
