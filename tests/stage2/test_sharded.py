"""Both stages under FSDP2, FSDP1, DDP and tensor parallelism: the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from stage1_cases import SMALL
from stage2_models import opt_model, stage2_config
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from blip2fast.qformer.layers import QFormerLayer
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2

pytestmark = pytest.mark.slow

B, S, T, STEPS = 8, 7, 6, 3


def stage1() -> nn.Module:
    torch.manual_seed(0)
    return Blip2Stage1(Stage1Config.from_dict(SMALL.to_dict())).double()


def stage2() -> nn.Module:
    torch.manual_seed(0)
    return (
        Blip2Stage2(
            stage2_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), opt_model()
        )
        .double()
        .eval()
    )


def batch(stage: str) -> dict[str, Tensor]:
    """Eight pairs of texts of one length, so that means of means are means."""
    generator = torch.Generator().manual_seed(0)
    width = SMALL.encoder_hidden_size if stage == "stage1" else stage2_config().encoder_hidden_size
    ids = torch.randint(4, 30, (B, T), generator=generator)
    tokens = torch.randn(B, S, width, generator=generator, dtype=torch.float64)
    given = {"image_embeds": tokens, "input_ids": ids}
    if stage == "stage1":
        given["negative_image"] = torch.tensor([2, 6, 0, 7, 1, 1, 3, 5])
        given["negative_text"] = torch.tensor([5, 0, 7, 1, 6, 2, 4, 3])
    return given


def fsdp2(model: Any) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def fsdp2_layers(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.qformer.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp1(model: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp1_flat(model: Any) -> nn.Module:
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), ignored_states=_frozen(model)
    )


def fsdp1_layers(model: Any) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({QFormerLayer}),
    )


def _frozen(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not p.requires_grad]


ENGINES: dict[str, Callable[[Any], nn.Module]] = {
    "FSDP2": fsdp2,
    "FSDP2 of layers": fsdp2_layers,
    "FSDP1": fsdp1,
    "FSDP1, flat": fsdp1_flat,
    "FSDP1 of layers": fsdp1_layers,
    "DDP": DistributedDataParallel,
}
STAGES: dict[str, Callable[[], nn.Module]] = {"stage1": stage1, "stage2": stage2}


def losses(stage: str, engine: Callable[[Any], nn.Module], rank: int, ranks: int) -> Any:
    """The losses of this process's share of a few steps, and what became of the temperature."""
    inner = STAGES[stage]()
    model = engine(inner)
    share = {name: x.chunk(ranks)[rank] for name, x in batch(stage).items()}
    if stage == "stage1":
        share["negatives"] = share.pop("negative_image"), share.pop("negative_text")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02)
    found = []
    for _ in range(STEPS):
        out = model(**share)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(out.loss.detach()))
    return found


def state_of(stage: str) -> dict[str, Any]:
    """A full state dict of an FSDP2 model, and that a model of one process takes it and back."""
    model = fsdp2(STAGES[stage]())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(model, options=options)
    plain = STAGES[stage]()
    if dist.get_rank() == 0:
        with torch.no_grad():
            for p in plain.parameters():
                p.zero_()
        plain.load_state_dict(state)
        expected = STAGES[stage]().state_dict()
        for name, value in plain.state_dict().items():
            assert torch.equal(value, expected[name]), name
    moved = {n: x + 1 if x.is_floating_point() else x for n, x in plain.state_dict().items()}
    set_model_state_dict(model, moved if dist.get_rank() == 0 else {}, options=options)
    return {"temp": None if stage == "stage2" else float(model.temp.full_tensor())}


def refusals() -> dict[str, str]:
    """What a sharded stage 1 says where FSDP has not gathered its weights."""
    model = fsdp2(stage1())
    images = batch("stage1")["image_embeds"]
    said = {}
    with pytest.raises(RuntimeError) as caught:
        model.encode_image(images)
    said["encode_image"] = str(caught.value)
    model = stage1()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.embeddings, mesh=mesh)
    fully_shard(model, mesh=mesh)
    share = {n: x.chunk(2)[dist.get_rank()] for n, x in batch("stage1").items()}
    share["negatives"] = share.pop("negative_image"), share.pop("negative_text")
    with pytest.raises(RuntimeError) as caught:
        model(**share)
    said["embeddings"] = str(caught.value)
    return said


def tensor_parallel() -> dict[str, Tensor]:
    """What a stage 1 with its layers in parts over the ranks computes, next to the whole one."""
    whole, parts = stage1(), stage1()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in cast(Any, parts).qformer.encoder.layer:
        linear = [name for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
        rows = ("query", "key", "value", "intermediate.dense", "intermediate_query.dense")
        plan = {n: ColwiseParallel() if n.endswith(rows) else RowwiseParallel() for n in linear}
        parallelize_module(layer, mesh, plan)
    given = batch("stage1")
    found = {}
    for name, model in (("whole", whole), ("parts", parts)):
        with torch.no_grad():
            found[name] = cast(Any, model).match(given["image_embeds"], given["input_ids"])
    return found


def _worker(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}/store", rank=rank, world_size=ranks)
    found: dict[str, Any] = {}
    for stage in STAGES:
        for name, engine in ENGINES.items():
            try:
                found[f"{stage}, {name}"] = losses(stage, engine, rank, ranks)
            except Exception as error:
                found[f"{stage}, {name}"] = f"{type(error).__name__}: {error}"
        found[f"{stage}, state"] = state_of(stage)
    found["refusals"] = refusals()
    found["tensor parallel"] = tensor_parallel()
    torch.save(found, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    path = tmp_path_factory.mktemp("sharded")
    mp.spawn(_worker, args=(2, str(path)), nprocs=2)
    return [torch.load(Path(path) / f"rank{r}.pt") for r in range(2)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_process(ranks: list[Any], stage: str, engine: str) -> None:
    """Of three steps: the temperature moves with them. FSDP refused it, a scalar."""
    expected = torch.tensor(losses(stage, lambda model: model, 0, 1))
    found = [rank[f"{stage}, {engine}"] for rank in ranks]
    assert not any(isinstance(each, str) for each in found), found
    torch.testing.assert_close(torch.tensor(found).mean(0), expected, rtol=1e-6, atol=0)


def test_sharded_state_is_exchanged_with_a_whole_model(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank["stage1, state"]["temp"] == pytest.approx(1.07)


def test_layers_in_parts_are_the_whole_ones(ranks: list[Any]) -> None:
    """Every rank took its columns for all heads, of half the width."""
    for rank in ranks:
        found = rank["tensor parallel"]
        torch.testing.assert_close(found["parts"], found["whole"], rtol=1e-9, atol=1e-9)


def test_what_is_not_gathered_is_named(ranks: list[Any]) -> None:
    for rank in ranks:
        said = rank["refusals"]
        assert said["encode_image"].startswith("query_tokens is a DTensor, which FSDP gathers")
        assert said["embeddings"].startswith("embeddings.word_embeddings.weight is a DTensor")
