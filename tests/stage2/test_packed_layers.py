"""A language model's linear layers while it writes on a CPU: same text, what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stage2_models import PAD, images, reference_model, text_batch
from streaming_cases import opt, t5
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip2fast.ops import linear as onednn_linear
from blip2fast.stage2 import packed_layers
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.packed_layers import packed_linear_layers

MODELS = {"opt": opt, "t5": t5}


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layers, "_WORTH_WEIGHT", 0)


def logits_of(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(2, 12).view(2, 5)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("most_bytes", [0, 1 << 30], ids=["as they are", "packed"])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_logits(
    kind: str, most_bytes: int, onednn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_layers, "_MOST_BYTES", most_bytes)
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    expected = logits_of(model)
    assert not onednn
    with packed_linear_layers(model, 2) as names:
        found = logits_of(model)
        again = logits_of(model)
    assert names == [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    # each layer once a pass; T5's encoder and decoder, too
    assert len(onednn) == 2 * len(names)
    assert torch.equal(found, again)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert replaced(model) == []
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_text(kind: str, beams: int, onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blip2Stage2.from_transformers(reference_model(kind)).float().eval()
    ids, mask = text_batch()
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": PAD}

    def write() -> Tensor:
        return model.generate(
            images=images().float(), input_ids=ids, attention_mask=mask, **settings
        )

    found, count = write(), len(onednn)
    assert count > 6 * 4
    monkeypatch.setattr(onednn_linear, "is_chosen", lambda: False)
    assert torch.equal(found, write())
    assert len(onednn) == count


def test_weights_that_change_between_texts(onednn: list[int]) -> None:
    model = opt().eval()
    layer = model.model.decoder.layers[0].fc1
    with torch.no_grad(), packed_linear_layers(model, 2):
        before = logits_of(model)
    layer.weight.data.mul_(3)
    with torch.no_grad(), packed_linear_layers(model, 2):
        after = logits_of(model)
    assert not torch.allclose(before, after, rtol=1e-3)
    torch.testing.assert_close(after, logits_of(model).detach(), rtol=1e-4, atol=1e-6)
    assert onednn


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hook(model: PreTrainedModel) -> None:
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda m, a, y: 2 * y)


def _hook_of_a_block(model: PreTrainedModel) -> None:
    model.model.decoder.layers[0].register_forward_pre_hook(lambda m, a: None)


def _subclass(model: PreTrainedModel) -> None:
    fc1 = model.model.decoder.layers[0].fc1
    other = Doubled(fc1.in_features, fc1.out_features)
    other.load_state_dict(fc1.state_dict())
    model.model.decoder.layers[0].fc1 = other


def _forward(model: PreTrainedModel) -> None:
    block = model.model.decoder.layers[0]
    block.forward = lambda *a, _call=block.forward, **k: _call(*a, **k)


def _half(model: PreTrainedModel) -> None:
    class Cast(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer.bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.bfloat16()).to(x.dtype)

    model.model.decoder.layers[0].fc1 = Cast(model.model.decoder.layers[0].fc1)


@pytest.mark.parametrize("change", [_hook, _hook_of_a_block, _subclass, _forward, _half])
@torch.no_grad()
def test_what_is_called(change: Callable[[PreTrainedModel], None], onednn: list[int]) -> None:
    model = opt().eval()
    change(model)
    expected = logits_of(model)
    with packed_linear_layers(model, 2) as names:
        found = logits_of(model)
    left = "model.decoder.layers.0.fc1"
    if change in (_hook_of_a_block, _forward):
        left = "model.decoder.layers.0."
    assert not [name for name in names if name.startswith(left)]
    assert any(name.startswith("model.decoder.layers.1.") for name in names)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert onednn


def test_gradients_and_other_machines(onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients nothing is replaced; in the context they turn to PyTorch's product."""
    model = opt().eval()
    with packed_linear_layers(model, 2) as names:
        assert names == []
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    with torch.no_grad(), packed_linear_layers(nn.Sequential(layer), 3) as names:
        assert names == ["0"]
        with torch.enable_grad():
            layer(x).sum().backward()
        assert torch.equal(layer(x[0]), F.linear(x[0], layer.weight, layer.bias))
        assert layer(x.new_empty(0, 8)).shape == (0, 8)
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.double())
    assert layer.weight.grad is not None
    assert not onednn
    monkeypatch.setattr(onednn_linear, "is_chosen", lambda: False)
    with torch.no_grad(), packed_linear_layers(model, 2) as names:
        assert names == []


def test_a_text_within_a_text(onednn: list[int]) -> None:
    """The first of two contexts has the layers; they are as before after both, and after errors."""
    model = opt().eval()
    with torch.no_grad(), packed_linear_layers(model, 2) as outer:
        with packed_linear_layers(model, 2) as inner:
            assert inner == []
        assert replaced(model) == outer
    with pytest.raises(KeyError), torch.no_grad(), packed_linear_layers(model, 2):
        raise KeyError
    assert replaced(model) == []
    assert not onednn
