"""Layers that are not plain are called, whatever changed them and whichever path runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qformer_cases import B, E, Q, S, blip2_config, images, make, rows
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from wrapped_layers import SAME_OUTPUT, WRAPPERS, wrap

from blip2fast import QFormer
from blip2fast.qformer import absorption

pytestmark = pytest.mark.usefixtures("own_linear")

LAYERS = (
    "attention.attention.value",
    "attention.output.dense",
    "crossattention.attention.query",
    "crossattention.attention.key",
    "crossattention.attention.value",
    "intermediate_query.dense",
    "output_query.dense",
)
CALL: dict[str, Any] = {
    "query_embeds": rows(length=Q),
    "encoder_hidden_states": images(),
}


def model() -> QFormer:
    return make(blip2_config(), torch.float32)


def run(qformer: QFormer, grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad):
        return qformer(**CALL).last_hidden_state.detach()


@pytest.fixture(params=["projected", "absorbed"])
def cross(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorption wherever it may run, or nowhere: sizes do not decide."""
    low = 0.0 if request.param == "projected" else torch.inf
    monkeypatch.setattr(absorption, "_FEWER_OPERATIONS", low)


@pytest.mark.usefixtures("cross")
@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("where", LAYERS)
def test_inference_is_the_called_module(kind: str, where: str) -> None:
    """With gradients every module is called; without, plain ones are read.

    A forward replaced on the instance was dropped, and a weight of a subclass was read as numbers.
    """
    qformer, plain = model(), model()
    wrap(qformer, f"encoder.layer.0.{where}", kind)
    called = run(qformer, grad=True)
    torch.testing.assert_close(run(qformer, grad=False), called, rtol=1e-5, atol=1e-5)
    key = where.endswith("crossattention.attention.key")  # softmax does not see a shift
    same = kind in SAME_OUTPUT
    if not (same or key):
        assert not torch.allclose(called, run(plain, grad=True), atol=1e-3)
    assert f"encoder.layer.0.{where} (" in repr(qformer)
    assert "called, not read" not in repr(plain)


@pytest.mark.usefixtures("cross")
@pytest.mark.parametrize("kind", ["class", "global hook", "global pre-hook", "call"])
def test_what_changes_every_linear_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qformer = model()
    plain = run(qformer, grad=True)
    handle = None
    if kind == "class":
        old = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: old(self, x) + x[..., :1])
    elif kind == "call":
        call = nn.Module.__call__

        def shifted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            y = call(self, *args, **kwargs)
            return y + 1 if isinstance(self, nn.Linear) else y

        monkeypatch.setattr(nn.Module, "__call__", shifted)
    elif kind == "global hook":
        handle = modules.register_module_forward_hook(
            lambda module, _, y: y + 1 if isinstance(module, nn.Linear) else None
        )
    else:
        handle = modules.register_module_forward_pre_hook(
            lambda module, x: (x[0] * 2,) if isinstance(module, nn.Linear) else None
        )
    try:
        called, read = run(qformer, grad=True), run(qformer, grad=False)
        torch.testing.assert_close(read, called, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(called, plain, atol=1e-3)
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.usefixtures("cross")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_another_dtype(dtype: torch.dtype) -> None:
    """Under autocast both forms cast; without it both refuse."""
    qformer = model()
    qformer.encoder.layer[0].crossattention.attention.value.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        called, read = run(qformer, grad=True), run(qformer, grad=False)
    torch.testing.assert_close(read, called, rtol=0.05, atol=0.05)
    for grad in (True, False):
        with pytest.raises(RuntimeError, match="same dtype"):
            run(qformer, grad)


@pytest.mark.usefixtures("cross")
def test_a_weight_of_two_layers() -> None:
    qformer = model()
    attention = qformer.encoder.layer[0].crossattention.attention
    attention.value.weight = attention.key.weight
    torch.testing.assert_close(run(qformer, False), run(qformer, True), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cross", "onednn")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bias_of_another_dtype(dtype: torch.dtype) -> None:
    """A call takes it or says that it does not; oneDNN had an error of its own."""
    qformer = model()
    bias = qformer.encoder.layer[0].crossattention.attention.query.bias
    bias.data = bias.data.to(dtype)
    said = []
    for grad in (True, False):
        try:
            said.append(run(qformer, grad))
        except RuntimeError as error:
            said.append(str(error))
    called, read = said
    if isinstance(called, str):
        assert "dtype" in read
    else:
        torch.testing.assert_close(read, called, rtol=1e-5, atol=1e-5)


def test_an_activation_that_is_not_plain(onednn: list[int]) -> None:
    qformer = model()
    act = qformer.encoder.layer[0].intermediate_query.intermediate_act_fn
    before = run(qformer, True)
    act.register_forward_hook(lambda _, __, y: y * 2)
    called = run(qformer, True)
    assert not torch.allclose(called, before, atol=1e-3)
    torch.testing.assert_close(run(qformer, False), called, rtol=1e-5, atol=1e-5)
    assert onednn


@pytest.mark.usefixtures("cross")
def test_norms_without_a_weight_of_their_own() -> None:
    """An adapter in a LayerNorm's place: its dtype is that of its parameters."""

    class Tuned(nn.Module):
        def __init__(self, norm: nn.LayerNorm) -> None:
            super().__init__()
            self.base = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    qformer = model()
    expected = run(qformer, True)
    qformer.layernorm = Tuned(qformer.layernorm)
    assert torch.equal(run(qformer, True), expected)


@pytest.mark.usefixtures("cross")
def test_a_forward_derivative_without_gradients() -> None:
    """oneDNN's operator has none: the tangent was lost."""
    qformer = model()
    direction = torch.randn(B, S, E, generator=torch.Generator().manual_seed(5))

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            tokens = forward_ad.make_dual(CALL["encoder_hidden_states"], direction)
            call = CALL | {"encoder_hidden_states": tokens}
            with torch.no_grad():
                out = qformer(**call, output_attentions=True).last_hidden_state
            return forward_ad.unpack_dual(out).tangent

    found = tangent()
    assert found is not None
    step = 1e-3
    ends = [
        run_at(qformer, CALL["encoder_hidden_states"] + sign * step * direction) for sign in (1, -1)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=2e-2, atol=2e-3)


def run_at(qformer: QFormer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return qformer(**CALL | {"encoder_hidden_states": tokens}).last_hidden_state


def test_recording_outputs_leaves_layers_plain(onednn: list[int]) -> None:
    """transformers leaves its recording hooks on the modules; they change nothing."""
    qformer = model()
    with torch.no_grad():
        qformer(**CALL, output_hidden_states=True, output_attentions=True)
        onednn.clear()
        qformer(**CALL)
    assert onednn


@pytest.mark.usefixtures("cross")
def test_compiles_into_one_graph_without_gradients() -> None:
    """The checks of plain layers are traced with the rest."""
    qformer = model()
    compiled = torch.compile(qformer, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, False), run(qformer, False), rtol=1e-5, atol=1e-5)
