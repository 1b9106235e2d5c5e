"""The CUDA kernels on the host: every thread emulated, the same source, against the definitions.

What this shows: addresses, masks, fragments, softmax, dropout and gradients, launch arithmetic.
What it cannot: speed, memory ordering, the compiler's code, the hardware's own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from extension_build import build_extension, build_target, needs_compiler
from torch import Tensor

from blip2fast.kernels.qformer_attention import reference
from blip2fast.ops import _attention_cuda
from blip2fast.ops.attention_layout import KVIndex
from blip2fast.ops.philox import philox_state

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> torch._ops._OpNamespace:
    build_extension(Path(tmp_path_factory.mktemp("extension")))
    torch.ops.load_library(str(build_target("emulated/_C.so")))
    return torch.ops.blip2fast_emulated


@dataclass(frozen=True)
class Case:
    """N blocks of Q queries, S keys, H heads of width D; B images where blocks share them."""

    N: int
    Q: int
    S: int
    H: int
    D: int
    B: int | None = None
    index: tuple[int, ...] | None = None
    p: float = 0.0
    masked: bool = False
    layers: int = 1
    shared: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "window": Case(N=5, Q=3, S=15, H=2, D=64),
    "one query, one key": Case(N=3, Q=1, S=1, H=1, D=64),
    "full tile": Case(N=2, Q=16, S=64, H=1, D=64, dtype=torch.float16),
    "BLIP-2": Case(N=1, Q=32, S=257, H=1, D=64, p=0.1),
    "two tiles and one": Case(N=1, Q=33, S=33, H=1, D=64, p=0.1),
    "narrow heads": Case(N=2, Q=5, S=17, H=3, D=16, p=0.3, masked=True),
    "odd width": Case(N=2, Q=20, S=9, H=1, D=48, masked=True, dtype=torch.float16),
    "wide heads": Case(N=1, Q=20, S=33, H=2, D=128, p=0.2),
    "width 80": Case(N=1, Q=9, S=16, H=1, D=80, masked=True),
    "shared images": Case(N=4, Q=8, S=20, H=2, D=64, index=(2, 0, 2, 2), B=4, p=0.1, masked=True),
    "shared, wide": Case(N=3, Q=17, S=18, H=1, D=128, index=(1, 1, 1), B=2),
    "a layer's slice": Case(N=2, Q=8, S=20, H=2, D=64, layers=3),
    "shared queries": Case(N=4, Q=8, S=7, H=2, D=64, index=(0, 1, 0, 1), B=2, shared=True),
}


def _inputs(
    case: Case,
) -> tuple[Tensor, Tensor, KVIndex | None, Tensor | None, Tensor | None]:
    images = case.B or case.N
    q = torch.randn(1 if case.shared else case.N, case.Q, case.H, case.D).to(case.dtype)
    kv = torch.randn(images, case.S, case.layers, 2, case.H, case.D).to(case.dtype)
    mask = torch.rand(images, case.S) > 0.4 if case.masked else None
    if mask is not None:
        mask[0] = False  # a block that sees nothing
    index = None if case.index is None else KVIndex.build(case.index, images)
    philox = philox_state(2**62 + 5, 9) if case.p else None
    return q, kv[:, :, case.layers - 1], index, mask, philox


def _narrow(
    q: Tensor,
    kv: Tensor,
    index: KVIndex | None,
    mask: Tensor | None,
    keep: Tensor | None,
    scale: float,
    p: float,
) -> Tensor:
    """The definition in the inputs' own dtype, the rival."""
    image = torch.arange(len(kv)) if index is None else index.index.long()
    k, v = kv[image].permute(2, 0, 3, 1, 4)
    visible = None if mask is None else mask[image][:, None, None, :]
    out, _, _ = reference.attend(q.transpose(1, 2) * scale, k, v, visible, keep, p)
    return out.transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_cross_attention(kernels: torch._ops._OpNamespace, name: str) -> None:
    torch.manual_seed(0)
    q, kv, index, mask, philox = _inputs(CASES[name])
    N, Q, H, D, p = (getattr(CASES[name], field) for field in ("N", "Q", "H", "D", "p"))
    scale = D**-0.5
    where = None if index is None else index.index
    out, lse = kernels.qformer_cross_attention_fwd(q, kv, where, mask, philox, N, scale, p)
    d_out = torch.randn_like(out)
    # gradients go to buffers of any strides; what is not written stays NaN
    d_q = torch.full((N, Q, 2, H, D), torch.nan, dtype=q.dtype)[:, :, 1]
    d_kv = torch.full_like(kv, torch.nan)
    uses = (None, None) if index is None else (index.order, index.offsets)
    kernels.qformer_cross_attention_bwd(
        d_out, q, kv, out, lse, where, *uses, mask, philox, N, scale, p, d_q, d_kv
    )
    if len(q) < N:
        d_q = d_q.sum(0, keepdim=True)

    exact = [x.double().requires_grad_() for x in (q, kv)]
    expected, expected_lse = reference.qformer_cross_attention(
        *exact, where, mask, scale, p, philox
    )
    expected.backward(d_out.double())
    keep = None
    if philox is not None:
        keep = reference.cross_attention_keep(N, Q, H, kv.shape[1], philox, p)
    rival = [x.clone().requires_grad_() for x in (q, kv)]
    narrow = _narrow(*rival, index, mask, keep, scale, p)
    narrow.backward(d_out)

    truths = (expected.detach(), *(x.grad for x in exact))
    rivals = (narrow.detach(), *(x.grad for x in rival))
    for ours, truth, theirs in zip((out, d_q, d_kv), truths, rivals, strict=True):
        # one rounding of the largest value, and fp32 sums of what cancels
        floor = torch.finfo(q.dtype).eps * truth.abs().max() / 2 + 1e-6 * d_out.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + floor
    assert lse.isneginf().equal(expected_lse.isneginf())
    seen = ~lse.isneginf()
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=0, atol=4e-6)
    assert (out[~seen] == 0).all()


def test_the_backend_takes_any_strides(
    kernels: torch._ops._OpNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`impl="cuda"`'s own functions: queries shared by all blocks, rows at odd addresses."""
    monkeypatch.setattr(_attention_cuda, "_OPS", kernels)
    _, kv, index, mask, philox = _inputs(CASES["shared images"])
    N, scale, p = 4, 0.125, 0.1
    q = torch.randn(1, 8, 2, 65).bfloat16()[..., 1:]
    kv = F.pad(kv, (3, 0))[..., 3:]
    mask = mask.T.contiguous().T
    options = (scale, p, philox)
    out, lse = _attention_cuda.cross_forward(q, kv, index, mask, N, *options)
    d_out = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)
    d_q, d_kv = _attention_cuda.cross_backward(d_out, q, kv, out, lse, index, mask, *options)
    exact = [x.double().requires_grad_() for x in (q, kv)]
    truth, _ = reference.qformer_cross_attention(*exact, index.index, mask, *options)
    truth.backward(d_out.double())
    assert d_q.shape == q.shape
    for ours, theirs in ((out, truth), (d_q, exact[0].grad), (d_kv, exact[1].grad)):
        # a few roundings to 8 bits of what is added up
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 2**-6


def test_cross_attention_is_deterministic(kernels: torch._ops._OpNamespace) -> None:
    q, kv, index, mask, philox = _inputs(CASES["shared images"])
    p = CASES["shared images"].p
    results = []
    for _ in range(2):
        out, lse = kernels.qformer_cross_attention_fwd(q, kv, index.index, mask, philox, 4, 0.1, p)
        d_q, d_kv = torch.empty_like(out), torch.empty_like(kv)
        kernels.qformer_cross_attention_bwd(
            out,
            q,
            kv,
            out,
            lse,
            index.index,
            index.order,
            index.offsets,
            mask,
            philox,
            4,
            0.1,
            p,
            d_q,
            d_kv,
        )
        results.append((out, lse, d_q, d_kv))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 5}, "expected 5 blocks or 1"),
        ({"q": torch.zeros(2, 3, 2, 64)}, "float16 or bfloat16|the dtype of q"),
        ({"kv_index": torch.zeros(2)}, "kv_index: expected contiguous int32"),
        ({"key_mask": torch.zeros(2, 4)}, "key_mask: expected contiguous bool"),
        (
            {"q": torch.zeros(2 * 3 * 2 * 64 + 4, dtype=torch.half)[4:].view(2, 3, 2, 64)},
            "multiples of 16 bytes",
        ),
        (
            {
                "q": torch.zeros(2, 3, 2, 136, dtype=torch.half),
                "kv": torch.zeros(2, 4, 2, 2, 136, dtype=torch.half),
            },
            "multiple of 8 up to 128, got 136",
        ),
    ],
)
def test_cross_attention_rejects_what_it_would_misread(
    kernels: torch._ops._OpNamespace, change: dict[str, object], message: str
) -> None:
    arguments = {
        "q": torch.zeros(2, 3, 2, 64, dtype=torch.half),
        "kv": torch.zeros(2, 4, 2, 2, 64, dtype=torch.half),
        **dict.fromkeys(("kv_index", "key_mask", "philox")),
        "num_blocks": 2,
        "scale": 1.0,
        "dropout_p": 0.0,
    }
    with pytest.raises(RuntimeError, match=message):
        kernels.qformer_cross_attention_fwd(*(arguments | change).values())


def test_schemas_tell_the_truth(kernels: torch._ops._OpNamespace) -> None:
    q, kv, _, _, _ = _inputs(CASES["window"])
    arguments = (q, kv, None, None, None, len(q), 0.1, 0.0)
    op = kernels.qformer_cross_attention_fwd
    torch.library.opcheck(op.default, arguments, test_utils="test_schema")
    out, lse = op(*arguments)
    gradients = (torch.zeros_like(q), torch.zeros_like(kv))
    arguments = (out, q, kv, out, lse, *[None] * 5, len(q), 0.1, 0.0, *gradients)
    op = kernels.qformer_cross_attention_bwd
    torch.library.opcheck(op.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("name", ["window", "shared images", "shared queries", "a layer's slice"])
def test_the_public_operator_is_what_its_fake_says(
    kernels: torch._ops._OpNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Schema, fake, autograd and compiled shapes of `impl="cuda"`, forward and backward."""
    monkeypatch.setattr(_attention_cuda, "_OPS", kernels)
    q, kv, index, mask, philox = _inputs(CASES[name])
    ops, N, p = torch.ops.blip2fast, CASES[name].N, CASES[name].p
    uses = (None,) * 3 if index is None else (index.index, index.order, index.offsets)
    options = (philox, 0.125, p, "cuda")
    leaves = (q.requires_grad_(), kv.requires_grad_())
    torch.library.opcheck(ops.qformer_cross_attention, (*leaves, *uses, mask, N, *options))
    q, kv = q.detach(), kv.detach()
    out, lse = ops.qformer_cross_attention(q, kv, *uses, mask, N, *options)
    torch.library.opcheck(
        ops.qformer_cross_attention_grad, (out, q, kv, out, lse, *uses, mask, *options)
    )
