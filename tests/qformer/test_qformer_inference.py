"""What only inference takes: absorbed cross-attention, oneDNN. The same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig

from blip2fast import QFormer
from blip2fast.qformer import absorption
from blip2fast.qformer.layers import linear

CONFIG = Blip2QFormerConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    encoder_hidden_size=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
B, Q, S = 3, 4, 11


def model_and_inputs(dtype: torch.dtype = torch.float64) -> tuple[QFormer, Tensor, Tensor]:
    torch.manual_seed(0)
    model = QFormer(CONFIG).to(dtype).eval()
    for parameter in model.parameters():  # biases begin at zero, which hides them
        nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(B, Q, 32, dtype=dtype), torch.randn(B, S, 40, dtype=dtype)


def additive(lengths: Tensor) -> Tensor:
    visible = torch.arange(S) < lengths[:, None]
    mask = torch.zeros(B, 1, 1, S, dtype=torch.float64)
    return mask.masked_fill(~visible[:, None, None], -torch.inf).expand(B, 1, Q, S)


MASKS = {
    "none": None,
    "lengths": torch.tensor([11, 3, 1]),
    "nothing to see": (torch.arange(S) < torch.tensor([11, 0, 5])[:, None]).long(),
    "rows differ": torch.rand(B, Q, S, generator=torch.Generator().manual_seed(1)) < 0.6,
    "additive": additive(torch.tensor([4, 11, 0])),
    "heads differ": torch.rand(B, 4, Q, S, generator=torch.Generator().manual_seed(2)) < 0.6,
}


@pytest.mark.parametrize("batches", ["equal", "one query block", "one image"])
@pytest.mark.parametrize("mask", MASKS)
def test_absorbed_is_projected(mask: str, batches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, queries, tokens = model_and_inputs()
    queries = queries[:1] if batches == "one query block" else queries
    tokens = tokens[:1] if batches == "one image" else tokens
    arguments = {
        "query_embeds": queries,
        "encoder_hidden_states": tokens,
        "encoder_attention_mask": MASKS[mask],
    }
    calls = []
    form = absorption.absorbed_attention

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return form(*given)

    monkeypatch.setattr(absorption, "absorbed_attention", counted)
    with torch.no_grad():
        monkeypatch.setattr(absorption, "is_cheaper", lambda *_: True)
        absorbed = model(**arguments).last_hidden_state
        assert len(calls) == 2  # layers 0 and 2
        monkeypatch.setattr(absorption, "is_cheaper", lambda *_: False)
        projected = model(**arguments).last_hidden_state
    assert len(calls) == 2
    torch.testing.assert_close(absorbed, projected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("images", "uses", "queries", "tokens", "pays"),
    [
        (1, 1, 32, 257, False),  # BLIP-2 on ViT-g: 0.61 of the operations
        (1, 1, 16, 257, True),
        (4, 4, 32, 4 * 257, True),
        (1, 64, 32, 257, False),  # one image, many texts: projected once
        (1, 1, 256, 257, False),
    ],
)
def test_the_rule_compares_operations(
    images: int, uses: int, queries: int, tokens: int, pays: bool
) -> None:
    layers = [nn.Linear(1408, 768, device="meta") for _ in range(2)]
    query = torch.empty(uses, queries, 768, device="meta")
    image = torch.empty(images, tokens, 1408, device="meta")
    with torch.no_grad():
        assert absorption.is_cheaper(query, image, 12, *layers, False) is pays
        assert not absorption.is_cheaper(query, image, 12, *layers, True)
    assert not absorption.is_cheaper(query, image, 12, *layers, False)


@pytest.mark.parametrize(("queries", "pays"), [(32, True), (40, False)])
def test_the_rule_on_a_cpu_in_bf16(queries: int, pays: bool) -> None:
    """BLIP-2's own shape at 0.61 of the operations, and one at 0.75."""
    layers = [nn.Linear(1408, 768) for _ in range(2)]
    narrow = [nn.Linear(1408, 768).bfloat16() for _ in range(2)]
    query, image = torch.empty(1, queries, 768), torch.empty(1, 257, 1408)
    with torch.no_grad():
        half = query.bfloat16(), image.bfloat16()
        assert absorption.is_cheaper(*half, 12, *narrow, False) is pays
        assert not absorption.is_cheaper(query, image, 12, *layers, False)


def test_onednn_computes_the_same(onednn: list[int]) -> None:
    model, queries, tokens = model_and_inputs(torch.float32)
    with_grad = model(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    assert not onednn
    with torch.no_grad():
        states = model(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        # 3 layers: QKV, their output and two of the FFN; 2 cross-attentions: as many but the FFN
        assert len(onednn) == 3 * 6 + 2 * 4
    exact, _, _ = model_and_inputs(torch.float64)
    truth = exact(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    error, usual = (states - truth).norm(), (with_grad - truth).norm()
    assert error < 2 * usual


def test_layers_that_are_not_plain_are_called(onednn: list[int]) -> None:
    model, queries, tokens = model_and_inputs(torch.float32)
    for layer in model.encoder.layer:
        layer.intermediate_query.dense.register_forward_hook(lambda *_: torch.zeros(B, Q, 48))
        nn.init.zeros_(layer.output_query.dense.bias)
    with torch.no_grad():
        states = model(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        for layer in model.encoder.layer:
            nn.init.zeros_(layer.output_query.dense.weight)
        without = model(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    assert onednn
    torch.testing.assert_close(states, without)


@pytest.mark.parametrize("how", ["autocast", "half", "vmap", "disabled", "tanh gelu"])
def test_where_onednn_is_not_asked(how: str, onednn: list[int]) -> None:
    model, queries, tokens = model_and_inputs(torch.float32)
    act = model.encoder.layer[0].intermediate_query.intermediate_act_fn
    run = {"query_embeds": queries, "encoder_hidden_states": tokens}
    with torch.no_grad():
        if how == "autocast":
            with torch.autocast("cpu"):
                model(**run)
        elif how == "half":
            model.bfloat16()(**{name: x.bfloat16() for name, x in run.items()})
        elif how == "disabled":
            with torch.backends.mkldnn.flags(enabled=False):
                model(**run)
        elif how == "tanh gelu":
            x = torch.randn(2, 32)
            linear(nn.Linear(32, 8), x, lambda y: act(y) + 1)
        else:
            alone = torch.vmap(
                lambda q, x: model(query_embeds=q[None], encoder_hidden_states=x[None])[0][0]
            )(queries, tokens)
            assert not onednn
            torch.testing.assert_close(alone, model(**run)[0], rtol=1e-4, atol=1e-4)
            return
    assert not onednn
