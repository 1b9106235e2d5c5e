"""Batches in which a row, or every row, has no negative: ITM counts what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from small_run import config, write_world
from stage1_cases import SMALL, make_batch
from torch import Tensor

from blip2fast.stage1.contrast import step_contrast
from blip2fast.stage1.losses import itm_loss
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train

SUBSETS = [("itc",), ("itc", "itm"), ("itc", "itg"), ("itc", "itm", "itg")]


def small_model(**options: Any) -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(SMALL, **options).double()


def gradients(model: Blip2Stage1) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_image(batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Pairs of one image id."""
    return {**make_batch(SMALL, batch, seed=seed), "image_ids": torch.full((batch,), 3)}


@pytest.mark.parametrize("losses", SUBSETS)
@pytest.mark.parametrize("batch", [2, 5])
def test_a_batch_of_one_image_trains_on_its_other_losses(
    losses: tuple[str, ...], batch: int
) -> None:
    model, without = small_model(losses=losses), small_model(losses=set(losses) - {"itm"})
    torch.manual_seed(1)
    out = model(**one_image(batch))
    out.loss.backward()
    torch.manual_seed(1)
    expected = without(**one_image(batch))
    expected.loss.backward()
    assert out.negative_image.tolist() == out.negative_text.tolist() == [-1] * batch
    if "itm" in losses:
        assert out.loss_itm.item() == out.accuracy_itm.item() == 0
        assert all(
            float(model.itm_head.get_parameter(n).grad.norm()) == 0 for n in ("weight", "bias")
        )
    assert torch.equal(out.loss, expected.loss)
    found = gradients(model)
    for name, gradient in gradients(without).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14, msg=name)


def test_itm_of_no_row_has_no_gradient_at_all() -> None:
    model = small_model()
    model(**one_image(3)).loss_itm.backward()
    found = gradients(model)
    assert "itm_head.weight" in found
    assert all(not gradient.any() for gradient in found.values())


def test_given_negatives_that_are_missing_are_left_out() -> None:
    """The mean over the pairs that exist, each computed on its own."""
    model = small_model().eval()
    batch = make_batch(SMALL, 6)
    image, text = torch.tensor([2, -1, 0, -1, 5, 4]), torch.tensor([5, 4, -1, -1, 2, 1])
    out = model(**batch, negatives=(image, text))

    def each(images: list[int], texts: list[int], label: int) -> Tensor:
        logits = model.match(
            batch["image_embeds"][images], batch["input_ids"][texts], batch["attention_mask"][texts]
        )
        return F.cross_entropy(logits, torch.full((len(images),), label), reduction="none")

    matching = each([0, 1, 2, 4, 5], [0, 1, 2, 4, 5], 1)
    others = each([2, 0, 5, 4], [0, 2, 4, 5], 0), each([0, 1, 4, 5], [5, 4, 2, 1], 0)
    truth = torch.cat([matching, *others])
    torch.testing.assert_close(out.loss_itm, truth.mean(), rtol=1e-10, atol=0)
    right = (truth < torch.tensor(2.0).log()).double().mean()
    torch.testing.assert_close(out.accuracy_itm.double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pairs", [2, 7, 100])
def test_where_no_negative_is_missing_the_bits_are_those_of_cross_entropy(
    dtype: torch.dtype, pairs: int
) -> None:
    logits = torch.randn(3 * pairs, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = (torch.arange(3 * pairs) < pairs).long()
    found, expected = (logits.clone().requires_grad_() for _ in range(2))
    negatives = torch.zeros(pairs).long(), torch.ones(pairs).long()
    loss, accuracy = itm_loss(found, negatives, torch.tensor(torch.nan))
    wide = expected if dtype == torch.float64 else expected.float()
    truth = F.cross_entropy(wide, labels)
    (3 * loss).backward()
    (3 * truth).backward()
    assert torch.equal(loss, truth)
    assert torch.equal(found.grad, expected.grad)
    assert float(accuracy) == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))


@pytest.mark.parametrize("where", ["image", "temperature", "matching"])
@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 2, 3]), torch.zeros(4).long()])
def test_what_is_not_finite_is_not_taken_for_a_missing_negative(
    where: str, ids: Tensor | None
) -> None:
    model = small_model().eval()
    batch = make_batch(SMALL, 4)
    with torch.no_grad():
        if where == "image":
            batch["image_embeds"][1] = torch.nan
        elif where == "temperature":
            model.temp.fill_(torch.nan)
        else:
            model.itm_head.bias[0] = torch.nan
    out = model(**batch, image_ids=ids)
    assert out.loss.isnan()
    assert out.loss_itm.isnan()
    assert out.loss_itc.isnan() == (where != "matching")


def test_a_step_of_several_batches_one_of_which_has_no_negative() -> None:
    """`grad_cache`: ITC compares the pairs of all of them, ITM those of each."""
    model = small_model().eval()
    batches = [one_image(2), {**make_batch(SMALL, 3, seed=1), "image_ids": torch.tensor([3, 1, 4])}]
    contrasts = step_contrast(model.features, batches, model.config)
    outputs = [
        model(**batch, contrast=contrast)
        for batch, contrast in zip(batches, contrasts, strict=True)
    ]
    sum(out.loss for out in outputs).backward()
    assert outputs[0].loss_itm.item() == 0
    assert outputs[1].loss_itm.item() > 0
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def _worker(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}/store", rank=rank, world_size=ranks)
    model = small_model().eval()
    share = {name: x.chunk(ranks)[rank] for name, x in one_image(4).items()}
    sampled = model(**share)
    given = tuple(x.chunk(ranks)[rank] for x in (torch.tensor([2, -1, -1, -1]),) * 2)
    batch = {name: x for name, x in share.items() if name != "image_ids"}
    some = model(**batch, negatives=given)
    (sampled.loss + some.loss).backward()
    kept = {
        "sampled": (sampled.loss_itm.detach(), sampled.negative_image),
        "given": some.loss_itm.detach(),
        "loss": sampled.loss_itc.detach(),
        "finite": all(g.isfinite().all() for g in gradients(model).values()),
    }
    torch.save(kept, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_pairs_of_one_image(tmp_path: Path) -> None:
    mp.spawn(_worker, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for kept in ranks:
        assert float(kept["sampled"][0]) == 0
        assert kept["sampled"][1].tolist() == [-1, -1]
        assert kept["finite"]
    whole = small_model().eval()(**one_image(4))
    together = torch.stack([kept["loss"] for kept in ranks]).mean()
    torch.testing.assert_close(together, whole.loss_itc.detach(), rtol=1e-10, atol=0)
    assert float(ranks[0]["given"]) > 0
    assert float(ranks[1]["given"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("grad_cache", [False, True])
def test_a_run_on_few_images_with_several_records_each(tmp_path: Path, grad_cache: bool) -> None:
    world = write_world(tmp_path / "world")
    records = (world / "train.jsonl").read_text().splitlines()[:2]
    (world / "train.jsonl").write_text("\n".join(records * 5) + "\n")
    optim = {"batch_size": 2, "accumulation": 2, "grad_cache": grad_cache}
    train(config(world, tmp_path / "run", 1, optim=optim), say=lambda _: None)
    losses = [line["loss_itm"] for line in read_metrics(tmp_path / "run") if "loss_itm" in line]
    assert losses
    assert all(loss >= 0 for loss in losses)
