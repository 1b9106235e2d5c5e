"""A stage-1 training step, ours and from the textbook: forward, backward, optimiser.

The negatives are given and the learning rate is 0, so that every step without dropout computes the
same losses, which can be compared, and does all the work of one that learns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_inputs import cross_work, self_work
from comparing import Contender, Provider, Work
from shapes import BI, CAUSAL, UNI, CrossShape, SelfShape, Shape, spread_lengths
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blip2fast import Blip2Stage1
from blip2fast.ops import kernels_set_to
from blip2fast.training.parameter_groups import parameter_groups

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from textbook_stage1 import TextbookStage1

Batch = dict[str, Any]
_FLOPS: dict[str, float] = {}
WITHOUT_KERNELS = "blip2fast, no kernels"
NAMES = ("blip2fast", "textbook", "textbook, layers compiled")
# compared between contenders: nearly first, nearly last and outermost in the backward pass
GRADIENTS = ("query_tokens", "vision_projection.weight", "ln_vision.weight")


def make_batch(shape: Shape, device: torch.device) -> Batch:
    """Random pairs; texts stay on the CPU, where a data loader leaves them."""
    B, T = shape.batch, shape.text_tokens
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(spread_lengths(B, shape.mean_caption, T))
    mask = (torch.arange(T)[None] < lengths[:, None]).long()
    ids = torch.randint(4, shape.config.vocab_size - 1, (B, T), generator=generator)
    size = (B, shape.image_tokens, shape.config.encoder_hidden_size)
    others = (torch.arange(B) + 1) % B
    return {
        "image_embeds": torch.randn(size, generator=generator).to(device),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "negatives": tuple(x.to(device) for x in (others, (others + 1) % B)),
    }


def make_models(
    shape: Shape, device: torch.device, names: tuple[str, ...] = NAMES
) -> dict[str, nn.Module]:
    """The contenders' models by name, with the same random weights in fp32."""
    torch.manual_seed(0)
    ours = Blip2Stage1(shape.config)
    models: dict[str, nn.Module] = {}
    for name in names:
        if name in ("blip2fast", WITHOUT_KERNELS):  # one model twice
            models[name] = ours.to(device)
            continue
        textbook = TextbookStage1(ours).to(device)
        if "compiled" in name:
            for layer in textbook.qformer.encoder.layer:
                layer.compile(dynamic=False)
        models[name] = textbook
    return models


def choices_of(name: str) -> AbstractContextManager[None]:
    """Where a contender's forward pass chooses its backends, which its backward pass keeps."""
    return kernels_set_to("never") if name == WITHOUT_KERNELS else nullcontext()


def loss_of(
    model: nn.Module, batch: Batch, dtype: torch.dtype, name: str = ""
) -> Callable[[], Tensor]:
    """The forward pass of a contender; below fp32 by autocast on fp32 weights."""
    device = batch["image_embeds"].device
    ours = isinstance(model, Blip2Stage1)
    if not ours:
        batch = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()}

    def forward() -> Tensor:
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with choices_of(name), autocast:
            return model(**batch)["loss"]

    return forward


def step_provider(
    model: nn.Module, batch: Batch, dtype: torch.dtype, name: str = ""
) -> Provider[None]:
    """A provider of whole steps in three phases."""

    def provider(inputs: None) -> Contender:
        forward = loss_of(model, batch, dtype, name)
        fused = torch.optim.AdamW(parameter_groups(model, 0.05), lr=0.0, fused=True)
        kept: dict[str, Tensor] = {}

        def optimise() -> None:
            fused.step()
            fused.zero_grad()

        return Contender(
            {
                "forward": lambda: kept.update(loss=forward()),
                "backward": lambda: kept.pop("loss").backward(),
                "optimiser": optimise,
            }
        )

    return provider


def judged_provider(
    model: nn.Module, batch: Batch, dtype: torch.dtype, name: str = ""
) -> Provider[None]:
    """A provider whose result is the loss and some gradients, without dropout."""

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.eval()
        loss = loss_of(model, batch, dtype, name)()
        loss.backward()
        model.train()
        found = {name: parameter_of(model, name).grad for name in GRADIENTS}
        model.zero_grad()
        return {"loss": loss.detach(), **{n: g for n, g in found.items() if g is not None}}

    return lambda inputs: Contender({"": gradients})


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter under our name, in ours or in the textbook."""
    if isinstance(model, TextbookStage1):
        return model.w(name)
    return model.get_parameter(name)


def flops_of_a_pair(shape: Shape, device: torch.device) -> float:
    """What our step computes for an image-text pair, counted over one period of caption lengths.

    Without our kernels, which would be compiled for fp32 just for this. Counted once for a model.
    """
    counted = replace(shape, batch=13, where="test", headline=False)
    known = repr((counted, device))
    if known not in _FLOPS:
        _FLOPS[known] = _count_flops(counted, device)
    return _FLOPS[known]


def _count_flops(counted: Shape, device: torch.device) -> float:
    model = make_models(counted, device, ("blip2fast",))["blip2fast"]
    forward = loss_of(model, make_batch(counted, device), torch.float32, WITHOUT_KERNELS)
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    flops = counter.get_total_flops()
    operations = {str(op) for op in counter.get_flop_counts()["Global"]}
    if not any("bmm" in op or "attention" in op for op in operations):
        flops += attention_flops(counted)  # inside ops that the counter does not look into
    flops += word_flops(counted)  # always inside one
    return flops / counted.batch


def word_flops(shape: Shape) -> float:
    """The word head on label rows: logits, and the gradients of both factors."""
    labels = sum(spread_lengths(shape.batch, shape.mean_caption, shape.text_tokens)) - shape.batch
    return 6 * labels * shape.config.hidden_size * shape.config.vocab_size


def attention_flops(shape: Shape) -> float:
    """Scores and sums of both passes, forward and backward."""
    config, B = shape.config, shape.batch
    layers = config.num_hidden_layers
    sizes: dict[str, Any] = {
        "queries": config.num_query_tokens,
        "heads": config.num_attention_heads,
        "width": config.hidden_size // config.num_attention_heads,
    }
    texts: dict[str, Any] = {"text_tokens": shape.text_tokens, "mean_text": shape.mean_caption}
    rows = [
        SelfShape(B, (UNI, CAUSAL), **texts, **sizes),
        SelfShape(3 * B, (BI,), **texts, **sizes),
    ]
    total = layers * sum(self_work(x, 4, train=True).flops for x in rows)
    cross_layers = len(range(0, layers, config.cross_attention_frequency))
    for blocks in (B, 3 * B):
        cross = CrossShape(blocks, shape.image_tokens, **sizes)
        total += cross_layers * cross_work(cross, 4, train=True).flops
    return total


def step_work(shape: Shape, model: nn.Module, device: torch.device) -> Work:
    """Our arithmetic; of the bytes the weights alone.

    Read forward and backward, their gradient written, and the optimiser's seven tensors.
    """
    weights = sum(p.nbytes for p in model.parameters())
    return Work(shape.batch * flops_of_a_pair(shape, device), 10 * weights)
