"""ITC over all pairs of an optimizer step, at the memory of one of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from small_run import be_one_of_two, config, distance, free_port, write_world
from stage1_cases import SMALL, make_batch
from torch import Tensor

from blip2fast.kernels.philox import philox_state
from blip2fast.ops import itc_loss
from blip2fast.stage1 import contrast as stage1_contrast
from blip2fast.stage1 import model as stage1
from blip2fast.stage1.contrast import step_contrast
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.training.engine import leave_processes
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train

SIZES = (4, 3, 5)  # pairs of each batch of a step
DROPOUT = replace(SMALL, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
IDS = (torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0, 5]), torch.tensor([6, 1, 7, 8, 4]))


def step_batches(image_ids: bool) -> list[dict[str, Tensor]]:
    batches = []
    for number, size in enumerate(SIZES):
        batch = make_batch(SMALL, size, seed=number)
        batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
        batches.append(batch | ({"image_ids": IDS[number]} if image_ids else {}))
    return batches


def cached_gradients(
    model: Blip2Stage1, batches: list[dict[str, Tensor]]
) -> tuple[dict[str, Tensor], list[Any]]:
    """Gradients of the mean of the batches' losses, and their outputs."""
    model.zero_grad()
    contrasts = step_contrast(model.features, batches, model.config)
    outputs = []
    for batch, contrast in zip(batches, contrasts, strict=True):
        output = model(**batch, contrast=contrast)
        (output.loss / len(batches)).backward()
        outputs.append(output)
    return gradients(model), outputs


def gradients(model: Blip2Stage1) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name],
            gradient,
            rtol=1e-9,
            atol=1e-11 * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.fixture(params=[False, True], ids=["plain", "image ids"])
def batches(request: pytest.FixtureRequest) -> list[dict[str, Tensor]]:
    return step_batches(request.param)


@pytest.fixture
def kept_seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The seeds that a step draws, in order."""
    seeds: list[Tensor] = []

    def drawn(device: torch.device) -> Tensor:
        seeds.append(philox_state(device=device))
        return seeds[-1]

    monkeypatch.setattr(stage1_contrast, "philox_state", drawn)
    return seeds


def test_without_dropout_it_is_one_batch_of_all_pairs(batches: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model = Blip2Stage1(SMALL, losses=("itc",)).double()
    found, outputs = cached_gradients(model, batches)
    model.zero_grad()
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    expected = model(**whole)
    expected.loss.backward()
    assert_gradients(found, gradients(model))
    for output in outputs:
        torch.testing.assert_close(output.loss_itc, expected.loss_itc)
        torch.testing.assert_close(output.accuracy_t2i, expected.accuracy_t2i)


def test_with_dropout_and_the_other_losses(
    batches: list[dict[str, Tensor]], kept_seeds: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the graph of the whole step: features of all batches, one ITC, and each batch's rest.

    The same seeds make the same masks and negatives.
    """
    torch.manual_seed(0)
    model = Blip2Stage1(DROPOUT).double()
    found, outputs = cached_gradients(model, batches)
    assert len(kept_seeds) == len(batches)
    model.zero_grad()
    loss, encoded = 0.0, []
    for batch, seed, cached in zip(batches, list(kept_seeds), outputs, strict=True):
        monkeypatch.setattr(stage1, "philox_state", lambda device, seed=seed: seed)
        output = model(**batch)
        torch.testing.assert_close(cached.image_features, output.image_features)
        torch.testing.assert_close(cached.loss_itm, output.loss_itm)
        assert cached.negative_text.equal(output.negative_text)
        encoded.append((output.image_features, output.text_features))
        loss = loss + (output.loss_itm + output.loss_itg) / len(batches)
    image_ids = torch.cat([b["image_ids"] for b in batches]) if "image_ids" in batches[0] else None
    itc = itc_loss(
        *(torch.cat(x) for x in zip(*encoded, strict=True)),
        model.temp,
        image_ids=image_ids,
        negatives="none",
    )
    (loss + itc.loss).backward()
    assert_gradients(found, gradients(model))


def test_batches_that_do_not_fit_are_refused() -> None:
    model = Blip2Stage1(SMALL).double()
    encode = model.features
    with pytest.raises(ValueError, match="batches: expected one or more, got none"):
        step_contrast(encode, [], SMALL)
    first, second, third = step_batches(image_ids=False)
    with pytest.raises(ValueError, match="image_ids: given with 1 of 2 batches"):
        step_contrast(encode, [first | {"image_ids": IDS[0]}, second], SMALL)
    contrast = step_contrast(encode, [first, second], SMALL)[0]
    with pytest.raises(
        ValueError, match=r"image features \[4, 5, 16\], the batch has \[5, 5, 16\]"
    ):
        model(**third, contrast=contrast)


def _settings(split: int) -> dict[str, Any]:
    """A step of eight pairs in `split` passes; ITC alone, nothing random."""
    optim = {"batch_size": 8 // split, "accumulation": split, "losses": ["itc"]}
    return {
        "model": {"dropout": 0.0},
        "data": {"max_txt_len": 4},
        "optim": optim | {"grad_cache": split > 1},
    }


def _quiet(_: str) -> None: ...


def _one_of_two(rank: int, port: int, world: Path, outputs: Path) -> None:
    be_one_of_two(rank, port)
    settings = _settings(4)
    settings["optim"] |= {"accumulation": 2}
    for zero_stage in (0, 3):
        run = config(world, outputs / f"two-{zero_stage}", 1, zero_stage=zero_stage, **settings)
        train(run, say=_quiet)
    leave_processes()


def _losses(folder: Path) -> list[float]:
    return [line["loss_itc"] for line in read_metrics(folder) if "loss_itc" in line]


@pytest.mark.slow
def test_training_in_passes_is_training_at_once(tmp_path: Path) -> None:
    """One process under ZeRO 0, 2 and 3, and two."""
    world = write_world(tmp_path / "world")
    train(config(world, tmp_path / "once", 1, **_settings(1)), say=_quiet)
    for zero_stage in (0, 2, 3):
        run = config(world, tmp_path / f"{zero_stage}", 1, zero_stage=zero_stage, **_settings(2))
        train(run, say=_quiet)
    mp.spawn(_one_of_two, (free_port(), world, tmp_path), nprocs=2)
    expected = _losses(tmp_path / "once")
    assert len(expected) == 6
    for name in ("0", "2", "3", "two-0", "two-3"):
        torch.testing.assert_close(_losses(tmp_path / name), expected, rtol=1e-4, atol=0)
        assert distance(tmp_path / name, tmp_path / "once") < 1e-3


def test_without_it_passes_compare_fewer_pairs(tmp_path: Path) -> None:
    """The control of the test above."""
    world = write_world(tmp_path / "world")
    settings = _settings(2)
    train(config(world, tmp_path / "once", 1, **_settings(1)), say=_quiet)
    settings["optim"]["grad_cache"] = False
    train(config(world, tmp_path / "apart", 1, **settings), say=_quiet)
    assert _losses(tmp_path / "apart")[0] < 0.9 * _losses(tmp_path / "once")[0]
