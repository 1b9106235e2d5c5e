"""Stage 1 for other users than BLIP-2: any encoder, ragged tokens, long texts, wrapped layers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage1_cases import SMALL, make_batch, relative_error
from textbook_stage1 import TextbookStage1
from torch import Tensor, nn

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1

NEGATIVES = (torch.tensor([2, 3, 0, 1, 5, 4]), torch.tensor([5, 4, 1, 0, 2, 1]))
LOSSES = ("loss_itc", "loss_itm", "loss_itg")


def a_model(config: Stage1Config = SMALL) -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(config).double()


@pytest.mark.parametrize(
    ("sizes", "tokens", "text"),
    [
        ({"encoder_hidden_size": 1, "num_query_tokens": 1}, 1, 3),
        ({"encoder_hidden_size": 33, "num_query_tokens": 40}, 90, 5),
        ({"cross_attention_frequency": 1, "num_query_tokens": 2}, 1100, 4),
        ({"cross_attention_frequency": 3, "max_position_embeddings": 512}, 5, 512),
        ({"num_hidden_layers": 1, "num_attention_heads": 1}, 7, 9),
    ],
    ids=["least", "narrow tokens, many queries", "video", "512 tokens", "one layer, one head"],
)
def test_any_sizes_are_the_textbook(sizes: dict[str, int], tokens: int, text: int) -> None:
    config = replace(SMALL, **sizes)
    model = a_model(config)
    textbook = TextbookStage1(model)
    batch = make_batch(config, batch=6, tokens=tokens, text=text)
    assert int(batch["attention_mask"].sum(1).max()) == text
    ours = model(**batch, negatives=NEGATIVES)
    truth = textbook(**batch, negatives=NEGATIVES)
    for name in LOSSES:
        assert relative_error(ours[name], truth[name]) < 1e-11, name
    ours.loss.backward()
    truth["loss"].backward()
    for name, parameter in model.named_parameters():
        twin = textbook.twin(name)
        if not name.endswith("key.bias"):
            error = (parameter.grad - twin.grad).norm()
            assert error <= 1e-9 * twin.grad.norm() + 1e-14, name


def test_ragged_images_are_each_image_alone() -> None:
    """A batch whose images have 1 to 7 tokens, against images without padding, one at a time."""
    model = a_model()
    batch = make_batch(SMALL, batch=6)
    counts = torch.tensor([7, 1, 3, 5, 2, 6])
    mask = torch.arange(7)[None] < counts[:, None]
    out = model(**batch, image_attention_mask=mask, negatives=NEGATIVES)
    tokens, ids, real = batch["image_embeds"], batch["input_ids"], batch["attention_mask"]
    own = torch.arange(6)
    images = torch.cat([own, NEGATIVES[0], own])
    texts = torch.cat([own, own, NEGATIVES[1]])
    for pair, (i, j) in enumerate(zip(images.tolist(), texts.tolist(), strict=True)):
        alone = tokens[i : i + 1, : counts[i]]
        logits = model.match(alone, ids[j : j + 1], real[j : j + 1])
        assert torch.allclose(out.itm_logits[pair], logits[0], rtol=0, atol=1e-12)
        if pair < 6:
            features, states = model.encode_image(alone)
            assert torch.allclose(out.image_features[i], features[0], rtol=0, atol=1e-12)
            assert torch.allclose(out.query_output[i], states[0], rtol=0, atol=1e-12)


class StoredIn8Bits(nn.Module):
    """A linear layer whose weight is kept as integers, as quantisers keep one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).to(x.dtype).T + self.bias.to(x.dtype)


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "stage1.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["out"].loss.isfinite()
    assert names["model"].query_tokens.grad is not None
    assert "ln_vision folded" in capsys.readouterr().out


def test_the_model_says_which_path_ran() -> None:
    model = a_model()
    batch = make_batch(SMALL, batch=6)
    assert model.extra_repr().endswith("linear layers fused, last step: none yet")
    model(**batch, negatives=NEGATIVES)
    assert "last step: ln_vision folded" in str(model)
    trained = {**batch, "image_embeds": batch["image_embeds"].requires_grad_()}
    model(**trained, negatives=NEGATIVES)
    assert "last step: ln_vision not folded: the image tokens need a gradient" in str(model)
    value = model.qformer.encoder.layer[0].crossattention.attention
    value.value = StoredIn8Bits(value.value)
    model(**batch, negatives=NEGATIVES)
    assert "last step: ln_vision not folded: layers of keys or values are called" in str(model)


def test_quantised_layers_are_called_and_named() -> None:
    """All linear layers of the Q-Former: the step is that of the weights that they stand for."""
    quantised, plain = a_model(), a_model()
    names = [n for n, m in plain.qformer.named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        layer = StoredIn8Bits(plain.qformer.get_submodule(name))
        parent, _, child = name.rpartition(".")
        setattr(quantised.qformer.get_submodule(parent), child, layer)
        weight = plain.qformer.get_submodule(name).weight
        weight.data.copy_(layer.weight * layer.scale)
    assert f"{names[0]} (StoredIn8Bits)" in quantised.extra_repr()
    assert f"and {len(names) - 4} more" in quantised.extra_repr()
    batch = make_batch(SMALL, batch=6)
    ours, truth = (m(**batch, negatives=NEGATIVES) for m in (quantised, plain))
    for name in LOSSES:
        assert relative_error(ours[name], truth[name]) < 1e-12, name
    ours.loss.backward()
    truth.loss.backward()
    for name in ("query_tokens", "ln_vision.weight", "embeddings.word_embeddings.weight"):
        grads = [m.get_parameter(name).grad for m in (quantised, plain)]
        assert relative_error(*grads) < 1e-10, name


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_torchs_own_quantised_layers_judge_pairs() -> None:
    """8-bit dynamic quantisation of every linear layer of the Q-Former, for inference."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model = a_model().float().eval()
    batch = make_batch(SMALL, batch=6)
    call = (batch["image_embeds"].float(), batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        truth = model.match(*call)
        model.qformer = quantization.quantize_dynamic(model.qformer, {nn.Linear})
        found = model.match(*call)
    assert "called, not fused" in model.extra_repr()
    assert not torch.equal(found, truth)
    assert relative_error(found, truth) < 0.1
