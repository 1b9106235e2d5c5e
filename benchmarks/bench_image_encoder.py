"""`FrozenImageEncoder` against the transformers model that it holds: pixels to tokens, eval.

Both have the same weights; the final norm, which BLIP-2 does not use, is left out of both. In the
cells of int8 ours computes another function, and results have its error beside its time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import Contender, Provider, Work, plain
from shapes import ENCODER_SHAPES, EncoderShape, cells
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionModel, PreTrainedModel

from blip2fast.frozen.image_encoders import FrozenImageEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# relative norm by which tokens may differ: roundings of the blocks in another order
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# of int8 weights and activations from fp32
INT8_ERROR = 0.1


def their_model(shape: EncoderShape, attention: str) -> PreTrainedModel:
    """A vision model with random weights and without its final norm, in fp32."""
    torch.manual_seed(0)
    kind = Blip2VisionModel if isinstance(shape.config, Blip2VisionConfig) else CLIPVisionModel
    model = kind._from_config(copy.deepcopy(shape.config), attn_implementation=attention)
    for owner in (model, getattr(model, "vision_model", model)):
        if hasattr(owner, "post_layernorm"):
            owner.post_layernorm = nn.Identity()
    return model.eval().requires_grad_(False)


def with_weights_of(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same model with another attention; the weights are shared."""
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    shared.config._attn_implementation = attention
    return shared


def our_model(model: PreTrainedModel, quantization: Any = "none") -> FrozenImageEncoder:
    """Ours, with the weights of theirs."""
    held = with_weights_of(model, "sdpa")
    blocks = held.config.num_hidden_layers
    return FrozenImageEncoder(held, blocks, "", identified=False, quantization=quantization)


def forward_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """From pixels to tokens."""

    @torch.no_grad()
    def forward(pixels: Tensor) -> Tensor:
        found = model(pixels)
        return found if isinstance(found, Tensor) else found.last_hidden_state

    return forward


def error_of(tokens: Tensor, expected: Tensor) -> float:
    """The relative error of tokens, by norm."""
    return float((tokens.double() - expected.double()).norm() / expected.double().norm())


def pixels_of(shape: EncoderShape, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """From a seed to images."""

    def make(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = (shape.batch, 3, shape.config.image_size, shape.config.image_size)
        return torch.randn(size, generator=generator).to(device, dtype)

    return make


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", cells(ENCODER_SHAPES))
def bench_encode(
    name: str, dtype: str, device: torch.device, compiled: bool, compare: Callable[..., None]
) -> None:
    shape, kind = ENCODER_SHAPES[name], DTYPES[dtype]
    eager = their_model(shape, "eager").to(device, kind)
    forwards = {
        "blip2fast": forward_of(our_model(eager)),
        "transformers sdpa": forward_of(with_weights_of(eager, "sdpa")),
        "transformers eager": forward_of(eager),
    }
    if compiled:
        forwards["transformers sdpa, compiled"] = torch.compile(forwards["transformers sdpa"])
        if device.type == "cuda":
            ours = our_model(eager)
            ours.compile_blocks()
            forwards["blip2fast, compiled"] = forward_of(ours)
    make_inputs = pixels_of(shape, kind, device)

    def agree(pixels: Tensor, tokens: Tensor) -> None:
        error = error_of(tokens, forwards["transformers eager"](pixels))
        assert error < TOLERANCE[kind], f"relative error {error:.1e}"

    pixels = make_inputs(0)
    with FlopCounterMode(display=False) as counter:
        forwards["transformers eager"](pixels)
    weights = sum(p.nbytes for p in eager.parameters())
    work = Work(counter.get_total_flops(), weights + pixels.nbytes, input_bytes=pixels.nbytes)
    providers: dict[str, Any] = {which: plain(forward) for which, forward in forwards.items()}
    compare(providers, make_inputs, agree, work=work, dtype=kind)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", cells(ENCODER_SHAPES))
def bench_int8(
    name: str,
    dtype: str,
    device: torch.device,
    compiled: bool,
    compare: Callable[..., None],
    benchmark: Any,
) -> None:
    shape, kind = ENCODER_SHAPES[name], DTYPES[dtype]
    model = their_model(shape, "sdpa").to(device)
    make_inputs = pixels_of(shape, torch.float32, device)
    expected = forward_of(model)(make_inputs(0))
    errors: dict[str, float] = {}

    def int8(which: str, compiles: bool) -> Provider[Tensor]:
        held: list[FrozenImageEncoder] = []

        def provider(pixels: Tensor) -> Contender:
            if not held:  # without torchao this contender does not run
                held.append(our_model(model, "int8").to(kind))
                if compiles:
                    held[0].compile_blocks()
                errors[which] = error_of(forward_of(held[0])(make_inputs(0)), expected)
            return plain(forward_of(held[0]))(pixels)

        return provider

    def agree(pixels: Tensor, tokens: Tensor) -> None:
        error = error_of(tokens, expected)
        assert error < INT8_ERROR, f"relative error {error:.1e}"

    names = {"blip2fast, int8": False} | ({"blip2fast, int8, compiled": True} if compiled else {})
    providers: dict[str, Any] = {which: int8(which, compiles) for which, compiles in names.items()}
    theirs = copy.deepcopy(model).to(kind)
    providers[f"transformers sdpa, {dtype}"] = plain(forward_of(theirs))
    ours = forward_of(our_model(theirs))
    providers[f"plain encoder, {dtype}"] = plain(ours)
    compare(providers, lambda seed: make_inputs(seed).to(kind), agree, dtype=kind)
    for which, result in benchmark.extra_info.get("contenders", {}).items():
        if which in errors:
            result["relative_error"] = errors[which]
