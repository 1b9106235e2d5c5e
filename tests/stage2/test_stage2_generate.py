"""What stage 2 writes: as transformers does, as single calls do, new tokens only."""

import pytest
import torch
from stage2_models import (
    IMAGE_TOKEN,
    PAD,
    B,
    Q,
    T,
    V,
    images,
    opt_config,
    reference_model,
    stage2_config,
    text_batch,
    with_placeholders,
)
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTForCausalLM

from blip2fast.offload.blocks import find_blocks
from blip2fast.stage2.model import Blip2Stage2

KINDS = ["opt", "t5"]
WAYS = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "beam": {"num_beams": 3, "length_penalty": -1.0, "do_sample": False},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "nucleus": {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
}


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    reference = reference_model(request.param)
    return request.param, reference, Blip2Stage2.from_transformers(reference).eval()


def left(ids, mask):
    """Each row's padding moved to the left, by hand."""
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    fill = [torch.full((T - len(row),), PAD) for row in rows]
    return torch.stack([torch.cat(pair) for pair in zip(fill, rows, strict=True)]), mask.flip(1)


@pytest.mark.parametrize("way", WAYS)
def test_parity_with_transformers(models, way):
    kind, reference, model = models
    ids, mask = left(*text_batch()) if kind == "opt" else text_batch()
    settings = {"max_new_tokens": 6, "pad_token_id": PAD, **WAYS[way]}
    torch.manual_seed(5)
    want = reference.generate(images(), **with_placeholders(ids, mask), **settings)
    torch.manual_seed(5)
    got = model.generate(images=images(), input_ids=ids, attention_mask=mask, **settings)
    start = Q + T if kind == "opt" else 1  # transformers repeats the prompt, or a start token
    assert torch.equal(got, want[:, start:])
    assert got.shape[0] == B * settings.get("num_return_sequences", 1)
    assert len(got.unique()) > 3  # the comparison is not of constant outputs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_equals_single_calls(models, side, num_beams):
    """Rows of 7, 4 and 2 tokens give in one batch what each gives alone, unpadded."""
    _, _, model = models
    ids, mask = text_batch()
    padded, padded_mask = left(ids, mask) if side == "left" else (ids, mask)
    settings = {
        "max_new_tokens": 5,
        "num_beams": num_beams,
        "do_sample": False,
        "eos_token_id": V,
        "pad_token_id": PAD,
    }
    together = model.generate(
        images=images(), input_ids=padded, attention_mask=padded_mask, **settings
    )
    for b in range(B):
        alone = model.generate(
            images=images()[b : b + 1], input_ids=ids[b : b + 1, mask[b] == 1], **settings
        )
        assert torch.equal(together[b], alone[0])


def test_greedy_follows_the_training_logits(models):
    """Every greedy token is the argmax of the logits that training computes at its place."""
    kind, _, model = models
    ids, _ = text_batch()
    written = model.generate(
        images=images(), input_ids=ids, max_new_tokens=5, eos_token_id=V, pad_token_id=PAD
    )
    if kind == "opt":
        text = torch.cat([ids, written], dim=1)
        logits = model(images=images(), input_ids=text, return_logits=True).logits
        predicted = logits[:, Q + T - 1 : -1].argmax(-1)
    else:
        out = model(images=images(), input_ids=ids, labels=written, return_logits=True)
        predicted = out.logits.argmax(-1)
    assert torch.equal(predicted, written)


def test_image_is_encoded_once_for_all_beams(models):
    _, _, model = models
    seen = []
    handle = model.qformer.register_forward_hook(
        lambda *call: seen.append(call[2].last_hidden_state.shape[0])
    )
    model.generate(images=images(), input_ids=text_batch()[0], num_beams=4, max_new_tokens=3)
    handle.remove()
    assert seen == [B]


def test_without_text(models):
    """No text is what a tokenizer makes of an empty one: bos, or an encoder's eos."""
    kind, _, model = models
    config = model.language_model.config
    token = config.bos_token_id if kind == "opt" else config.eos_token_id
    settings = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(images=images(), input_ids=torch.full((B, 1), token), **settings)
    assert torch.equal(model.generate(images=images(), **settings), want)


def test_empty_text_is_no_text():
    """A tokenizer without a bos token gives T = 0."""
    language_model = OPTForCausalLM(opt_config(bos_token_id=None))
    model = Blip2Stage2(stage2_config(), language_model).eval()
    embeds = torch.randn(B, 5, 24)
    got = model.generate(embeds, torch.empty(B, 0, dtype=torch.long), max_new_tokens=4)
    assert got.shape[0] == B
    assert torch.equal(got, model.generate(embeds, max_new_tokens=4))


def test_output_object(models):
    _, _, model = models
    settings = {"max_new_tokens": 4, "do_sample": False, "input_ids": text_batch()[0]}
    plain = model.generate(images=images(), **settings)
    rich = model.generate(images=images(), return_dict_in_generate=True, **settings)
    assert torch.equal(rich.sequences, plain)


def test_stops_at_the_given_token(models):
    _, _, model = models
    settings = {"input_ids": text_batch()[0], "max_new_tokens": 6, "pad_token_id": IMAGE_TOKEN}
    free = model.generate(images=images(), **settings, eos_token_id=V)
    stop = int(free[0, 2])
    got = model.generate(images=images(), **settings, eos_token_id=stop)
    first = free[0].tolist().index(stop)
    assert torch.equal(got[0, : first + 1], free[0, : first + 1])
    assert (got[0, first + 1 :] == IMAGE_TOKEN).all()


@pytest.mark.parametrize("name", ["max_length", "min_length"])
def test_refuses_lengths_that_count_prompts(models, name):
    _, _, model = models
    with pytest.raises(ValueError, match=rf"{name}=30: give {name[:3]}_new_tokens instead"):
        model.generate(images=images(), **{name: 30})


def test_refuses_more_tokens_than_positions():
    model = Blip2Stage2(stage2_config(), OPTForCausalLM(opt_config())).eval()
    with pytest.raises(ValueError, match=r"28 new tokens = 33 positions.*max_position_emb.*=32"):
        model.generate(torch.randn(B, 5, 24), max_new_tokens=28)


def test_prompts_stand_for_their_images(models):
    _, _, model = models
    settings = {"input_ids": text_batch()[0], "num_beams": 3, "max_new_tokens": 4}
    prompts, _ = model.encode_image(images=images())
    want = model.generate(images=images(), **settings)
    assert torch.equal(model.generate(prompts=prompts, **settings), want)
    with pytest.raises(ValueError, match="images, image_embeds or their prompts, not two"):
        model.generate(images=images(), prompts=prompts, **settings)


FAMILIES = {
    "opt": lambda: OPTForCausalLM(opt_config()),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["beam", "beams returned", "nucleus", "samples"])
def test_beams_share_what_comes_before_them(family, way):
    """Only the last position is read once a beam, and nothing else changes."""
    torch.manual_seed(0)
    language_model = FAMILIES[family]()
    for parameter in language_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = Blip2Stage2(stage2_config(), language_model).double().eval()
    ids, mask = text_batch()
    settings = {"max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": V, **WAYS.get(way, {})}
    if way == "samples":
        settings |= {"do_sample": True, "num_return_sequences": 3}
    embeds = torch.randn(B, 5, 24, dtype=torch.float64)
    widths = []
    handle = find_blocks(language_model)[0].register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(
            (args[0] if args else kwargs["hidden_states"]).shape[:2]
        ),
        with_kwargs=True,
    )

    def written(**more):
        widths.clear()
        torch.manual_seed(5)
        return model.generate(embeds, ids, mask, **settings, **more), list(widths)

    apart, before = written(past_key_values=DynamicCache(config=language_model.config))
    shared, after = written()
    handle.remove()
    assert torch.equal(shared, apart)
    assert len(shared.unique()) > 3
    copies = {"beam": 3, "beams returned": 3, "nucleus": 1, "samples": 3}[way]
    assert before[0] == (B * copies, Q + T)
    if copies == 1:
        assert after == before
    else:
        assert after[:2] == [(B, Q + T - 1), (B * copies, 1)]
        assert after[2:] == before[1:]
