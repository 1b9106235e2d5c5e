"""The losses one pair at a time, and over several processes against one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from stage1_cases import SMALL, make_batch
from torch import Tensor

from blip2fast.ops import itc_loss
from blip2fast.stage1 import losses
from blip2fast.stage1.config import Stage1Output
from blip2fast.stage1.model import Blip2Stage1

NEGATIVES = (torch.tensor([2, 3, 0, 1]), torch.tensor([3, 2, 1, 0]))


def unit(*shape: int, seed: int) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_itc_loss_by_hand() -> None:
    images, texts, temp = unit(4, 3, 5, seed=0), unit(4, 5, seed=1), torch.tensor(0.2).double()
    loss = itc_loss(images, texts, temp, label_smoothing=0.1, negatives="none").loss

    def similarity(i: int, j: int) -> float:
        return max(float(images[i, q] @ texts[j]) for q in range(3)) / 0.2

    total = 0.0
    for i in range(4):
        for row in (
            [similarity(i, j) for j in range(4)],
            [similarity(j, i) for j in range(4)],
        ):
            lse = math.log(sum(math.exp(s) for s in row))
            target = [0.9 * (j == i) + 0.1 / 4 for j in range(4)]
            total -= sum(t * (s - lse) for t, s in zip(target, row, strict=True))
    assert float(loss) == pytest.approx(total / 8, rel=1e-7)


def test_first_query_wins_a_tie_and_gets_the_gradient() -> None:
    images = torch.zeros(1, 3, 2, dtype=torch.float64)
    images[0, 1:, 0] = 1.0
    images.requires_grad_()
    texts = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    losses.max_query_similarity(images, texts).sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0].tolist() == [0.0, 1.0, 0.0]


def test_large_image_ids_are_compared_exactly() -> None:
    """Ids beyond 2^24 collide when compared in fp32."""
    images, texts, temp = unit(3, 2, 5, seed=0), unit(3, 5, seed=1), torch.tensor(0.2).double()
    found = [
        float(itc_loss(images, texts, temp, image_ids=torch.tensor(ids), negatives="none").loss)
        for ids in ([2**24, 2**24 + 1, 2**24], [0, 1, 0], [0, 0, 0])
    ]
    assert found[0] == found[1]
    assert abs(found[0] - found[2]) > 1e-3


def test_local_gradients_stop_at_the_gathered_side() -> None:
    """Local: each direction sends gradient to its own rows alone; full: to both sides."""
    texts = unit(4, 5, seed=1)
    grads = {}
    for mode in ("local", "full"):
        images = unit(4, 3, 5, seed=0).requires_grad_()
        sim_i2t, sim_t2i = losses.itc_logits(images, texts, torch.tensor(0.1).double(), mode)
        (grads[mode],) = torch.autograd.grad(sim_t2i.sum() + 0 * sim_i2t.sum(), images)
    assert float(grads["local"].abs().sum()) == 0
    assert float(grads["full"].abs().sum()) > 0


def test_mismatched_features_name_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"text_features: expected \[b, D\] = \[4, 5\].*\(4, 6\)"):
        losses.itc_logits(unit(4, 3, 5, seed=0), unit(4, 6, seed=0), torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"image_features: expected \[b, Q, D\]"):
        losses.itc_logits(unit(4, 5, seed=0), unit(4, 5, seed=0), torch.tensor(0.1))


def _share(batch: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    return {name: value.chunk(ranks)[rank] for name, value in batch.items()}


def _global_batch() -> dict[str, Tensor]:
    batch = make_batch(SMALL, batch=4)
    # equal lengths: generation averages over the tokens of a rank, the rest over pairs
    batch["attention_mask"].fill_(1)
    batch["input_ids"].masked_fill_(batch["input_ids"] == SMALL.pad_token_id, 7)
    return batch


def _ragged_batch() -> dict[str, Tensor]:
    """Texts of rank 1 are shorter, image masks differ, and the tokens want a gradient."""
    batch = make_batch(SMALL, batch=4, seed=1)
    batch["attention_mask"][2:, 6:] = 0
    batch["input_ids"][2:, 6:] = SMALL.pad_token_id
    lengths = torch.tensor([7, 4, 5, 2])
    batch["image_attention_mask"] = (torch.arange(7)[None] < lengths[:, None]).long()
    batch["image_embeds"].requires_grad_()
    return batch


def _model(grad_mode: str) -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(replace(SMALL, grad_mode=grad_mode)).double().eval()


def _forward(model: Blip2Stage1, share: dict[str, Tensor], rank: int, ranks: int) -> Stage1Output:
    return model(**share, negatives=tuple(n.chunk(ranks)[rank] for n in NEGATIVES))


REFUSALS = (
    "batch size: expected the same on every rank, got [1, 2]",
    "image tokens: expected the same on every rank, got [6, 7]",
    "image_ids given: expected the same on every rank, got [1, 0]",
)


def _refusals(rank: int, ranks: int) -> list[str]:
    """Batches that differ between ranks end in an error on all of them, not in an abort."""
    share = _share(_global_batch(), rank, ranks)
    pairs = {name: value[: 1 + rank] for name, value in share.items()}
    tokens = {**share, "image_embeds": share["image_embeds"][:, : 6 + rank]}
    ids = {**share, "image_ids": torch.arange(2)} if rank == 0 else share
    messages = []
    for batch in (pairs, tokens, ids):
        with pytest.raises(ValueError) as caught:
            _model("local")(**batch)
        messages.append(str(caught.value))
    return messages


def _worker(rank: int, ranks: int, path: str, ids: Tensor | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}/store", rank=rank, world_size=ranks)
    results: dict[str, object] = {}
    for mode in ("local", "full"):
        model = _model(mode)
        share = _share(_global_batch(), rank, ranks)
        out = model(
            **share,
            image_ids=None if ids is None else ids.chunk(ranks)[rank],
            negatives=tuple(n.chunk(ranks)[rank] for n in NEGATIVES),
        )
        out.loss.backward()
        results[mode] = {
            "losses": {k: out[k].detach() for k in ("loss_itc", "loss_itm", "loss_itg")},
            "grads": {name: p.grad for name, p in model.named_parameters()},
        }
    sampled = _model("local")(**_share(_global_batch(), rank, ranks))
    results["negatives"] = (sampled.negative_image, sampled.negative_text)
    share = _share(_ragged_batch(), rank, ranks)
    share["image_embeds"] = share["image_embeds"].detach().requires_grad_()
    if rank == 1:
        share["input_ids"] = share["input_ids"][:, :6]
        share["attention_mask"] = share["attention_mask"][:, :6]
    out = _forward(_model("full"), share, rank, ranks)
    (out.loss_itc + out.loss_itm).backward()
    results["ragged"] = (out.loss_itm.detach(), share["image_embeds"].grad)
    results["refused"] = _refusals(rank, ranks)
    torch.save(results, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("with_ids", [False, True])
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path, with_ids: bool) -> None:
    ids = torch.tensor([7, 1, 2, 7]) if with_ids else None
    mp.spawn(_worker, args=(2, str(tmp_path), ids), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]

    for mode in ("local", "full"):
        model = _model(mode)
        truth = model(**_global_batch(), image_ids=ids, negatives=NEGATIVES)
        truth.loss.backward()
        for name in ("loss_itc", "loss_itm", "loss_itg"):
            mean = sum(float(r[mode]["losses"][name]) for r in ranks) / 2
            assert mean == pytest.approx(float(truth[name].detach()), rel=1e-12), (mode, name)
        for name, parameter in model.named_parameters():
            mean = sum(r[mode]["grads"][name] for r in ranks) / 2
            assert torch.allclose(mean, parameter.grad, rtol=1e-9, atol=1e-11), (mode, name)

    for rank, result in enumerate(ranks):
        own = torch.arange(2) + 2 * rank
        for negative in result["negatives"]:
            assert bool(((negative >= 0) & (negative < 4) & (negative != own)).all())
        for message, expected in zip(result["refused"], REFUSALS, strict=True):
            assert expected in message

    batch = _ragged_batch()
    truth = _model("full")(**batch, negatives=NEGATIVES)
    (truth.loss_itc + truth.loss_itm).backward()
    losses_itm = torch.stack([r["ragged"][0] for r in ranks])
    assert float(losses_itm.mean()) == pytest.approx(float(truth.loss_itm.detach()), rel=1e-12)
    # each rank's loss is a mean over its own half: their sum is twice that of the whole
    tokens = torch.cat([r["ragged"][1] for r in ranks]) / 2
    assert torch.allclose(tokens, batch["image_embeds"].grad, rtol=1e-9, atol=1e-11)
