"""Layers of the trained part that are not plain are called in stage 2, with gradients or not."""

from __future__ import annotations

import pytest
import torch
from stage1_cases import relative_error
from stage2_models import opt_model, stage2_config
from torch import Tensor, nn
from wrapped_layers import SAME_OUTPUT, WRAPPERS, Wrapper, wrap

from blip2fast.qformer import absorption
from blip2fast.stage2.model import Blip2Stage2

pytestmark = pytest.mark.usefixtures("own_linear")

LAYERS = (
    "qformer.encoder.layer.0.crossattention.attention.value",
    "qformer.encoder.layer.0.output_query.dense",
    "language_projection",
)


def a_model() -> Blip2Stage2:
    torch.manual_seed(0)
    model = Blip2Stage2(stage2_config(), opt_model()).eval()
    for parameter in model.trainable_parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def values(model: Blip2Stage2, grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = model.config.encoder_hidden_size
    image = torch.randn(3, 7, width, generator=generator)
    ids = torch.randint(3, 30, (3, 5), generator=generator)
    with torch.set_grad_enabled(grad):
        out = model(image, ids)
        return [out.loss.detach(), out.prompts.detach(), model.encode_image(image)[0].detach()]


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("where", LAYERS)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_linear_layers(
    kind: str, where: str, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absorption, "_FEWER_OPERATIONS", torch.inf if absorbed else 0.0)
    model = a_model()
    wrap(model, where, kind)
    read, called = values(model, grad=False), values(model, grad=True)
    for ours, truth in zip(read, called, strict=True):
        assert relative_error(ours, truth) < 1e-5
    if kind not in SAME_OUTPUT:
        assert relative_error(called[1], values(a_model(), grad=True)[1]) > 1e-3
    if where.startswith("qformer."):
        assert f"{where.removeprefix('qformer.')} (" in repr(model)


@pytest.mark.parametrize("where", ["ln_vision", "qformer.layernorm", "language_projection"])
def test_modules_without_a_weight(where: str) -> None:
    """The dtype that they take is that of their parameters."""
    model, plain = a_model(), values(a_model(), grad=True)
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, Wrapper(model.get_submodule(where)))
    assert relative_error(values(model, grad=True)[1], plain[1]) > 1e-3
