"""Streamed blocks compute what resident ones do, are copied when needed, and do not change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from streaming_cases import (
    LAYERS,
    MODELS,
    assert_gradients_close,
    frozen,
    inputs,
    loss_and_gradient,
    opt,
    t5,
)
from torch import Tensor, nn
from transformers import DynamicCache, OPTForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from blip2fast.offload import stream_blocks
from blip2fast.offload.blocks import find_blocks
from blip2fast.offload.streaming import BlockStream
from blip2fast.stage2.language_model import recompute_layers


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradient_and_weights_are_those_of_the_resident_model(
    name: str, buffers: int, recompute: bool
) -> None:
    model = frozen(MODELS[name])
    before = copy.deepcopy(model.state_dict())
    loss, gradient = loss_and_gradient(model)
    stream = stream_blocks(model, "cpu", buffers, recompute=recompute)
    streamed_loss, streamed_gradient = loss_and_gradient(model)
    assert torch.equal(streamed_loss, loss)
    if name == "opt" or not recompute:
        assert torch.equal(streamed_gradient, gradient)
    assert_gradients_close(streamed_gradient, gradient)

    number = len(stream.blocks)
    assert number == (2 * LAYERS if name == "t5" else LAYERS)
    # each block once forward and once backward; the last ones are still there for the latter
    assert stream.fetches.forward == [1] * number
    assert stream.fetches.backward == [1] * (number - buffers) + [0] * buffers
    assert stream.fetches.most_live == buffers
    assert stream.fetches.late == 1
    stream.reset_fetches()
    loss_and_gradient(model, seed=2)
    assert stream.fetches.forward == [0] * buffers + [1] * (number - buffers)
    assert stream.fetches.backward == [1] * (number - buffers) + [0] * buffers
    assert stream.fetches.late == 0

    for after in (model.state_dict(), undone(stream, model)):
        assert set(after) == set(before)
        assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert torch.equal(loss_and_gradient(model)[1], gradient)


def undone(stream: BlockStream, model: nn.Module) -> dict[str, Tensor]:
    stream.undo()
    return model.state_dict()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_several_forward_passes_before_a_backward(name: str, recompute: bool) -> None:
    model = frozen(MODELS[name])

    def accumulated() -> Tensor:
        given = inputs(model)
        other = {**inputs(model, seed=3), "inputs_embeds": given["inputs_embeds"] * 0.5}
        losses = [model(**x, use_cache=False).logits.square().mean() for x in (given, other)]
        for loss in losses:
            loss.backward(retain_graph=True)
        losses[0].backward()  # a graph that was kept
        gradient = given["inputs_embeds"].grad
        assert gradient is not None
        return gradient

    expected = accumulated()
    stream_blocks(model, "cpu", recompute=recompute)
    assert_gradients_close(accumulated(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(name: str) -> None:
    model = frozen(MODELS[name])
    given = {key: x.detach() for key, x in inputs(model).items() if key != "decoder_input_ids"}
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    tokens = 6
    settings = {"num_beams": 2, "max_new_tokens": tokens, "min_new_tokens": tokens}
    expected = model.generate(**given, **settings)
    stream = stream_blocks(model, "cpu")
    assert torch.equal(model.generate(**given, **settings), expected)
    # nothing is late but the first block: after the last one the next token's first one follows
    assert stream.fetches.late == 1
    encoder = LAYERS if name == "t5" else 0
    assert stream.fetches.forward[:encoder] == [1] * encoder
    assert all(tokens - 1 <= count <= tokens + 1 for count in stream.fetches.forward[encoder:])


def test_evaluation_without_gradients() -> None:
    model = frozen(t5)
    given = inputs(model)
    with torch.no_grad():
        expected = model(**given).logits
        stream_blocks(model, "cpu")
        assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model(**given).logits, expected)


def test_a_cache_under_gradients_is_refused() -> None:
    model = frozen(opt)
    stream_blocks(model, "cpu")
    with pytest.raises(
        ValueError, match="would extend it twice: call the model with use_cache=Fal"
    ):
        model(**inputs(model), past_key_values=DynamicCache())
    model(inputs_embeds=torch.randn(1, 2, 20), use_cache=True)  # nothing needs gradients


def test_weights_that_are_shared() -> None:
    """Between blocks, and with the rest: they stay. Within a block: one copy, two places."""
    model = frozen(opt)
    blocks = find_blocks(model)
    blocks[1].fc1.weight = blocks[3].fc1.weight
    blocks[2].self_attn.q_proj.weight = blocks[2].self_attn.k_proj.weight
    blocks[4].final_layer_norm.weight = model.model.decoder.final_layer_norm.weight
    before = copy.deepcopy(model.state_dict())
    _, gradient = loss_and_gradient(model)
    stream = stream_blocks(model, "cpu")
    assert [sum(1 for _ in block.parameters()) for block in blocks] == [0, 1, 0, 1, 1]
    assert torch.equal(loss_and_gradient(model)[1], gradient)
    for after in (model.state_dict(), undone(stream, model)):
        assert all(torch.equal(after[key], value) for key, value in before.items())
    assert blocks[2].self_attn.q_proj.weight is blocks[2].self_attn.k_proj.weight


def test_weights_may_be_loaded_and_saved_while_streamed(tmp_path: Any) -> None:
    model, other = frozen(opt), frozen(opt)
    for parameter in other.parameters():
        parameter.data *= 0.9
    _, gradient = loss_and_gradient(other)
    stream_blocks(model, "cpu")
    loss_and_gradient(model)  # blocks of the old weights are in the buffers now
    model.load_state_dict(other.state_dict())
    assert torch.equal(loss_and_gradient(model)[1], gradient)
    model.save_pretrained(tmp_path)
    again = OPTForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    assert torch.equal(loss_and_gradient(again)[1], gradient)


@pytest.mark.parametrize("recompute", [True, False])
def test_dropout_and_autocast_are_those_of_the_forward_pass(recompute: bool) -> None:
    """A recomputed block draws the same mask; the resident model's gradient shows it."""
    model = frozen(opt)
    gradients = []
    for streamed in (False, True):
        if streamed:
            stream_blocks(model, "cpu", recompute=recompute)
        model.train()
        torch.manual_seed(5)
        given = inputs(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**given, use_cache=False).logits.float().square().mean()
        torch.rand(3)  # what others draw between the passes
        loss.backward()
        gradients.append(given["inputs_embeds"].grad)
        model.eval()
    assert torch.equal(gradients[0], gradients[1])


class Doubling(GradientCheckpointingLayer):
    """Two outputs, nested, one of them an integer; an input that is passed through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, extra: dict[str, Any]) -> dict[str, Any]:
        return {"x": (self.linear(x), extra["y"]), "count": 3, "ids": x.argmax(-1), "none": None}


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Doubling() for _ in range(3)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x, extra={"y": y})
            x, y = out["x"]
            assert (out["count"], out["none"], out["ids"].dtype) == (3, None, torch.int64)
        return (x * y).sum()


@pytest.mark.parametrize("recompute", [True, False])
def test_any_block_of_nested_inputs_and_outputs(recompute: bool) -> None:
    torch.manual_seed(0)
    model = Doubled().requires_grad_(False)
    gradients = []
    for streamed in (False, True):
        if streamed:
            stream_blocks(model, "cpu", blocks=list(model.layers), recompute=recompute)
        x, y = torch.arange(8.0).view(2, 4).requires_grad_(), torch.ones(2, 4).requires_grad_()
        model(x, y).backward()
        gradients.append((x.grad, y.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_double_backward_is_refused() -> None:
    model = frozen(opt)
    stream_blocks(model, "cpu")
    given = inputs(model)
    out = model(**given, use_cache=False).logits.square().mean()
    (first,) = torch.autograd.grad(out, given["inputs_embeds"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_recomputing_layers_of_a_streamed_model() -> None:
    """Its own way of recomputing is used, not a second one around it."""
    model = frozen(opt)
    _, gradient = loss_and_gradient(model)
    stream = stream_blocks(model, "cpu", recompute=False)
    recompute_layers(model)
    assert stream.recompute
    assert torch.equal(loss_and_gradient(model)[1], gradient)
    assert stream.fetches.forward == [1] * LAYERS


def test_refusals() -> None:
    model = frozen(opt)
    with pytest.raises(ValueError, match="buffers 1: expected at least 2"):
        stream_blocks(model, "cpu", buffers=1)
    with pytest.raises(ValueError, match="storage 'int2': expected one of as_is, int8, int4"):
        stream_blocks(model, "cpu", storage="int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device 'meta': blocks are streamed to a CUDA device or"):
        stream_blocks(model, "meta")
    with pytest.raises(ValueError, match=r"Linear has no layers .* name its blocks"):
        stream_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="blocks: none given"):
        stream_blocks(model, "cpu", blocks=[])
    stream = stream_blocks(model, "cpu")
    with pytest.raises(ValueError, match="is streamed already; undo that stream first"):
        stream_blocks(model, "cpu")
    stream.undo()
    recompute_layers(model)
    with pytest.raises(ValueError, match="its forward has been replaced"):
        stream_blocks(model, "cpu")
    with pytest.raises(ValueError, match=r"is trained, .* call requires_grad_\(False\)"):
        stream_blocks(opt(), "cpu")
