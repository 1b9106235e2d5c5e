"""Stage 2 from stage 1, to and from transformers, and its own saved state."""

import copy

import pytest
import torch
from stage2_models import (
    IMAGE_TOKEN,
    B,
    Q,
    batches,
    images,
    opt_model,
    reference_model,
    stage1_model,
    stage2_config,
    text_batch,
)
from transformers import AutoModelForCausalLM, Blip2ForConditionalGeneration

from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.convert import VisionTokens, trained_to_transformers
from blip2fast.stage2.model import Blip2Stage2, Stage2Config

KINDS = ["opt", "t5"]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_transformers(kind, tmp_path):
    """Taken over, handed back, saved and loaded by transformers: the same outputs throughout."""
    reference = reference_model(kind)
    model = Blip2Stage2.from_transformers(reference).eval()
    back = model.to_transformers(IMAGE_TOKEN)
    ours, theirs = batches(kind)
    want = reference(pixel_values=images(), **theirs)
    got = back(pixel_values=images(), **theirs)
    assert torch.equal(got.logits, want.logits)

    back.save_pretrained(tmp_path)
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.state_dict().keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    again = Blip2Stage2.from_transformers(loaded).eval()
    assert again.config == model.config
    # the same weights; a product's order of summing depends on where its operands lie in memory
    losses = [m(images=images(), **ours).loss for m in (again, model)]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)


def test_to_transformers_copies_the_trained_part_only():
    reference = reference_model("opt")
    model = Blip2Stage2.from_transformers(reference)
    assert model.language_model is reference.language_model
    back = model.to_transformers(IMAGE_TOKEN)
    assert back.language_model is model.language_model
    before = copy.deepcopy(back.state_dict())
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(1)
    for name, value in back.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_trained_state_under_transformers_names():
    """Trained here, loaded into an existing transformers model by `load_state_dict`."""
    source, target = reference_model("opt"), reference_model("opt")
    model = Blip2Stage2.from_transformers(source)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.mul_(1.5)
    left = target.load_state_dict(
        trained_to_transformers(model.trainable_state_dict()), strict=False
    )
    assert not left.unexpected_keys
    assert {name.split(".")[0] for name in left.missing_keys} == {"vision_model", "language_model"}
    _, theirs = batches("opt")
    want = model.to_transformers(IMAGE_TOKEN)(pixel_values=images(), **theirs).logits
    assert torch.equal(target.eval()(pixel_values=images(), **theirs).logits, want)


def test_keeps_the_epsilon_of_the_checkpoint():
    reference = reference_model("opt")
    assert reference.config.vision_config.layer_norm_eps == 1e-6
    model = Blip2Stage2.from_transformers(reference)
    assert model.ln_vision.eps == model.config.ln_vision_eps == 1e-6
    assert Stage2Config().ln_vision_eps == 1e-5  # LAVIS's


def test_warns_where_transformers_has_one_epsilon_for_all():
    reference = reference_model("opt", torch.float32)
    vision = reference.vision_model
    model = Blip2Stage2(stage2_config(), opt_model(), VisionTokens(vision)).eval()
    with pytest.warns(UserWarning, match=r"ln_vision_eps is 1e-05.*layer_norm_eps is 1e-06"):
        back = model.to_transformers(IMAGE_TOKEN)
    ours, theirs = batches("opt")
    want = model(images=images(torch.float32), **ours).loss
    got = back(pixel_values=images(torch.float32), **theirs).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_takes_mixed_precision_as_it_is():
    """transformers keeps the Q-Former in fp32 beside a half-precision rest."""
    reference = reference_model("opt", torch.float32)
    reference.to(torch.bfloat16)
    reference.qformer.float()
    reference.query_tokens.data = reference.query_tokens.data.float()
    model = Blip2Stage2.from_transformers(reference).eval()
    for name, value in model.trainable_state_dict().items():
        full = name.startswith(("qformer", "query_tokens"))
        assert value.dtype == (torch.float32 if full else torch.bfloat16), name
    ours, _ = batches("opt")
    assert model(images=images(torch.bfloat16), **ours).loss.isfinite()
    back = model.to_transformers(IMAGE_TOKEN)
    assert {n: v.dtype for n, v in back.state_dict().items()} == {
        n: v.dtype for n, v in reference.state_dict().items()
    }


def test_from_stage1_gives_what_the_queries_saw():
    stage1 = stage1_model().eval()
    model = Blip2Stage2.from_stage1(stage1, opt_model()).eval()
    embeds = torch.randn(B, 5, 24)
    _, want = stage1.encode_image(embeds)
    prompts, got = model.encode_image(embeds)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert prompts.shape == (B, Q, 20)
    names = model.trainable_state_dict()
    assert not any(
        "text" in n or ".intermediate." in n or ".output." in n.replace("attention.output.", "")
        for n in names
    )
    with torch.no_grad():
        model.query_tokens.add_(1)
    assert not torch.equal(stage1.query_tokens, model.query_tokens)


def test_from_stage1_state_dict():
    stage1 = stage1_model()
    model = Blip2Stage2.from_stage1(stage1.state_dict(), opt_model(), stage2_config())
    assert torch.equal(model.query_tokens, stage1.query_tokens)
    with pytest.raises(ValueError, match="does not tell all sizes; pass config="):
        Blip2Stage2.from_stage1(stage1.state_dict(), opt_model())


def test_from_stage1_takes_settings_and_encoder():
    encoder = torch.nn.Conv2d(3, 24, 8)
    stage1 = Blip2Stage1(stage1_model().config, encoder)
    assert Blip2Stage2.from_stage1(stage1, opt_model()).image_encoder is encoder
    config = Stage2Config.from_stage1(stage1.config, prompt="a photo of", ln_vision_eps=1e-6)
    assert (config.prompt, config.ln_vision_eps, config.hidden_size) == ("a photo of", 1e-6, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_tokens": 6}, r"query_tokens: expected \(1, 6, 16\), got \(1, 4, 16\)"),
        ({"encoder_hidden_size": 32}, r"ln_vision.weight: expected \(32,\), got \(24,\)"),
        ({"num_hidden_layers": 3}, r"qformer.encoder.layer.2.\S+: missing; .* more"),
        ({"hidden_size": 8}, r"query_tokens: expected \(1, 4, 8\), got \(1, 4, 16\)"),
    ],
)
def test_from_stage1_of_other_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        Blip2Stage2.from_stage1(stage1_model(), opt_model(), stage2_config(**changes))


def test_trainable_state_is_all_that_training_changes():
    model = Blip2Stage2(stage2_config(), opt_model(), torch.nn.Conv2d(3, 24, 8))
    state = model.trainable_state_dict()
    assert set(state) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in model.trainable_parameters()) == sum(
        value.numel() for value in state.values()
    )
    torch.manual_seed(9)
    other = Blip2Stage2(stage2_config(), opt_model())
    embeds = torch.randn(B, 5, 24)
    ids, mask = text_batch()
    want = model.eval()(embeds, ids, mask).loss
    assert not torch.equal(other.eval()(embeds, ids, mask).loss, want)
    other.load_trainable_state_dict(state)
    assert torch.equal(other(embeds, ids, mask).loss, want)


def test_load_refuses_another_state():
    model = Blip2Stage2(stage2_config(), opt_model())
    state = model.trainable_state_dict()
    wider = Blip2Stage2(stage2_config(), opt_model(word_embed_proj_dim=30, hidden_size=30))
    with pytest.raises(
        ValueError, match=r"language_projection.weight: expected \(30, 16\), got \(20, 16\)"
    ):
        wider.load_trainable_state_dict(state)
    with pytest.raises(ValueError, match="query_tokens: missing"):
        model.load_trainable_state_dict({n: v for n, v in state.items() if n != "query_tokens"})
    with pytest.raises(ValueError, match="temp: unknown"):
        model.load_trainable_state_dict({**state, "temp": torch.ones(())})


def test_to_transformers_refuses():
    reference = reference_model("opt", torch.float32)
    model = Blip2Stage2(stage2_config(), opt_model())
    with pytest.raises(ValueError, match="pass vision_model=Blip2VisionModel"):
        model.to_transformers(IMAGE_TOKEN)
    with pytest.raises(ValueError, match=r"image_token_id is 41, .* tokens 0 to 40"):
        model.to_transformers(41, reference.vision_model)
    wide = Blip2Stage2(stage2_config(encoder_hidden_size=32), opt_model())
    with pytest.raises(ValueError, match=r"has width 24, .* width 32 \(encoder_hidden_size\)"):
        wide.to_transformers(IMAGE_TOKEN, reference.vision_model)
    projected = Blip2Stage2(stage2_config(), opt_model(hidden_size=24))
    with pytest.raises(ValueError, match="embeds in 20 and has hidden_size 24"):
        projected.to_transformers(IMAGE_TOKEN, reference.vision_model)


def test_from_transformers_refuses_other_qformers():
    reference = reference_model("opt", torch.float32)
    reference.config.qformer_config.use_qformer_text_input = True
    with pytest.raises(ValueError, match="use_qformer_text_input is True; stage 2 has False"):
        Blip2Stage2.from_transformers(reference)


def test_language_model_from_disk(tmp_path):
    """The usual way: a language model by path."""
    opt_model().save_pretrained(tmp_path)
    language_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = Blip2Stage2(stage2_config(), language_model)
    assert model(torch.randn(B, 5, 24), *text_batch()).loss.isfinite()
