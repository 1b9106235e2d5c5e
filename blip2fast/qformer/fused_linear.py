"""Several linear layers fused into one GEMM; weights are cast to the compute dtype once per step.

Only plain `nn.Linear` modules can be fused (`plain.py`); any other module is called.

Shapes: C hidden width, E image token width, H heads, D head width, B images, S image tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2fast.ops.linear import linear
from blip2fast.qformer.plain import describe_called, input_dtype, is_plain, is_plain_norm

# how `ln_vision` is applied when computing image keys and values
FOLDED = "ln_vision folded into the keys' and values' weights"
TRAINED = "ln_vision not folded: the image tokens need a gradient"
CALLED = "ln_vision not folded: layers of keys or values are called"
NORM_CALLED = "ln_vision not folded: it is called"


def describe_fusion(root: nn.Module, image_form: str) -> str:
    """Which layers are fused, which are called, and the last `image_form`; for a `repr`.

    Args:
        root: The Q-Former.
        image_form: One of the constants above, or empty before the first pass.
    """
    called = describe_called(root)
    how = f"called, not fused: {called}" if called else "linear layers fused"
    return f"{how}, last step: {image_form or 'none yet'}"


class _ConcatCast(torch.autograd.Function):
    """Concatenate along the first dimension and cast, in one copy."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.sizes = [len(part) for part in parts]
        ctx.dtypes = [part.dtype for part in parts]
        joined = parts[0].new_empty((sum(ctx.sizes), *parts[0].shape[1:]), dtype=dtype)
        for piece, part in zip(joined.split(ctx.sizes), parts, strict=True):
            piece.copy_(part)
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pieces = zip(grad.split(ctx.sizes), ctx.dtypes, strict=True)
        return (None, *(piece.to(dtype) for piece, dtype in pieces))


def concat_cast(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """`torch.cat(parts).to(dtype)`, in one copy.

    Args:
        parts: Tensors `[n_i, ...]`.
        dtype: Of the result.

    Returns:
        `[sum n_i, ...]`.
    """
    joined: Tensor = _ConcatCast.apply(dtype, *parts)
    return joined


class Linear:
    """One linear layer in the compute dtype; a module that is not plain is called.

    Args:
        module: The layer.
        dtype: The compute dtype.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if is_plain(module):
            self.weight = module.weight.to(dtype)
            self.bias = None if module.bias is None else module.bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, bias included."""
        if self.weight is None:
            return self.module(x).to(x.dtype)
        return linear(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output without bias, and the bias for the next op; None if already added."""
        if self.weight is None:
            return self(x), None
        return linear(x, self.weight), self.bias


class FusedLinear:
    """Linear layers that share an input, fused into one GEMM if all of them are plain.

    Args:
        modules: The layers, of equal widths.
        dtype: The compute dtype.
    """

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype) -> None:
        self.modules = modules
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        plain = [module for module in modules if is_plain(module)]
        if len(plain) == len(modules):
            self.weight = concat_cast([module.weight for module in plain], dtype)
            if any(module.bias is not None for module in plain):
                self.bias = concat_cast([_bias(module) for module in plain], dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., len(modules), out]`."""
        if self.weight is None:
            return torch.stack([module(x).to(x.dtype) for module in self.modules], dim=-2)
        return linear(x, self.weight, self.bias).unflatten(-1, (len(self.modules), -1))


def image_form(
    image_embeds: Tensor, ln_vision: nn.Module, projections: list[tuple[nn.Module, nn.Module]]
) -> str:
    """One of the constants above: the path `image_keys_values` takes for these arguments."""
    if not all(is_plain(module) for pair in projections for module in pair):
        return CALLED
    if not is_plain_norm(ln_vision):
        return NORM_CALLED
    return TRAINED if image_embeds.requires_grad else FOLDED


def image_keys_values(
    image_embeds: Tensor,
    ln_vision: nn.Module,
    projections: list[tuple[nn.Module, nn.Module]],
    heads: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Keys and values of every cross-attention layer, computed once for all uses of an image.

    One product for all layers. Where the image tokens need no gradient, `ln_vision` is folded into
    the weights: with x the normalised tokens before gamma and beta,
    `W (gamma x + beta) + b = (W diag(gamma)) x + (W beta + b)`, so that gamma and beta get their
    gradients through the weights and no gradient of the image tokens is ever computed.

    Args:
        image_embeds: `[B, S, E]`, the encoder's tokens before `ln_vision`.
        ln_vision: Normalises them.
        projections: The key and value layers of each cross-attention.
        heads: H.
        dtype: The compute dtype.

    Returns:
        `[B, S, 2, H, D]` per layer; views of one tensor if the layers were fused.
    """
    modules = [module for pair in projections for module in pair]
    split = (len(projections), 2, heads, -1)
    plain = [module for module in modules if is_plain(module)]
    if len(plain) < len(modules):
        tokens = ln_vision(image_embeds.to(input_dtype(ln_vision, image_embeds))).to(dtype)
        pairs = (torch.stack([key(tokens), value(tokens)], dim=2) for key, value in projections)
        return [pair.to(dtype).unflatten(-1, (heads, -1)) for pair in pairs]
    weight = torch.cat([module.weight for module in plain])
    bias = torch.cat([_bias(module) for module in plain])
    with torch.autocast(image_embeds.device.type, enabled=False):
        if image_embeds.requires_grad or not is_plain_norm(ln_vision):
            tokens = ln_vision(image_embeds.to(input_dtype(ln_vision, image_embeds))).to(dtype)
            merged = linear(tokens, weight.to(dtype), bias.to(dtype))
        else:
            tokens = normalised(image_embeds, ln_vision, dtype)
            folded = (weight * ln_vision.weight).to(dtype)
            wider = torch.promote_types(weight.dtype, ln_vision.bias.dtype)
            shift = torch.mv(weight.to(wider), ln_vision.bias.to(wider)) + bias
            merged = linear(tokens, folded, shift.to(dtype))
    return list(merged.unflatten(-1, split).unbind(2))


def normalised(image_embeds: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """LayerNorm of image tokens without gamma and beta; statistics in fp32."""
    if image_embeds.dtype != dtype:
        image_embeds = image_embeds.to(torch.promote_types(torch.float32, dtype))
    return F.layer_norm(image_embeds, norm.normalized_shape, eps=norm.eps).to(dtype)


def _bias(module: nn.Linear) -> Tensor:
    return module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
