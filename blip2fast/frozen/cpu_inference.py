"""Vision models on a CPU without gradients: their linear layers, their attention, their batches.

For a pass the functions are replaced that PyTorch computes slowly on AMD's processors, whichever
module calls them (`torch.overrides.TorchFunctionMode`). Modules are called as ever, so hooks,
adapters, parametrisations and quantised weights have their effect, and a model is not changed.

* `F.linear` in fp32 is oneDNN's product, twice as quick as MKL's on the EPYC where it was timed. In
  bf16 oneDNN computes it anyway; here it adds the bias itself, with the same result.
* `F.scaled_dot_product_attention` in bf16 is products with a softmax between them, in 60 % of
  PyTorch's time. The logits stay in fp32, as there.
* Large batches go through the model in parts whose activations fit the cache.

On other vendors' processors nobody has timed this, and nothing is replaced (`ops/linear.py`, where
`BLIP2FAST_LINEAR` overrules the vendor). Weights that oneDNN has reordered beforehand would save
another 4 to 8 % and take as much memory again, 4 GB for ViT-g in fp32: not done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blip2fast.ops import linear as onednn_linear
from blip2fast.ops.tracing import has_values

# A smaller weight is left to PyTorch: its product takes a few dozen microseconds.
_WORTH_WEIGHT = 1 << 16
# Attention from this many logits of a head; so many weights are held at once for each thread.
_WORTH_LOGITS = 1 << 14
_HELD_LOGITS = 1 << 21
# PyTorch's attention gives each thread heads of its own; here threads meet after each step, which
# with many of them costs more than it saves. One thread was timed.
_MOST_THREADS = 4
# Elements of the token matrix that a part of a batch has for each thread: 5 images of ViT-g, 7 of
# ViT-L. Against that parts of 1 or 2 images take 5 to 8 % more (a thread, fp32 and bf16), all 16 at
# once up to 10 %.
_PART = 1 << 21


def tokens_of(
    model: Callable[..., Any], pixels: Tensor, more: dict[str, Tensor], count: int, width: int
) -> Tensor:
    """`model(pixels, **more).last_hidden_state`, as quickly as this machine can.

    Args:
        model: A vision model.
        pixels: Its images, `[B, ...]`.
        more: Other arguments, each `[B, ...]`.
        count: S; 0: not known, so all images at once.
        width: E; narrow models are PyTorch's alone.

    Returns:
        `[B, S, E]`.
    """
    if not (applies(pixels) and _is_worth(width * width)):
        tokens: Tensor = model(pixels, **more).last_hidden_state
        return tokens
    size = len(pixels)
    if count and not (isinstance(model, nn.Module) and has_hooks(model)):
        size = max(1, _PART * torch.get_num_threads() // (count * width))
    split = {name: value.split(size) for name, value in more.items()}
    with _Quicker():
        parts = [
            model(part, **{name: values[n] for name, values in split.items()}).last_hidden_state
            for n, part in enumerate(pixels.split(size))
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def applies(x: Tensor) -> bool:
    """Whether a pass is computed this way: fp32 or bf16, on an AMD CPU, without gradients."""
    return (
        not torch.is_grad_enabled()
        and x.dtype in (torch.float32, torch.bfloat16)
        and has_values(x)
        and onednn_linear.is_chosen()
    )


def has_hooks(model: nn.Module) -> bool:
    """Whether a module has forward hooks, which see a batch as it is."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def takes_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes `F.linear(x, weight, bias)`, or without a reason PyTorch."""
    return (
        not torch.is_grad_enabled()
        and isinstance(weight, Tensor)
        and _is_worth(weight.numel())
        and x.ndim > 1
        and x.dtype in _dtypes()
        and onednn_linear.is_supported(x, weight, x.dtype)
        and onednn_linear.is_chosen()
        and (bias is None or _is_bias(bias, weight))
    )


def _is_worth(weight: int) -> bool:
    return weight >= _WORTH_WEIGHT or onednn_linear.is_asked_for()


def _dtypes() -> Iterable[torch.dtype]:
    # the check costs a look at the processor's flags, which PyTorch keeps
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)


def _is_bias(bias: Tensor, weight: Tensor) -> bool:
    return (
        (type(bias) is nn.Parameter or type(bias) is Tensor)
        and bias.dtype is weight.dtype
        and bias.shape == weight.shape[:1]
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if takes_product(x, weight, bias):
        return onednn_linear.onednn_product(x, weight, bias)
    return F.linear(x, weight, bias)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    plain = attn_mask is None and dropout_p == 0.0 and not is_causal and not enable_gqa
    if plain and _takes_attention(query, key, value):
        return bf16_attention(query, key, value, scale)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _takes_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and all(
            type(x) is Tensor and x.dtype is torch.bfloat16 and x.ndim == 4
            for x in (query, key, value)
        )
        and query.shape[:2] == key.shape[:2]
        and key.shape[:3] == value.shape[:3]
        and query.shape[2] * key.shape[2] >= _WORTH_LOGITS
        and torch.get_num_threads() <= _MOST_THREADS
        and has_values(query)
        and onednn_linear.is_supported(query, key, torch.bfloat16)
        and onednn_linear.is_chosen()
    )


def bf16_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """`F.scaled_dot_product_attention`, some heads at once: logits in fp32; no derivatives.

    Args:
        query: `[B, H, L, D]`, bf16 on a CPU.
        key: `[B, H, S, D]`.
        value: as key.
        scale: Of the logits; None: `1 / sqrt(D)`.

    Returns:
        `[B, H, L, D]`.
    """
    B, H, L, D = query.shape
    S = key.shape[2]
    scale = D**-0.5 if scale is None else scale
    queries = (query.float() * scale).flatten(0, 1).contiguous()
    keys = key.float().flatten(0, 1).contiguous()
    values = value.flatten(0, 1)
    held = max(1, min(B * H, _HELD_LOGITS * torch.get_num_threads() // (L * S)))
    weights = query.new_empty(held, L, S)
    parts = []
    for first in range(0, B * H, held):
        heads = slice(first, first + held)
        last = weights[: B * H - first]
        _softmax_of_products(queries[heads], keys[heads], last)
        parts.append(torch.bmm(last, values[heads]))
    return torch.cat(parts).unflatten(0, (B, H))


def _softmax_of_products(query: Tensor, key: Tensor, weights: Tensor) -> None:
    """Write `softmax(query @ key.T)` of heads into `weights`, which are of less precision."""
    if torch.get_num_threads() > 1:  # which would meet after each small product
        logits = torch.bmm(query, key.transpose(1, 2))
        weights.copy_(torch.softmax(logits, -1, out=logits))
        return
    for q, k, rounded in zip(query.unbind(), key.unbind(), weights.unbind(), strict=True):
        # a head's logits stay in the cache until they are weights
        logits = onednn_linear.onednn_product(q, k)
        rounded.copy_(torch.softmax(logits, -1, out=logits))


_QUICKER: dict[Any, Callable[..., Tensor]] = {
    # not `F.linear`, which ZeRO-3 replaces for a whole process
    torch._C._nn.linear: _linear,
    torch._C._nn.scaled_dot_product_attention: _attention,
}


class _Quicker(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _QUICKER.get(func, func)(*args, **(kwargs or {}))
