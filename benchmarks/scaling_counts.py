"""Costs of a stage-1 step that are counted, against each size that they depend on.

FLOPs of every product, those inside the fused ops too; bytes kept for the backward pass; and what
each of several processes hands to collectives, under DeepSpeed with gloo. Small models, on a CPU:
the same numbers on every machine with the same PyTorch. Legend as in `shapes.py`, and P processes.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import guards
import torch
import torch.multiprocessing as mp
from shapes import SCENES, Shape
from stage1_contenders import make_batch, make_models, step_provider
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from blip2fast.kernels.itc import chunked as itc_chunked
from blip2fast.kernels.itc.cpu import sweep as itc
from blip2fast.kernels.lm_cross_entropy import chunked as words_chunked
from blip2fast.kernels.qformer_attention.cpu import cross_attention, self_attention
from blip2fast.ops import itc_loss

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BASE = Shape(SCENES, batch=8, image_tokens=17, text_tokens=8, mean_caption=8)
PROCESSES, HELD_OUT_PROCESSES, ZERO_STAGES = (1, 2, 4), 3, (0, 1, 2)
# where the products of fused operators are computed on a CPU; a counter of PyTorch's calls sees the
# operators alone
_INSIDE = (
    (self_attention, ("self_forward", "self_backward")),
    (cross_attention, ("cross_forward", "cross_backward")),
    (itc, ("sweep",)),
    (itc_chunked, ("sweep_grad",)),
    (words_chunked, ("forward", "backward")),
)


def _counter() -> FlopCounterMode:
    """PyTorch's counter, which also knows PyTorch's attention on a CPU."""

    def forward(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(dout: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        return int(sdpa_backward_flop_count(dout, query, key, value))

    name, aten = "_scaled_dot_product_flash_attention_for_cpu", torch.ops.aten
    formulas = {getattr(aten, name): forward, getattr(aten, f"{name}_backward"): backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


@contextmanager
def counted_flops() -> Iterator[Callable[[], int]]:
    """FLOPs of all products in the `with` block, those inside fused operators too.

    Raises:
        NotImplementedError: a fused operator computed them elsewhere.
    """
    inside: list[int] = []

    def opened(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _counter() as flops:
                found = function(*args, **kwargs)
            inside.append(flops.get_total_flops())
            return found

        return run

    fused = _Fused()
    with ExitStack() as stack:
        for module, names in _INSIDE:
            for name in names:
                stack.enter_context(patch.object(module, name, opened(getattr(module, name))))
        outside = stack.enter_context(_counter())
        stack.enter_context(fused)
        yield lambda: outside.get_total_flops() + sum(inside)
    if len(inside) != sum(fused.calls.values()):
        calls = dict(fused.calls)
        raise NotImplementedError(f"{calls}: the products of {len(inside)} of them were counted")


class _Fused(TorchDispatchMode):
    """Counts calls of the package's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "blip2fast":
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], Any], given: Iterable[Tensor] = ()) -> dict[str, int]:
    """FLOPs of all products of a call, and bytes that it keeps for its backward pass.

    Args:
        call: Forward and backward; it is made several times.
        given: Tensors that are there anyway: weights, inputs.
    """
    found = guards.count(call, given)
    with counted_flops() as flops:
        call()
    return {"flops": flops(), "saved_bytes": found["saved_bytes"]}


def step(shape: Shape) -> dict[str, int]:
    """Of a stage-1 step of one process, in fp32."""
    model = make_models(shape, CPU, ("blip2fast",))["blip2fast"]
    batch = make_batch(shape, CPU)
    run = step_provider(model, batch, torch.float32)(None).run
    return count(run, [*model.parameters(), batch["image_embeds"]])


def contrast(pairs: int, queries: int = 8, width: int = 32) -> dict[str, int]:
    """Of ITC alone over N pairs on one process, with its gradients and negatives."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        nn.functional.normalize(torch.randn(*size, generator=generator), dim=-1).requires_grad_()
        for size in ((pairs, queries, width), (pairs, width))
    )
    temp = torch.tensor(0.07, requires_grad=True)

    def call() -> None:
        loss = itc_loss(image, text, temp, grad_mode="local").loss
        torch.autograd.grad(loss, (image, text, temp))

    return count(call, [image, text])


@dataclass(frozen=True)
class Sweep:
    """One size that is varied, the others as in `BASE`.

    Attributes:
        size: Its letter.
        values: Counted, and fitted to.
        held_out: Counted, and predicted by the fit.
        powers: Of the size, by cost: the terms that the mathematics has.
        measure: Counts at a value.
    """

    size: str
    values: tuple[int, ...]
    held_out: int
    powers: Mapping[str, tuple[int, ...]]
    measure: Callable[[int], dict[str, int]]


def _config(**sizes: Any) -> Shape:
    return replace(BASE, config=replace(BASE.config, **sizes))


# ITC multiplies every image with every text; attention every row of a text with every other.
# Attention keeps no probabilities, so what is kept grows with B * B (the similarities) alone.
SWEEPS = (
    Sweep(
        "B",
        (4, 8, 12, 16),
        32,
        {"flops": (0, 1, 2), "saved_bytes": (0, 1, 2)},
        lambda x: step(replace(BASE, batch=x)),
    ),
    Sweep("N", (32, 64, 96, 128), 256, {"flops": (2,), "saved_bytes": (0, 1, 2)}, contrast),
    Sweep(
        "T",
        (4, 6, 8, 12),
        20,
        {"flops": (0, 1, 2), "saved_bytes": (0, 1)},
        lambda x: step(replace(BASE, text_tokens=x, mean_caption=x)),
    ),
    Sweep(
        "S",
        (9, 17, 33, 65),
        257,
        {"flops": (0, 1), "saved_bytes": (0, 1)},
        lambda x: step(replace(BASE, image_tokens=x)),
    ),
    Sweep(
        "Q",
        (4, 8, 12, 16),
        32,
        {"flops": (0, 1, 2), "saved_bytes": (0, 1)},
        lambda x: step(_config(num_query_tokens=x)),
    ),
    # the first layer knows its queries, the last one computes only what a loss reads
    Sweep(
        "layers",
        (2, 3, 4, 6),
        12,
        {"flops": (0, 1), "saved_bytes": (0, 1)},
        lambda x: step(_config(num_hidden_layers=x)),
    ),
)


def sweep_counts(given: Sweep) -> dict[str, Any]:
    """What was counted: `held_out`, and for each of `costs` its `powers` and `points` by value."""
    at = {x: given.measure(x) for x in (*given.values, given.held_out)}
    costs = {
        cost: {"powers": powers, "points": {x: counts[cost] for x, counts in at.items()}}
        for cost, powers in given.powers.items()
    }
    return {"held_out": given.held_out, "costs": costs}


def _config_of(zero_stage: int, batch: int) -> Any:
    from blip2fast.training.config_files import load_config

    overrides = [f"zero_stage={zero_stage}", f"optim.batch_size={batch}", "precision=bf16"]
    return load_config(ROOT / "configs" / "scenes_stage1.yaml", [*overrides, "optim.clip_norm=0"])


def _count_stage(rank: int, world: int, stage: int) -> dict[str, Any]:
    from blip2fast.training.engine import start_engine
    from blip2fast.training.step_passes import TrainingStep

    model = make_models(BASE, CPU, ("blip2fast",))["blip2fast"]
    parameters = sum(p.numel() for p in model.parameters())
    engine, _ = start_engine(TrainingStep(model), _config_of(stage, BASE.batch))
    batch = make_batch(BASE, CPU)
    batch["image_embeds"] = batch["image_embeds"].to(torch.bfloat16)
    if world > 1:
        # negatives of the next process: of many processes, nearly all are of others
        own, total = torch.arange(BASE.batch), BASE.batch * world
        first = BASE.batch * (rank + 1)
        batch["negatives"] = ((own + first) % total, (own + first + 1) % total)

    def run() -> None:
        loss, _ = engine(**batch)
        engine.backward(loss)
        engine.step()

    run()
    run()
    with guards.Calls() as calls:
        run()
    with counted_flops() as flops:
        run()
    return {
        "parameters": parameters,
        "flops": flops(),
        "collectives": dict(calls.collectives),
        "sent_bytes": dict(calls.sent_bytes),
    }


def _count_process(rank: int, world: int, port: int, stages: tuple[int, ...], out: str) -> None:
    from blip2fast.training.engine import leave_processes, start_processes

    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(x) for name, x in numbers.items()}, MASTER_ADDR="127.0.0.1")
    start_processes()
    found = {stage: _count_stage(rank, world, stage) for stage in stages}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    leave_processes()


def processes(world: int, stages: tuple[int, ...] = ZERO_STAGES) -> dict[str, Any]:
    """What the first of P processes computes and sends in a step in bf16, by ZeRO stage.

    `BASE.batch` pairs each. By kind of collective, as PyTorch names them: how many, and the bytes
    that they are handed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        mp.spawn(_count_process, (world, port, stages, out), nprocs=world)
        return json.loads(Path(out).read_text())
