"""A stage-2 step, forward and backward, by where the frozen language model is.

Ours are streamed blocks, with activations kept or recomputed; the rivals are the model resident on
the device, likewise, DeepSpeed ZeRO-3 with its parameters on the host, and accelerate's CPU offload
where accelerate is installed (the dev extra has it). Random weights, the same in all; no optimiser
step. On a CPU the device is the host, so that ZeRO-3 and accelerate copy little or nothing, and
streaming does.

Beside the times, in `extra_info`: `link_gbps`, the copy of a block from host to device alone, and
the language model's bytes on the device and on the host.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shapes import flan_t5, opt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from blip2fast import Blip2Stage2, Stage2Config
from blip2fast.offload import BlockStream, stream_blocks
from blip2fast.stage2 import language_model as stage2_llm


@dataclass(frozen=True)
class StepShape:
    """A language model and a batch; a text has `text_tokens` tokens, all real."""

    language: Any
    qformer: Stage2Config
    batch: int
    text_tokens: int
    image_tokens: int
    dtype: torch.dtype


QFORMER = Stage2Config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SMALL_QFORMER = Stage2Config(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    encoder_hidden_size=64,
    num_query_tokens=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
# 16,384 tokens a step and more, from where on the copies should hide behind the arithmetic
SHAPES = {
    "small": StepShape(
        opt(512, 8, 8, vocab_size=1000),
        SMALL_QFORMER,
        batch=8,
        text_tokens=16,
        image_tokens=65,
        dtype=torch.float32,
    ),
    "opt_2.7b": StepShape(opt(2560, 32, 32), QFORMER, 256, 32, 257, torch.bfloat16),
    "opt_6.7b": StepShape(opt(4096, 32, 32), QFORMER, 256, 32, 257, torch.bfloat16),
    "flan_t5_xl": StepShape(flan_t5(2048, 5120, 24, 32), QFORMER, 256, 32, 257, torch.bfloat16),
}
NO_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="billions of parameters: timed on a CUDA device only"
)
NAMES = [
    "small",
    *(
        pytest.param(name, marks=[pytest.mark.fullsize, pytest.mark.gpu, NO_GPU])
        for name in SHAPES
        if name != "small"
    ),
]


def make_batch(shape: StepShape, device: torch.device) -> dict[str, Tensor]:
    """Random image tokens and texts; the labels of an encoder-decoder are a second text."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.image_tokens, shape.qformer.encoder_hidden_size)
    words = (shape.batch, shape.text_tokens)
    ids, labels = (
        torch.randint(2, shape.language.vocab_size, words, generator=generator) for _ in range(2)
    )
    batch = {"image_embeds": torch.randn(size, generator=generator), "input_ids": ids}
    batch["image_embeds"] = batch["image_embeds"].to(shape.dtype)
    if shape.language.is_encoder_decoder:
        batch["labels"] = labels
    return {name: value.to(device) for name, value in batch.items()}


def make_model(shape: StepShape, language: nn.Module, device: torch.device) -> Blip2Stage2:
    """The same trained part around any language model; the language model is left where it is."""
    torch.manual_seed(0)
    model = Blip2Stage2(shape.qformer, language)
    for name, child in model.named_children():
        if name != "language_model":
            child.to(device, shape.dtype)
    model.query_tokens.data = model.query_tokens.data.to(device, shape.dtype)
    return model.train()


def language_model(shape: StepShape, device: torch.device) -> nn.Module:
    kind = AutoModelForSeq2SeqLM if shape.language.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(1)
    with device:
        model = kind.from_config(shape.language, dtype=shape.dtype)
    return model.to("cpu").eval().requires_grad_(False)


def step_of(
    model: Blip2Stage2,
    batch: dict[str, Tensor],
    stream: BlockStream | None = None,
    recompute: bool = False,
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        if stream is not None:
            stream.recompute = recompute
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        _synchronise()
        return loss.detach()

    return step


def zero3_step(model: Blip2Stage2, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """DeepSpeed's engine with the parameters on the host; it never comes to an optimiser step."""
    import deepspeed

    from blip2fast.training.engine import start_processes

    start_processes()
    trained = [p for p in model.parameters() if p.requires_grad]
    low = {"bf16": {"enabled": True}} if trained[0].dtype == torch.bfloat16 else {}
    values = {
        "train_micro_batch_size_per_gpu": len(batch["input_ids"]),
        "gradient_accumulation_steps": 1_000_000,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
            "stage3_param_persistence_threshold": max(p.numel() for p in trained),
            "reduce_bucket_size": sum(p.numel() for p in trained),
        },
        "zero_force_ds_cpu_optimizer": False,
        **low,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained), config=values
    )

    def step() -> Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        _synchronise()
        return loss.detach()

    return step


def accelerate_step(
    shape: StepShape, language: nn.Module, batch: dict[str, Tensor], device: torch.device
) -> Callable[[], Tensor]:
    from accelerate import cpu_offload

    cpu_offload(language, execution_device=device)
    return step_of(make_model(shape, language, device), batch)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def link_gbps(stream: BlockStream, device: torch.device) -> float:
    """The copy of the largest block from the host to the device, alone; the median of five."""
    source = max((block.host for block in stream._blocks), key=len)
    target = torch.empty_like(source, device=device)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        _synchronise()
        taken.append(time.perf_counter() - start)
    return len(source) / sorted(taken)[2] / 1e9


@pytest.mark.parametrize("name", NAMES)
def bench_step(name: str, race: Callable[..., None], benchmark: Any) -> None:
    shape = SHAPES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(shape, device)
    original = language_model(shape, device)
    weights = sum(p.nbytes for p in original.parameters())

    streamed = copy.deepcopy(original)
    stream = stream_blocks(streamed, device)
    ours = make_model(shape, streamed, device)
    on_device = copy.deepcopy(original).to(device)
    resident = make_model(shape, on_device, device)
    same_weights = {id(parameter): parameter for parameter in on_device.parameters()}
    recomputed = make_model(shape, copy.deepcopy(on_device, same_weights), device)
    stage2_llm.recompute_layers(recomputed.language_model)
    step = step_of(ours, batch, stream)
    rivals = {
        "stream_recomputed": step_of(ours, batch, stream, recompute=True),
        "resident": step_of(resident, batch),
        "resident_recomputed": step_of(recomputed, batch),
    }
    if importlib.util.find_spec("accelerate") is not None:
        moved = copy.deepcopy(original)
        rivals["accelerate_cpu_offload"] = accelerate_step(shape, moved, batch, device)
        benchmark.extra_info["accelerate_weight_bytes_on_host"] = weights
    spread = make_model(shape, original, device)
    rivals["zero3_offload"] = zero3_step(spread, batch)

    expected = rivals["resident"]()
    bound = 1e-5 if shape.dtype == torch.float32 else 1e-3
    for rival in (step, *rivals.values()):
        torch.testing.assert_close(rival(), expected, rtol=bound, atol=0)
    for which in ("query_tokens", "ln_vision.weight", "language_projection.weight"):
        other = resident.get_parameter(which).grad
        found = ours.get_parameter(which).grad
        atol = bound * float(other.abs().max())
        torch.testing.assert_close(found, other, rtol=0, atol=atol)

    rest = sum(p.nbytes for p in streamed.parameters())
    benchmark.extra_info |= {
        "tokens": batch["input_ids"].numel() + shape.batch * shape.qformer.num_query_tokens,
        "dtype_of_language_model": str(shape.dtype),
        "copier": stream.copier,
        "link_gbps": link_gbps(stream, device),
        "resident_weight_bytes": weights,
        "stream_weight_bytes_on_device": rest + stream.device_bytes,
        "stream_weight_bytes_on_host": stream.host_bytes,
        "zero3_weight_bytes_on_host": sum(
            part.nbytes
            for parameter in spread.language_model.parameters()
            if (part := parameter.ds_tensor).device.type == "cpu"
        ),
    }
    stream.reset_fetches()
    race(step, rivals, rounds=5)
    assert stream.fetches.most_live <= 2
    assert stream.fetches.late == 0
