"""The hot Triton launches at BLIP-2's sizes, and what each may be launched with: for a sweep.

A configuration is the launcher's keyword arguments; "default" has none, so the formula in
`config.py` of the op chooses: whatever is tuned already is ignored, so that sweeps can be compared.
Every case stands for a class of calls that `tune.py` tunes. All are compiled for sm_90 by
`tests/ops/test_kernel_configurations.py`, with dropout and without: none asks for more shared
memory than there is, and few spill registers.

Only the ops and kernels are imported: no model, no transformers. Letters as in `shapes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip2fast.kernels.bias_gelu import backward as gelu_backward
from blip2fast.kernels.bias_gelu import forward as gelu_forward
from blip2fast.kernels.bias_gelu import reference as gelu_reference
from blip2fast.kernels.bias_gelu.config import TileConfig
from blip2fast.kernels.dropout_add_layer_norm import backward as norm_backward
from blip2fast.kernels.dropout_add_layer_norm import forward as norm_forward
from blip2fast.kernels.dropout_add_layer_norm import pytorch as norm_pytorch
from blip2fast.kernels.dropout_add_layer_norm import reference as norm_reference
from blip2fast.kernels.dropout_add_layer_norm.config import RowsConfig
from blip2fast.kernels.itc import backward as itc_backward
from blip2fast.kernels.itc import forward as itc_forward
from blip2fast.kernels.itc import reference as itc_reference
from blip2fast.kernels.itc.config import TritonConfig
from blip2fast.kernels.itc.interface import Options, Pairs, Weights
from blip2fast.kernels.philox import philox_state
from blip2fast.kernels.qformer_attention import reference as attention_reference
from blip2fast.kernels.qformer_attention.backward import self_backward
from blip2fast.kernels.qformer_attention.config import CrossTiles, Tiles
from blip2fast.kernels.qformer_attention.cross_backward import cross_backward
from blip2fast.kernels.qformer_attention.cross_forward import cross_forward
from blip2fast.kernels.qformer_attention.forward import self_forward
from blip2fast.kernels.qformer_attention.layout import AttentionLayout, KVIndex, MaskKind
from blip2fast.kernels.tuned import formula_alone

Device = torch.device | str
Inputs = dict[str, Any]
Configuration = Mapping[str, Any]
Outputs = tuple[Tensor, ...]
UNI, BI, CAUSAL = MaskKind.UNIMODAL, MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL


@dataclass(frozen=True)
class Case:
    """One launch to sweep.

    Attributes:
        name: Of the op, its direction and its size.
        make: `(device, dropout_p) -> inputs`: new random ones, from the default generator. Those
            of a backward pass have what the forward pass gave. Ops without dropout ignore it.
        run: `(inputs, configuration) -> outputs`: the kernels once, nothing checked.
        configurations: By name, "default" first.
        bytes: Every input read once, every output written once.
        flops: Multiplications and additions of matrix products, of what the masks let through.
        tunes: Folder of the op in `kernels/`, and the class of calls there.
        reference: `inputs -> outputs` in fp32 PyTorch, of which there may be fewer: the first ones
            of `run`. None where it would not fit: the default's outputs are the comparison.
    """

    name: str
    make: Callable[[Device, float], Inputs]
    run: Callable[[Inputs, Configuration], Outputs]
    configurations: Mapping[str, Configuration]
    bytes: int
    flops: int
    tunes: tuple[str, str]
    reference: Callable[[Inputs], Outputs] | None = None


def launch(launcher: Callable[..., Any], inputs: Inputs, configuration: Configuration) -> Outputs:
    """A launcher's outputs, as a tuple where it is one."""
    with formula_alone():
        outputs = launcher(**inputs, **configuration)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def random(*shape: int, device: Device, dtype: torch.dtype) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, device=device, dtype=dtype)


def dropout(device: Device, dropout_p: float) -> Inputs:
    """`dropout_p` and `philox`, none without dropout."""
    philox = philox_state(1, 2, device) if dropout_p > 0 else None
    return {"dropout_p": dropout_p, "philox": philox}


# self-attention


@dataclass(frozen=True)
class SelfSize:
    """N blocks of Q queries, and with each a text of every kind; `lengths` of one kind's."""

    kinds: tuple[MaskKind, ...]
    lengths: tuple[int, ...]
    queries: int = 32
    heads: int = 12
    width: int = 64
    dtype: torch.dtype = torch.bfloat16

    def layout(self, device: Device) -> AttentionLayout:
        """Who sees whom."""
        N = len(self.lengths)
        kinds = [kind for kind in self.kinds for _ in range(N)]
        blocks = list(range(N)) * len(self.kinds)
        lengths = torch.tensor(self.lengths * len(self.kinds))
        return AttentionLayout.build(N, self.queries, lengths, kinds, blocks, device=device)

    def forward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `self_forward`."""
        layout = self.layout(device)
        shape = (layout.num_rows, 3, self.heads, self.width)
        qkv = random(*shape, device=device, dtype=self.dtype)
        scale = self.width**-0.5
        return {"qkv": qkv, "layout": layout, "scale": scale, **dropout(device, dropout_p)}

    def backward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `self_backward`."""
        inputs = self.forward_inputs(device, dropout_p)
        out, lse = self_forward(**inputs)
        dout = random(*out.shape, device=device, dtype=self.dtype)
        return {"dout": dout, "out": out, "lse": lse, **inputs}

    def work(self) -> tuple[int, int]:
        """Bytes of one `[R, H, D]`; multiplications and additions of one product."""
        Q = self.queries
        rows, pairs = len(self.lengths) * Q, len(self.lengths) * Q * Q
        for kind in self.kinds:
            for T in self.lengths:
                rows += T
                if kind is UNI:
                    pairs += T * T
                else:
                    pairs += T * Q + (T * T + Q * T if kind is BI else T * (T + 1) // 2)
        width = self.heads * self.width
        return rows * width * self.dtype.itemsize, 2 * pairs * width


def self_cases(name: str, size: SelfSize) -> list[Case]:
    """Forward and backward."""
    row_bytes, product = size.work()
    causal = CAUSAL in size.kinds
    texts = "causal" if causal else "no_causal"
    return [
        Case(
            f"self_forward_{name}",
            size.forward_inputs,
            partial(launch, self_forward),
            _self_forward_configurations(causal),
            4 * row_bytes,
            2 * product,
            ("qformer_attention", f"self_forward/{texts}"),
        ),
        Case(
            f"self_backward_{name}",
            size.backward_inputs,
            partial(launch, self_backward),
            _self_backward_configurations(causal),
            8 * row_bytes,
            5 * product,
            ("qformer_attention", f"self_backward/{texts}"),
        ),
    ]


def _tiles(
    block_m: int,
    warps: int,
    stages: int,
    heads: int = 1,
    reader_m: int = 32,
    max_registers: int | None = None,
    joined: bool = False,
) -> Tiles:
    """All keys in one tile."""
    return Tiles(block_m, 64, 64, heads, True, warps, stages, reader_m, max_registers, joined)


def _self_forward_configurations(causal: bool) -> dict[str, Configuration]:
    if causal:
        tiles = {
            "m32_w4": _tiles(32, 4, 2),
            "m16_w1": _tiles(16, 1, 2),
            "m16_w2": _tiles(16, 2, 2),
            "m64_w4_joined": _tiles(64, 4, 2, joined=True),
            "m64_w4_joined_2_heads": _tiles(64, 4, 2, heads=2, joined=True),
        }
    else:
        tiles = {
            "m64_w2": _tiles(64, 2, 2),
            "m64_w8": _tiles(64, 8, 2),
            "m64_w4_2_heads": _tiles(64, 4, 2, heads=2),
            "m32_w2": _tiles(32, 2, 2),
            "m32_w4": _tiles(32, 4, 2),
        }
    return {"default": {}} | {x: {"tiles": tiles[x]} for x in tiles}


def _self_backward_configurations(causal: bool) -> dict[str, Configuration]:
    if causal:
        tiles = {
            "m32_w8_readers16": _tiles(32, 8, 1, reader_m=16),
            "m32_w4_readers16": _tiles(32, 4, 1, reader_m=16),
            "m64_w4": _tiles(64, 4, 1),
            "m64_w4_readers16": _tiles(64, 4, 1, reader_m=16),
            "m64_w4_joined": _tiles(64, 4, 1, reader_m=16, joined=True),
            "m64_w4_r168_joined": _tiles(64, 4, 1, reader_m=16, max_registers=168, joined=True),
        }
    else:
        tiles = {
            "m64_w8": _tiles(64, 8, 1),
            "m64_w4": _tiles(64, 4, 1),
            "m32_w8": _tiles(32, 8, 1),
            "m32_w4": _tiles(32, 4, 1),
        }
    return {"default": {}} | {x: {"tiles": tiles[x]} for x in tiles}


# cross-attention


@dataclass(frozen=True)
class CrossSize:
    """`images` images, each read `uses` times on average; keys are one layer's slice.

    With `uses` of 3 an image is read by its own two pairs and by as many more as drew it as a hard
    negative: 2, 3, 4, ... times.
    """

    images: int
    uses: int = 1
    queries: int = 32
    tokens: int = 257
    layers: int = 6
    heads: int = 12
    width: int = 64
    dtype: torch.dtype = torch.bfloat16

    def index(self, device: Device) -> KVIndex | None:
        """The image of each block; the same at each call."""
        if self.uses == 1:
            return None
        own = torch.arange(self.images)
        drawn = torch.randint(self.images, own.shape, generator=torch.Generator().manual_seed(0))
        index = torch.cat([own, drawn, *[own] * (self.uses - 2)])
        return KVIndex.build(index.to(device), self.images)

    def forward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `cross_forward`."""
        N = self.images * self.uses
        shape = (self.images, self.tokens, self.layers, 2, self.heads, self.width)
        return {
            "q": random(N, self.queries, self.heads, self.width, device=device, dtype=self.dtype),
            "kv": random(*shape, device=device, dtype=self.dtype)[:, :, self.layers // 2],
            "index": self.index(device),
            "key_mask": None,
            "num_blocks": N,
            "scale": self.width**-0.5,
            **dropout(device, dropout_p),
        }

    def backward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `cross_backward`."""
        inputs = self.forward_inputs(device, dropout_p)
        out, lse = cross_forward(**inputs)
        del inputs["num_blocks"]
        dout = random(*out.shape, device=device, dtype=self.dtype)
        return {"dout": dout, "out": out, "lse": lse, **inputs}

    def work(self) -> tuple[int, int, int]:
        """Bytes of q, bytes of keys and values; multiplications and additions of one product."""
        width = self.heads * self.width
        rows, tokens = self.images * self.uses * self.queries, self.images * self.tokens
        itemsize = self.dtype.itemsize
        products = 2 * rows * self.tokens * width
        return rows * width * itemsize, 2 * tokens * width * itemsize, products


def cross_cases(name: str, size: CrossSize) -> list[Case]:
    """Forward and backward."""
    queries, images, product = size.work()
    few = size.uses == 1
    uses = "one_use" if few else "several_uses"
    return [
        Case(
            f"cross_forward_{name}",
            size.forward_inputs,
            partial(launch, cross_forward),
            _cross_forward_configurations() if few else _cross_forward_configurations_of_uses(),
            2 * queries + images,
            2 * product,
            ("qformer_attention", f"cross_forward/{uses}"),
            _cross_forward_reference,
        ),
        Case(
            f"cross_backward_{name}",
            size.backward_inputs,
            partial(launch, cross_backward),
            _cross_backward_configurations() if few else _cross_backward_configurations_of_uses(),
            4 * queries + 2 * images,
            5 * product,
            ("qformer_attention", f"cross_backward/{uses}"),
            _cross_backward_reference,
        ),
    ]


def _cross_tiles(
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    interleaved: bool = False,
    max_registers: int | None = None,
    uses: int = 0,
) -> CrossTiles:
    """For tokens of which one is left over by full tiles, as of 257."""
    return CrossTiles(
        *(block_m, block_n, 64, 1, False, warps, stages),
        max_registers=max_registers,
        full=True,
        tail=16,
        interleaved=interleaved,
        uses=uses,
    )


def _cross_forward_configurations() -> dict[str, Configuration]:
    tiles = {
        "m32_n64_w2_s3": _cross_tiles(32, 64, 2, 3),
        "m32_n64_w2_s3_r200": _cross_tiles(32, 64, 2, 3, max_registers=200),
        "m32_n64_w2_s4": _cross_tiles(32, 64, 2, 4),
        "m32_n64_w4_s2_r168": _cross_tiles(32, 64, 4, 2, max_registers=168),
        "m32_n32_w2_s4": _cross_tiles(32, 32, 2, 4),
        "m32_n32_w2_s4_r168": _cross_tiles(32, 32, 2, 4, max_registers=168),
        # half of the rows are none, but products of 64 rows take fewer registers
        "m64_n64_w4_s2_r168": _cross_tiles(64, 64, 4, 2, max_registers=168),
    }
    return {"default": {}} | {name: {"tiles": tiles[name]} for name in tiles}


def _cross_forward_configurations_of_uses() -> dict[str, Configuration]:
    tiles = {
        "m64_n64_w4_s2_interleaved_r168": _cross_tiles(64, 64, 4, 2, True, 168),
        "m64_n64_w4_s3_interleaved": _cross_tiles(64, 64, 4, 3, True),
        "m64_n32_w4_s3_interleaved": _cross_tiles(64, 32, 4, 3, True),
        "m64_n32_w4_s3_interleaved_r96": _cross_tiles(64, 32, 4, 3, True, 96),
        "m64_n32_w4_s3": _cross_tiles(64, 32, 4, 3),
        "m64_n32_w4_s4_interleaved": _cross_tiles(64, 32, 4, 4, True),
    }
    return {"default": {}} | {name: {"tiles": tiles[name]} for name in tiles}


def _cross_backward_configurations() -> dict[str, Configuration]:
    tiles = {
        "m32_n64_w4_s1": _cross_tiles(32, 64, 4, 1),
        "m32_n64_w4_s2": _cross_tiles(32, 64, 4, 2),
        "m32_n32_w4_s2": _cross_tiles(32, 32, 4, 2),
        "m32_n16_w2_s2": _cross_tiles(32, 16, 2, 2),
        "uses1_n64_w4_s1": _cross_tiles(32, 64, 4, 1, uses=1),
        "uses1_n64_w4_s2": _cross_tiles(32, 64, 4, 2, uses=1),
        "uses1_n64_w4_s3": _cross_tiles(32, 64, 4, 3, uses=1),
    }
    return {"default": {}} | {
        name: {"tiles": (tiles[name],) if tiles[name].uses else (tiles[name],) * 2}
        for name in tiles
    }


def _cross_backward_configurations_of_uses() -> dict[str, Configuration]:
    """Owners of images from the fewest rows to the most, then chunks of images with more."""
    two_uses, chunks = _cross_tiles(64, 32, 4, 1), _cross_tiles(64, 32, 4, 1, True)
    wide = _cross_tiles(128, 64, 8, 2)
    tiles = {
        "m64_n32_w4_s1": (two_uses, chunks),
        "m64_n32_m128_n64": (two_uses, wide, chunks),
        "uses1_n64_w4_s2": (_cross_tiles(32, 64, 4, 2, uses=1),),
        "uses2_n64_w4_s2": (_cross_tiles(32, 64, 4, 2, uses=2),),
        "uses3_n64_w4_s2": (_cross_tiles(32, 64, 4, 2, uses=3),),
    }
    return {"default": {}} | {name: {"tiles": tiles[name]} for name in tiles}


def _cross_forward_reference(inputs: Inputs) -> Outputs:
    index: KVIndex | None = inputs["index"]
    return attention_reference.qformer_cross_attention(
        inputs["q"].float(),
        inputs["kv"],
        None if index is None else index.index,
        inputs["key_mask"],
        inputs["scale"],
        inputs["dropout_p"],
        inputs["philox"],
    )


def _cross_backward_reference(inputs: Inputs) -> Outputs:
    leaves = {name: inputs[name].float().requires_grad_() for name in ("q", "kv")}
    with torch.enable_grad():
        out, _ = _cross_forward_reference(inputs | leaves)
    return torch.autograd.grad(out, (leaves["q"], leaves["kv"]), inputs["dout"].float())


# dropout, residual and LayerNorm


@dataclass(frozen=True)
class RowsSize:
    """R rows of C: a product in 16 bits beside a residual in fp32, and a copy in 16 bits."""

    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    def norm_forward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `dropout_add_layer_norm`'s forward pass."""
        R, C = self.rows, self.width
        weight, bias, x_bias = (random(C, device=device, dtype=torch.float32) for _ in range(3))
        return {
            "x": random(R, C, device=device, dtype=self.dtype),
            "residual": random(R, C, device=device, dtype=torch.float32),
            "weight": weight,
            "bias": bias,
            "x_bias": x_bias,
            "eps": 1e-12,
            "out_dtype": torch.float32,
            "copy_dtype": self.dtype,
            "save": True,
            **dropout(device, dropout_p),
        }

    def norm_backward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of its backward pass."""
        inputs = self.norm_forward_inputs(device, dropout_p)
        out, copy, total, mean, rstd = norm_forward.forward(**inputs)
        return {
            "dout": random(*out.shape, device=device, dtype=out.dtype),
            "dcopy": random(*copy.shape, device=device, dtype=copy.dtype),
            "total": total,
            "mean": mean,
            "rstd": rstd,
            "weight": inputs["weight"],
            "residual_dtype": torch.float32,
            "x_dtype": self.dtype,
            "apart": True,
            "needs_parameters": True,
            "needs_x_bias": True,
            **dropout(device, dropout_p),
        }

    def gelu_forward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `bias_gelu`'s forward pass."""
        x = random(self.rows, self.width, device=device, dtype=self.dtype)
        return {"x": x, "bias": random(self.width, device=device, dtype=torch.float32)}

    def gelu_backward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of its backward pass."""
        inputs = self.gelu_forward_inputs(device, dropout_p)
        dout = random(self.rows, self.width, device=device, dtype=self.dtype)
        return {"dout": dout, "needs_bias": True, **inputs}


def norm_cases(name: str, size: RowsSize) -> list[Case]:
    """Forward and backward of dropout, residual and LayerNorm."""
    elements = size.rows * size.width
    # x, residual, output, its copy, the sum; likewise their gradients
    moved = elements * (3 * 4 + 2 * size.dtype.itemsize)
    return [
        Case(
            f"layer_norm_forward_{name}",
            size.norm_forward_inputs,
            partial(launch, norm_forward.forward),
            _norm_configurations(size.width, backward=False),
            moved,
            0,
            ("dropout_add_layer_norm", "forward/width_1024"),
            _norm_forward_reference,
        ),
        Case(
            f"layer_norm_backward_{name}",
            size.norm_backward_inputs,
            partial(launch, norm_backward.backward),
            _norm_configurations(size.width, backward=True),
            moved,
            0,
            ("dropout_add_layer_norm", "backward/width_1024"),
            _norm_backward_reference,
        ),
    ]


def _norm_configurations(width: int, backward: bool) -> dict[str, Configuration]:
    block_c = 1 << (width - 1).bit_length()
    # rows, warps, and as many programs of a backward pass as fit 132 processors, or some more
    forward_sizes = [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 16), (8, 8)]
    backward_sizes = [
        (1, 4, 528),
        (1, 4, 792),
        (1, 4, 1584),
        (1, 8, 660),
        (1, 2, 1056),
        (2, 8, 264),
        (2, 4, 396),
        (4, 8, 132),
    ]
    found: dict[str, Configuration] = {"default": {}}
    for rows, warps, *programs in backward_sizes if backward else forward_sizes:
        name = "_".join([f"r{rows}", f"w{warps}", *(f"p{count}" for count in programs)])
        found[name] = {"config": RowsConfig(rows, block_c, warps, *(programs or [528]))}
    return found


def _norm_forward_reference(inputs: Inputs) -> Outputs:
    names = ("x", "residual", "weight", "bias", "x_bias", "eps", "dropout_p", "philox")
    chosen = {name: inputs[name] for name in names}
    return (norm_reference.dropout_add_layer_norm(**chosen, out_dtype=torch.float32),)


def _norm_backward_reference(inputs: Inputs) -> Outputs:
    # at a probability of 0 everything is kept, whatever the seed
    philox = inputs["philox"]
    if philox is None:
        philox = philox_state(0, 0, inputs["total"].device)
    return norm_pytorch.backward(**inputs | {"philox": philox, "x_dtype": torch.float32})


# bias and GELU


def gelu_cases(name: str, size: RowsSize) -> list[Case]:
    """Forward and backward."""
    moved = size.rows * size.width * size.dtype.itemsize
    return [
        Case(
            f"gelu_forward_{name}",
            size.gelu_forward_inputs,
            partial(launch, gelu_forward.forward),
            _gelu_configurations(backward=False),
            2 * moved,
            0,
            ("bias_gelu", "forward"),
            _gelu_forward_reference,
        ),
        Case(
            f"gelu_backward_{name}",
            size.gelu_backward_inputs,
            partial(launch, gelu_backward.backward),
            _gelu_configurations(backward=True),
            3 * moved,
            0,
            ("bias_gelu", "backward"),
            _gelu_backward_reference,
        ),
    ]


def _gelu_configurations(backward: bool) -> dict[str, Configuration]:
    # rows, columns, warps, programs of a backward pass
    forward_sizes = [
        (4, 256, 4),
        (16, 256, 4),
        (2, 512, 4),
        (4, 512, 4),
        (1, 1024, 4),
        (2, 1024, 4),
        (4, 256, 2),
        (8, 512, 8),
    ]
    backward_sizes = [
        (4, 256, 4, 528),
        (4, 256, 4, 1320),
        (8, 256, 4, 792),
        (2, 512, 4, 1188),
        (4, 512, 4, 660),
        (1, 1024, 4, 1320),
        (4, 256, 2, 1584),
        (16, 256, 8, 264),
    ]
    found: dict[str, Configuration] = {"default": {}}
    for rows, columns, warps, *programs in backward_sizes if backward else forward_sizes:
        name = "_".join([f"r{rows}_f{columns}_w{warps}", *(f"p{count}" for count in programs)])
        found[name] = {"config": TileConfig(rows, columns, warps, *(programs or [528]))}
    return found


def _gelu_forward_reference(inputs: Inputs) -> Outputs:
    return (gelu_reference.bias_gelu(inputs["x"].float(), inputs["bias"]),)


def _gelu_backward_reference(inputs: Inputs) -> Outputs:
    total = inputs["x"].float() + inputs["bias"]
    dx = torch.ops.aten.gelu_backward(inputs["dout"].float(), total)
    return dx, dx.sum(0)


# ITC


@dataclass(frozen=True)
class ITCSize:
    """All pairs of N images of Q queries with N texts, one rank."""

    batch: int
    queries: int = 32
    width: int = 256
    dtype: torch.dtype = torch.bfloat16

    def forward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `sweep`: negatives are drawn, similarities kept."""
        N, Q, D = self.batch, self.queries, self.width
        image, text = (random(*s, device=device, dtype=torch.float32) for s in ((N, Q, D), (N, D)))
        normalize = torch.nn.functional.normalize
        return {
            "image": normalize(image, dim=-1).to(self.dtype),
            "text": normalize(text, dim=-1).to(self.dtype),
            "temp": torch.tensor(0.07, device=device),
            "pairs": Pairs(0, None, None),
            "options": Options(philox_state(1, 2, device), save=True),
        }

    def backward_inputs(self, device: Device, dropout_p: float) -> Inputs:
        """Of `sweep_grad`, with the weights of a loss with label smoothing."""
        inputs = self.forward_inputs(device, dropout_p)
        swept = itc_forward.sweep(**inputs)
        del inputs["options"]
        weight = torch.ones(3, self.batch, device=device) / (2 * self.batch)
        weight[1] *= -0.1 / self.batch
        weight[2] *= -0.9
        sides = Weights(swept.rows[0], weight), Weights(swept.columns[0], weight)
        return inputs | {"sides": sides, "local": True, "saved": (swept.sim, swept.arg)}


def itc_cases(name: str, size: ITCSize) -> list[Case]:
    """Forward and backward."""
    N, Q, D = size.batch, size.queries, size.width
    features = (N * Q + N) * D * size.dtype.itemsize
    kept, product = 5 * N * N, 2 * N * N * Q * D
    block_q = 1 << (Q - 1).bit_length()
    return [
        Case(
            f"itc_forward_{name}",
            size.forward_inputs,
            partial(launch, itc_forward.sweep),
            _itc_forward_configurations(block_q, D),
            features + kept,
            product,
            ("itc", "forward/q32_d256"),
            lambda inputs: itc_reference.sweep(**inputs)[:2],
        ),
        Case(
            f"itc_backward_{name}",
            size.backward_inputs,
            partial(launch, itc_backward.sweep_grad),
            _itc_backward_configurations(block_q, D),
            2 * features + kept,
            # dense products with the queries that were best
            2 * product,
            ("itc", "backward/q32_d256"),
            lambda inputs: itc_reference.sweep_grad(**inputs),
        ),
    ]


def _itc_forward_configurations(block_q: int, D: int) -> dict[str, Configuration]:
    # texts, images, width of a product, warps, stages, programs
    sizes = [
        (128, 4, D, 8, 2, 132),
        (128, 4, D, 8, 2, 528),
        (64, 4, D, 4, 2, 264),
        (64, 4, D, 8, 2, 264),
        (128, 2, D, 8, 2, 264),
        (64, 2, D, 4, 2, 528),
        (128, 4, 64, 8, 3, 264),
        (128, 4, 128, 8, 2, 264),
    ]
    found: dict[str, Configuration] = {"default": {}}
    for texts, images, width, warps, stages, programs in sizes:
        config = TritonConfig(texts, images, block_q, width, 0, warps, stages, programs)
        found[f"t{texts}_i{images}_d{width}_w{warps}_s{stages}_p{programs}"] = {"config": config}
    return found


def _itc_backward_configurations(block_q: int, D: int) -> dict[str, Configuration]:
    def config(texts: int, images: int, out: int, stages: int, programs: int = 264) -> TritonConfig:
        return TritonConfig(texts, images, block_q, min(D, 64), min(D, out), 8, stages, programs)

    half, whole, tall = config(64, 4, 128, 1), config(64, 4, 256, 1), config(128, 2, 256, 1)
    return {
        "default": {},
        "d128": {"config": half},
        "d128_p528": {"config": half, "text_config": config(64, 4, 128, 1, 528)},
        "images_t64_texts_t64_d256": {"config": whole},
        "images_t128_texts_t64": {"config": tall, "text_config": whole},
        "images_t128_texts_t128": {"config": tall},
        "images_d128_texts_d256": {"config": half, "text_config": whole},
        "images_t128_texts_d128": {"config": tall, "text_config": half},
    }


# the two passes of a stage-1 step at B = 256, mean caption 12
_LENGTHS = tuple(2 + 5 * i % 21 for i in range(256))
CASES: list[Case] = [
    *self_cases("64x64_b256", SelfSize((BI,), (32,) * 256)),
    *self_cases("multimodal_b256", SelfSize((UNI, CAUSAL), _LENGTHS)),
    *cross_cases("32x257_b256", CrossSize(256)),
    *cross_cases("32x257_n768_b256", CrossSize(256, uses=3)),
    *norm_cases("r33792_c768", RowsSize(33_792, 768)),
    *gelu_cases("r33792_f3072", RowsSize(33_792, 3072)),
    *itc_cases("n1680", ITCSize(1680)),
    *itc_cases("n4096", ITCSize(4096)),
]
