"""Hard negatives are draws from the softmax without the positives, the same on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from itc_cases import make_features
from scipy.stats import chisquare
from torch import Tensor

from blip2fast.kernels.itc import chunked, noise, reference
from blip2fast.kernels.itc.config import ChunkedConfig
from blip2fast.kernels.itc.interface import NEGATIVE_INDEX, Options, Pairs, Sweep
from blip2fast.kernels.philox import philox_state, philox_words
from blip2fast.ops import itc_loss
from blip2fast.stage1.negatives import NegativeExchange

DRAWS, OTHERS = 500_000, 7
# a million draws: half of them rows (images), half of them columns (texts)
CONFIG = ChunkedConfig(images=4096, tile_bytes=2**26)


def _draw(impl: str, by_row: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Negatives of DRAWS equal rows (columns) over OTHERS texts (images).

    Returns:
        The indices drawn, the x of a row, and which of OTHERS are positives.
    """
    image, text, temp = (x.detach() for x in make_features(OTHERS, 1, 16, torch.float32, temp=0.5))
    ids = torch.arange(OTHERS)
    ids[4] = 1
    many = torch.ones(DRAWS, dtype=torch.int64)
    if by_row:
        image = image[1:2].expand(DRAWS, 1, 16)
        pairs = Pairs(0, many, ids)
    else:
        text = text[1:2].expand(DRAWS, 16)
        pairs = Pairs(0, ids, many)
    options = Options(philox_state(seed))
    swept: Sweep
    if impl == "reference":
        swept = reference.sweep(image, text, temp, pairs, options)
    else:
        swept = chunked.sweep(image, text, temp, pairs, options, CONFIG)
    one = reference.similarity(image[:OTHERS], text[:OTHERS])[0] / temp
    x = one[0] if by_row else one[:, 0]
    index = swept.row_index if by_row else swept.column_index
    return index[NEGATIVE_INDEX], x, ids == 1


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("by_row", [True, False])
def test_half_a_million_draws(impl: str, by_row: bool) -> None:
    """Chi-square against the softmax, and never a positive."""
    drawn, x, positive = _draw(impl, by_row, seed=11)
    counts = torch.bincount(drawn, minlength=OTHERS)
    assert counts[positive].tolist() == [0, 0]
    expected = x.masked_fill(positive, -torch.inf).double().softmax(0) * DRAWS
    legal = ~positive
    assert chisquare(counts[legal], expected[legal]).pvalue > 1e-3
    # and the test sees a temperature that is off by 3 %
    wrong = (1.03 * x).masked_fill(positive, -torch.inf).double().softmax(0) * DRAWS
    assert chisquare(counts[legal], wrong[legal]).pvalue < 1e-3


def test_rows_and_columns_are_drawn_independently() -> None:
    """Pairs of the two noises of the same images and texts have no correlation."""
    by_row, by_column = noise.pair_noise(philox_state(4), (0, 1000), (0, 1000), torch.float64)
    for other in (by_column, by_row.roll(1, 0), by_row.roll(1, 1), by_column.roll(1, 1)):
        both = torch.stack([by_row.flatten(), other.flatten()])
        # a million pairs: three standard errors
        assert abs(float(both.corrcoef()[0, 1])) < 3e-3
    euler = 0.5772156649
    assert float(by_row.mean()) == pytest.approx(euler, abs=4e-3)
    assert float(by_column.var()) == pytest.approx(math.pi**2 / 6, abs=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_at_the_ends_of_a_word(dtype: torch.dtype) -> None:
    """Finite everywhere, and distinct where it decides: at the smallest words."""
    words = torch.tensor([0, 1, 2, 100, 2**24, 2**31, 2**32 - 2, 2**32 - 1])
    u = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    expected = -torch.log(-torch.log1p(-u))
    got = noise.gumbel(words, dtype)
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-6, atol=1e-6)
    assert bool((got[:4].diff() < -0.1).all())


@pytest.mark.parametrize(("rows", "columns"), [((0, 5), (0, 4)), ((2**31, 2**31 + 3), (7, 12))])
def test_noise_is_a_function_of_the_pair(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Word by word as the README of the kernel says, beyond 2^31 too."""
    philox = philox_state(123456789012, 7)
    by_row, by_column = noise.pair_noise(philox, rows, columns, torch.float64)
    for a, i in enumerate(range(*rows)):
        for b, j in enumerate(range(*columns)):
            counters = (torch.tensor([c]) for c in (j // 2, i, 0x49544300))
            word = philox_words(philox, *counters)[0]
            for found, place in ((by_row, j % 2), (by_column, 2 + j % 2)):
                assert torch.equal(found[a, b], noise.gumbel(word[place], torch.float64))


@pytest.mark.parametrize("with_ids", [False, True])
def test_backends_draw_the_same(with_ids: bool) -> None:
    b = 40
    image, text, temp = make_features(b, 3, 16)
    ids = torch.arange(b) // 3 if with_ids else None
    call: dict[str, Any] = {"image_ids": ids, "philox": philox_state(9, 4)}
    outputs = [itc_loss(image, text, temp, impl=i, **call) for i in ("reference", "chunked")]
    for name in ("negative_image", "negative_text"):
        assert torch.equal(getattr(outputs[0], name), getattr(outputs[1], name))
    again = itc_loss(image, text, temp, **call)
    assert torch.equal(again.negative_text, outputs[0].negative_text)
    other = itc_loss(image, text, temp, image_ids=ids, philox=philox_state(9, 5))
    assert not torch.equal(other.negative_text, outputs[0].negative_text)


def test_generator_is_the_seed() -> None:
    image, text, temp = make_features(40, 3, 16)
    drawn = [
        itc_loss(image, text, temp, generator=torch.Generator().manual_seed(seed)).negative_text
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(5)
    first = itc_loss(image, text, temp).negative_image
    second = itc_loss(image, text, temp).negative_image
    torch.manual_seed(5)
    assert torch.equal(first, itc_loss(image, text, temp).negative_image)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_legacy_epsilon(impl: str, with_ids: bool) -> None:
    """softmax over all, plus epsilon, then without positives: as the first LAVIS release drew."""
    kinds, b, calls = 6, 300, 20
    image, text, temp = (x.detach() for x in make_features(kinds, 1, 16, temp=0.2))
    kind = torch.arange(b) % kinds
    ids = kind if with_ids else torch.arange(b)
    counts = torch.zeros(2, kinds, kinds)
    for seed in range(calls):
        output = itc_loss(
            image[kind],
            text[kind],
            temp,
            image_ids=kind if with_ids else None,
            philox=philox_state(seed),
            legacy_epsilon=1 / b,
            impl=impl,
        )
        for k, drawn in enumerate((output.negative_text, output.negative_image)):
            assert not bool((ids[drawn] == ids).any())
            counts[k].index_put_((kind, kind[drawn]), torch.ones(b), accumulate=True)
    x = (reference.similarity(image, text)[0] / temp)[kind][:, kind]
    positive = ids[:, None] == ids[None, :]
    for found, logits in ((counts[0], x), (counts[1], x.T)):
        # what the formula draws, and what it would without the epsilon
        for epsilon, right in ((1 / b, True), (0.0, False)):
            weight = (logits.softmax(1) + epsilon).masked_fill(positive, 0)
            by_column = calls * weight / weight.sum(1, keepdim=True)
            expected = (
                torch.zeros(kinds, kinds)
                .double()
                .index_put_(
                    (kind[:, None].expand(b, b), kind[None].expand(b, b)),
                    by_column,
                    accumulate=True,
                )
            )
            possible = expected > 0
            # the counts of each of the rows add up to a fixed number
            p = chisquare(found[possible], expected[possible], ddof=kinds - 1).pvalue
            assert (p > 1e-3) == right, p


def test_exchange_on_one_process() -> None:
    held = torch.tensor([10, 11, 12])
    exchanges = NegativeExchange.for_lists([torch.tensor([2, 0]), torch.tensor([1, 1])], 3)
    assert [exchange.rows(held).tolist() for exchange in exchanges] == [[12, 10], [11, 11]]
    assert NegativeExchange.for_lists([], 3) == []


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([0, 1], [2]), r"indices: expected lists of one length, got \[2, 1\]; pad them"),
        (([0, 1], [0, 3]), r"index: expected rows 0 to 2 of the batch of all ranks, got 0 to 3"),
        (([0, 1], [[0, 2]]), r"index: expected \[k\] int64, got torch.int64 \(1, 2\)"),
        (([0, 1], [0.5, 2.0]), r"index: expected \[k\] int64, got torch.float32 \(2,\)"),
    ],
)
def test_lists_that_are_refused(lists: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NegativeExchange.for_lists([torch.tensor(index) for index in lists], 3)
