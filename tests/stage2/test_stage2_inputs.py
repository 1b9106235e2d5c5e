"""What stage 2 refuses: each message names what came and what to do."""

import pytest
import torch
from stage2_models import PAD, B, Q, T, V, opt_config, stage2_config, t5_config, text_batch
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from blip2fast.stage2.model import Blip2Stage2

IDS, MASK = text_batch()
EMBEDS = torch.randn(B, 5, 24)


@pytest.fixture(scope="module")
def opt():
    return Blip2Stage2(stage2_config(), OPTForCausalLM(opt_config())).eval()


@pytest.fixture(scope="module")
def t5():
    return Blip2Stage2(stage2_config(), T5ForConditionalGeneration(t5_config())).eval()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS}, "expected either image_embeds or images, got neither"),
        (
            {"image_embeds": EMBEDS, "images": torch.ones(B, 3, 8, 8), "input_ids": IDS},
            "expected either image_embeds or images, got both",
        ),
        ({"images": torch.ones(B, 3, 8, 8), "input_ids": IDS}, "has no image encoder; build it"),
        (
            {"image_embeds": EMBEDS[..., :20], "input_ids": IDS},
            r"expected \[B, S, 24\] \(encoder_hidden_size=24\), got \(3, 5, 20\)",
        ),
        ({"image_embeds": EMBEDS[:0], "input_ids": IDS[:0]}, "the batch is empty"),
        ({"image_embeds": EMBEDS}, r"input_ids: expected \[B, T\] text tokens, got none"),
        ({"image_embeds": EMBEDS, "input_ids": IDS[:2]}, "one text for each of 3 images, got 2"),
        (
            {"image_embeds": EMBEDS, "input_ids": IDS.float()},
            r"input_ids: expected \[B, T\] integers, got \(3, 7\), torch.float32",
        ),
        (
            {"image_embeds": EMBEDS, "input_ids": IDS, "attention_mask": MASK[:, 1:]},
            r"mask of input_ids: expected its shape \(3, 7\), got \(3, 6\)",
        ),
        (
            {"image_embeds": EMBEDS, "input_ids": IDS + V},
            rf"input_ids: expected ids from 0 to {V - 1}, got \d+ to \d+; does the tokenizer",
        ),
        (
            {"image_embeds": EMBEDS, "input_ids": IDS, "labels": IDS + V},
            rf"labels: expected ids from 0 to {V - 1}",
        ),
        (
            {"image_embeds": EMBEDS, "input_ids": IDS, "labels": IDS[:, 1:]},
            r"labels: expected the shape of input_ids \(3, 7\), got \(3, 6\)",
        ),
        (
            {"image_embeds": EMBEDS, "input_ids": IDS, "labels": torch.full((B, T), -100)},
            r"labels: all 21 of \(3, 7\), .* are ignored \(-100\).*raise max_txt_len",
        ),
        (
            {"image_embeds": EMBEDS, "input_ids": IDS, "decoder_input_ids": IDS},
            "OPTForCausalLM is decoder-only and has no second sequence; give input_ids and labels",
        ),
        (
            {"image_embeds": EMBEDS, "input_ids": torch.full((B, 29), 5)},
            r"4 soft prompts \+ 29 text tokens = 33 positions, .*max_position_embeddings=32; shor",
        ),
        (
            {
                "image_embeds": EMBEDS,
                "input_ids": IDS,
                "image_attention_mask": torch.ones(B, 4),
            },
            r"image_attention_mask: expected \[B, S\] = \[3, 5\]",
        ),
    ],
)
def test_decoder_only(opt, inputs, message):
    with pytest.raises(ValueError, match=message):
        opt(**inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"T5ForConditionalGeneration is an encoder-decoder .* give labels"),
        ({"labels": IDS[:2]}, "labels: expected one text for each of 3 images, got 2"),
        ({"labels": torch.full((B, 2), -100)}, "labels: all 6 of"),
        ({"labels": IDS.masked_fill(IDS == PAD, V)}, f"labels: .* 0 to {V - 1}, got .* to {V}"),
        (
            {"labels": IDS, "decoder_input_ids": IDS[:, 1:]},
            r"labels: expected the shape of decoder_input_ids \(3, 6\), got \(3, 7\)",
        ),
    ],
)
def test_encoder_decoder(t5, inputs, message):
    with pytest.raises(ValueError, match=message):
        t5(EMBEDS, IDS, MASK, **inputs)


def test_generate(opt, t5):
    for model in (opt, t5):
        with pytest.raises(ValueError, match="got neither"):
            model.generate(input_ids=IDS)
        with pytest.raises(ValueError, match="one text for each of 3 images, got 2 texts"):
            model.generate(EMBEDS, IDS[:2])
        with pytest.raises(ValueError, match=r"expected its shape \(3, 7\), got \(3, 6\)"):
            model.generate(EMBEDS, IDS, MASK[:, 1:])


def test_encoder_decoder_has_no_position_limit(t5):
    """T5's positions are relative: n_positions is not a limit."""
    long = torch.full((B, 600), 5)
    assert t5(EMBEDS, long, labels=IDS).loss.isfinite()


def test_decoder_input_ids_alone_give_logits(t5):
    out = t5(EMBEDS, IDS, MASK, decoder_input_ids=IDS)
    assert out.loss is None
    assert out.logits.shape == (B, T, V)


def test_one_image_is_enough(opt):
    """Stage 2 has no negatives."""
    assert opt(EMBEDS[:1], IDS[:1]).loss.isfinite()


def test_partitioned_parameters(opt):
    """What ZeRO-3 leaves outside the engine's forward: an empty tensor."""
    held = opt.query_tokens.data
    opt.query_tokens.data = torch.empty(0)
    try:
        with pytest.raises(RuntimeError, match=r"ZeRO-3.*GatheredParameters"):
            opt.generate(EMBEDS)
    finally:
        opt.query_tokens.data = held
    assert opt.generate(EMBEDS, max_new_tokens=2).shape[0] == B
    assert opt.query_tokens.shape == (1, Q, 16)
