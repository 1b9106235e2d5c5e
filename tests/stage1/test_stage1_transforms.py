"""Stage 1 under torch.compile and torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage1_cases import SMALL, make_batch, relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1

NEGATIVES = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "image ids": {"image_ids": torch.tensor([7, 1, 2, 7, 4, 2])},
    "no mask": {"attention_mask": None},
    "image mask": {"image_attention_mask": torch.arange(7) < torch.tensor([[7]] * 3 + [[2]] * 3)},
}


def a_model(**changes: Any) -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(Stage1Config.from_dict(SMALL.to_dict() | changes)).double()


def a_batch(extra: str = "plain") -> dict[str, Any]:
    return make_batch(SMALL, batch=6) | {"negatives": NEGATIVES} | EXTRAS[extra]


def truth(extra: str) -> tuple[Any, dict[str, Tensor]]:
    model = a_model()
    out = model(**a_batch(extra))
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if not name.endswith("key.bias"):
            assert relative_error(value, expected[name]) < 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_compiles_into_one_graph(extra: str) -> None:
    """The host looked at the ids, then at the lengths of the texts."""
    expected, gradients = truth(extra)
    model = a_model()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**a_batch(extra))
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg", "accuracy_itg", "itm_logits"):
        assert relative_error(out[name] + 1, expected[name] + 1) < 1e-11, name
    assert int(out.counts["loss_itg"]) == int(expected.counts["loss_itg"])
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, gradients)
    with pytest.raises(AttributeError, match="not kept by a compiled or transformed call"):
        _ = out.sim_i2t


@pytest.mark.slow
def test_compiled_draws_negatives_and_dropout() -> None:
    model = a_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = a_batch() | {"negatives": None}
    losses = []
    for _ in range(3):
        out = compiled(**batch)
        losses.append(float(out.loss.detach()))
        assert ((out.negative_text >= 0) & (out.negative_text != torch.arange(6))).all()
    assert len(set(losses)) == 3


def test_functional_call() -> None:
    expected, _ = truth("plain")
    model = a_model()
    parameters = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    moved = functional_call(model, parameters, (), a_batch()).loss
    assert not torch.equal(moved, expected.loss)
    model.load_state_dict({name: x.detach() for name, x in parameters.items()})
    assert torch.equal(moved, model(**a_batch()).loss)


@pytest.mark.parametrize("extra", EXTRAS)
def test_grad(extra: str) -> None:
    """The fused operators have no rules for it."""
    _, gradients = truth(extra)
    model = a_model()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        value: Tensor = functional_call(model, parameters, (), a_batch(extra)).loss
        return value

    assert_same(grad(loss)({n: p.detach() for n, p in model.named_parameters()}), gradients)


@pytest.mark.usefixtures("own_linear")
@pytest.mark.parametrize("through", ["torch.func", "dual numbers", "dual numbers, no gradients"])
def test_forward_derivatives(through: str) -> None:
    """The fused operators and PyTorch's fused attention have none."""
    _, gradients = truth("image mask")
    model, batch = a_model(), a_batch("image mask")
    point = {name: p.detach() for name, p in model.named_parameters()}
    draws = torch.Generator().manual_seed(3)
    towards = {n: torch.randn(p.shape, generator=draws).double() for n, p in point.items()}
    expected = sum((gradients[n] * towards[n]).sum() for n in gradients)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        value: Tensor = functional_call(model, parameters, (), batch).loss
        return value

    if through == "torch.func":
        _, found = jvp(loss, (point,), (towards,))
    else:
        with forward_ad.dual_level(), torch.set_grad_enabled("no" not in through):
            dual = {n: forward_ad.make_dual(p, towards[n]) for n, p in point.items()}
            found = forward_ad.unpack_dual(loss(dual)).tangent
    assert relative_error(found, expected) < 1e-9


def test_negatives_are_drawn_under_grad() -> None:
    model = a_model()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        batch = a_batch() | {"negatives": None}
        out = functional_call(model, parameters, (), batch)
        assert (out.negative_image >= 0).all()
        value: Tensor = out.loss
        return value

    found = grad(loss)({n: p.detach() for n, p in model.named_parameters()})
    assert all(x.isfinite().all() for x in found.values())


def test_packed_texts_are_refused_where_shapes_are_fixed() -> None:
    model = a_model()
    with pytest.raises(ValueError, match=r"cu_seqlens: a compiled or transformed model takes"):
        grad(
            lambda p: (
                functional_call(
                    model,
                    p,
                    (
                        torch.randn(2, 3, SMALL.encoder_hidden_size).double(),
                        torch.tensor([2, 3, 2, 3]),
                    ),
                    {"cu_seqlens": torch.tensor([0, 2, 4])},
                ).loss
            )
        )({n: p.detach() for n, p in model.named_parameters()})
