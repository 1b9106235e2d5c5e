"""A stage-1 step never makes its host wait for the device; "meta" stands in for one.

Tensors there have no values: reading one raises. What would wait without reading is counted: copies
from the host that block, and numbers assigned to places of a tensor, which CUDA copies likewise.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from stage1_cases import SMALL, make_batch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blip2fast.ops.itc.loss import _philox as philox_of_negatives
from blip2fast.ops.itc.loss import itc_loss
from blip2fast.stage1.model import Blip2Stage1


class Copies(TorchDispatchMode):
    """Copies between the host and the device: how many, and which of them block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.blocking: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if str(func) in ("aten._to_copy.default", "aten.copy_.default"):
            places = [x.device.type for x in (*args, result) if isinstance(x, Tensor)]
            if len(set(places)) > 1:
                self.count += 1
                if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                    self.blocking.append(f"{func} {places}")
        return result


class Assignments(TorchFunctionMode):
    """Numbers assigned to places of tensors on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
            self.found.append(args[1:] if args[0].device.type == "meta" else None)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def autocast_of_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)


@pytest.mark.usefixtures("autocast_of_meta")
@pytest.mark.parametrize(("dropout", "with_ids"), [(0.0, False), (0.1, False), (0.0, True)])
def test_a_step_with_texts_on_the_host(dropout: float, with_ids: bool) -> None:
    config = replace(SMALL, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = Blip2Stage1(config).to("meta")
    batch = make_batch(config, 6)
    batch["image_embeds"] = batch["image_embeds"].float().to("meta")
    if with_ids:
        batch["image_ids"] = torch.zeros(6).long().to("meta")
    with Copies() as copies, Assignments() as assignments:
        model(**batch).loss.backward()
    assert copies.blocking == []
    assert assignments.found == []
    # words, places and offsets of texts; of two layouts lengths, kinds and blocks
    assert copies.count == 8


def test_assignments_are_seen() -> None:
    x = torch.empty(3, device="meta")
    with Assignments() as assignments:
        x[1] = 5
        x[1].fill_(5)
    assert assignments.found == [(1, 5)]


@pytest.mark.parametrize("saved", [0, 2**30])
def test_itc_with_ids_and_a_generator(saved: int) -> None:
    image, text, temp = (
        torch.randn(shape, device="meta", requires_grad=True) for shape in ((6, 4, 16), (6, 16), ())
    )
    ids = torch.arange(6, device="meta")
    with Copies() as copies, Assignments() as assignments:
        itc_loss(image, text, temp, image_ids=ids, save_budget_bytes=saved).loss.backward()
        philox_of_negatives(None, torch.device("meta"))
    assert copies.count == 0
    assert assignments.found == []
