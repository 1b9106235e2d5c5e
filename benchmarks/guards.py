"""Costs that can be counted, so that no noise hides a change: FLOPs, calls, bytes, collectives.

    python benchmarks/guards.py            # what is worse or better than guards.json says
    python benchmarks/guards.py --write    # record what is counted now

Small models, on a CPU, in seconds. The same numbers on every machine with the same PyTorch and
transformers, so products run by PyTorch's own linear, whatever the processor's vendor.

    flops          of products outside fused ops
    calls          of operators, each fused op one
    casts          of tensors from one type to another
    saved_bytes    kept for the backward pass, weights and inputs left out
    graphs         that torch.compile makes for several lengths
    collectives    of a process, of two; sent_bytes: what it hands to them
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

# asked for once a process, on first use
os.environ["BLIP2FAST_LINEAR"] = "pytorch"
# this checkout is counted, whichever is installed
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_stage2_step import StepShape, language_model, make_model
from bench_stage2_step import make_batch as make_stage2_batch
from shapes import SCENES, STAGE1_SHAPES, TINY_QFORMER, flan_t5, opt
from stage1_contenders import make_batch, make_models, step_provider
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from blip2fast import QFormer

RECORD = Path(__file__).parent / "guards.json"
COMMAND = "python benchmarks/guards.py --write"
CPU = torch.device("cpu")
SCENES_STEP = replace(STAGE1_SHAPES["scenes"], batch=8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LANGUAGE_MODELS = {
    "opt": opt(32, 2, 2, vocab_size=64),
    "t5": flan_t5(32, 64, 2, 2, vocab_size=64),
}
LENGTHS = (5, 9, 17, 33)
Counts = dict[str, int]


class Calls(TorchDispatchMode):
    """Operators that are called, and what collectives are given.

    Attributes:
        calls, casts: Of operators, of them from one type to another.
        collectives, sent_bytes: By kind, as PyTorch names them (`allreduce_`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.casts = 0
        self.collectives: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        self.casts += func is torch.ops.aten._to_copy.default
        if func.namespace == "c10d":
            kind = func.name().partition("::")[2]
            self.collectives[kind] += 1
            # where there are two, the second argument is what is sent, and the first what arrives
            two = any(each in kind for each in ("allgather", "alltoall", "reduce_scatter"))
            self.sent_bytes[kind] += sum(x.nbytes for x in _tensors(args[1] if two else args[0]))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def count(call: Callable[[], Any], given: Iterable[Tensor] = ()) -> Counts:
    """Flops, calls, casts and saved bytes of a call, which is made three times.

    Args:
        call: Forward, or forward and backward.
        given: Tensors that are there anyway: weights, inputs.
    """
    call()  # what is prepared once
    with FlopCounterMode(display=False) as flops:
        call()
    there = {x.untyped_storage().data_ptr() for x in given}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return x

    with saved_tensors_hooks(pack, lambda x: x), Calls() as calls:
        call()
    return {
        "flops": flops.get_total_flops(),
        "calls": calls.calls,
        "casts": calls.casts,
        "saved_bytes": sum(storage.nbytes() for storage in kept.values()),
    }


def stage1_step(dtype: str) -> Counts:
    """Forward, backward and optimiser of eight pairs of the scenes."""
    model = make_models(SCENES_STEP, CPU, ("blip2fast",))["blip2fast"]
    batch = make_batch(SCENES_STEP, CPU)
    step = step_provider(model, batch, DTYPES[dtype])(None)
    return count(step.run, [*model.parameters(), batch["image_embeds"]])


def stage2_step(kind: str) -> Counts:
    """Forward and backward of three pairs, the language model frozen."""
    language = LANGUAGE_MODELS[kind]
    qformer = replace(TINY_QFORMER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    shape = StepShape(language, qformer, 3, 6, 5, torch.float32)
    model = make_model(shape, language_model(shape, CPU), CPU)
    batch = make_stage2_batch(shape, CPU)

    def step() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    return count(step, [*model.parameters(), *batch.values()])


def qformer() -> tuple[nn.Module, Callable[[int], Any]]:
    """A Q-Former, and its forward pass on two images of so many tokens."""
    torch.manual_seed(0)
    model = QFormer(SCENES.qformer_config()).eval()
    queries = torch.randn(2, SCENES.num_query_tokens, SCENES.hidden_size)

    @torch.no_grad()
    def forward(tokens: int) -> Any:
        image = torch.zeros(2, tokens, SCENES.encoder_hidden_size)
        return model(query_embeds=queries, encoder_hidden_states=image)[0]

    return model, forward


def qformer_forward() -> Counts:
    """Without gradients."""
    _, forward = qformer()
    found = count(lambda: forward(65))
    del found["saved_bytes"]
    return found


def compiled_qformer() -> Counts:
    """Graphs for four numbers of image tokens."""
    made = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal made
        made += 1
        return graph.forward

    torch._dynamo.reset()
    model, forward = qformer()
    model.compile(backend=backend)
    for tokens in LENGTHS:
        forward(tokens)
    torch._dynamo.reset()
    return {"graphs": made}


def _rank_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    model = make_models(SCENES_STEP, CPU, ("blip2fast",))["blip2fast"]
    batch = make_batch(SCENES_STEP, CPU)
    # given: how many rows travel would be drawn
    batch["negatives"] = tuple((torch.arange(8) + 8 * rank + n) % 16 for n in (5, 8))
    step = step_provider(model, batch, torch.float32)(None)
    step.run()
    with Calls() as calls:
        step.run()
    if rank == 0:
        found = {
            "collectives": calls.collectives.total(),
            "sent_bytes": calls.sent_bytes.total(),
        }
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def stage1_step_of_two() -> Counts:
    """What the first of two processes sends in a step; gradients are nobody's here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_step, (folder,), nprocs=2)
        return json.loads((Path(folder) / "found.json").read_text())


def measure() -> Counts:
    """Every guard by its name, `WHAT/KIND`."""
    found = {
        **{f"stage1_step_{dtype}": stage1_step(dtype) for dtype in DTYPES},
        **{f"stage2_step_{kind}": stage2_step(kind) for kind in LANGUAGE_MODELS},
        "qformer_forward": qformer_forward(),
        "compiled_qformer": compiled_qformer(),
        "stage1_step_of_two": stage1_step_of_two(),
    }
    return {f"{what}/{kind}": n for what, counts in found.items() for kind, n in counts.items()}


def compare(old: Counts, new: Counts) -> tuple[list[str], list[str]]:
    """A line for each guard that is worse or in one of both alone; and for each that is better."""
    worse, better = [], []
    for name in [*old, *(n for n in new if n not in old)]:
        if name not in new:
            worse.append(f"{name}: {old[name]:,} recorded, not counted now")
        elif name not in old:
            worse.append(f"{name}: {new[name]:,} now, none recorded")
        elif new[name] != old[name]:
            line = f"{name}: {old[name]:,} recorded, {new[name]:,} now"
            (worse if new[name] > old[name] else better).append(line)
    return worse, better


def recorded() -> Counts:
    """What guards.json says."""
    return json.loads(RECORD.read_text())["guards"]


def main() -> int:
    """The command line; 1 where something is worse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record what is counted now")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure()
    if given.write:
        held = {"written by": COMMAND, "torch": torch.__version__, "guards": found}
        RECORD.write_text(json.dumps(held, indent=1) + "\n")
        return 0
    worse, better = compare(recorded(), found)
    for title, lines in (("worse", worse), ("better", better)):
        for line in lines:
            print(f"{title}: {line}")
    if worse or better:
        print(f"to record what is counted now: {COMMAND}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
