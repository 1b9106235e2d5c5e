"""The Q-Former's attentions as operators: schemas, fakes, compile, export; CPU paths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import (
    CROSS_CASES,
    SELF_CASES,
    C,
    SelfCase,
    U,
    make_index,
    make_key_mask,
    make_q_kv,
    make_qkv,
    philox_of,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from blip2fast.kernels.qformer_attention import memory_efficient as _attention_xformers
from blip2fast.kernels.qformer_attention.cpu import cross_attention as _attention_cpu_cross
from blip2fast.kernels.qformer_attention.cpu import plan as _attention_cpu_plan
from blip2fast.kernels.qformer_attention.cpu.core import pick
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.ops import qformer_attention, qformer_cross_attention
from blip2fast.ops.qformer_attention.operators import unpack_index, unpack_layout


@pytest.mark.parametrize("name", ["all kinds", "dropout", "nothing"])
def test_self_opcheck(name: str) -> None:
    case, ops = SELF_CASES[name], torch.ops.blip2fast
    qkv = make_qkv(case, torch.float32).requires_grad_()
    rest = (*unpack_layout(case.layout()), philox_of(case.p), 0.25, case.p, "sdpa")
    torch.library.opcheck(ops.qformer_attention, (qkv, *rest))
    out, lse = ops.qformer_attention(qkv.detach(), *rest)
    torch.library.opcheck(ops.qformer_attention_grad, (out, qkv.detach(), out, lse, *rest))


@pytest.mark.parametrize(
    "name", ["masked", "dropout, shared queries", "a layer's slice", "own image", "no token"]
)
def test_cross_opcheck(name: str) -> None:
    case, ops = CROSS_CASES[name], torch.ops.blip2fast
    q, kv = (x.requires_grad_() for x in make_q_kv(case, torch.float32))
    uses = (*unpack_index(make_index(case)), make_key_mask(case))
    options = (philox_of(case.p), 0.25, case.p, "sdpa")
    torch.library.opcheck(ops.qformer_cross_attention, (q, kv, *uses, case.N, *options))
    out, lse = ops.qformer_cross_attention(q.detach(), kv.detach(), *uses, case.N, *options)
    arguments = (out, q.detach(), kv.detach(), out, lse, *uses, *options)
    torch.library.opcheck(ops.qformer_cross_attention_grad, arguments)


def _pass(
    qkv: Tensor, layout: AttentionLayout, kv: Tensor, index: KVIndex, mask: Tensor, philox: Tensor
) -> Tensor:
    """Self-attention, then cross-attention of its query rows."""
    out = qformer_attention(2 * qkv, layout, dropout_p=0.3, philox=philox)
    N, Q = layout.num_blocks, layout.num_queries
    q = out[: N * Q].unflatten(0, (N, Q))
    crossed = qformer_cross_attention(q, kv, index, key_mask=mask, dropout_p=0.3, philox=philox)
    return crossed.sin().sum() + out.cos().sum()


def _arguments(images: int, length: int) -> tuple[Any, ...]:
    case = SelfCase(3 * images, 3, (length, length + 1, 2) * images, (U, C, C) * images)
    generator = torch.Generator().manual_seed(images)
    kv = torch.randn(images, 4 + length, 2, case.H, case.D, generator=generator)
    index = KVIndex.build(torch.arange(case.num_blocks) % images, images)
    mask = torch.rand(images, 4 + length, generator=generator) < 0.8
    qkv = make_qkv(case, torch.float32)
    return (
        qkv.requires_grad_(),
        case.layout(),
        kv.requires_grad_(),
        index,
        mask,
        philox_of(0.3),
    )


def _with_grads(function: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    loss = function(*arguments)
    return loss.detach(), *torch.autograd.grad(loss, (arguments[0], arguments[2]))


def test_compiles_whole_and_for_all_sizes() -> None:
    """One graph of the first sizes, one of all others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_pass, fullgraph=True, dynamic=True, backend=counter)
    for images, length in ((2, 3), (3, 5), (5, 4), (4, 9)):
        arguments = _arguments(images, length)
        for x, y in zip(
            _with_grads(compiled, arguments), _with_grads(_pass, arguments), strict=True
        ):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2


def test_compiles_with_a_plain_index_and_each_backend() -> None:
    torch._dynamo.reset()
    q, kv = make_q_kv(CROSS_CASES["every image twice"], torch.float32)
    index = torch.tensor(CROSS_CASES["every image twice"].index)
    for impl in ("reference", "sdpa", "auto"):
        compiled = torch.compile(
            lambda q, kv, index, impl=impl: qformer_cross_attention(q, kv, index, impl=impl),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        expected = qformer_cross_attention(q, kv, index, impl=impl)
        torch.testing.assert_close(compiled(q, kv, index), expected)


def test_reference_compiles_with_dropout() -> None:
    torch._dynamo.reset()
    case = SELF_CASES["dropout"]
    qkv, layout, philox = make_qkv(case, torch.float32), case.layout(), philox_of(case.p)

    def run(qkv: Tensor, layout: AttentionLayout, philox: Tensor) -> Tensor:
        return qformer_attention(qkv, layout, dropout_p=0.3, philox=philox, impl="reference")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, layout, philox), run(qkv, layout, philox))


def test_exports() -> None:
    class Pass(torch.nn.Module):
        def forward(self, *arguments: Any) -> Tensor:
            return _pass(*arguments)

    arguments = _arguments(2, 3)
    program = torch.export.export(Pass(), arguments)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {
        "blip2fast.qformer_attention.default",
        "blip2fast.qformer_cross_attention.default",
    } <= targets
    other = (arguments[0] + 1, *arguments[1:])
    torch.testing.assert_close(program.module()(*other), _pass(*other))


def test_meta_tensors() -> None:
    case = SELF_CASES["all kinds"]
    arguments = (*unpack_layout(case.layout()), None, 0.25, 0.0, "sdpa")
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    qkv = make_qkv(case, torch.bfloat16).to("meta")
    out, lse = torch.ops.blip2fast.qformer_attention(qkv, *meta)
    assert (out.shape, out.dtype) == ((len(qkv), case.H, case.D), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((len(qkv), case.H), torch.float32)


def test_row_numbers_beyond_31_bits() -> None:
    """Rows of the token buffer and of dropout's numbering are counted in 64 bits."""
    blocks, Q = 2**29, 8
    layout = AttentionLayout(
        num_blocks=blocks,
        num_queries=Q,
        num_text_rows=2**31 - 1,
        max_seqlen=3,
        has_bidirectional=True,
        has_causal=False,
        cu_seqlens=torch.tensor([2**31 - 4, 2**31 - 1], dtype=torch.int32),
        kinds=torch.tensor([1], dtype=torch.int32),
        blocks=torch.tensor([blocks - 1], dtype=torch.int32),
        block_text=torch.zeros(1, dtype=torch.int32),
        order=torch.zeros(1, dtype=torch.int32),
        offsets=torch.tensor([0, 1], dtype=torch.int32),
    )
    (group,) = _attention_cpu_plan._groups(layout, head_elements=32)
    end = blocks * Q
    expected = [*range(end - Q, end), *(end + 2**31 - 4 + t for t in range(3))]
    assert group.rows.tolist() == group.keys.tolist() == [expected]
    assert expected[-1] > 2**32
    uses = _attention_cpu_cross._Uses(images=np.array([0]), blocks=np.array([[2**30]]))
    dropout = _attention_cpu_cross._dropout(philox_of(0.5), 0.5, uses, Q)
    assert dropout.rows.tolist() == [[2**33 + q for q in range(Q)]]


def test_consecutive_rows_are_not_copied() -> None:
    x = torch.randn(6, 3)
    indices = np.array([[2, 3], [4, 5]])
    assert pick(x, indices).data_ptr() == x[2].data_ptr()
    assert pick(x, indices[::-1].copy()).equal(x[[4, 5, 2, 3]])


def test_buckets_hold_texts_of_like_length() -> None:
    lengths = np.array([9, 1, 40, 2, 39, 10, 1, 41])
    buckets = _attention_cpu_plan._buckets(lengths, seen=32, head_elements=12 * 64)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(8))
    assert len(buckets) > 1
    longest = [lengths[bucket].max() for bucket in buckets]
    assert longest == sorted(longest)
    assert len(_attention_cpu_plan._buckets(lengths[:2] * 0 + 7, 32, 10**6)) == 1


def test_layers_share_a_plan_and_other_texts_do_not() -> None:
    def layout(*lengths: int) -> AttentionLayout:
        return AttentionLayout.build(2, 3, lengths, MaskKind.BIDIRECTIONAL)

    def plan_of(*lengths: int, gathered: int = 1 << 20) -> _attention_cpu_plan.Plan:
        return _attention_cpu_plan.plan_of(layout(*lengths), 32, gathered)

    with torch.inference_mode():
        plan = plan_of(4, 2)
    assert plan_of(4, 2) is plan
    assert not plan.order.is_inference()
    assert plan_of(2, 4) is not plan
    assert plan.rows() == 2 * 3 + 2 * 4
    assert len(plan.parts) == 1
    # two problems of seven keys, with room for thirteen
    small = plan_of(4, 2, gathered=13 * 3 * 32 // torch.get_num_threads())
    assert len(small.parts) == 2


def test_what_is_one_call_gives_what_it_gives_in_training() -> None:
    q, kv = torch.randn(3, 4, 2, 16), torch.randn(3, 130, 2, 2, 16)
    out = qformer_cross_attention(q, kv)
    assert out.equal(qformer_cross_attention(q.clone().requires_grad_(), kv).detach())
    shared = qformer_cross_attention(q[:1], kv)
    assert shared.equal(qformer_cross_attention(q[:1].expand(3, -1, -1, -1), kv))
    assert shared.is_contiguous()


@pytest.mark.parametrize("name", [name for name, case in SELF_CASES.items() if case.p == 0])
def test_without_a_gradient_no_operator_runs_and_the_output_is_the_same(name: str) -> None:
    qkv, layout = make_qkv(SELF_CASES[name], torch.float32), SELF_CASES[name].layout()
    out, _ = qformer_attention(qkv, layout, impl="sdpa", return_lse=True)
    with torch.profiler.profile() as profile:
        alone = qformer_attention(qkv, layout, impl="sdpa")
    assert alone.equal(out)
    assert not any(event.key.startswith("blip2fast::") for event in profile.key_averages())


@pytest.mark.parametrize("name", [name for name, case in SELF_CASES.items() if case.p == 0])
def test_xformers_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention has no CPU operator: its mask objects, written out, are put into PyTorch's."""
    fmha = pytest.importorskip("xformers.ops.fmha")

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float) -> Tensor:
        assert isinstance(bias, fmha.attn_bias.AttentionBias)
        mask = bias.materialize((q.shape[1], k.shape[1])).to(q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return out.transpose(1, 2)

    monkeypatch.setattr(_attention_xformers, "attend", attend)
    case = SELF_CASES[name]
    qkv, layout = make_qkv(case, torch.float64), case.layout()
    out = _attention_xformers.self_attention(qkv, layout, case.D**-0.5)
    torch.testing.assert_close(out, qformer_attention(qkv, layout, impl="reference"))
