"""Test problems for kernels: for each kind of call, small cases with partial tiles in every
dimension, and one of realistic size that is timed.

The kinds come from `kernel_kinds.py`. Only the worker process imports this. Shapes as in the
ops: R rows, N query blocks, Q queries, B images, S image tokens, T text tokens, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.bias_gelu import reference as gelu_reference
from blip2fast.kernels.dropout_add_layer_norm import reference as norm_reference
from blip2fast.kernels.itc import noise
from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import reference as attention_reference
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.ops.bias_gelu import bias_gelu
from blip2fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from blip2fast.ops.itc.loss import itc_loss
from blip2fast.ops.kernel_kinds import DTYPES, read_kind, self_keys, self_rows
from blip2fast.ops.kernel_proof import Case, Problem
from blip2fast.ops.qformer_attention.attention import qformer_attention, qformer_cross_attention

P = 0.1
# relative gradient error from an lse stored in fp32, per unit of lse
LSE_ROUNDING = torch.finfo(torch.float32).eps / 2
# bound on the lse for normal inputs: the largest score plus the log of the number of keys
ATTENTION_ROUNDING = 12 * LSE_ROUNDING
# bound on the lse: similarities are at most 1, the temperature is 0.07
ITC_ROUNDING = 16 * LSE_ROUNDING
# sums over rows in fp32, in a different order
SUM_ROUNDING = 4 * torch.finfo(torch.float32).eps
UNI, BI, CAUSAL = MaskKind.UNIMODAL, MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL


def _leaf(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """A random leaf tensor that requires a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    return x.to(dtype).requires_grad_()


def _philox(p: float, device: torch.device) -> Tensor | None:
    """A Philox state whose seed exceeds 32 bits; None without dropout."""
    return philox_state(2**40 + 7, 5, device) if p else None


@dataclass(frozen=True)
class Drop:
    """Dropout probability, and the Philox state of its mask if that is above 0."""

    p: float
    philox: Tensor | None


def _small(device: torch.device) -> bool:
    """Whether kernels run in the interpreter, so GPU sizes and timings do not apply."""
    return device.type == "cpu"


# bias_gelu


def gelu_problem(kind: str, device: torch.device) -> Problem:
    """One 8 x 256 tile plus a row and a column; on a GPU also several row tiles per program."""
    dtype, bias_type = (DTYPES[read_kind(kind)[name]] for name in ("dtype", "bias"))

    def case(name: str, R: int, width: int, with_bias: bool = True) -> Case:
        x = _leaf((R, width), dtype, device, 0)
        inputs = [x, _leaf((width,), bias_type, device, 1)] if with_bias else [x]
        return Case(
            f"{name} {R} x {width}",
            inputs,
            lambda impl: partial(_gelu, impl),
            lambda given: [F.gelu(given[0] + given[1].to(dtype) if with_bias else given[0])],
            lambda given: [gelu_reference.bias_gelu(*given)],
            ("output",),
            SUM_ROUNDING,
        )

    cases = [case("bias and GELU", 9, 257), case("GELU alone", 3, 33, False)]
    if _small(device):
        return Problem(cases)
    # more rows than the programs of a backward pass take at once
    return Problem([*cases, case("bias and GELU", 4233, 264)], case("bias and GELU", 16384, 3072))


def _gelu(impl: str, given: Sequence[Tensor]) -> list[Tensor]:
    x, bias = given if len(given) == 2 else (given[0], None)
    return [bias_gelu(x, bias, impl)]


# dropout_add_layer_norm


def norm_problem(kind: str, device: torch.device) -> Problem:
    """A partial last tile of one row; with both residual and bias of x, and with neither."""
    given = read_kind(kind)
    width, p = int(given["width"]), P if given["dropout"] == "1" else 0.0
    x_type, sum_type, out_type = (DTYPES[given[name]] for name in ("x", "sum", "out"))
    copy_type, of_parameters = DTYPES[given["copy"]], DTYPES[given["parameters"]]
    copy = None if copy_type == out_type else copy_type
    drop = Drop(p, _philox(p, device))

    def case(name: str, R: int, alone: bool = False) -> Case:
        x = _leaf((R, width), x_type, device, 0)
        inputs = [x, *(_leaf((width,), of_parameters, device, seed) for seed in (1, 2))]
        if not alone:
            inputs += [_leaf((R, width), sum_type, device, 3)]
            inputs += [_leaf((width,), of_parameters, device, 4)]
        return Case(
            f"{name} {R} x {width}",
            inputs,
            lambda impl: partial(_norm, impl, drop, out_type, copy),
            partial(_plain_norm, drop, out_type, copy),
            partial(_true_norm, drop, copy is not None),
            ("output",) if copy is None else ("output", "copy"),
            SUM_ROUNDING,
        )

    # a program has up to 16 rows
    rows = min(16, max(1, 4096 // (1 << (width - 1).bit_length()))) + 1
    name = "dropout, residual and LayerNorm"
    cases = [case(name, rows)]
    if x_type == sum_type:
        cases.append(case("LayerNorm alone", 3, alone=True))
    if _small(device):
        return Problem(cases)
    # more rows than the programs of a backward pass take at once
    return Problem([*cases, case(name, 528 * (rows - 1) + 3)], case(name, 16384))


class Rows(NamedTuple):
    """Inputs of `dropout_add_layer_norm`, in the order of a case."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None = None
    x_bias: Tensor | None = None


def _norm(
    impl: str,
    drop: Drop,
    out_type: torch.dtype,
    copy: torch.dtype | None,
    given: Sequence[Tensor],
) -> list[Tensor]:
    rows = Rows(*given)
    options = {"dropout_p": drop.p, "philox": drop.philox, "out_dtype": out_type, "impl": impl}
    call: Any = dropout_add_layer_norm
    found = call(
        rows.x,
        rows.residual,
        rows.weight,
        rows.bias,
        x_bias=rows.x_bias,
        copy_dtype=copy,
        **options,
    )
    return [found] if isinstance(found, Tensor) else list(found)


def _plain_norm(
    drop: Drop, out_type: torch.dtype, copy: torch.dtype | None, given: Sequence[Tensor]
) -> list[Tensor]:
    rows = Rows(*given)
    total = rows.x if rows.x_bias is None else rows.x + rows.x_bias.to(rows.x.dtype)
    if drop.philox is not None:
        R, C = total.shape
        total = total * norm_reference.keep(R, C, drop.philox, drop.p) / (1 - drop.p)
    total = total if rows.residual is None else total + rows.residual
    weight, bias = rows.weight.to(total.dtype), rows.bias.to(total.dtype)
    out = F.layer_norm(total, total.shape[-1:], weight, bias, 1e-12).to(out_type)
    return [out] if copy is None else [out, out.to(copy)]


def _true_norm(drop: Drop, copied: bool, given: Sequence[Tensor]) -> list[Tensor]:
    rows = Rows(*given)
    out = norm_reference.dropout_add_layer_norm(
        rows.x, rows.residual, rows.weight, rows.bias, rows.x_bias, 1e-12, drop.p, drop.philox
    )
    return [out, out] if copied else [out]


# qformer_attention


def self_problem(kind: str, device: torch.device) -> Problem:
    """Layouts of one tile class: pairs, texts of all mask kinds, queries alone, text alone."""
    given = read_kind(kind)
    dtype, D, Q = DTYPES[given["dtype"]], int(given["width"]), int(given["queries"])
    p = P if given["dropout"] == "1" else 0.0
    least, most = _text_lengths(Q, int(given["rows"]), int(given["keys"]))

    drop = Drop(p, _philox(p, device))

    # 4 heads: with small tiles, a program handles as many at once as it does of 12
    def case(name: str, layout: AttentionLayout, H: int = 4, timed: bool = False) -> Case:
        # training does not request the lse, and PyTorch's fastest path does not return it
        return Case(
            name,
            [_leaf((layout.num_rows, 3, H, D), dtype, device, 0)],
            lambda impl: partial(_self, impl, layout, drop, not timed),
            partial(_plain_self, layout, drop),
            partial(_true_self, layout, drop),
            ("output",) if timed else ("output", "lse"),
            ATTENTION_ROUNDING,
        )

    def build(*layout: object) -> AttentionLayout:
        return AttentionLayout.build(*layout, device=device)  # type: ignore[arg-type]

    H = max(1, 768 // D)
    if most == 0:
        cases = [case("queries alone", build(3, Q))]
        race_layout = build(128, Q)
    else:
        lengths = [most, least, 1, 0]
        kinds = (UNI, BI, CAUSAL, CAUSAL, BI, UNI, CAUSAL)
        mixed = (least, most, most, 1, 0, 0, least), kinds, (0, 1, 2, 2, 0, 0, 1)
        cases = [
            case("texts of three kinds", build(3, Q, *mixed)),
            case(
                "texts that see no queries, and captions",
                build(2, Q, lengths, (UNI, CAUSAL) * 2, (0, 0, 1, 1)),
            ),
            # without causal texts a different backward variant runs
            case("pairs", build(3, Q, (most, max(least, 1), 0), BI)),
            case("text alone", build(0, Q, (most, 1, 0), UNI)),
        ]
        race_layout = build(128, Q, (most,) * 128, BI)
    if _small(device):
        return Problem(cases)
    name = f"{race_layout.num_blocks} x {Q} queries, {most} text tokens, {H} heads"
    return Problem(cases, case(name, race_layout, H, timed=True))


def _text_lengths(Q: int, rows: int, keys: int) -> tuple[int, int]:
    """Range of the longest text's length, `(min, max)`, in a tile class; see `kernel_kinds`."""
    fits = [T for T in range(513) if (self_rows(Q, T), self_keys(Q, T)) == (rows, keys)]
    if not fits:
        raise ValueError(f"no text length goes with {Q} queries, {rows} rows, {keys} keys")
    return fits[0], min(fits[-1], fits[0] + 64)


def _self(
    impl: str, layout: AttentionLayout, drop: Drop, with_lse: bool, given: Sequence[Tensor]
) -> list[Tensor]:
    call: Any = qformer_attention
    options = {"dropout_p": drop.p, "philox": drop.philox, "impl": impl, "return_lse": with_lse}
    found = call(given[0], layout, **options)
    return list(found) if with_lse else [found]


def _true_self(layout: AttentionLayout, drop: Drop, given: Sequence[Tensor]) -> list[Tensor]:
    scale = given[0].shape[-1] ** -0.5
    out, lse = attention_reference.qformer_attention(given[0], layout, scale, drop.p, drop.philox)
    return [out, lse.detach()]


def _plain_self(layout: AttentionLayout, drop: Drop, given: Sequence[Tensor]) -> list[Tensor]:
    q, k, v = given[0].permute(1, 2, 0, 3)
    visible, _ = attention_reference.visible_pairs(layout)
    keep = None
    if drop.philox is not None:
        keep = attention_reference.self_attention_keep(layout, q.shape[0], drop.philox, drop.p)
    out, lse = _plain_attend(q, k, v, visible, keep, drop.p)
    return [out.transpose(0, 1), lse.T]


def _plain_attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, keep: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, in the dtype of the inputs; the lse in fp32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.detach().float().logsumexp(-1)
    # a fully masked row gives 0
    weights = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)
    return (weights if keep is None else weights * keep / (1 - p)) @ v, lse


# qformer_cross_attention


def cross_problem(kind: str, device: torch.device) -> Problem:
    """Images read once, never and several times; separate queries and one shared block."""
    given = read_kind(kind)
    dtype, D, Q, S = DTYPES[given["dtype"]], *(int(given[n]) for n in ("width", "queries", "keys"))
    p = P if given["dropout"] == "1" else 0.0
    indexed, masked = given["index"] == "1", given["mask"] == "1"

    def case(
        name: str,
        reads: Sequence[int] | None,
        B: int,
        H: int = 4,
        shared: bool = False,
        timed: bool = False,
    ) -> Case:
        index = None if reads is None else KVIndex.build(torch.tensor(reads, device=device), B)
        N = B if reads is None else len(reads)
        mask = None
        if masked:
            draw = torch.rand(B, S, generator=torch.Generator().manual_seed(2))
            mask = draw > 0.4
            # one image is fully masked
            mask[0] = False
            mask = mask.to(device)
        call = Crossing(N, index, mask, Drop(p, _philox(p, device)))
        return Case(
            name,
            [
                _leaf((1 if shared else N, Q, H, D), dtype, device, 0),
                # one layer's slice of a projection for several layers
                _leaf((B, S, 2, 2, H, D), dtype, device, 1).detach()[:, :, 1].requires_grad_(),
            ],
            lambda impl: partial(_cross, impl, call, not timed),
            partial(_plain_cross, call),
            partial(_true_cross, call),
            ("output",) if timed else ("output", "lse"),
            ATTENTION_ROUNDING,
        )

    H, many = max(1, 768 // D), 128
    if indexed:
        cases = [
            case("images read 1, 3 and 0 times", (1, 3, 1, 1), 4),
            case("images read thrice on average", (1, 2, 1, 1, 2, 1, 2, 1, 1), 3),
        ]
        race_reads = [i % many for i in range(many)] + [(7 * i + 3) % many for i in range(2 * many)]
        reads: Sequence[int] | None = race_reads
    else:
        cases = [
            case("each its image", None, 3),
            case("one block of queries for all", None, 2, shared=True),
        ]
        reads = None
    if S > 224 and not _small(device):
        # with enough programs the keys are not split
        cases.append(case("many images", None if reads is None else list(range(24)), 24, 12))
        if reads is not None:
            # tiles of several heights, and one image with more rows than the tallest
            often = [i for i, n in enumerate((3,) * 8 + (4, 4, 14) + (2,) * 13) for _ in range(n)]
            cases.append(case("many images read thrice on average", often, 24, 12))
    if _small(device):
        return Problem(cases)
    N = many if reads is None else len(reads)
    name = f"{N} blocks of {Q} queries, {many} images of {S} tokens, {H} heads"
    return Problem(cases, case(name, reads, many, H, timed=True))


@dataclass(frozen=True)
class Crossing:
    """A cross-attention call: index, key mask and dropout.

    Attributes:
        blocks: N.
        index: The image of each block, or None.
        mask: `[B, S]`, true for real tokens, or None.
        drop: Dropout of the attention weights.
    """

    blocks: int
    index: KVIndex | None
    mask: Tensor | None
    drop: Drop

    @property
    def image(self) -> Tensor | None:
        return None if self.index is None else self.index.index


def _cross(impl: str, call: Crossing, with_lse: bool, given: Sequence[Tensor]) -> list[Tensor]:
    function: Any = qformer_cross_attention
    found = function(
        given[0],
        given[1],
        call.index,
        key_mask=call.mask,
        dropout_p=call.drop.p,
        philox=call.drop.philox,
        impl=impl,
        return_lse=with_lse,
    )
    return list(found) if with_lse else [found]


def _true_cross(call: Crossing, given: Sequence[Tensor]) -> list[Tensor]:
    q, kv = given
    out, lse = attention_reference.qformer_cross_attention(
        q.expand(call.blocks, -1, -1, -1),
        kv,
        call.image,
        call.mask,
        q.shape[-1] ** -0.5,
        call.drop.p,
        call.drop.philox,
    )
    return [out, lse.detach()]


def _plain_cross(call: Crossing, given: Sequence[Tensor]) -> list[Tensor]:
    q, kv = given
    (_, Q, H, _), S = q.shape, kv.shape[1]
    image = torch.arange(call.blocks, device=q.device) if call.image is None else call.image.long()
    visible = q.new_ones(1, 1, 1, 1, dtype=torch.bool)
    if call.mask is not None:
        visible = call.mask[image][:, None, None]
    k, v = kv[image].permute(2, 0, 3, 1, 4)
    keep = None
    if call.drop.philox is not None:
        sizes = (call.blocks, Q, H, S)
        keep = attention_reference.cross_attention_keep(*sizes, call.drop.philox, call.drop.p)
    out, lse = _plain_attend(
        q.expand(call.blocks, -1, -1, -1).transpose(1, 2), k, v, visible, keep, call.drop.p
    )
    return [out.transpose(1, 2), lse.transpose(1, 2)]


def attention_problem(kind: str, device: torch.device) -> Problem:
    """The problem of a self- or cross-attention kind."""
    return cross_problem(kind, device) if "index" in read_kind(kind) else self_problem(kind, device)


# itc_loss


@dataclass(frozen=True)
class Contrast:
    """A batch of pairs.

    Attributes:
        ids: `[b]`, pairs with the same id are positives of each other; None: all ids differ.
        philox: Seed of the negatives.
        budget: Most bytes of similarities that may be saved.
    """

    ids: Tensor | None
    philox: Tensor
    budget: int

    def positive(self, b: int) -> Tensor:
        """`[b, b]` bool."""
        ids = torch.arange(b, device=self.philox.device) if self.ids is None else self.ids
        return ids[:, None] == ids[None, :]


def itc_problem(kind: str, device: torch.device) -> Problem:
    """One tile of pairs plus one pair, with similarities saved and recomputed."""
    given = read_kind(kind)
    dtype, D, Q = DTYPES[given["dtype"]], int(given["width"]), int(given["queries"])

    def case(name: str, b: int, budget: int, timed: bool = False) -> Case:
        ids = torch.arange(b, device=device) // 2 if given["ids"] == "1" else None
        call = Contrast(ids, philox_state(3, 0, device), budget)
        return Case(
            f"{b} pairs, {name}",
            _features(b, Q, D, dtype, device),
            lambda impl: partial(_itc, impl, call, timed),
            partial(_plain_itc, call, dtype),
            partial(_plain_itc, call, torch.float64),
            _ITC_OUTPUTS[:1] if timed else _ITC_OUTPUTS,
            ITC_ROUNDING,
        )

    b = 17 if _small(device) else 129
    cases = [case("similarities kept", b, 2**30), case("similarities computed again", b, 0)]
    if _small(device):
        return Problem(cases)
    return Problem(cases, case("similarities kept", 1024, 2**30, timed=True))


_ITC_OUTPUTS = ("loss", "lse of images", "lse of texts", "negative texts", "negative images")


def _features(b: int, Q: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Unit vectors, each text near one query of its image; a temperature exact in every dtype."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(b, Q, D, generator=generator), dim=-1)
    own = image[torch.arange(b), torch.arange(b) % Q]
    text = torch.randn(b, D, generator=generator) / D**0.5 + 0.5 * own
    temp = torch.tensor(0.0703125)
    features = [image.to(device, dtype), F.normalize(text, dim=-1).to(device, dtype)]
    return [x.requires_grad_() for x in (*features, temp.to(device))]


def _itc(impl: str, call: Contrast, timed: bool, given: Sequence[Tensor]) -> list[Tensor]:
    image, text, temp = given
    found = itc_loss(
        image,
        text,
        temp,
        image_ids=call.ids,
        philox=call.philox,
        save_budget_bytes=call.budget,
        impl=impl,
    )
    if timed:
        return [found.loss]
    chosen = (found.negative_text, found.negative_image)
    return [
        found.loss,
        found.lse_i2t,
        found.lse_t2i,
        *_worth(call, given, chosen),
    ]


def _plain_itc(call: Contrast, dtype: torch.dtype, given: Sequence[Tensor]) -> list[Tensor]:
    """LAVIS's formula in a given dtype, with autograd; gathered features carry no gradient."""
    image, text, temp = given
    b, smoothing = len(image), 0.1
    temp = temp.to(dtype)
    positive = call.positive(b)
    target = (1 - smoothing) * positive.to(dtype) / positive.sum(1, keepdim=True) + smoothing / b
    i2t = torch.einsum("iqd,jd->ijq", image, text.detach()).amax(-1) / temp
    t2i = torch.einsum("jd,iqd->jiq", text, image.detach()).amax(-1) / temp
    loss = -(target * (i2t.log_softmax(1) + t2i.log_softmax(1))).sum(1).mean() / 2
    wide = torch.promote_types(dtype, torch.float32)
    lse = [x.detach().logsumexp(1).to(wide) for x in (i2t, t2i)]
    noises = noise.pair_noise(call.philox, (0, b), (0, b), wide)
    chosen = [
        (x.detach().to(wide) + n).masked_fill(positive, -torch.inf).argmax(1)
        for x, n in zip((i2t, t2i), (noises[0], noises[1].T), strict=True)
    ]
    return [loss.to(wide), *lse, *_worth(call, given, chosen)]


def _worth(call: Contrast, given: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[Tensor]:
    """Scores, similarity plus Gumbel noise, of the sampled negatives; a row samples its argmax.

    The reference's negatives score highest; an invalid index or a positive scores -inf. Computed
    in fp64 from the unrounded features and returned in fp32, so an fp32 rounding is tolerated.
    """
    image, text, temp = (x.detach().double() for x in given)
    b = len(image)
    x = torch.einsum("iqd,jd->ijq", image, text).amax(-1) / temp
    noises = noise.pair_noise(call.philox, (0, b), (0, b), torch.float64)
    found = []
    for scores, index in ((x + noises[0], chosen[0]), ((x + noises[1]).T, chosen[1])):
        open_to = scores.masked_fill(call.positive(b), -torch.inf)
        worth = open_to.gather(1, index.clamp(min=0)[:, None])[:, 0]
        found.append(worth.masked_fill(index < 0, -torch.inf).float())
    return found
