"""The CUDA kernels on the host: every thread emulated, the same source, against the definitions.

What this shows: addresses, masks, fragments, softmax, dropout and gradients, launch arithmetic.
What it cannot: speed, memory ordering, the compiler's code, the hardware's own rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cross_attention_cases import CASES, Inputs, Results, check_cross_attention, make_inputs
from extension_build import build_extension, build_target, module_again, needs_compiler

from blip2fast import _extension
from blip2fast.kernels.qformer_attention import cuda as _attention_cuda
from blip2fast.kernels.qformer_attention import reference
from blip2fast.ops.qformer_attention import backends as _attention_backends

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> torch._ops._OpNamespace:
    build_extension(Path(tmp_path_factory.mktemp("extension")))
    torch.ops.load_library(str(build_target("emulated/_C.so")))
    return torch.ops.blip2fast_emulated


@pytest.mark.parametrize("name", CASES)
def test_cross_attention(kernels: torch._ops._OpNamespace, name: str) -> None:
    def run(given: Inputs) -> Results:
        case, (q, kv, index, mask, philox, d_out) = given.case, given.tensors
        options = (mask, philox, case.N, case.D**-0.5, case.p)
        where = None if index is None else index.index
        out, lse = kernels.qformer_cross_attention_fwd(q, kv, where, *options)
        # gradients go to buffers of any strides; what is not written stays NaN
        wide = torch.full((case.N, case.Q, 2, case.H, case.D), torch.nan, dtype=q.dtype)
        d_q, d_kv = wide[:, :, 1], torch.full_like(kv, torch.nan)
        uses = (None, None) if index is None else (index.order, index.offsets)
        kernels.qformer_cross_attention_bwd(
            d_out, q, kv, out, lse, where, *uses, *options, d_q, d_kv
        )
        return Results(out, lse, d_q.sum(0, keepdim=True) if len(q) < case.N else d_q, d_kv)

    # fp32 sums of what cancels
    check_cross_attention(run, CASES[name], lse_error=4e-6, cancelled=1e-6)


def test_the_backend_is_there_where_its_operators_are(
    kernels: torch._ops._OpNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once asked for a name that csrc/ does not define, and no build could satisfy it."""
    call = _attention_backends.AttentionCall(
        32, 257, 12, 64, torch.bfloat16, "cuda", dropout=True, key_mask=True, lse=True, cross=True
    )
    monkeypatch.setattr(torch.ops, "blip2fast_C", kernels)
    monkeypatch.setattr(_extension, "_WHY_NOT", "")
    assert module_again(_attention_backends, monkeypatch)._cuda_reasons(call) == []
    monkeypatch.setattr(_extension, "_WHY_NOT", "the extension was not built")
    again = module_again(_attention_backends, monkeypatch)
    assert again._cuda_reasons(call) == ["the extension was not built"]


def test_the_backend_takes_any_strides(
    kernels: torch._ops._OpNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`impl="cuda"`'s own functions: queries shared by all blocks, rows at odd addresses."""
    monkeypatch.setattr(_attention_cuda, "_OPS", kernels)
    _, kv, index, mask, philox, _ = make_inputs(CASES["shared images"])
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
    q, kv, index, mask, philox, _ = make_inputs(CASES["shared images"])
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
        ({"q": torch.zeros(2, 3, 2, 64)}, "kv: expected 5 dimensions and the dtype of the data"),
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


GRADIENT = (
    "dout", "q", "kv", "out", "lse", "kv_index", "order", "offsets", "key_mask", "philox",
    "num_blocks", "scale", "dropout_p", "dq", "dkv",
)  # fmt: skip


def test_every_tensor_of_a_gradient_is_on_the_device_and_of_its_shape(
    kernels: torch._ops._OpNamespace,
) -> None:
    """A pointer of another device, or past the end, would be used all the same."""
    q, kv, index, mask, philox, d_out = make_inputs(CASES["shared images"])
    uses = (index.index, index.order, index.offsets)
    options = (mask, philox, len(q), 0.125, 0.1)
    out, lse = kernels.qformer_cross_attention_fwd(q, kv, uses[0], *options)
    gradients = torch.zeros_like(out), kv.new_zeros(kv.shape)
    call = dict(zip(GRADIENT, (d_out, q, kv, out, lse, *uses, *options, *gradients), strict=True))
    op = kernels.qformer_cross_attention_bwd.default
    op(*call.values())
    tensors = {name: x for name, x in call.items() if isinstance(x, torch.Tensor)}
    assert len(tensors) == len(call) - 3
    for name, x in tensors.items():
        if name != "q":  # the others are held against it
            elsewhere = call | {name: x.to("meta")}
            with pytest.raises(RuntimeError, match=f"{name}.*: expected on the device of the data"):
                # not by the dispatcher, which would look at all the devices itself
                op._op_dk(torch._C.DispatchKey.CPU, *elsewhere.values())
        for dim in range(x.dim()):
            fewer = call | {name: x.narrow(dim, 0, x.shape[dim] - 1).clone()}
            with pytest.raises(RuntimeError):
                op(*fewer.values())


def test_schemas_tell_the_truth(kernels: torch._ops._OpNamespace) -> None:
    q, kv, *_ = make_inputs(CASES["window"])
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
    q, kv, index, mask, philox, _ = make_inputs(CASES[name])
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
