"""Batches without padding: the padded batch's loss and gradients, from fewer positions."""

import copy

import pytest
import torch
from stage2_models import PAD, Q, V, opt_config, stage2_config, t5_config
from test_stage2_families import CAUSAL
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)

from blip2fast.stage2 import packing
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.packing import FAMILIES, _spread, pack
from blip2fast.stage2.token_rows import IMAGE_PLACE

LENGTHS = torch.tensor([3, 9, 1, 4, 2, 9, 5])
B, T = len(LENGTHS), int(LENGTHS.max())
CONFIGS = {"opt": opt_config} | CAUSAL


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, V - 1, (B, T), generator=generator)
    mask = (torch.arange(T) < LENGTHS[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    return {
        "image_embeds": torch.randn(B, 5, 24, generator=generator, dtype=torch.float64),
        "input_ids": ids.masked_fill(mask == 0, PAD),
        "attention_mask": mask,
        "labels": labels,
    }


def pair(family, implementation="sdpa"):
    """The same model with its padding and without it."""
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(
        CONFIGS[family](), attn_implementation=implementation
    )
    for parameter in language_model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    packed = Blip2Stage2(stage2_config(pack_padding=True), language_model).double().eval()
    padded = copy.deepcopy(packed)
    padded.config = stage2_config()
    return padded, packed


def gradients(model, inputs):
    loss = model(**inputs).loss
    return loss, torch.autograd.grad(loss, list(model.trainable_parameters()))


def positions_seen(model, inputs):
    """Positions that a layer's linear computes."""
    seen = []
    layers = model.language_model.base_model
    layer = next(m for n, m in layers.named_modules() if n.endswith(("q_proj", "query_key_value")))
    handle = layer.register_forward_hook(lambda _, args, output: seen.append(args[0].shape[:-1]))
    model(**inputs)
    handle.remove()
    return seen[0].numel()


@pytest.mark.parametrize("count", [5, 3, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients(family, count, monkeypatch):
    """Many short rows, few long ones, and one row of all samples."""
    monkeypatch.setattr(packing, "LEAST_SAVING", -100)
    monkeypatch.setattr(packing, "_cheapest", lambda lengths, *_: _spread(lengths, count))
    padded, packed = pair(family)
    want, wanted = gradients(padded, batch())
    got, found = gradients(packed, batch())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    largest = max(float(x.abs().max()) for x in wanted)
    assert largest > 1e-4
    # transformers keeps some steps (rotary tables, norms) in fp32 whatever the weights are
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest)
    assert positions_seen(padded, batch()) == B * (Q + T)
    assert positions_seen(packed, batch()) <= 0.9 * B * (Q + T)


def test_eager_attention_adds_its_mask():
    padded, packed = pair("llama", "eager")
    torch.testing.assert_close(
        packed.float()(**half(batch())).loss,
        padded.float()(**half(batch())).loss,
        rtol=1e-5,
        atol=0,
    )


def half(inputs):
    return inputs | {"image_embeds": inputs["image_embeds"].float()}


def test_images_within_texts():
    padded, packed = pair("opt")
    P = [IMAGE_PLACE] * Q
    rows = [[*P, 5, 6, *P, 7], [8, 9], [*P, 11]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    inputs = {
        "image_embeds": batch()["image_embeds"][:3],
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long(),
        "image_counts": torch.tensor([2, 0, 1]),
    }
    assert positions_seen(packed, inputs) == sum(map(len, rows))
    torch.testing.assert_close(packed(**inputs).loss, padded(**inputs).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("row_length", [9, 12, 20, 100])
def test_packing_loses_nothing(row_length):
    mask = (torch.arange(T) < LENGTHS[:, None]).long()
    packed = pack(mask, 4096, row_length)
    rows, length = packed.sample.shape
    assert -(-33 // max(9, row_length)) <= rows <= B
    assert rows * length <= 33 + rows
    real = packed.sample >= 0
    where = real.flatten().nonzero().flatten()
    assert torch.equal(packed.place[mask == 1].sort().values, where)
    assert (packed.place[mask == 0] == -1).all()
    held = torch.stack([packed.sample[real], packed.position_ids[real]], dim=1).tolist()
    assert sorted(map(tuple, held)) == [(b, t) for b in range(B) for t in range(LENGTHS[b])]
    source = packed.source.view(rows, length)[real]
    assert torch.equal(source // T, packed.sample[real])
    assert torch.equal(source % T, packed.position_ids[real])


def test_rows_are_as_long_as_pays():
    """32 equal samples beside a long one; attention over long rows costs a narrow model more."""
    lengths = torch.tensor([40] * 31 + [80])
    mask = (torch.arange(80) < lengths[:, None]).long()
    narrow, wide = pack(mask, 64, 512), pack(mask, 4096, 512)
    assert narrow.sample.shape[1] == 80
    assert wide.sample.shape[0] * wide.sample.shape[1] == int(lengths.sum())
    assert pack(mask, 1, 512) is not None
    even = (torch.arange(50) < torch.tensor([[50]] + [[40]] * 31)).long()
    assert pack(even, 4096, 512) is not None
    assert pack(even, 16, 512) is None  # two in a row cost more than their padding


def test_little_padding_is_kept():
    """Below 10 % of the operations, and where all logits are asked for."""
    mask = torch.ones(8, 100)
    mask[:2, 40:] = 0
    assert pack(mask, 10**6, 10**4) is not None
    mask[:2, :70] = 1
    assert pack(mask, 10**6, 10**4) is None
    padded, packed = pair("opt")
    assert packed(**batch(), return_logits=True).logits.shape == (B, Q + T, V)
    full = {name: value[LENGTHS == T] for name, value in batch().items()}
    assert torch.equal(packed(**full).loss, padded(**full).loss)


def test_labels_at_padding_are_refused():
    _, packed = pair("opt")
    inputs = batch()
    inputs["labels"][2, 4] = 5
    with pytest.raises(ValueError, match="1 of 30 would be predicted from padding; set them to -"):
        packed(**inputs)


def test_models_that_need_their_padding():
    """Refused with every reason; the reasons stand in the description where it is off."""
    t5 = T5ForConditionalGeneration(t5_config())
    with pytest.raises(ValueError, match=r"T5For.* an encoder-decoder counts positions by columns"):
        Blip2Stage2(stage2_config(pack_padding=True), t5)
    assert "padding kept: an encoder-decoder counts" in repr(Blip2Stage2(stage2_config(), t5))
    gemma2 = AutoModelForCausalLM.from_config(CAUSAL["gemma2"]())
    with pytest.raises(ValueError, match=r"(?s)'gemma2' is not one.*layers of \['sliding_att"):
        Blip2Stage2(stage2_config(pack_padding=True), gemma2)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"'bloom' is not one of .* it takes no position_ids"):
        Blip2Stage2(stage2_config(pack_padding=True), bloom)


def test_says_what_it_does():
    language_model = OPTForCausalLM(opt_config())
    assert "padding kept: pack_padding is off" in repr(Blip2Stage2(stage2_config(), language_model))
    config = stage2_config(pack_padding=True, llm_dropout=True)
    described = repr(Blip2Stage2(config, language_model))
    assert "padding removed where that saves 10%: samples share rows" in described
    assert "dropout as it was trained" in described
