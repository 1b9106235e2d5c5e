"""Frozen encoders on a CPU without gradients: the same tokens, whatever computes them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.activations import QuickGELUActivation

from blip2fast.frozen import cpu_inference, perceptrons
from blip2fast.frozen.cpu_inference import bf16_attention
from blip2fast.frozen.image_encoders import FrozenImageEncoder
from blip2fast.frozen.perceptrons import Chain, activated, chain_perceptrons
from blip2fast.ops import linear as onednn_linear

SIZE, BLOCKS = 28, 2
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": SIZE,
    "patch_size": 7,
}
IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
FAMILIES: dict[str, Any] = {
    "blip-2": lambda: Blip2VisionModel(Blip2VisionConfig(**SMALL, initializer_range=0.1)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, vision_use_head=False)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "vit": lambda: ViTModel(ViTConfig(**SMALL), add_pooling_layer=False),
}


def build(family: str = "blip-2") -> FrozenImageEncoder:
    torch.manual_seed(0)
    return FrozenImageEncoder(FAMILIES[family]().eval(), BLOCKS, family)


def by_pytorch(encoder: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The tokens as an Intel's CPU computes them, by the modules alone."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(onednn_linear, "is_chosen", lambda: False)
        tokens: Tensor = encoder(images)
        return tokens


@pytest.fixture
def calls(onednn: list[int], own_linear: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that oneDNN computes, which are all, however small."""
    monkeypatch.setattr(cpu_inference, "_WORTH_WEIGHT", 0)
    return onednn


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_models_own(
    family: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    names = list(model.state_dict())
    encoder = FrozenImageEncoder(copy.deepcopy(model), BLOCKS, family)
    linear = sum(type(m) is nn.Linear for m in encoder.modules())
    tokens = encoder(IMAGES)
    assert len(calls) == linear
    expected = by_pytorch(encoder, IMAGES, monkeypatch)
    assert len(calls) == linear
    assert (tokens - expected).norm() <= 2e-6 * expected.norm()
    for norm in ("layernorm", "post_layernorm"):
        if hasattr(model, norm):
            setattr(model, norm, nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).last_hidden_state, expected)
    # the final norm apart, the parameters keep their names
    kept = [n.removeprefix("model.") for n in encoder.state_dict()]
    assert kept == [n for n in names if not n.startswith(("layernorm.", "post_layernorm."))]


def test_narrow_models_and_small_weights_are_left_to_pytorch(
    onednn: list[int], own_linear: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build()
    encoder(IMAGES)
    assert not onednn
    monkeypatch.setattr(cpu_inference, "_WORTH_WEIGHT", 400)
    encoder(IMAGES)
    assert not onednn
    monkeypatch.setattr(cpu_inference, "_WORTH_WEIGHT", 256)
    encoder(IMAGES)
    assert len(onednn) == 4 * BLOCKS
    monkeypatch.setattr(cpu_inference, "_WORTH_WEIGHT", 1 << 16)
    monkeypatch.setattr(onednn_linear, "is_asked_for", lambda: True)
    encoder(IMAGES)
    assert len(onednn) == 8 * BLOCKS


def _hooked(encoder: FrozenImageEncoder) -> None:
    encoder.model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda m, x, y: y * 2)


def _parametrised(encoder: FrozenImageEncoder) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(
        encoder.model.encoder.layers[1].mlp.fc1, "weight", Double()
    )


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _wrapped(encoder: FrozenImageEncoder) -> None:
    mlp = encoder.model.encoder.layers[0].mlp
    old, mlp.fc1 = mlp.fc1, _Doubled(16, 24)
    mlp.fc1.load_state_dict(old.state_dict())
    mlp.requires_grad_(False)


def _adapted(encoder: FrozenImageEncoder) -> None:
    config = LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
    inject_adapter_in_model(config, encoder.model)
    encoder.requires_grad_(False)


def _other_activation(encoder: FrozenImageEncoder) -> None:
    encoder.model.encoder.layers[0].mlp.activation_fn = nn.GELU(approximate="tanh")


@pytest.mark.parametrize("change", [_hooked, _parametrised, _wrapped, _adapted, _other_activation])
def test_what_has_been_done_to_a_layer_counts(
    change: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build()
    before = by_pytorch(encoder, IMAGES, monkeypatch)
    change(encoder)
    expected = by_pytorch(encoder, IMAGES, monkeypatch)
    least = 1e-5 if change is _other_activation else 1e-3
    assert (expected - before).norm() > least * before.norm()
    assert not calls
    tokens = encoder(IMAGES)
    assert calls
    assert (tokens - expected).norm() <= 2e-6 * expected.norm()


def test_gradients_of_one_that_is_trained_are_pytorchs(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build()
    encoder(IMAGES)
    assert calls
    calls.clear()
    encoder.unfreeze()
    found = []
    for chosen in (True, False):
        monkeypatch.setattr(onednn_linear, "is_chosen", lambda chosen=chosen: chosen)
        encoder.zero_grad()
        encoder(IMAGES).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in encoder.named_parameters()})
    assert not calls
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    with torch.no_grad():
        monkeypatch.setattr(onednn_linear, "is_chosen", lambda: True)
        encoder(IMAGES)
    assert calls


def test_autocast_and_transforms_are_left_to_pytorch(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build()
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_pytorch(encoder, IMAGES, monkeypatch)
        assert torch.equal(encoder(IMAGES), expected)
    with torch.no_grad():
        torch.func.vmap(lambda image: encoder(image[None])[0])(IMAGES)
    assert not calls


def test_copies_and_new_weights(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a weight is kept: a copy, loaded weights and another dtype give their tokens."""
    encoder = build()
    first = encoder(IMAGES)
    for same in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(same(IMAGES), first)
    other = copy.deepcopy(encoder)
    other.load_state_dict({n: 1.5 * v for n, v in encoder.state_dict().items()})
    assert torch.equal(encoder(IMAGES), first)
    expected = by_pytorch(other, IMAGES, monkeypatch)
    assert (expected - first).norm() > 0.1 * first.norm()
    assert (other(IMAGES) - expected).norm() <= 2e-6 * expected.norm()
    wide = by_pytorch(other.double(), IMAGES.double(), monkeypatch)
    assert torch.equal(other(IMAGES), wide)
    assert calls


def test_large_batches_go_in_parts(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build()
    whole = encoder(IMAGES)
    seen: list[int] = []
    inside = type(encoder.model).forward

    def counted(self: Any, pixels: Tensor, *args: Any, **more: Any) -> Any:
        seen.append(len(pixels))
        return inside(self, pixels, *args, **more)

    monkeypatch.setattr(type(encoder.model), "forward", counted)
    elements = encoder.num_tokens * encoder.width * 2
    monkeypatch.setattr(cpu_inference, "_PART", -(-elements // torch.get_num_threads()))
    tokens = encoder(IMAGES)
    assert seen == [2, 1]
    assert (tokens - whole).norm() <= 2e-6 * whole.norm()
    # a hook gets the batch that the encoder was given
    batches: list[int] = []
    encoder.blocks[0].register_forward_hook(lambda m, x, y: batches.append(len(x[0])))
    encoder(IMAGES)
    assert batches == [3]


def test_masked_autoencoders_get_their_noise_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments besides the pixels are split like them."""
    monkeypatch.setattr(onednn_linear, "is_chosen", lambda: True)
    monkeypatch.setattr(cpu_inference, "_PART", 1)
    seen = []

    def model(pixels: Tensor, noise: Tensor) -> Any:
        seen.append((len(pixels), len(noise)))
        return type("Output", (), {"last_hidden_state": pixels.flatten(1)[:, None] + noise[0, 0]})

    noise = torch.arange(3.0)[:, None]
    with torch.no_grad():
        tokens = cpu_inference.tokens_of(model, IMAGES, {"noise": noise}, 5, 256)
    assert seen == [(1, 1)] * 3
    torch.testing.assert_close(tokens, IMAGES.flatten(1)[:, None] + noise[:, None])


@pytest.mark.parametrize(("heads", "length", "width"), [(3, 37, 24), (2, 130, 88)])
def test_attention_in_bf16(
    heads: int, length: int, width: int, onednn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as PyTorch's but for one rounding of the weights, in groups of heads too."""
    monkeypatch.setattr(cpu_inference, "_HELD_LOGITS", 4 * length * length)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, length, 3, heads, width, generator=generator).bfloat16()
    query, key, value = made.permute(2, 0, 3, 1, 4)
    for scale in (None, 0.5):
        truth = F.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), scale=scale
        )
        theirs = F.scaled_dot_product_attention(query, key, value, scale=scale)
        with torch.no_grad():
            ours = bf16_attention(query, key, value, scale)
        errors = [(x.double() - truth).norm() / truth.norm() for x in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1]
    assert len(onednn) == 2 * 2 * heads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.no_grad():
        shared_out = bf16_attention(query, key, value, 0.5)
    torch.testing.assert_close(shared_out, ours)
    assert len(onednn) == 2 * 2 * heads


def test_which_attention_is_ours(onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16")
    q = torch.randn(1, 2, 128, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.ones(128, 128, dtype=torch.bool).tril()
    cases: list[tuple[bool, Tensor, dict[str, Any]]] = [
        (True, q, {}),
        (True, q, {"scale": 1.0}),
        (False, q, {"attn_mask": mask}),
        (False, q, {"is_causal": True}),
        (False, q[:, :, :64], {}),
        (False, q.float(), {}),
        (False, q.requires_grad_(False).half(), {}),
    ]
    with torch.no_grad(), cpu_inference._Quicker():
        for ours, x, more in cases:
            onednn.clear()
            tokens = F.scaled_dot_product_attention(x, x, x, **more)
            assert bool(onednn) == ours, more
            torch.testing.assert_close(
                tokens, torch._C._nn.scaled_dot_product_attention(x, x, x, **more)
            )
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        onednn.clear()
        F.scaled_dot_product_attention(q, q, q)
        assert not onednn


@pytest.mark.parametrize("family", ["blip-2", "clip"])
def test_bf16(family: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers round as PyTorch's do; GELU of an unrounded product is more exact."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16")
    monkeypatch.setattr(cpu_inference, "_WORTH_LOGITS", 1)
    encoder = build(family)
    truth = by_pytorch(encoder, IMAGES, monkeypatch)
    encoder.to(torch.bfloat16)
    tokens = encoder(IMAGES)
    assert calls
    assert tokens.dtype == torch.bfloat16
    theirs = by_pytorch(encoder, IMAGES, monkeypatch)
    errors = [(x.float() - truth).norm() / truth.norm() for x in (tokens, theirs)]
    assert errors[0] <= 1.25 * errors[1]


def test_chains() -> None:
    """Perceptrons become chains; what is none, or does more than call, stays."""

    class Perceptron(nn.Module):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.fc2, self.act, self.fc1 = nn.Linear(6, 4), activation, nn.Linear(4, 6)
            self.drop, self.norm = nn.Dropout(0.5), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.fc2(self.norm(self.drop_(self.act(self.fc1(x))))))

        def drop_(self, x: Tensor) -> Tensor:
            return self.drop(x) if x.ndim < 9 else x

    class Straight(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.fc2(self.norm(self.act(self.fc1(x)))))

    class Gated(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc1(x)
            return self.fc2(self.act(y) * y)

    class WithScale(Straight):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__(activation)
            self.scale = nn.Parameter(torch.ones(4))

    hooked = Straight(nn.GELU())
    hooked.register_forward_hook(lambda m, x, y: y + 1)
    stay = [Perceptron(nn.GELU()), Gated(nn.GELU()), WithScale(nn.GELU()), hooked]
    stay += [Straight(nn.SiLU()), Straight(nn.GELU(approximate="tanh"))]
    become = [Straight(nn.GELU()), Straight(QuickGELUActivation())]
    model = nn.ModuleList([*stay, *become]).eval()
    names, x = list(model.state_dict()), torch.randn(2, 4)
    with torch.no_grad():
        expected = [module(x) for module in model]
        chain_perceptrons(model)
        assert [isinstance(module, Chain) for module in model] == [False] * 6 + [True] * 2
        assert list(model.state_dict()) == names
        for module, y in zip(model, expected, strict=True):
            torch.testing.assert_close(module(x), y)
    # dropout of a chain in training
    assert model[6].train()(x).eq(0).any()


def test_gelu_is_applied_by_the_product(calls: list[int]) -> None:
    layer, x = nn.Linear(16, 24), torch.randn(5, 16)
    with torch.no_grad():
        expected = F.gelu(layer(x))
        torch.testing.assert_close(activated(layer, x, nn.GELU()), expected)
        assert len(calls) == 1
        quick = activated(layer, x, QuickGELUActivation())
        assert torch.equal(quick, QuickGELUActivation()(layer(x)))
    assert len(calls) == 1
    x.requires_grad_()
    activated(layer, x, QuickGELUActivation()).sum().backward()
    assert x.grad is not None
    assert perceptrons.is_quick_gelu(QuickGELUActivation())


def test_compiled_blocks(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, of another batch size too; a copy is not compiled."""
    encoder = build()
    expected = by_pytorch(encoder, IMAGES, monkeypatch)
    encoder.compile_blocks("aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder(IMAGES[:2]), expected[:2], rtol=1e-4, atol=1e-5)
    assert not calls
    copied = copy.deepcopy(encoder)
    tokens = copied(IMAGES)
    assert calls
    assert (tokens - expected).norm() <= 2e-6 * expected.norm()
    calls.clear()
    whole = torch.compile(build(), backend="aot_eager")
    torch.testing.assert_close(whole(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert not calls
