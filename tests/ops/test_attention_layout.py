"""Index tensors of a pass: what they say, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import SELF_CASES, B, C, U
from hypothesis import given
from hypothesis import strategies as st

from blip2fast.kernels.qformer_attention import reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, sort_by_target


def test_a_pass_of_all_kinds() -> None:
    layout = AttentionLayout.build(4, 3, [3, 0, 5, 1], [U, C, B, C], [7, 0, 1, 0])
    assert (layout.num_rows, layout.num_texts, layout.num_text_rows) == (21, 4, 9)
    assert (layout.max_seqlen, layout.has_bidirectional, layout.has_causal) == (5, True, True)
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 8, 9]
    assert layout.kinds.tolist() == [0, 2, 1, 2]
    assert layout.block_text.tolist() == [-1, 2, -1, -1]
    # texts by the block that they see, the UNIMODAL one last
    assert layout.order.tolist() == [1, 3, 2, 0]
    assert layout.offsets.tolist() == [0, 2, 3, 3, 3]
    for tensor in (layout.cu_seqlens, layout.kinds, layout.blocks, layout.order, layout.offsets):
        assert tensor.dtype == torch.int32


@pytest.mark.parametrize("name", SELF_CASES)
def test_mask_written_out(name: str) -> None:
    """Every pair of rows, by the three masks as drawn."""
    case = SELF_CASES[name]
    layout = case.layout()
    N, Q = case.num_blocks, case.num_queries
    kinds = case.kinds if isinstance(case.kinds, tuple) else (case.kinds,) * len(case.lengths)
    blocks = case.blocks or tuple(range(len(case.lengths)))
    rows: list[tuple[str, int, int]] = [("q", block, i) for block in range(N) for i in range(Q)]
    rows += [("t", text, i) for text, n in enumerate(case.lengths) for i in range(n)]

    def sees(row: tuple[str, int, int], column: tuple[str, int, int]) -> bool:
        (what, which, place), (other, whose, there) = row, column
        if what == other:
            causal = what == "t" and kinds[which] is C
            return which == whose and (there <= place or not causal)
        if what == "q":
            return kinds[whose] is B and blocks[whose] == which
        return kinds[which] is not U and blocks[which] == whose

    visible, position = reference.visible_pairs(layout)
    assert visible.tolist() == [[sees(row, column) for column in rows] for row in rows]
    assert position.tolist() == [i if what == "q" else Q + i for what, _, i in rows]


def test_one_kind_and_default_blocks() -> None:
    layout = AttentionLayout.build(2, 3, torch.tensor([4, 2]), C)
    assert layout.kinds.tolist() == [2, 2]
    assert layout.blocks.tolist() == [0, 1]
    assert layout.block_text.tolist() == [-1, -1]


def test_lengths_elsewhere_are_not_read() -> None:
    """`meta` tensors have no values: nothing makes the host look at them."""
    lengths = torch.ones(2, dtype=torch.int32, device="meta")
    layout = AttentionLayout.build(2, 3, lengths, U, num_text_rows=2, max_seqlen=1)
    assert layout.num_rows == 8
    assert layout.order.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": (U,)}, "kinds: expected one for each of 2 texts, got 1"),
        ({"lengths": [3, -1]}, r"lengths: expected 0 or more, got \[3, -1\]"),
        ({"blocks": [0]}, r"blocks: expected \[2\], one for each text, got \[1\]"),
        ({"blocks": [0, 2]}, r"blocks: expected 0 to 1 \(num_blocks=2\), got 0 to 2"),
        ({"blocks": [-1, 0]}, r"blocks: expected 0 to 1 \(num_blocks=2\), got -1 to 0"),
        ({"blocks": [1, 1]}, r"several texts share blocks \[1, 1\]: give each pair a block of its"),
        (
            {"lengths": torch.ones(2, dtype=torch.int32, device="meta")},
            "lengths are on meta: give num_text_rows and max_seqlen too",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    given = {"num_blocks": 2, "num_queries": 3, "lengths": [1, 2], "kinds": B}
    with pytest.raises(ValueError, match=message):
        AttentionLayout.build(**(given | arguments))


def test_unimodal_texts_may_name_any_block() -> None:
    layout = AttentionLayout.build(1, 2, [1, 2], U, [5, -3])
    assert layout.offsets.tolist() == [0, 0]


def test_kv_index() -> None:
    index = KVIndex.build([2, 0, 2, 2, 0], 4)
    assert index.index.tolist() == [2, 0, 2, 2, 0]
    assert index.order.tolist() == [1, 4, 0, 2, 3]
    assert index.offsets.tolist() == [0, 2, 2, 5, 5]
    assert KVIndex.build([], 2).offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 4], "kv_index: expected images from 0 to 3, got 0 to 4"),
        ([-1, 0], "kv_index: expected images from 0 to 3, got -1 to 0"),
        ([[0]], r"kv_index: expected \[N\], got shape \[1, 1\]"),
    ],
)
def test_kv_index_refusals(index: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVIndex.build(index, 4)


@given(targets=st.lists(st.integers(0, 5), max_size=20))
def test_members_of_each_target_in_order(targets: list[int]) -> None:
    order, offsets = sort_by_target(torch.tensor(targets, dtype=torch.int32), 5)
    assert order.dtype == offsets.dtype == torch.int32
    for target in range(5):
        members = order[offsets[target] : offsets[target + 1]].tolist()
        assert members == [i for i, x in enumerate(targets) if x == target]
    assert sorted(order.tolist()) == list(range(len(targets)))


def test_layouts_are_pytrees() -> None:
    layout = AttentionLayout.build(2, 3, [4, 2], C)
    leaves, spec = torch.utils._pytree.tree_flatten((layout, KVIndex.build([0, 1], 2)))
    again, index = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.cu_seqlens is layout.cu_seqlens
    assert (again.num_blocks, again.has_bidirectional, again.has_causal) == (2, False, True)
    assert index.index.tolist() == [0, 1]
