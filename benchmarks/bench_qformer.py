"""`blip2fast.QFormer` against transformers' Q-Former: queries on image tokens, forward, eval.

On a GPU whole calls are timed, launches included; "CUDA graph" means that the caller replays one.
"absorbed" and "projected" are the two forms of cross-attention (`blip2fast/qformer/absorption.py`);
"blip2fast" chooses between them by its rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import Contender, Provider, Work, plain
from shapes import INFERENCE_SHAPES, Shape, cells
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerModel

from blip2fast import QFormer
from blip2fast.qformer import absorption

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}
# relative norm by which last states may differ: roundings of 12 layers in another order
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def models(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """The same random weights in ours and theirs."""
    torch.manual_seed(0)
    config = shape.config.qformer_config()
    eager = Blip2QFormerModel._from_config(config, attn_implementation="eager")
    sdpa = Blip2QFormerModel._from_config(config, attn_implementation="sdpa")
    ours = QFormer(config)
    for model in (sdpa, ours):
        model.load_state_dict(eager.state_dict())
    named = {"blip2fast": ours, "transformers sdpa": sdpa, "transformers eager": eager}
    return {name: model.to(device, dtype).eval() for name, model in named.items()}


def forward_of(model: nn.Module, queries: Tensor) -> Callable[[Tensor], Tensor]:
    """From image tokens to last states, without gradients."""

    @torch.no_grad()
    def forward(tokens: Tensor) -> Tensor:
        batch = queries.expand(len(tokens), -1, -1)
        return model(query_embeds=batch, encoder_hidden_states=tokens).last_hidden_state

    return forward


def with_absorption(forward: Callable[[Tensor], Tensor], absorb: bool) -> Callable[..., Tensor]:
    """The forward pass with one form of cross-attention, whatever the rule says."""

    def forced(tokens: Tensor) -> Tensor:
        rule, absorption.is_cheaper = absorption.is_cheaper, lambda *_: absorb
        try:
            return forward(tokens)
        finally:
            absorption.is_cheaper = rule

    return forced


def graphed(forward: Callable[[Tensor], Tensor]) -> Provider[Tensor]:
    """A provider that replays a CUDA graph of the forward pass."""

    def provider(tokens: Tensor) -> Contender:
        if tokens.device.type != "cuda":
            raise NotImplementedError("CUDA graphs need a CUDA device")
        return Contender({"": lambda: forward(tokens)})

    return provider


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", cells(INFERENCE_SHAPES))
def bench_forward(
    name: str, dtype: str, device: torch.device, compiled: bool, compare: Callable[..., None]
) -> None:
    shape, kind = INFERENCE_SHAPES[name], DTYPES[dtype]
    C, E = shape.config.hidden_size, shape.config.encoder_hidden_size
    held = models(shape, kind, device)
    queries = torch.randn(1, shape.config.num_query_tokens, C).to(device, kind)
    forwards = {which: forward_of(model, queries) for which, model in held.items()}
    for form, absorb in (("absorbed", True), ("projected", False)):
        forwards[f"blip2fast, {form}"] = with_absorption(forwards["blip2fast"], absorb)
    if compiled:
        forwards["transformers sdpa, compiled"] = torch.compile(forwards["transformers sdpa"])

    def make_inputs(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = (shape.batch, shape.image_tokens, E)
        return torch.randn(size, generator=generator).to(device, kind)

    def agree(tokens: Tensor, states: Tensor) -> None:
        expected = forwards["transformers eager"](tokens).double()
        error = (states.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[kind], f"relative error {error:.1e}"

    providers: dict[str, Any] = {which: plain(forward) for which, forward in forwards.items()}
    for which in ("blip2fast", "transformers sdpa"):
        providers[f"{which}, CUDA graph"] = graphed(forwards[which])
    tokens = make_inputs(0)
    with FlopCounterMode(display=False) as counter:
        forwards["transformers eager"](tokens)
    weights = sum(p.nbytes for p in held["blip2fast"].parameters())
    work = Work(
        counter.get_total_flops(),
        weights + tokens.nbytes + shape.batch * queries.nbytes,
        input_bytes=tokens.nbytes,
    )
    compare(providers, make_inputs, agree, work=work, dtype=kind)
