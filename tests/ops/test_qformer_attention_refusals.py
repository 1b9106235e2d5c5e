"""What the Q-Former's attentions refuse, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.ops import qformer_attention, qformer_cross_attention

LAYOUT = AttentionLayout.build(2, 3, [4, 2], MaskKind.UNIMODAL)
QKV = torch.zeros(12, 3, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": torch.zeros(12, 2, 2, 16)}, r"qkv: expected \[R, 3, H, D\], got shape \[12, 2, "),
        (
            {"qkv": torch.zeros(11, 3, 2, 16)},
            r"qkv: expected 12 rows \(2 blocks of 3 queries, then 6 text rows\), got 11: build the",
        ),
        ({"qkv": QKV.int()}, "qkv: expected fp16, bf16, fp32 or fp64, got torch.int32"),
        ({"qkv": torch.zeros(12, 3, 0, 16)}, "qkv: expected heads and head width above 0"),
        ({"qkv": QKV.to("meta")}, "layout: expected on meta like the data, got cpu"),
        ({"dropout_p": 1.0}, "dropout_p: expected 0 to below 1, got 1.0"),
        ({"dropout_p": 0.1}, "dropout_p=0.1 needs philox, the seed and offset of its mask: ops"),
        (
            {"philox": torch.zeros(3, dtype=torch.int64)},
            r"philox: expected \[2\] int64, seed and offset, got \(3,\), torch.int64, cpu",
        ),
        ({"impl": "spda"}, "impl: expected 'auto' or one of .* got 'spda'; did you mean 'sdpa'"),
    ],
)
def test_self_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qformer_attention(**({"qkv": QKV, "layout": LAYOUT} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, r"q: expected \[N, Q, H, D\], got shape \[2, 3, 16\]"),
        (
            {"kv": torch.zeros(2, 5, 2, 3, 16)},
            r"kv: expected \[B, S, 2, H, D\] with H, D = \[2, 16\] as in q, got shape \[2, 5, 2, 3",
        ),
        ({"kv": torch.zeros(2, 5, 2, 2, 16).half()}, "kv: expected torch.float32 like q, got tor"),
        ({"kv": torch.zeros(3, 5, 2, 2, 16)}, "q: expected 3 blocks, or 1 for all, got 2: pass kv"),
        ({"kv_index": torch.tensor([0, 1, 1])}, "q: expected 3 blocks, or 1 .* needs one image"),
        (
            {"kv_index": torch.tensor([0.0, 1.0])},
            r"kv_index: expected integers, got \(2,\), torch.float32",
        ),
        ({"kv_index": torch.tensor([0, 2])}, "kv_index: expected images from 0 to 1, got 0 to 2"),
        ({"kv_index": torch.tensor([[0, 1]])}, r"kv_index: expected \[N\], got shape \[1, 2\]"),
        ({"kv_index": KVIndex.build([0, 1], 3)}, "kv_index: built for 3 images, kv has 2"),
        (
            {"key_lengths": torch.tensor([1])},
            r"key_lengths: expected 2 integers, got \(1,\), t",
        ),
        (
            {"key_mask": torch.ones(2, 5)},
            r"key_mask: expected bool \[2, 5\], true where an image token is real, got \(2, 5\), t",
        ),
        (
            {"key_mask": torch.ones(2, 5).bool(), "key_lengths": torch.tensor([1, 2])},
            "key_lengths and key_mask both say which keys are real: pass one",
        ),
        ({"dropout_p": 0.1}, "dropout_p=0.1 needs philox"),
    ],
)
def test_cross_refusals(arguments: dict[str, Any], message: str) -> None:
    given = {"q": torch.zeros(2, 3, 2, 16), "kv": torch.zeros(2, 5, 2, 2, 16)}
    with pytest.raises(ValueError, match=message):
        qformer_cross_attention(**(given | arguments))


def test_every_backend_says_why_not() -> None:
    q, kv = torch.zeros(2, 300, 2, 140).double(), torch.zeros(2, 5, 2, 2, 140).double()
    with pytest.raises(NotImplementedError) as error:
        qformer_cross_attention(
            q,
            kv,
            key_lengths=torch.tensor([1, 2]),
            dropout_p=0.1,
            philox=philox_state(1),
            impl="xformers",
            return_lse=True,
        )
    lines = str(error.value)
    for line in (
        "qformer_cross_attention: impl='xformers' does not run AttentionCall(queries=300, keys=5",
        "  cuda: head width 140: only 16 to 128",
        "  cuda: head width 140: only multiples of 8",
        "  cuda: torch.float64: only float16 and bfloat16",
        "  cuda: tensors on cpu: needs a CUDA device",
        "  triton: 300 queries: at most 256",
        "  triton: torch.float64: only float16, bfloat16 and float32",
        "  xformers: tensors on cpu: its attention has no operator there, only CUDA",
        "  xformers: dropout: its masks are not those of a seed and a position",
        "  xformers: key_mask: its masks are block-diagonal, by lengths",
        "  xformers: return_lse: it gives none beside a gradient",
        "  sdpa: runs it; use impl='sdpa'",
        "  reference: it is the definition, with every pair in memory: force it with impl='ref",
    ):
        assert line in lines
    with pytest.raises(NotImplementedError, match="cuda: only cross-attention is written in CUDA"):
        qformer_attention(QKV, LAYOUT, impl="cuda")
    layout = AttentionLayout.build(0, 1, [513], MaskKind.UNIMODAL)
    with pytest.raises(NotImplementedError, match="513 text tokens: at most 512"):
        qformer_attention(torch.zeros(513, 3, 1, 16), layout, impl="triton")
    with pytest.raises(NotImplementedError, match="16385 image tokens: at most 16384"):
        qformer_cross_attention(q[:1], kv[:1, :1].expand(1, 16385, 2, 2, 140), impl="triton")
