"""`blip2fast init`, `train`, `plan` and `storage-loss`: training runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated

import typer

from blip2fast.command_line.options import Config, Set, on_terminal, settle_process, show_table

if TYPE_CHECKING:
    from blip2fast._choices import Storage
    from blip2fast.training.memory_plan import MemoryPlan, Option


class FewerBits(Enum):
    """How `storage-loss` stores weights: an enumeration, as a list of literals is no option."""

    int8 = "int8"
    int4 = "int4"


def init(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration to write.")],
    stage: Annotated[int, typer.Option(min=1, max=2)] = 1,
    records: Annotated[
        str, typer.Option(metavar="SOURCE", help="Images and their texts (docs/data.md).")
    ] = "captions.jsonl",
    images: Annotated[str, typer.Option(metavar="DIR", help="Folder of image files.")] = "images",
    encoder: Annotated[
        str, typer.Option(metavar="PATH", help="Folder or hub name of the frozen image encoder.")
    ] = "openai/clip-vit-large-patch14",
    language_model: Annotated[
        str, typer.Option(metavar="PATH", help="Folder or hub name of the frozen LLM (stage 2).")
    ] = "facebook/opt-2.7b",
    init_from: Annotated[
        str, typer.Option(metavar="RUN", help="The stage-1 run that stage 2 starts from.")
    ] = "runs/stage1",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
) -> None:
    """Write a commented configuration for a stage, an encoder and a language model.

    Example: blip2fast init stage1.yaml --records captions.csv --images photos
    """
    from blip2fast.training.config_template import write_config

    command = write_config(
        out,
        stage=stage,
        records=records,
        images=images,
        encoder=encoder,
        language_model=language_model,
        init_from=init_from,
        overwrite=overwrite,
    )
    print(f"wrote {out}; next: {command}")


def train(context: typer.Context) -> None:
    """Train stage 1 or stage 2 in one process.

    Several processes: `deepspeed --module blip2fast.train ...` or `torchrun -m blip2fast.train ...`
    with the same options; `blip2fast train --help` lists them.

    Example: blip2fast train --config configs/scenes_stage1.yaml --set optim.lr=1e-3
    """
    from blip2fast.train import leave_processes, main

    try:
        main(context.args, "blip2fast train")
    finally:
        leave_processes()


def plan(
    config: Config,
    set_: Set = None,
    processes: Annotated[int, typer.Option(min=1, help="Of the run, one a device.")] = 1,
    machines: Annotated[int, typer.Option(min=1, help="That the processes share.")] = 1,
    device_gib: Annotated[
        float | None, typer.Option(metavar="GIB", help="Of each device, instead of what is free.")
    ] = None,
    host_gib: Annotated[
        float | None, typer.Option(metavar="GIB", help="Of each machine, instead of what is free.")
    ] = None,
) -> None:
    """Print what a run takes in memory, in stage 2 for every way to keep its language model.

    Counts parameters, optimiser and activations of a run, and in stage 2 the memory of every way
    to keep its frozen language model. Nothing is loaded but config.json.

    Example: blip2fast plan --config configs/vitg_opt6.7b_stage2.yaml --processes 8 --device-gib 80
    """
    from blip2fast.training.config_files import load_config

    run = load_config(config, set_ or ())
    from blip2fast.training.memory_plan import GIB, Memory, machine_memory, plan_memory

    settle_process()
    memory = machine_memory()
    if device_gib is not None or host_gib is not None:
        device = memory.device if device_gib is None else int(device_gib * GIB)
        host = memory.host if host_gib is None else int(host_gib * GIB)
        on_host = memory.device_is_host and device_gib is None
        memory = Memory(host if on_host else device, host, on_host)
    planned = plan_memory(run, processes, machines, memory)
    chosen = planned.first(run.stream_storage)
    if on_terminal():
        _show_plan(planned, chosen)
    else:
        print(planned)
    said = "it fits as" if run.stage == 1 else "offload: auto would choose"
    print("nothing fits" if chosen is None else f"{said} {chosen.name!r}")


def _show_plan(planned: MemoryPlan, chosen: Option | None) -> None:
    """A table; where the terminal is too narrow for it, with the parts of one row alone."""
    print(f"{planned.heading}\n{planned.available}")
    table = planned.table()
    number = planned.options.index(chosen) if chosen else None
    width = sum(max(map(len, column)) + 3 for column in zip(*table, strict=True))
    whole = width <= get_terminal_size().columns
    show_table(table if whole else [[row[0], *row[-3:]] for row in table], chosen=number)
    if not whole and number is not None:
        names, parts = table[0][1:-3], table[number + 1][1:-3]
        print(f"{table[number + 1][0]}, GiB: ", end="")
        print(", ".join(f"{name} {part}" for name, part in zip(names, parts, strict=True)))
    for line in planned.notes:
        print(line)


def storage_loss(
    config: Config,
    set_: Set = None,
    storage: Annotated[
        list[FewerBits] | None, typer.Option(help="Repeatable; by default both.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """Print what storing the language model in 8 or 4 bits does to the loss.

    Loads a stage-2 run as it starts (init_from), on the CPU, and compares the loss of its first
    batches with the language model's weights as they are and in fewer bits.

    Example: blip2fast storage-loss --config configs/scenes_stage2.yaml --storage int4
    """
    from dataclasses import replace

    from blip2fast.training.config_files import load_config

    run = load_config(config, set_ or ())
    if run.stage != 2:
        raise ValueError("stage 1 has no language model: give a configuration of stage 2")
    if run.data.images is not None:
        raise ValueError("storage-loss reads a feature cache: set data.features, not data.images")
    from blip2fast.offload.blocks import find_blocks
    from blip2fast.offload.storage_loss import loss_difference
    from blip2fast.stage2.model import Blip2Stage2
    from blip2fast.training.build import build_run

    settle_process()
    parts = build_run(
        replace(run, offload="none", zero_stage=0, stream_storage="as_is", stream_buffers=2),
        rank=0,
        world_size=1,
    )
    if not isinstance(parts.model, Blip2Stage2):
        raise ValueError("stage 2 expected")
    model = parts.model.eval()
    first = [parts.batches[number] for number in range(batches)]
    kinds: list[Storage] = [kind.value for kind in storage or FewerBits]
    blocks = find_blocks(model.language_model)
    for kind in kinds:
        print(loss_difference(model, first, kind, blocks))
